import pytest

from manylora.types import ConfigError, Unsupported
from manylora.types.mesh_shape import MeshShape


@pytest.mark.parametrize(
    ("text", "shape"),
    [
        ("dp=2,tp=2", MeshShape(2, 2)),
        ("tp=4", MeshShape(1, 4)),
        (" tp = 2 , dp = 3 ", MeshShape(3, 2)),
        ("dp=1", MeshShape()),
        ("replicas=3,tp=2", MeshShape(1, 2, 3)),
    ],
)
def test_a_shape_is_read_and_written(text: str, shape: MeshShape):
    assert MeshShape.parse(text) == shape
    assert MeshShape.parse(str(shape)) == shape
    assert shape.size == shape.replicas * shape.one.size == shape.replicas * shape.dp * shape.tp
    assert shape.one.replicas == 1


@pytest.mark.parametrize(
    "text", ["", "2x2", "dp", "dp=", "dp=-1", "ep=2", "dp=2,dp=2", "dp=2;tp=2", "dp=2,", "dp=1.5"]
)
def test_anything_else_is_refused_with_an_example(text: str):
    with pytest.raises(ConfigError, match="dp=2,tp=2"):
        MeshShape.parse(text)


def test_an_axis_has_at_least_one_rank():
    with pytest.raises(ConfigError, match="tp is 0"):
        MeshShape.parse("tp=0")


def test_a_tp_that_does_not_fit_is_told_what_does():
    sizes = {"num_attention_heads": 9, "num_key_value_heads": 3, "intermediate_size": 1536}
    for tp in (1, 3):
        MeshShape(tp=tp).check_split(sizes, "'smol'")
    for tp in (2, 4, 6, 9):
        with pytest.raises(Unsupported, match=r"9 query heads, 3 key-value heads.*one of 1, 3;"):
            MeshShape(tp=tp).check_split(sizes, "'smol'")
    MeshShape(tp=7).check_split({}, "a family that names its sizes otherwise")
