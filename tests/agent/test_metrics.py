"""Istio's names and labels over the kernel's accounts."""

from prometheus_client import CollectorRegistry
from prometheus_client.exposition import generate_latest
from prometheus_client.parser import text_string_to_metric_families

from agent.identities import Identities, label_of
from agent.kernel import Direction, Event, FlowCounters, FlowKey, Pressure, Reason
from agent.mesh import Mesh, apply
from agent.metrics import LABELS, CniLatencies, Collector, View, labels_of, name_of, services_by_identity
from agent.refusals import INTERVAL, Refusals
from controlplane.api import Endpoint, Service, ServicePort
from tests.agent.pods import complete, workload

CLIENT = workload("client", app="client-app", version="v1")
SERVER = workload("server", app="server-app")


def service(name: str, *endpoints: Endpoint) -> Service:
    return Service(
        "default",
        name,
        f"{name}.default.svc.cluster.local",
        ("10.96.0.1",),
        (ServicePort(80, endpoints=endpoints),),
    )


def view(flows: dict[FlowKey, FlowCounters], *more) -> View:
    mesh, _ = apply(Mesh(), complete(CLIENT, SERVER, *more))
    return View(mesh, numbers(), flows, {"pods": Pressure(3, 1024, 1)}, 3, 2, {"nodeproxy": 1}, True, 4)


def numbers() -> Identities:
    made = Identities()
    made.number(label_of(CLIENT))
    made.number(label_of(SERVER))
    return made


def samples(shown: View) -> dict[str, list[tuple[dict[str, str], float]]]:
    registry = CollectorRegistry()
    registry.register(Collector(lambda: shown, CniLatencies()))
    found: dict[str, list[tuple[dict[str, str], float]]] = {}
    for family in text_string_to_metric_families(generate_latest(registry).decode()):
        for sample in family.samples:
            found.setdefault(sample.name, []).append((dict(sample.labels), sample.value))
    return found


def test_both_ends_count_as_istio_does():
    web = service("web", Endpoint("uid-server", "10.0.1.2", 8080, "n1"))
    found = samples(
        view(
            {
                # What each application wrote and read: the server sent 300 and received 200.
                FlowKey(16, 17, 8080, Direction.OUTBOUND): FlowCounters(5, 3, 0, 200, 300),
                FlowKey(16, 17, 8080, Direction.INBOUND): FlowCounters(5, 3, 2, 300, 200),
            },
            web,
        )
    )
    for reporter in ("source", "destination"):
        for name, value in (
            ("istio_tcp_sent_bytes_total", 300),
            ("istio_tcp_received_bytes_total", 200),
            ("istio_tcp_connections_opened_total", 5),
            ("istio_tcp_connections_closed_total", 3),
        ):
            ((labels, seen),) = [s for s in found[name] if s[0]["reporter"] == reporter]
            assert seen == value
            assert set(labels) == set(LABELS)
            assert labels["source_workload"] == "client"
            assert labels["source_workload_namespace"] == "default"
            assert labels["source_principal"] == "spiffe://cluster.local/ns/default/sa/client"
            assert labels["source_app"] == labels["source_canonical_service"] == "client-app"
            assert labels["source_version"] == labels["source_canonical_revision"] == "v1"
            assert labels["destination_workload"] == "server"
            assert labels["destination_canonical_revision"] == "latest"
            assert labels["destination_service"] == "web.default.svc.cluster.local"
            assert (labels["destination_service_name"], labels["destination_service_namespace"]) == (
                "web",
                "default",
            )
            assert labels["request_protocol"] == "tcp"
            assert labels["measured_in"] == "kernel"
    ((labels, refused),) = found["mycel_tcp_connections_refused_total"]
    assert (refused, labels["response_flags"], labels["reporter"]) == (2, "UAEX", "destination")


