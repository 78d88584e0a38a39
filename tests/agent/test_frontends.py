"""Services in, frontends out: at which addresses a service is reached from pods of a node, and its backends there."""

import pytest

from agent.frontends import Frontends, ServiceEntry, compile_frontends
from agent.kernel import Backend, Frontend
from agent.mesh import Mesh, apply
from bpf.wire import Protocol
from controlplane.api import Endpoint, Service, ServicePort, Update

UDP = Protocol.UDP


def compiled(*services: Service, node: str = "n1", before: Frontends | None = None) -> Frontends:
    state, errors = apply(Mesh(), Update(nonce=1, version="v1", complete=True, upserts=services))
    assert errors == ()
    return compile_frontends(state.services, node, before or Frontends())


def web(**more) -> Service:
    addresses = more.pop("addresses", ("10.96.0.1",))
    ports = more.pop("ports", (ServicePort(80),))
    return Service("d", "web", "web.d", addresses, ports, **more)


ENDS = (
    Endpoint("u2", "10.0.2.1", 8080, "n2"),
    Endpoint("u1", "10.0.1.1", 8080, "n1"),
    Endpoint("u6", "fd00::1", 1, "n1"),
)
BACKENDS = (Backend("10.0.1.1", 8080), Backend("10.0.2.1", 8080))
BACKENDS6 = (Backend("fd00::1", 1),)


def test_both_families_and_protocols():
    """TCP and UDP may have one number, SCTP goes its own way, and l7proxy needs no backends."""
    service = web(
        addresses=("10.96.0.1", "fd01::1"),
        ports=(
            ServicePort(80, l7=True, endpoints=ENDS),
            ServicePort(53, protocol="UDP", endpoints=ENDS),
            ServicePort(53, endpoints=ENDS),
            ServicePort(9, protocol="SCTP", endpoints=ENDS),
            ServicePort(81),
        ),
    )
    assert compiled(service).entries == {
        Frontend("10.96.0.1", 80): ServiceEntry("d/web", True, ()),
        Frontend("fd01::1", 80): ServiceEntry("d/web", True, ()),
        Frontend("10.96.0.1", 53, UDP): ServiceEntry("d/web", False, BACKENDS),
        Frontend("fd01::1", 53, UDP): ServiceEntry("d/web", False, BACKENDS6),
        Frontend("10.96.0.1", 53): ServiceEntry("d/web", False, BACKENDS),
        Frontend("fd01::1", 53): ServiceEntry("d/web", False, BACKENDS6),
        Frontend("10.96.0.1", 81): ServiceEntry("d/web", False, ()),
        Frontend("fd01::1", 81): ServiceEntry("d/web", False, ()),
    }


def test_headless_and_external_names_need_nothing():
    assert compiled(web(addresses=(), ports=(ServicePort(80, endpoints=ENDS, node_port=0),))).entries == {}


@pytest.mark.parametrize("l7", [False, True])
def test_node_ports_and_addresses_from_outside(l7):
    """l7proxy is told the service's own address."""
    service = web(
        addresses=("10.96.0.1", "fd01::1"),
        external_addresses=("203.0.113.7", "2001:db8::7"),
        ports=(
            ServicePort(80, l7=l7, endpoints=ENDS, node_port=30080),
            ServicePort(80, protocol="UDP", endpoints=ENDS, node_port=30080),
        ),
    )
    four, six = ((Backend("10.96.0.1", 80),), (Backend("fd01::1", 80),)) if l7 else (BACKENDS, BACKENDS6)
    entries = compiled(service).entries
    for address, port, backends in (
        ("203.0.113.7", 80, four),
        ("2001:db8::7", 80, six),
        ("0.0.0.0", 30080, four),
        ("::", 30080, six),
    ):
        assert entries[Frontend(address, port)] == ServiceEntry("d/web", l7, backends)
        assert entries[Frontend(address, port, UDP)] == ServiceEntry(
            "d/web", False, BACKENDS6 if ":" in address else BACKENDS
        )
    assert len(entries) == 12


def test_a_family_that_the_service_has_not():
    service = web(ports=(ServicePort(80, endpoints=ENDS, node_port=30080),))
    assert set(compiled(service).entries) == {Frontend("10.96.0.1", 80), Frontend("0.0.0.0", 30080)}


