"""Compilation as a graph of small pure functions that remember their results.

A *cell* is a function of the graph and a key. What it reads, it reads through the graph: other cells with :meth:`Graph.get`,
rows of the input tables with :meth:`Graph.read`. So the graph knows what each result was made from. When rows change, only
cells that were made from them are computed again, and a cell whose result turns out equal ends the spreading there. The
outcome is the one of computing everything anew: nothing in a cell may come from elsewhere.

Owns no knowledge of what is computed. Not thread-safe.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable
from typing import Any, Protocol, TypeVar

from controlplane.model.findings import Finding, Findings

K = TypeVar("K", bound=Hashable)
V = TypeVar("V")
Cell = Callable[["Graph", K], V]


class Table(Protocol):
    """Rows of input by key; a key without a row has a value too (None, or empty)."""

    def row(self, key: Any) -> Any: ...


class _Node:
    """A cell with its result, or a row of a table (``cell`` is None) that somebody has read."""

    __slots__ = (
        "alive",
        "cell",
        "changed",
        "clean",
        "deps",
        "holds",
        "keeps",
        "key",
        "notes",
        "users",
        "value",
        "verified",
    )

    def __init__(self, cell: Any, key: Any) -> None:
        self.cell = cell
        self.key = key
        self.value: Any = None
        self.clean = False
        self.alive = True
        self.changed = 0  #: revision in which the value was last another one
        self.verified = 0  #: revision in which the value was last known to be right; 0: never computed
        self.deps: tuple[_Node, ...] = ()
        self.keeps: tuple[_Node, ...] = ()
        self.users: set[_Node] = set()
        self.holds = 0  #: roots and keepers
        self.notes: tuple[Finding, ...] = ()


class _Frame(Findings):
    """What a cell reads, keeps and finds while it is computed."""

    __slots__ = ("deps", "keeps")

    def __init__(self) -> None:
        super().__init__()
        self.deps: dict[_Node, None] = {}
        self.keeps: dict[_Node, None] = {}


class Graph:
    """``outputs`` are the cells of which :meth:`update` reports changes. ``settings`` never changes: cells may look at it."""

    def __init__(self, settings: Any = None, outputs: Iterable[Any] = ()) -> None:
        self.settings = settings
        self._outputs = frozenset(outputs)
        self._nodes: dict[tuple[Any, Any], _Node] = {}
        self._rows: dict[tuple[Any, Any], _Node] = {}
        self._roots: dict[tuple[Any, Any], _Node] = {}
        self._frames: list[_Frame] = []
        self._revision = 1
        # What an update that fails leaves to do stays here.
        self._unsettled: dict[_Node, None] = {}
        self._changed: dict[tuple[Any, Any], Any] = {}  # output cell and key -> result before
        self._notes: Counter[Finding] = Counter()
        self.computed = 0  #: cells computed so far, for tests and metrics

    # -- within cells

    def get(self, cell: Cell[K, V], key: K) -> V:
        """The result of another cell."""
        node = self._node(cell, key)
        if not node.clean:
            self._refresh(node)
        if self._frames:
            self._frames[-1].deps[node] = None
        result: V = node.value
        return result

    def read(self, table: Table, key: Any) -> Any:
        """A row of input. It must not be changed."""
        node = self._rows.get((table, key))
        if node is None:
            node = self._rows[table, key] = _Node(None, (table, key))
            node.clean = True
        if self._frames:
            self._frames[-1].deps[node] = None
        return table.row(key)

    def keep(self, cell: Cell[K, V], key: K) -> None:
        """Have a cell computed for as long as this one wants it, without looking at its result."""
        node = self._node(cell, key)
        if not node.clean:
            self._unsettled[node] = None
        self._frames[-1].keeps[node] = None

    @property
    def findings(self) -> Findings:
        """Where the cell that is being computed notes what it finds."""
        return self._frames[-1]

    # -- from outside

    def touch(self, table: Table, key: Any) -> None:
        """A row has changed."""
        row = self._rows.get((table, key))
        if row is None or row.changed == self._revision + 1:
            return
        row.changed = self._revision + 1
        stack = [row]
        while stack:
            for user in stack.pop().users:
                if user.clean:
                    user.clean = False
                    self._unsettled[user] = None
                    stack.append(user)

    def root(self, cell: Cell[K, V], key: K) -> None:
        """Have a cell computed from now on."""
        if (cell, key) not in self._roots:
            node = self._roots[cell, key] = self._node(cell, key)
            node.holds += 1
            if not node.clean:
                self._unsettled[node] = None

    def unroot(self, cell: Cell[K, V], key: K) -> None:
        """The reverse of :meth:`root`."""
        node = self._roots.pop((cell, key), None)
        if node is not None:
            self._release(node)

    def update(self) -> dict[tuple[Any, Any], Any]:
        """Bring everything up to date; outputs that may have changed, by (cell, key), with their results before.

        A cell that raises leaves the graph as it can be gone on with: after further changes, ``update`` takes up what is
        left, and reports all changes since it last succeeded.
        """
        self._revision += 1
        while self._unsettled:
            # From the roots: what they turn out not to need any more is not computed.
            nodes = [n for n in self._unsettled if n.holds]
            for node in nodes or list(self._unsettled):
                if node.alive and not node.clean:
                    self._refresh(node)
                self._unsettled.pop(node, None)
        changed, self._changed = self._changed, {}
        return changed

    def result(self, cell: Cell[K, V], key: K) -> V | None:
        """A cell's result after :meth:`update`; None if nobody wants it."""
        node = self._nodes.get((cell, key))
        return None if node is None else node.value

    def notes(self) -> tuple[Finding, ...]:
        """All findings of all cells, each once, in no order."""
        return tuple(self._notes)

    # -- inside

    def _node(self, cell: Any, key: Any) -> _Node:
        node = self._nodes.get((cell, key))
        if node is None:
            node = self._nodes[cell, key] = _Node(cell, key)
        return node

    def _refresh(self, node: _Node) -> None:
        if node.verified and not self._stale(node):
            node.clean, node.verified = True, self._revision
            return
        frame = _Frame()
        self._frames.append(frame)
        try:
            value = node.cell(self, node.key)
        except BaseException:
            self._frames.pop()
            for other in (*frame.deps, *frame.keeps):
                self._drop_unused(other)
            raise
        self._frames.pop()
        self.computed += 1
        self._link(node, frame)
        if not node.verified or value != node.value:
            if node.cell in self._outputs:
                self._changed.setdefault((node.cell, node.key), node.value)
            node.value, node.changed = value, self._revision
        node.clean, node.verified = True, self._revision

    def _stale(self, node: _Node) -> bool:
        """True if something that the result was made from is another."""
        for dep in node.deps:
            if not dep.clean:
                self._refresh(dep)
            if dep.changed > node.verified:
                return True
        return False

    def _link(self, node: _Node, frame: _Frame) -> None:
        before, kept = node.deps, node.keeps
        node.deps, node.keeps = tuple(frame.deps), tuple(frame.keeps)
        for dep in node.deps:
            dep.users.add(node)
        for other in node.keeps:
            other.holds += 1
        for dep in before:
            if dep not in frame.deps:
                dep.users.discard(node)
                self._drop_unused(dep)
        for other in kept:
            self._release(other)
        notes = frame.all()
        if notes != node.notes:
            self._notes.update(notes)
            self._forget(node.notes)
            node.notes = notes

    def _release(self, node: _Node) -> None:
        node.holds -= 1
        self._drop_unused(node)

    def _drop_unused(self, node: _Node) -> None:
        """Forget a node that nobody wants any more, and what it alone wanted."""
        stack = [node]
        while stack:
            node = stack.pop()
            if node.users or node.holds or not node.alive:
                continue
            if any(node in frame.deps or node in frame.keeps for frame in self._frames):
                continue  # wanted by a cell that is still being computed
            node.alive = False
            if node.cell is None:
                del self._rows[node.key]
                continue
            del self._nodes[node.cell, node.key]
            self._unsettled.pop(node, None)
            if node.cell in self._outputs:
                self._changed.setdefault((node.cell, node.key), node.value)
            self._forget(node.notes)
            for dep in node.deps:
                dep.users.discard(node)
                stack.append(dep)
            for other in node.keeps:
                other.holds -= 1
                stack.append(other)

    def _forget(self, notes: Iterable[Finding]) -> None:
        for note in notes:
            self._notes[note] -= 1
            if not self._notes[note]:
                del self._notes[note]