def test_ports_of_one_workload_are_added_up():
    found = samples(
        view({FlowKey(16, 17, port, Direction.INBOUND): FlowCounters(1, 1, 0, 10, 20) for port in (1, 2, 3)})
    )
    ((_, opened),) = found["istio_tcp_connections_opened_total"]
    assert opened == 3


def test_security_policy_says_what_was_encrypted():
    def security(source: int, direction: Direction = Direction.INBOUND) -> str:
        labels = labels_of(FlowKey(source, 17, 80, direction), numbers(), {})
        return labels[LABELS.index("connection_security_policy")]

    assert [security(n) for n in (0, 1, 2, 16)] == ["none", "none", "mutual_tls", "same_node"]
    assert security(16, Direction.OUTBOUND) == "unknown"


def test_a_service_is_named_only_where_there_is_no_doubt():
    endpoint = Endpoint("uid-server", "10.0.1.2", 8080, "n1")
    shown = view({}, service("a", endpoint), service("b", endpoint))
    assert services_by_identity(shown.mesh, numbers()) == {(17, 8080): "unknown"}
    shown = view({}, service("a", endpoint))
    assert services_by_identity(shown.mesh, numbers()) == {(17, 8080): "a.default.svc.cluster.local"}


def test_own_health():
    found = samples(view({}))
    assert found["mycel_map_entries"] == [({"map": "pods"}, 3)]
    assert found["mycel_map_capacity"] == [({"map": "pods"}, 1024)]
    assert found["mycel_map_full_total"] == [({"map": "pods"}, 1)]
    assert found["mycel_agent_pods_enrolled"] == [({}, 2)]
    assert found["mycel_agent_proxies_connected"] == [({"role": "nodeproxy"}, 1)]
    assert found["mycel_agent_controller_connected"] == [({}, 1)]
    assert found["mycel_agent_connections_destroyed_total"] == [({}, 4)]


def test_cni_latencies():
    latencies = CniLatencies()
    for seconds in (0.001, 0.03, 100.0):
        latencies("ADD", seconds, 0)
    latencies("ADD", 0.001, 11)
    found = {s.name + str(sorted(s.labels.items())): s.value for s in latencies.family().samples}
    assert found["mycel_cni_request_duration_seconds_count[('code', '0'), ('command', 'ADD')]"] == 3
    assert (
        found["mycel_cni_request_duration_seconds_bucket[('code', '0'), ('command', 'ADD'), ('le', '0.05')]"]
        == 2
    )
    assert found["mycel_cni_request_duration_seconds_count[('code', '11'), ('command', 'ADD')]"] == 1


def test_names_for_logs():
    assert [name_of(n, numbers()) for n in (0, 1, 2, 16, 99)] == [
        "plain text",
        "a probe",
        "the node proxy",
        "default/client",
        "identity 99",
    ]


def test_refusals_are_told_once_and_then_together(caplog):
    caplog.set_level("WARNING")
    refusals = Refusals(lambda number: f"i{number}", lambda cookie: f"pod{cookie}")
    reason = next(iter(Reason))
    event = Event(reason, 7, 16, 17, ("10.0.0.1", 1000), ("10.0.0.2", 80))
    for second in range(5):
        refusals.tell([event, event], float(second))
    assert len(caplog.records) == 1
    refusals.tell([event], 5.0 + INTERVAL)
    assert len(caplog.records) == 2
    assert caplog.records[1].fields["more_since_last"] == 9
    assert caplog.records[0].fields == {
        "reason": reason.name.lower().replace("_", "-"),
        "client": "10.0.0.1:1000",
        "server": "10.0.0.2:80",
        "source": "i16",
        "destination": "i17",
        "pod": "pod7",
    }
    # Another port is another kind; a flood of kinds ends somewhere.
    flood = [event._replace(server=("10.0.0.3", port)) for port in range(5000)]
    refusals.tell(flood, 5.0 + INTERVAL)
    assert len(caplog.records) < 1100