def test_session_affinity():
    service = web(session_affinity=10800)
    assert compiled(service).entries[Frontend("10.96.0.1", 80)].affinity == 10800


@pytest.mark.parametrize(
    ("local", "ending", "expected"),
    [
        (False, (), ("10.0.1.1", "10.0.2.1")),
        (True, (), ("10.0.1.1",)),
        (True, ("n2",), ("10.0.1.1",)),
        # The node's own that ends is better than none, and another node's is none.
        (True, ("n1",), ("10.0.1.1",)),
        (False, ("n1",), ("10.0.2.1",)),
        (False, ("n1", "n2"), ("10.0.1.1", "10.0.2.1")),
    ],
)
def test_internal_traffic_policy_and_endpoints_that_end(local, ending, expected):
    ends = tuple(
        Endpoint(f"u-{node}", address, 8080, node, node in ending)
        for node, address in (("n1", "10.0.1.1"), ("n2", "10.0.2.1"))
    )
    for protocol in ("TCP", "UDP"):
        service = web(
            ports=(ServicePort(80, protocol=protocol, endpoints=ends, node_port=30080),),
            internal_local=local,
        )
        for node, backends in (("n1", expected), ("n3", () if local else expected)):
            entries = compiled(service, node=node).entries
            found = entries[Frontend("10.96.0.1", 80, Protocol[protocol])].backends
            assert found == tuple(Backend(address, 8080) for address in backends)
            # The node port is no internal traffic.
            outside = entries[Frontend("0.0.0.0", 30080, Protocol[protocol])].backends
            assert len(outside) == (1 if 0 < len(ending) < 2 else 2)


def test_weights():
    """What takes nothing is no backend, also if there is no other."""
    ends = tuple(
        Endpoint(f"u{n}", f"10.0.1.{n}", 8080, "n1", weight=weight) for n, weight in enumerate((3, 0, 1))
    )
    found = compiled(web(ports=(ServicePort(80, endpoints=ends),))).entries[Frontend("10.96.0.1", 80)]
    assert found.backends == (Backend("10.0.1.0", 8080, 3), Backend("10.0.1.2", 8080, 1))
    none = compiled(web(ports=(ServicePort(80, endpoints=ends[1:2]),))).entries[Frontend("10.96.0.1", 80)]
    assert none.backends == ()


def test_two_services_with_one_address():
    first = Service("a", "web", "web.a", ("10.96.0.1",), (ServicePort(80, endpoints=ENDS),))
    second = web(ports=(ServicePort(80), ServicePort(81)))
    for order in ((first, second), (second, first)):
        entries = compiled(*order).entries
        assert entries[Frontend("10.96.0.1", 80)].service == "a/web"
        assert entries[Frontend("10.96.0.1", 81)].service == "d/web"


def test_what_has_not_changed_is_the_same():
    """So a pass over ten thousand services costs what has changed; and it gives what a first one would."""
    still = Service("a", "still", "still.a", ("10.96.0.9",), (ServicePort(80, endpoints=ENDS),))
    before = compiled(still, web(ports=(ServicePort(80, endpoints=ENDS), ServicePort(81))))
    changed = web(
        ports=(
            ServicePort(80, endpoints=(*ENDS, Endpoint("u3", "10.0.3.1", 8080, "n3"))),
            ServicePort(81),
        )
    )
    after = compiled(still, changed, before=before)
    assert after == compiled(still, changed)
    for frontend in (Frontend("10.96.0.9", 80), Frontend("10.96.0.1", 81)):
        assert after.entries[frontend] is before.entries[frontend]
    frontend = Frontend("10.96.0.1", 80)
    assert len(after.entries[frontend].backends) == 3
    assert after.entries[frontend].backends[0] is before.entries[frontend].backends[0]
    # Another node's frontends are others.
    local = web(ports=(ServicePort(80, endpoints=ENDS),), internal_local=True)
    here = compiled(local)
    assert compiled(local, node="n2", before=here) == compiled(local, node="n2")
    assert compiled(still, before=after) == compiled(still)
