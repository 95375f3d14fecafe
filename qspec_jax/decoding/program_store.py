"""Compiled programs kept on disk by what they are made from, so that another process need not trace them again.

JAX's own cache (``device/compilation_cache.py``) looks a program up by its lowered form, and to trace and lower all
layers of a decoder takes longer than anything else at a start. Here a program is looked up by its ingredients:

- the program: its plan, shape and width, which are all that the functions of ``lowering.py`` close over;
- the decoder: its Flax graph with every static attribute (config, quantisation, kernels, dtype), the structure of its
  arrays (layouts among them), and shape, dtype, layout and device of each;
- the source: the text of every ``.py`` and ``.json`` file of ``qspec_jax`` and ``pallas_kernels``;
- what traces and compiles: the versions of Python and the libraries, those of NVIDIA beside JAX too, every value of
  ``jax.config`` in this thread, the ambient mesh, and the environment variables of compilers;
- the device: the platform's version, the kind of every device, and the fingerprint of the topology by which JAX's own
  key tells devices apart, for a CPU the features of that CPU.

Code that somebody else runs in the same process is none of them: a function of this library replaced at run time, or a
file edited after it was imported. So only the commands ``generate`` and ``chat`` use a store; where a program that
imports this library wants one, it sets ``model.programs.store`` itself. A decoder with modules of other packages, or on
several devices, has none.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import importlib.resources
import os
import pickle
import sys
import tempfile
import threading
from collections.abc import Generator, Iterable, Mapping
from pathlib import Path
from typing import Any

import flax
import jax
import numpy as np
from flax import nnx
from jax.experimental import serialize_executable
from jax.experimental.compilation_cache import compilation_cache
from jaxlib import version as jaxlib_version
from jaxlib import xla_client

from qspec_jax.model.decoder import Decoder

_OWN_PACKAGES = ("qspec_jax", "flax")
_DIGEST_BYTES = 32
_COMPILER_DISTRIBUTIONS = ("jax", "libtpu", "nvidia", "triton")
_COMPILER_VARIABLES = (
    *("XLA_", "JAX_", "TF_", "LIBTPU_", "TPU_", "TRITON_", "MOSAIC_", "PALLAS_"),
    *("CUBLAS_", "CUDNN_", "NVIDIA_TF32_OVERRIDE"),
)


@dataclasses.dataclass(frozen=True)
class ProgramStore:
    """A folder of compiled programs, which may be deleted at any time.

    The one beside JAX's cache is shrunk with it (:mod:`qspec_jax.device.cache_size`), others are not.

    A file that is damaged or cannot be read or written is as good as none. Whoever can write to the folder decides what
    the programs do, and what else runs as they are read: files hold pickled objects.

    Attributes:
        folder: made when the first program is written.
    """

    folder: Path

    def load(self, key: str, device: Any) -> jax.stages.Compiled | None:
        """The program under a key, ready to run on a device; None if it is not there."""
        with contextlib.suppress(Exception):  # whatever is wrong with a file, the program is compiled anew
            content = (self.folder / key).read_bytes()
            os.utime(self.folder / key)  # what was not used for longest is removed first
            digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
            if digest == _digest(key, data):
                return serialize_executable.deserialize_and_load(*pickle.loads(data), execution_devices=[device])
        return None

    def save(self, key: str, program: jax.stages.Compiled) -> None:
        """Writes a program that was compiled while JAX's cache was :func:`passed_over`, unless JAX cannot store it."""
        with contextlib.suppress(Exception):  # as above; JAX refuses host callbacks, for one
            data = pickle.dumps(serialize_executable.serialize(program))
            self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix="new-", delete=False) as file:
                try:
                    file.write(_digest(key, data) + data)
                    file.close()
                    os.replace(file.name, self.folder / key)
                except BaseException:
                    os.unlink(file.name)
                    raise


def program_keys(names: Iterable[Any], decoder: Decoder) -> dict[Any, str]:
    """What programs of a decoder are kept under; empty if it is not known what makes one what it is.

    Args:
        names: of the programs: what their functions close over besides the decoder, with a ``repr`` that says it all.
        decoder: as it is laid out for them.
    """
    ingredients = None if _is_foreign(decoder) else _ingredients(decoder)
    if ingredients is None:
        return {}
    shared = _hash(repr(sorted(ingredients.items())))
    return {name: _hash(f"{shared} {name!r}") for name in names}


_passing_lock = threading.Lock()
_passing, _enabled = 0, True  # how many pass it over now, and whether it is used otherwise


