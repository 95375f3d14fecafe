"""A mesh of devices, as people ask for one: ``data=2,model=4``.

Along ``data`` the rows of a batch are shared out, along ``model`` the model itself. What a device has of a model is in
``model/sharding.py``. JAX is imported when a mesh is made: commands read their options before.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any, NamedTuple

from qspec_jax.errors import UsageError

if TYPE_CHECKING:
    import jax

DATA, MODEL = "data", "model"
AXES = DATA, MODEL
_USE = f"use {DATA}=N,{MODEL}=N, such as {DATA}=2,{MODEL}=4, or one of them"
_MOST = 2**20  # devices of an axis


class MeshShape(NamedTuple):
    """How many devices share the rows of a batch, and how many the model."""

    data: int = 1
    model: int = 1

    def __str__(self) -> str:
        return f"{DATA}={self.data},{MODEL}={self.model}"


def parse_mesh(text: str) -> MeshShape:
    """The sizes that a text such as ``data=2,model=4`` names; an axis that it does not name has one.

    A semicolon is as good as a comma, which has another meaning in some lists of arguments.

    Raises:
        UsageError: it names no such axes, one twice, or no number of devices.
    """
    found: dict[str, int] = {}
    for part in re.split("[,;]", text):
        matched = re.fullmatch(rf"\s*({DATA}|{MODEL})\s*=\s*([0-9]{{1,9}})\s*", part)
        if matched is None or matched[1] in found or not 1 <= int(matched[2]) <= _MOST:
            raise UsageError(f"mesh={text[:60]!r}: {_USE}, of at least 1 device each")
        found[matched[1]] = int(matched[2])
    return MeshShape(**found)


def make_mesh(given: Any) -> jax.sharding.Mesh | None:
    """The mesh of both axes that somebody asks for.

    Args:
        given: a text; a ``jax.sharding.Mesh`` with one or both of the axes, whose devices are used as they are
            arranged; or None. A text takes the first of JAX's devices.

    Returns:
        the mesh; None for no mesh, and for one of the default device alone.

    Raises:
        UsageError: it is none of these, or needs more devices than there are.
    """
    import jax

    if given is None:
        return None
    mesh = _of_text(given) if isinstance(given, (str, MeshShape)) else _with_both_axes(given)
    return None if [*mesh.devices.flat] == jax.devices()[:1] and jax.process_count() == 1 else mesh


def shape_of(mesh: jax.sharding.Mesh) -> MeshShape:
    """The sizes of the axes."""
    return MeshShape(mesh.shape[DATA], mesh.shape[MODEL])


def told_mesh(given: Any, mesh: jax.sharding.Mesh) -> Any:
    """What tells other processes of a mesh: what was given if that is a text, else its devices by their numbers."""
    return str(shape_of(mesh)) if isinstance(given, str) else [[d.id for d in row] for row in mesh.devices]


def _of_text(given: str | MeshShape) -> jax.sharding.Mesh:
    import jax
    from jax.sharding import AxisType

    shape = parse_mesh(given) if isinstance(given, str) else given
    devices, wanted = jax.devices(), shape.data * shape.model
    if wanted > len(devices) or (jax.process_count() > 1 and wanted != len(devices)):
        raise UsageError(f"mesh={shape} has {wanted} devices, and {_there_are(len(devices), shape)}")
    # Along Explicit axes, which are what one gets otherwise, the sharding is part of every array's type.
    return jax.make_mesh(shape, AXES, axis_types=(AxisType.Auto,) * len(AXES), devices=devices[:wanted])


def _there_are(count: int, shape: MeshShape) -> str:
    """The devices that there are, and the meshes that would fit them and resemble the one asked for."""
    import jax

    if jax.process_count() > 1:
        fitting = [MeshShape(count // n, n) for n in range(1, count + 1) if count % n == 0]
        return f"all processes together have {count}; use {' or '.join(map(str, fitting[-4:]))}"
    if count == 1:
        hint = "JAX_NUM_CPU_DEVICES=8 makes 8 of a CPU" if jax.default_backend() == "cpu" else "leave it out"
        return f"there is 1 {jax.devices()[0].platform} device; {hint}"
    fitting = {MeshShape(count // n, n) for n in (min(shape.model, count), 1)}
    return f"there are {count}; use up to {' or '.join(map(str, sorted(fitting)))}"


def _with_both_axes(given: Any) -> jax.sharding.Mesh:
    import jax
    from jax.sharding import Mesh

    if not isinstance(given, Mesh):
        raise UsageError(f"mesh is of type {type(given).__name__}: {_USE}; or a jax.sharding.Mesh with these axes")
    if unknown := [name for name in given.axis_names if name not in AXES]:
        raise UsageError(f"mesh has the axis {unknown[0]!r}; name its axes {DATA!r} and {MODEL!r}, or one of them")
    if given.size == 0:
        raise UsageError(f"mesh has no devices: {_USE}")
    if not set(given.devices.flat) <= set(jax.devices()):
        raise UsageError("mesh has devices that are not those of jax.devices(); make it of these")
    by_axis = [given.axis_names.index(name) for name in AXES if name in given.axis_names]
    sizes = [given.shape.get(name, 1) for name in AXES]
    return Mesh(given.devices.transpose(by_axis).reshape(sizes), AXES)
