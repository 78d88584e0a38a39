"""The compiler: state in, tables out."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from agent.compiler import Peer, compile_tables, policies_of
from agent.identities import Identities, IdentitiesError, Label
from agent.mesh import Mesh, apply
from agent.verdicts import ANY_PORT, allowed, tells_workloads_apart, verdicts
from bpf.wire import IDENTITY_FIRST, IDENTITY_MESH, IDENTITY_PLAIN, IDENTITY_PROBE, IDENTITY_TUNNEL
from controlplane.api import (
    Action,
    Authorization,
    Endpoint,
    MeshConfig,
    MtlsMode,
    NodeInfo,
    Operation,
    Resource,
    ResourceError,
    Rule,
    Service,
    ServicePort,
    Source,
    Update,
    Workload,
    authorize,
)

BLOCKS = ("10.0.0.0/8", "10.1.0.0/16", "10.1.2.3/32", "0.0.0.0/0", "fd00::/8", "fd00::1/128", "::/0")
ADDRESSES = ("10.1.2.3", "10.1.2.4", "10.2.0.1", "192.0.2.1", "fd00::1", "fd00::2", "2001:db8::1")


def workload(name: str, *, node: str = "n1", enrolled: bool = True, **more) -> Workload:
    account = more.pop("service_account", name)
    return Workload(
        uid=f"uid-{name}",
        namespace="default",
        name=name,
        service_account=account,
        node=node,
        identity=f"spiffe://cluster.local/ns/default/sa/{account}",
        enrolled=enrolled,
        ready=True,
        workload_name=more.pop("workload_name", name),
        **more,
    )


def mesh(*resources: Resource, version: str = "v1") -> Mesh:
    state, errors = apply(Mesh(), Update(nonce=1, version=version, complete=True, upserts=resources))
    assert errors == ()
    return state


def allow(
    name: str, *principals: str, ports: tuple[int, ...] = (), action: Action = Action.ALLOW
) -> Authorization:
    sources = (
        (Source(principals=tuple(f"cluster.local/ns/default/sa/{p}" for p in principals)),)
        if principals
        else ()
    )
    operations = (Operation(ports=ports),) if ports else ()
    return Authorization("default", name, action, (Rule(sources, operations),))


class TestPolicies:
    def verdict(
        self, state: Mesh, client: str, server: str, port: int, attached=("client", "server", "other")
    ) -> bool:
        numbers = Identities()
        pods = {f"uid-{name}": () for name in attached if f"uid-{name}" in state.workloads}
        tables = compile_tables(state, node="n1", attached=pods, numbers=numbers)
        reserved = {"plain": IDENTITY_PLAIN, "probe": IDENTITY_PROBE, "tunnel": IDENTITY_TUNNEL}
        identity = reserved.get(client) if client in reserved else tables.identities[f"uid-{client}"]
        assert identity is not None
        return allowed(tables.policies[f"uid-{server}"], identity, port)

    def test_without_policies_everybody_may_and_plain_text_by_mode(self):
        strict = mesh(workload("client"), workload("server", mtls=MtlsMode.STRICT))
        permissive = mesh(workload("client"), workload("server"))
        assert self.verdict(strict, "client", "server", 80)
        assert not self.verdict(strict, "plain", "server", 80)
        assert self.verdict(permissive, "plain", "server", 80)
        for state in (strict, permissive):
            assert self.verdict(state, "probe", "server", 80)
            assert self.verdict(state, "tunnel", "server", 80)

    def test_mode_by_port(self):
        exceptions = ((9090, MtlsMode.PERMISSIVE), (9091, MtlsMode.STRICT))
        state = mesh(workload("client"), workload("server", mtls=MtlsMode.STRICT, port_mtls=exceptions))
        assert self.verdict(state, "plain", "server", 9090)
        assert not self.verdict(state, "plain", "server", 9091)
        assert not self.verdict(state, "plain", "server", 80)

    def test_allow_by_principal_and_port(self):
        policy = allow("p", "client", ports=(8080,))
        state = mesh(
            workload("client"), workload("other"), workload("server", policies=("default/p",)), policy
        )
        assert self.verdict(state, "client", "server", 8080)
        assert not self.verdict(state, "client", "server", 8081)
        assert not self.verdict(state, "other", "server", 8080)
        # A rule that asks for an identity never matches plain text, under PERMISSIVE too.
        assert not self.verdict(state, "plain", "server", 8080)
        assert self.verdict(state, "probe", "server", 8080)

    def test_deny_wins(self):
        state = mesh(
            workload("client"),
            workload("server", policies=("default/all", "default/not-22")),
            allow("all"),
            allow("not-22", ports=(22,), action=Action.DENY),
        )
        assert self.verdict(state, "client", "server", 80)
        assert not self.verdict(state, "client", "server", 22)

    def test_a_policy_that_is_missing_refuses_everybody(self):
        state = mesh(workload("client"), workload("server", policies=("default/gone",)))
        assert not self.verdict(state, "client", "server", 80)
        assert not self.verdict(state, "plain", "server", 80)

    def test_policies_that_tell_workloads_apart_have_every_identity_of_the_mesh(self):
        """Of other nodes too: their datagrams are judged by the identity behind the address."""
        state = mesh(
            workload("client"),
            workload("far", node="n2"),
            workload("server", policies=("default/p",)),
            workload("out", enrolled=False),
            allow("p", "far", "client", "out"),
        )
        tables = compile_tables(state, node="n1", attached={"uid-server": ()}, numbers=Identities())
        assert {key[0] for key in tables.policies["uid-server"].table} == {
            IDENTITY_PROBE,
            tables.identities["uid-client"],
            tables.identities["uid-far"],
        }

    def test_one_of_another_node_that_has_just_left_counts_as_in_the_mesh(self):
        """Its datagrams too: they are judged by its number, and its number needs verdicts."""
        far = workload("far", node="n2", addresses=("10.0.2.1",), enrolled=False)
        here = workload("here", addresses=("10.0.1.1",), policies=("default/deny",))
        state, numbers = mesh(here, far, allow("deny", "x", action=Action.DENY)), Identities()
        attached = {here.uid: here.addresses}
        for lingering in ((), (far.uid,)):
            tables = compile_tables(state, node="n1", attached=attached, numbers=numbers, lingering=lingering)
            peer = tables.peers["10.0.2.1"]
            assert (peer.enrolled, peer.leaving) == (bool(lingering), bool(lingering))
            judged = {identity for identity, _ in tables.policies[here.uid].table}
            assert (peer.identity in judged) == bool(lingering)

    def test_policies_that_tell_none_apart_have_one_entry_for_all(self):
        state = mesh(workload("client"), workload("server", policies=("default/p",)), allow("p", ports=(80,)))
        found = compile_tables(state, node="n1", attached={"uid-server": ()}, numbers=Identities())
        assert found.policies["uid-server"].table == {
            (IDENTITY_MESH, 80): True,
            (IDENTITY_PLAIN, 80): True,
            (IDENTITY_PROBE, ANY_PORT): True,
        }

    def test_pods_that_are_not_enrolled_or_unknown_have_no_table(self):
        state = mesh(workload("out", enrolled=False))
        tables = compile_tables(
            state, node="n1", attached={"uid-out": (), "uid-unknown": ()}, numbers=Identities()
        )
        assert tables.policies == {}

    ports = st.integers(1, 65535)
    policies = st.builds(
        Authorization,
        st.just("default"),
        st.text("pq", min_size=1, max_size=3),
        st.sampled_from(Action),
        st.lists(
            st.builds(
                Rule,
                st.lists(
                    st.builds(
                        Source,
                        principals=st.sampled_from(
                            [(), ("cluster.local/ns/default/sa/a",), ("*/sa/b",), ("*",)]
                        ),
                        not_namespaces=st.sampled_from([(), ("default",), ("other",)]),
                        ip_blocks=st.lists(st.sampled_from(BLOCKS), max_size=2).map(tuple),
                        not_ip_blocks=st.lists(st.sampled_from(BLOCKS), max_size=2).map(tuple),
                    ),
                    max_size=2,
                ).map(tuple),
                st.lists(
                    st.builds(
                        Operation,
                        ports=st.lists(ports, max_size=2).map(tuple),
                        not_ports=st.lists(ports, max_size=2).map(tuple),
                    ),
                    max_size=2,
                ).map(tuple),
            ),
            max_size=2,
        ).map(tuple),
    )

    @given(
        st.lists(policies, max_size=3),
        st.sampled_from(MtlsMode),
        st.tuples(ports, st.sampled_from(MtlsMode)),
        ports,
    )
    def test_the_table_says_what_authorize_says(self, policies, mode, exception, port):
        clients = {16: "cluster.local/ns/default/sa/a", 17: "cluster.local/ns/other/sa/b"}
        server = workload("server", mtls=mode, port_mtls=(exception,))
        found = verdicts(server, policies, clients)
        named = {p for x in policies for r in x.rules for o in r.operations for p in (*o.ports, *o.not_ports)}
        for asked in {port, exception[0], *named}:
            for address in ADDRESSES:
                for number, principal in clients.items():
                    assert (
                        allowed(found, number, asked, address)
                        == authorize(policies, principal, asked, address).allowed
                    )
                assert allowed(found, IDENTITY_PROBE, asked, address)
                plain = (exception[1] if asked == exception[0] else mode) is MtlsMode.PERMISSIVE
                assert allowed(found, IDENTITY_PLAIN, asked, address) == (
                    plain and authorize(policies, None, asked, address).allowed
                )
        if tells_workloads_apart(policies):
            assert not allowed(found, 99, port, ADDRESSES[0])


class TestPeersAndServices:
    def test_peers(self):
        state = mesh(
            workload("here", addresses=("10.0.1.1", "fd00::1")),
            workload("there", node="n2", addresses=("10.0.2.1",), enrolled=False),
        )
        attached = {"uid-here": ("10.0.1.1", "fd00::1")}
        tables = compile_tables(state, node="n1", attached=attached, numbers=Identities())
        assert tables.peers == {
            "10.0.1.1": Peer("uid-here", True, True, tables.identities["uid-here"]),
            "fd00::1": Peer("uid-here", True, True, tables.identities["uid-here"]),
            "10.0.2.1": Peer("uid-there", False, False, tables.identities["uid-there"]),
        }

    def test_zones_of_peers(self):
        state = mesh(
            workload("here", zone="eu-1a", addresses=("10.0.1.1",)),
            workload("far", zone="eu-1b", node="n2", addresses=("10.0.1.2",)),
            workload("nowhere", node="n2", addresses=("10.0.1.3",)),
        )
        numbers = Identities()
        attached = {"uid-here": ("10.0.1.1",)}
        tables = compile_tables(state, node="n1", attached=attached, numbers=numbers)
        zones = {address: numbers.zone_name(peer.zone) for address, peer in tables.peers.items()}
        assert zones == {"10.0.1.1": "eu-1a", "10.0.1.2": "eu-1b", "10.0.1.3": "unknown"}

    def test_nobody_dials_an_enrolled_pod_directly_that_is_not_attached(self):
        state = mesh(
            workload("early", addresses=("10.0.1.1",)),
            workload("out", enrolled=False, addresses=("10.0.1.2",)),
        )
        tables = compile_tables(state, node="n1", attached={}, numbers=Identities())
        assert not tables.peers["10.0.1.1"].local
        assert tables.peers["10.0.1.1"].enrolled
        assert tables.peers["10.0.1.2"].local

    def test_the_runtime_knows_better_who_has_an_address(self):
        state = mesh(workload("old", addresses=("10.0.1.1",)), workload("new"))
        tables = compile_tables(state, node="n1", attached={"uid-new": ("10.0.1.1",)}, numbers=Identities())
        assert tables.peers["10.0.1.1"].uid == "uid-new"
        # A pod that nobody knows is no peer, whoever had its address.
        tables = compile_tables(
            state, node="n1", attached={"uid-strange": ("10.0.1.1",)}, numbers=Identities()
        )
        assert "10.0.1.1" not in tables.peers

    def test_nodes_and_who_has_their_addresses(self):
        """Known by name only where it can be one pod's; never in the mesh."""
        state = mesh(
            MeshConfig(
                nodes=(NodeInfo("n1", ("10.99.0.11", "fd99::11")), NodeInfo("n2", ("10.99.0.12",))),
            ),
            workload("proxy", enrolled=False, host_network=True, addresses=("10.99.0.11",)),
            workload("other", enrolled=False, host_network=True, addresses=("10.99.0.11",)),
            workload("alone", node="n2", enrolled=False, host_network=True, addresses=("10.99.0.12",)),
            workload("early", node="n3", enrolled=False, host_network=True, addresses=("10.99.0.13",)),
        )
        tables = compile_tables(state, node="n1", attached={}, numbers=Identities())
        assert tables.peers == {
            "10.99.0.11": Peer("uid-other", True, False, IDENTITY_PLAIN, node=True),
            "fd99::11": Peer("", True, False, IDENTITY_PLAIN, node=True),
            "10.99.0.12": Peer("uid-alone", False, False, tables.identities["uid-alone"], node=True),
            "10.99.0.13": Peer("uid-early", False, False, tables.identities["uid-early"]),
        }

    def test_two_with_one_address_the_ready_one_has_it_in_any_order(self):
        old = Workload("uid-old", "d", "old", "sa", "n2", "spiffe://d/ns/d/sa/x", ("10.0.2.1",), True, False)
        new = workload("new", node="n2", addresses=("10.0.2.1",), enrolled=False)
        for order in ((old, new), (new, old)):
            tables = compile_tables(mesh(*order), node="n1", attached={}, numbers=Identities())
            assert tables.peers["10.0.2.1"].uid == "uid-new"


