"""What the agent leaves for the plugin: read back by the plugin's own function."""

from agent.enrolment import EnrolmentFile
from agent.mesh import Mesh, apply
from cni import protocol
from controlplane.api import MeshConfig, Update
from tests.agent.pods import workload


def mesh(outside, *workloads):
    update = Update(
        nonce=1, version="v", complete=True, upserts=(MeshConfig(outside_namespaces=outside), *workloads)
    )
    made, errors = apply(Mesh(), update)
    assert not errors
    return made


def test_namespaces_that_do_not_ask(tmp_path):
    file = EnrolmentFile(tmp_path)
    file.write(mesh(("b", "a")))
    assert protocol.read_outside(str(tmp_path)) == ["a", "b"]
    file.write(mesh(("a",)))
    assert protocol.read_outside(str(tmp_path)) == ["a"]


def test_a_namespace_with_a_pod_of_the_mesh_is_not_outside(tmp_path):
    inside = workload("one")
    file = EnrolmentFile(tmp_path)
    file.write(mesh((inside.namespace, "other"), inside, workload("two", enrolled=False)))
    assert protocol.read_outside(str(tmp_path)) == ["other"]


def test_what_did_not_change_is_not_written(tmp_path):
    file = EnrolmentFile(tmp_path)
    file.write(mesh(("a",)))
    before = (tmp_path / protocol.ENROLMENT).stat().st_ino
    file.write(mesh(("a",), workload("elsewhere", enrolled=False)))
    assert (tmp_path / protocol.ENROLMENT).stat().st_ino == before


def test_a_folder_that_is_gone_stops_nobody(tmp_path):
    file = EnrolmentFile(tmp_path / "gone")
    file.write(mesh(("a",)))
    (tmp_path / "gone").mkdir()
    file.write(mesh(("a",)))
    assert protocol.read_outside(str(tmp_path / "gone")) == ["a"]
