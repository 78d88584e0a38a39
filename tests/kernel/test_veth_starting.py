"""A pod that starts: filters judge what passes its veth until links take over, whatever happens meanwhile."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import pytest

from agent.kernel import Direction, FlowCounters, FlowKey, Kernel, KernelError, Pod, netlink
from agent.kernel.interfaces import find
from bpf import links, wire
from bpf.wire import IDENTITY_MESH
from tests.kernel.mesh import run
from tests.kernel.test_veth import Wire, datagram, inside, names, received, spoofed, udp

pytestmark = pytest.mark.privileged

FAMILIES = ("ipv4",)


def filter_names(node, index):
    """Which ways filters of ours are there."""
    ways = ((way, way == "from") for way in ("from", "to"))
    return [
        name
        for name, ingress in ways
        if inside(node.netns, lambda ingress=ingress: netlink.has_filter(index, ingress=ingress))
    ]


@pytest.fixture
def starting(node, make_pod):
    """A pod that came in as it was starting, and one that listens: both are judged by filters."""
    made = [make_pod(), make_pod()]
    for pod in made:
        node.kernel.add_pod(Pod(pod.cookie, pod.addresses, pod.identity), pod.netns, starting=True)
        node.kernel.set_policy(pod.cookie, {(IDENTITY_MESH, 0): True}, 1)
    return made


def link_without_an_end(node, pod):
    """As in the midst of :meth:`Kernel.link_pod`: links are there, and filters still are."""
    [end] = find(pod.netns, node.netns, pod.addresses)
    inside(node.netns, lambda: node.kernel._interfaces._attach(pod.cookie, end.number))
    assert len(names(node, pod)) == 2
    assert filter_names(node, end.number) == ["from", "to"]


def outgoing(node, client, server):
    """Datagrams to the server, as the accounts of both ends have them."""
    flows = node.kernel.flows()
    key = FlowKey(client.identity, server.identity, 5353, Direction.OUTBOUND, socket.IPPROTO_UDP)
    sent = flows.get(key, FlowCounters()).sent_datagrams
    return [sent, flows.get(key._replace(direction=Direction.INBOUND), FlowCounters()).received_datagrams]


def test_pod_that_starts_is_judged_by_filters_until_links_take_over(node, starting):
    """Whatever judges it: forged sources are dropped, each datagram is counted once, and nothing is missing."""
    client, server = starting
    [end] = find(client.netns, node.netns, client.addresses)
    assert node.kernel.unlinked() == {client.cookie, server.cookie}
    assert names(node, client) == []

    def judged():
        with udp(server.netns, server.address, 5353) as listening, Wire(client, server) as w:
            before, counted = spoofed(node), outgoing(node, client, server)
            for _ in range(3):
                w.send(datagram(client.address, server.address, 4000, 5353))
                assert received(listening) is not None
            w.send(datagram("10.77.250.7", server.address, 4000, 5353))
            assert received(listening, 0.3) is None
            assert spoofed(node) == before + 1
            assert outgoing(node, client, server) == [number + 3 for number in counted]
        for pod in starting:
            assert node.kernel.missing(pod.cookie, pod.netns) == []

    judged()
    for pod in starting:
        link_without_an_end(node, pod)
    judged()
    # Who it is changes meanwhile; what judges it does not.
    node.kernel.add_pod(Pod(client.cookie, client.addresses, client.identity, zone=7), client.netns)
    assert filter_names(node, end.number) == ["from", "to"]
    for pod in starting:
        node.kernel.link_pod(pod.cookie, pod.netns)
    assert node.kernel.unlinked() == set()
    assert names(node, client) == [f"{client.cookie}_{end.number}_from", f"{client.cookie}_{end.number}_to"]
    assert filter_names(node, end.number) == []
    judged()


def test_successor_finds_pods_without_links(node, starting):
    client, server = starting
    [end] = find(client.netns, node.netns, client.addresses)
    link_without_an_end(node, server)
    with Kernel(node.pins, node.netns) as successor:
        assert successor.unlinked() == {client.cookie, server.cookie}
        for pod in starting:
            successor.link_pod(pod.cookie, pod.netns)
            assert successor.missing(pod.cookie, pod.netns) == []
    assert filter_names(node, end.number) == []
    assert len(names(node, client)) == len(names(node, server)) == 2


@pytest.mark.parametrize("what", ["others removed the qdisc", "an agent ended as it pinned a link"])
def test_links_take_over_whatever_has_happened(node, starting, what):
    client, _ = starting
    [end] = find(client.netns, node.netns, client.addresses)
    if what == "others removed the qdisc":
        name = run(node.netns, "ip", "-o", "link").split(f"{end.number}: ", 1)[1].split("@")[0]
        run(node.netns, "tc", "qdisc", "del", "dev", name, "clsact")
        assert node.kernel.missing(client.cookie, client.netns)
    else:
        link_without_an_end(node, client)
        for name in names(node, client):
            path = Path(node.pins, f"v{wire.ABI}/veth", name)
            path.rename(path.with_name(f"new_{name}"))
    node.kernel.link_pod(client.cookie, client.netns)
    assert len(names(node, client)) == 2
    assert filter_names(node, end.number) == []
    assert node.kernel.missing(client.cookie, client.netns) == []
    assert client.cookie not in node.kernel.unlinked()


def test_links_are_not_given_to_an_interface_of_another_pod(node, starting):
    client, server = starting
    with pytest.raises(KernelError, match="is not the pod's any more"):
        node.kernel.link_pod(client.cookie, server.netns)
    assert names(node, client) == []
    assert client.cookie in node.kernel.unlinked()


def test_pod_that_ends_before_it_has_links(node, starting):
    """And starts again at once, on the same interface."""
    client, server = starting
    link_without_an_end(node, server)
    for pod in starting:
        [end] = find(pod.netns, node.netns, pod.addresses)
        node.kernel.remove_pod(pod.cookie)
        assert names(node, pod) == []
        assert filter_names(node, end.number) == []
        node.kernel.link_pod(pod.cookie, pod.netns)  # of one that is gone there is nothing to do
        assert names(node, pod) == []
        node.kernel.add_pod(Pod(pod.cookie, pod.addresses, pod.identity), pod.netns, starting=True)
        assert filter_names(node, end.number) == ["from", "to"]
    assert node.kernel.unlinked() == {client.cookie, server.cookie}


@pytest.mark.parametrize("others", ["tcx", "filter", "qdisc"])
def test_where_others_have_programs_links_come_first(node, make_pod, others):
    """A filter would run after a link of theirs, and may have no place beside a qdisc."""
    pod = make_pod()
    [end] = find(pod.netns, node.netns, pod.addresses)
    name = run(node.netns, "ip", "-o", "link").split(f"{end.number}: ", 1)[1].split("@")[0]
    link = -1
    pin = Path(node.pins, f"v{wire.ABI}", "program_from_pod")
    if others == "tcx":
        program = links.open_pin(str(pin))
        link = inside(node.netns, lambda: links.attach_tcx(program, end.number, links.TCX_EGRESS))
        os.close(program)
    elif others == "filter":
        run(node.netns, "tc", "qdisc", "add", "dev", name, "clsact")
        run(node.netns, "tc", "filter", "add", "dev", name, "egress", "bpf", "da", "pinned", str(pin))
    else:
        run(node.netns, "tc", "qdisc", "add", "dev", name, "ingress")
    try:
        node.kernel.add_pod(Pod(pod.cookie, pod.addresses, pod.identity), pod.netns, starting=True)
        assert len(names(node, pod)) == 2
        assert node.kernel.unlinked() == set()
        assert filter_names(node, end.number) == []
    finally:
        if link >= 0:
            os.close(link)


@pytest.mark.parametrize("missing", ["the qdisc", "filters"])
def test_kernel_without_filters_gives_links_at_once(node, make_pod, monkeypatch, missing):
    whole = netlink.add_filter

    def no_qdisc(index):
        raise FileNotFoundError(2, "no clsact")

    def no_egress(index, program, *, ingress):
        if not ingress:
            raise FileNotFoundError(2, "no classifier")
        whole(index, program, ingress=ingress)

    if missing == "the qdisc":
        monkeypatch.setattr(netlink, "make_room_for_filters", no_qdisc)
    else:
        monkeypatch.setattr(netlink, "add_filter", no_egress)
    pod = make_pod()
    [end] = find(pod.netns, node.netns, pod.addresses)
    node.kernel.add_pod(Pod(pod.cookie, pod.addresses, pod.identity), pod.netns, starting=True)
    assert len(names(node, pod)) == 2
    assert filter_names(node, end.number) == []
    assert node.kernel.unlinked() == set()