class TestMesh:
    def test_increments_replace_and_remove(self):
        state = mesh(workload("a"), workload("b"))
        changed, errors = apply(
            state,
            Update(
                nonce=2, version="v2", upserts=(workload("a", enrolled=False),), removes=("workload/uid-b",)
            ),
        )
        assert errors == ()
        assert changed.version == "v2"
        assert set(changed.workloads) == {"uid-a"}
        assert not changed.workloads["uid-a"].enrolled
        assert set(state.workloads) == {"uid-a", "uid-b"}

    def test_complete_replaces_all(self):
        state, _ = apply(
            mesh(workload("a")), Update(nonce=2, version="v2", complete=True, upserts=(workload("b"),))
        )
        assert set(state.workloads) == {"uid-b"}

    @pytest.mark.parametrize(
        ("bad", "reason"),
        [
            (workload("a", addresses=("10.0.0.300",)), "addresses: '10.0.0.300' is no IP address"),
            (workload("a", port_mtls=((0, MtlsMode.STRICT),)), "port_mtls: 0 is no port"),
            (
                Workload("uid-a", "d", "a", "sa", "n1", "https://x"),
                "identity: 'https://x': scheme is missing or invalid",
            ),
        ],
    )
    @pytest.mark.parametrize("complete", [True, False])
    def test_a_bad_resource_is_named_and_its_last_good_one_stays(self, bad, reason, complete):
        state = mesh(workload("a"), workload("b"))
        update = Update(nonce=2, version="v2", complete=complete, upserts=(bad, workload("c")))
        changed, errors = apply(state, update)
        assert errors == (ResourceError("workload/uid-a", reason),)
        assert changed.workloads["uid-a"] == workload("a")
        assert "uid-c" in changed.workloads
        # What is not held in full is never taken for it, also not after an update without errors.
        assert changed.version == "incomplete v2"
        changed, _ = apply(changed, Update(nonce=3, version="v3"))
        assert changed.version == "incomplete v3"
        assert apply(Mesh(), changed.snapshot())[0].version == "incomplete v3"
        changed, _ = apply(changed, Update(nonce=4, version="v4", complete=True))
        assert changed.version == "v4"

    def test_bad_service(self):
        service = Service(
            "d", "s", "s.d", (), (ServicePort(80, endpoints=(Endpoint("u", "10.0.0.1", 99999, "n"),)),)
        )
        _, errors = apply(Mesh(), Update(1, "v", upserts=(service,)))
        assert errors == (ResourceError("service/d/s", "ports[80].endpoints: 99999 is no port"),)

    def test_the_snapshot_is_the_state(self):
        state = mesh(workload("a"), allow("p"))
        again, _ = apply(Mesh(), state.snapshot())
        assert again == state

    def test_missing_policies_are_named(self):
        state = mesh(workload("a", policies=("default/gone",)))
        (policy,) = policies_of(state, state.workloads["uid-a"])
        assert (policy.namespace, policy.name) == ("default", "gone")


