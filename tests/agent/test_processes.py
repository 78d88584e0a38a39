"""What /proc says of a process, from a /proc of the test's own."""

import pytest

from agent.processes import ProcessError, cgroup_of

MOUNT = "35 24 0:30 {root} {point} rw,nosuid - cgroup2 cgroup2 rw\n"


@pytest.fixture
def proc(tmp_path):
    (tmp_path / "self").mkdir()
    (tmp_path / "7").mkdir()
    return tmp_path


def test_a_cgroup_is_found_below_the_mounts_root(proc, tmp_path):
    folder = tmp_path / "hierarchy"
    (folder / "pods/a").mkdir(parents=True)
    (proc / "self/mountinfo").write_text(MOUNT.format(root="/node", point=folder))
    (proc / "7/cgroup").write_text("0::/node/pods/a\n")
    found = cgroup_of(7, proc)
    assert (found.path, found.id) == (folder / "pods/a", (folder / "pods/a").stat().st_ino)


def test_a_cgroup_outside_of_what_is_visible_is_not_taken_for_another(proc, tmp_path):
    folder = tmp_path / "hierarchy"
    (folder / "pods").mkdir(parents=True)
    (proc / "self/mountinfo").write_text(MOUNT.format(root="/", point=folder))
    (proc / "7/cgroup").write_text("0::/../pods\n")
    with pytest.raises(ProcessError, match="outside of what is visible"):
        cgroup_of(7, proc)


def test_a_cgroup_outside_of_our_namespace_is_found_by_who_is_in_it(proc, tmp_path):
    """A container has a cgroup namespace with cgroup v2, and the node's hierarchy mounted beside its own."""
    own, node = tmp_path / "own", tmp_path / "node"
    folders = [node / "kubepods/pod-a/one", node / "kubepods/pod-b/one", own / "pod-a/one"]
    for folder in folders:
        folder.mkdir(parents=True)
        (folder / "cgroup.procs").write_text("")
    (folders[1] / "cgroup.procs").write_text("6\n7\n")
    (proc / "self/mountinfo").write_text(
        MOUNT.format(root="/", point=own) + MOUNT.format(root="/../../..", point=node)
    )
    (proc / "7/cgroup").write_text("0::/../../pod-b/one\n")
    found = cgroup_of(7, proc)
    assert (found.path, found.id) == (folders[1], folders[1].stat().st_ino)
    # Of that name, but it is not in it.
    (proc / "7/cgroup").write_text("0::/../../pod-a/one\n")
    with pytest.raises(ProcessError, match="outside of what is visible"):
        cgroup_of(7, proc)


def test_a_process_that_is_gone_has_none(proc):
    with pytest.raises(ProcessError, match="process 8: No such file"):
        cgroup_of(8, proc)