@contextlib.contextmanager
def passed_over() -> Generator[None]:
    """Has JAX use no cache of its own meanwhile.

    A program that came out of JAX's cache cannot be kept a second time: on the CPU, the copy of one lacks functions.
    """
    global _passing, _enabled
    config: Any = jax.config
    with _passing_lock:  # the setting is one for all threads
        if _passing == 0:
            _enabled = config.jax_enable_compilation_cache
            config.update("jax_enable_compilation_cache", False)
            compilation_cache.reset_cache()  # JAX asks once whether its cache is used
        _passing += 1
    try:
        yield
    finally:
        with _passing_lock:
            _passing -= 1
            if _passing == 0:
                config.update("jax_enable_compilation_cache", _enabled)
                compilation_cache.reset_cache()


def _is_foreign(decoder: Decoder) -> bool:
    """Whether it is more than this library's code on one device of one process."""
    modules = {type(module).__module__.partition(".")[0] for _, module in nnx.iter_modules(decoder)}
    elsewhere = _devices(jax.tree.leaves(nnx.state(decoder))) - {jax.local_devices()[0]}
    return not modules <= {*_OWN_PACKAGES} or bool(elsewhere) or jax.process_count() > 1


def _ingredients(decoder: Decoder) -> Mapping[str, Any] | None:
    """What decides what every program of a decoder compiles to, by name; None if some of it has no lasting name."""
    graph, state = nnx.split(decoder)
    leaves, structure = jax.tree.flatten(state)
    try:
        statics = pickle.dumps((graph, structure)).hex()
    except Exception:  # an attribute that cannot be pickled
        return None
    found = {
        "graph": statics,
        "arrays": repr([_description(leaf) for leaf in leaves]),
        "source": source_digest(),
        "versions": _versions(),
        "config": repr([(name, getattr(jax.config, name, value)) for name, value in sorted(jax.config.values.items())]),
        "mesh": repr(jax.sharding.get_abstract_mesh()),
        "environment": repr(sorted(item for item in os.environ.items() if item[0].startswith(_COMPILER_VARIABLES))),
        "devices": _platform(),
    }
    # The address of an object says nothing in another process.
    return None if any(" at 0x" in value for value in found.values()) else found


def _platform() -> str:
    devices = jax.devices()
    try:
        topology: Any = xla_client.get_topology_for_devices(devices).fingerprint()
    except jax.errors.JaxRuntimeError:  # of a backend that describes none; JAX's own key then has the kinds alone
        topology = None
    kinds = [device.device_kind for device in devices]
    return repr((devices[0].client.platform, devices[0].client.platform_version, kinds, topology))


def _versions() -> str:
    beside_jax = Path(jax.__file__).parents[1].glob("*.dist-info")
    compilers = sorted(folder.name for folder in beside_jax if folder.name.startswith(_COMPILER_DISTRIBUTIONS))
    return repr((sys.version, jax.__version__, jaxlib_version.__version__, flax.__version__, np.__version__, compilers))


def _packages() -> tuple[Path, ...]:
    """The folders of both packages as a whole, wherever in them this file lies."""
    return tuple(Path(str(importlib.resources.files(package))) for package in ("qspec_jax", "pallas_kernels"))


@functools.cache
def source_digest() -> str:
    """A digest of the text of every source file and table of both packages."""
    digest = hashlib.sha256()
    for package in _packages():
        for file in sorted(package.rglob("*")):
            if file.suffix in (".py", ".json"):
                data = file.read_bytes()
                digest.update(f"{package.name}/{file.relative_to(package).as_posix()} {len(data)} ".encode() + data)
    return digest.hexdigest()


def _description(leaf: Any) -> tuple[Any, ...]:
    """Of an array, or of the shape of one that is not there yet and will lie as arrays do by default."""
    described = leaf.shape, str(leaf.dtype), leaf.weak_type
    if isinstance(leaf, jax.ShapeDtypeStruct):
        return described
    order = leaf.format.layout.major_to_minor
    unusual = leaf.committed or tuple(order) != tuple(range(leaf.ndim))
    return (*described, leaf.format, leaf.committed) if unusual else described


def _devices(leaves: Iterable[Any]) -> set[Any]:
    arrays = (leaf for leaf in leaves if isinstance(leaf, jax.Array))
    return {device for leaf in arrays for device in leaf.sharding.device_set}


def _digest(key: str, data: bytes) -> bytes:
    return hashlib.sha256(key.encode() + data).digest()


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
