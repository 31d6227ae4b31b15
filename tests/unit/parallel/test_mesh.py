import pytest

from manylora.parallel import Mesh
from manylora.types import ConfigError
from manylora.types.mesh_shape import MeshShape


def test_a_mesh_of_one_needs_no_processes():
    mesh = Mesh.join(MeshShape(), "cpu")
    assert mesh.is_leader and mesh.device_mesh is None
    assert mesh.dp.group is mesh.tp.group is mesh.world.group is None


def test_another_number_of_processes_is_refused():
    with pytest.raises(ConfigError, match="4 ranks, but 1 were started"):
        Mesh.join(MeshShape(2, 2), "cpu")
