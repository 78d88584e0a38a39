"""The controller's messages: every kind survives, a newer peer is understood, equal messages give equal bytes."""

import msgspec
import pytest

from controlplane import api

RESOURCES: tuple[api.Resource, ...] = (
    api.MeshConfig(roots="PEM", nodes=(api.NodeInfo("node1", ("192.0.2.1", "2001:db8::1"), "zone-a"),)),
    api.Workload(
        "uid",
        "ns",
        "pod",
        "sa",
        "node1",
        "spiffe://td/ns/ns/sa/sa",
        ("10.0.0.1",),
        True,
        True,
        api.MtlsMode.STRICT,
        splice=False,
        zone="zone-a",
        groups=("=ns|app=web",),
        network_policies=("ns/n",),
        named_ports=(("http", "TCP", 8080),),
    ),
    api.Service(
        "ns", "web", "web.ns.svc.cluster.local", ("10.96.0.1",), (api.ServicePort(80, "http", "TCP", True),)
    ),
    api.Authorization(
        "ns", "p", api.Action.DENY, (api.Rule((api.Source(("a",)),), (api.Operation((80,)),)),)
    ),
    api.NetworkPolicy(
        "ns",
        "n",
        (
            api.NetworkRule(
                (api.NetworkPeer("=ns|app=web"), api.NetworkPeer("", "10.0.0.0/8", ("10.1.0.0/16",))),
                (
                    api.NetworkPort("UDP", 53),
                    api.NetworkPort("TCP", 1, 1024),
                    api.NetworkPort("TCP", name="http"),
                ),
            ),
        ),
        (),
    ),
)


def test_update_round_trip() -> None:
    update = api.Update(3, "abc", True, RESOURCES, ("workload/gone",))
    assert api.decode_update(api.encode(update)) == update
    assert api.encode(update) == api.encode(api.decode_update(api.encode(update)))


def test_keys_are_distinct_and_name_the_kind() -> None:
    assert [api.resource_key(r) for r in RESOURCES] == [
        "mesh",
        "workload/uid",
        "service/ns/web",
        "authorization/ns/p",
        "network/ns/n",
    ]


def test_what_an_earlier_controller_sends_is_understood() -> None:
    """Its messages have none of the fields that came later."""
    endpoint = {"uid": "u", "address": "10.0.0.1", "port": 80, "node": "n", "terminating": False}
    old = {
        "type": "update",
        "nonce": 1,
        "version": "v",
        "complete": True,
        "removes": [],
        "packed": b"",
        "upserts": [
            {"type": "mesh", "trust_domain": "td", "roots": "", "outside_namespaces": []},
            {
                "type": "service",
                "namespace": "ns",
                "name": "web",
                "host": "web.ns.svc.cluster.local",
                "addresses": [],
                "ports": [{"port": 80, "name": "", "protocol": "TCP", "l7": False, "endpoints": [endpoint]}],
                "session_affinity": 0,
                "internal_local": False,
            },
            {
                "type": "authorization",
                "namespace": "ns",
                "name": "p",
                "action": "ALLOW",
                "rules": [
                    {
                        "sources": [
                            {"principals": [], "not_principals": [], "namespaces": [], "not_namespaces": []}
                        ],
                        "operations": [],
                    }
                ],
            },
        ],
    }
    mesh, service, policy = api.decode_update(msgspec.msgpack.encode(old)).upserts
    assert isinstance(mesh, api.MeshConfig)
    assert isinstance(service, api.Service)
    assert mesh.nodes == ()
    assert service.ports[0].endpoints == (api.Endpoint("u", "10.0.0.1", 80, "n"),)
    assert service.ports[0].endpoints[0].weight == 1
    assert policy == api.Authorization("ns", "p", api.Action.ALLOW, (api.Rule((api.Source(),)),))


def test_an_endpoint_as_always_is_short() -> None:
    """There are a hundred thousand: what has its default is not written, and no other way of making it changes that."""
    one = api.Endpoint("u", "10.0.0.1", 80, "n", False, int("1"))
    assert b"weight" not in msgspec.msgpack.encode(one)
    assert msgspec.msgpack.encode(one) == msgspec.msgpack.encode(api.Endpoint("u", "10.0.0.1", 80, "n"))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(one), type=api.Endpoint) == one


def test_unknown_fields_are_ignored() -> None:
    hello = msgspec.msgpack.decode(api.encode(api.Hello("agent")))
    hello["of_a_later_version"] = [1, 2]
    assert api.decode_client(msgspec.msgpack.encode(hello)) == api.Hello("agent")


@pytest.mark.parametrize("data", [b"", b"\x80", b"\x81\xa4type\xa5alien", b"\xff" * 40])
def test_what_is_no_message_is_refused(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        api.decode_client(data)
    with pytest.raises(msgspec.DecodeError):
        api.decode_update(data)


def test_a_packed_update_is_the_same_update() -> None:
    plain = api.Update(3, "v", True, (api.MeshConfig("example.org"), api.Service("n", "s", "s.n")), ("mesh",))
    upserts = msgspec.msgpack.encode(plain.upserts)
    packed = msgspec.structs.replace(plain, upserts=(), packed=api.pack(upserts))
    assert api.decode_update(api.encode(packed)) == plain


@pytest.mark.parametrize("packed", [b"x", api.pack(b"\x91"), api.pack(b"\x90")[:-1], api.pack(b"no upserts")])
def test_what_is_packed_and_broken_is_refused(packed: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        api.decode_update(api.encode(api.Update(1, "v", packed=packed)))
