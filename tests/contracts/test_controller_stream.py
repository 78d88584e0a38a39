"""The controller's messages: every kind survives, a newer peer is understood, equal messages give equal bytes."""

import msgspec
import pytest

from controlplane import api

RESOURCES: tuple[api.Resource, ...] = (
    api.MeshConfig(roots="PEM"),
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
    ),
    api.Service(
        "ns", "web", "web.ns.svc.cluster.local", ("10.96.0.1",), (api.ServicePort(80, "http", "TCP", True),)
    ),
    api.Authorization(
        "ns", "p", api.Action.DENY, (api.Rule((api.Source(("a",)),), (api.Operation((80,)),)),)
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
    ]


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
