"""The settings of a run file or a server file that say how its base is opened."""

from dataclasses import fields

from manylora.config.settings import Settings
from manylora.types.mesh_shape import MeshShape
from manylora.types.opening import Opening


def opening_of(settings: Settings) -> Opening:
    """The settings of an opening, each of which both files have under its name there."""
    values = {field.name: getattr(settings, field.name) for field in fields(Opening)}
    return Opening(**values | {"mesh": MeshShape.parse(values["mesh"])})