class TestIdentities:
    def test_numbers_are_of_what_is_distinct_and_survive(self):
        numbers = Identities()
        a = numbers.number(Label("spiffe://d/ns/x/sa/a", "a", "a", "v1"))
        b = numbers.number(Label("spiffe://d/ns/x/sa/a", "a", "a", "v2"))
        assert (a, b) == (IDENTITY_FIRST, IDENTITY_FIRST + 1)
        assert numbers.dirty
        again = Identities.load(numbers.dump())
        assert not again.dirty
        assert again.number(Label("spiffe://d/ns/x/sa/a", "a", "a", "v2")) == b
        assert again.number(Label("spiffe://d/ns/x/sa/b")) == IDENTITY_FIRST + 2
        label = again.label(a)
        assert label is not None
        assert (label.principal, label.namespace) == ("d/ns/x/sa/a", "x")
        assert again.label(IDENTITY_PLAIN) is None

    @pytest.mark.parametrize(
        "data",
        [
            b"",
            b"[]",
            b'{"next":17,"numbers":[[3,{"identity":"a"}]]}',
            b'{"next":16,"numbers":[[16,{"identity":"a"}]]}',
            b'{"next":18,"numbers":[[16,{"identity":"a"}],[17,{"identity":"a"}]]}',
        ],
    )
    def test_broken_files(self, data):
        with pytest.raises(IdentitiesError):
            Identities.load(data)

    def test_any_port_is_no_port(self):
        assert ANY_PORT == 0
