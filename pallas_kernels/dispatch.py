"""Implementation names, what runs where, and the one error when none fits.

Every operation of this package takes ``implementation``. A name runs that implementation or raises;
None takes the first one of :data:`IMPLEMENTATIONS` that works for the platform and the shapes, and
always finds one because the reference is plain ``jax.numpy``.

What a backend needs of the machine is a row of :data:`BACKENDS`; which backends an operation has is the dictionary
of its :class:`Implementations`.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import importlib
import inspect
import pkgutil
from collections.abc import Callable, Generator, Mapping
from typing import Any

import jax

REFERENCE = "reference"
TRITON = "triton"
MOSAIC = "mosaic"
TPU = "tpu"
# Inputs times outputs from which Mosaic is the faster one on Hopper, at any number of rows (docs/results.md).
_LARGE_WEIGHT = 4_000_000


@dataclasses.dataclass(frozen=True)
class Backend:
    """What the kernels of a backend need of the machine, whatever their shapes.

    Attributes:
        platforms: those that it runs on, as JAX names them.
        device: what they have, in words: ``"an NVIDIA GPU"``.
        compute_capability: of an NVIDIA GPU: the first that will do, the first beyond that will not (or None), and
            both in words. None where the platform is all that matters.
    """

    platforms: tuple[str, ...]
    device: str
    compute_capability: tuple[tuple[int, int], tuple[int, int] | None, str] | None = None


# In the order in which None tries them, but for the matmuls of large weights (order_of_trial). Where JAX has no
# Triton backend, Mosaic is the first that works.
BACKENDS = {
    # bfloat16 tensor cores and `fma.rn.bf16x2` begin with Ampere; `wgmma` is Hopper's alone.
    TRITON: Backend(("gpu", "cuda"), "an NVIDIA GPU", ((8, 0), None, "8.0 or newer")),
    MOSAIC: Backend(("gpu", "cuda"), "an NVIDIA GPU", ((9, 0), (10, 0), "9.x (Hopper)")),
    TPU: Backend(("tpu",), "a TPU"),
}
IMPLEMENTATIONS = (*BACKENDS, REFERENCE)


def available_implementations(platform: str | None = None) -> tuple[str, ...]:
    """The implementation names that work on a platform, in the order in which None tries them.

    Args:
        platform: ``"cpu"``, ``"gpu"``, ``"cuda"``, ``"tpu"``, ...; None means the platform that JAX
            uses by default, whose device is then examined too.

    Returns:
        Names of :data:`IMPLEMENTATIONS`. An operation or a shape may still rule one out for a single call.
    """
    return tuple(name for name in _names() if _platform_obstacle(name, platform) is None)


def backend_obstacle(name: str) -> str | None:
    """Why no operation can run an implementation on the device that JAX uses, as the end of a sentence; None if it can.

    Args:
        name: of :data:`IMPLEMENTATIONS`.
    """
    return _platform_obstacle(name, None)


@dataclasses.dataclass(frozen=True)
class Selection:
    """What a call ran, and what kept it from the other implementations.

    Attributes:
        op: the operation's name.
        chosen: name of the implementation that ran; None where the call was refused.
        obstacles: for each other name why it could not, as the end of a sentence; None for one that could have.
    """

    op: str
    chosen: str | None
    obstacles: Mapping[str, str | None]


_interpreting: Any = jax.make_user_context(False)  # a part of the key under which jit finds what it traced


def interpreted() -> contextlib.AbstractContextManager[None]:
    """Has Pallas' interpreter run the kernels that are called in this context by name, on whatever device."""
    return _interpreting(True)


class _InterpretedModule:
    """The functions of an implementation's file, run by Pallas' interpreter."""

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        if not callable(found) or "interpret" not in inspect.signature(found).parameters:
            return found
        return functools.partial(found, interpret=True)


class _ModuleOf32Bits:
    """The functions of an implementation's file, traced as if ``jax_enable_x64`` were off.

    No operation has 64 bits, and Pallas' kernels count in 32: with the option, Python's numbers would make them 64.
    """

    def __init__(self, module: Any) -> None:
        self._module = module

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._module, name)
        return _in_32_bits(found) if callable(found) and not inspect.isclass(found) else found


def _has_64_bits() -> bool:
    config: Any = jax.config  # whose names type checkers do not know
    return config.jax_enable_x64


def _in_32_bits(function: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **options: Any) -> Any:
        with jax.enable_x64(False):
            return function(*args, **options)

    return call


_log: contextvars.ContextVar[list[Selection] | None] = contextvars.ContextVar("selections", default=None)


@contextlib.contextmanager
def recorded() -> Generator[list[Selection]]:
    """Lists what each call of an operation in this context and thread selects; under ``jit``, as it is traced."""
    selections: list[Selection] = []
    token = _log.set(selections)
    try:
        yield selections
    finally:
        _log.reset(token)


def operations() -> dict[str, Implementations]:
    """The implementations of every operation, by its name: of each folder of this package that has some."""
    package = importlib.import_module(__name__.rpartition(".")[0])
    modules = (
        importlib.import_module(f"{package.__name__}.{one.name}") for one in pkgutil.iter_modules(package.__path__)
    )
    found = (getattr(module, "_IMPLEMENTATIONS", None) for module in modules)
    return {one.op: one for one in found if isinstance(one, Implementations)}


def order_of_trial(num_outputs: int, num_inputs: int) -> tuple[str, ...]:
    """The names in the order in which None tries them for a 4-bit weight ``[num_outputs, num_inputs]``.

    It depends on the weight alone, so that a row has the same bits however many rows are beside it.
    """
    names = _names()
    if num_outputs * num_inputs < _LARGE_WEIGHT:
        return names
    return (MOSAIC, *[name for name in names if name != MOSAIC])


class Implementations:
    """The implementations of an operation, by name; each is a file of the operation's folder::

        _IMPLEMENTATIONS = Implementations(__name__, {TRITON: "gpu_triton", MOSAIC: "gpu_mosaic"})

    A file has the operation's functions, which take what those of ``reference.py`` take, and ``obstacle(...)``, which
    takes what decides whether they can: it says why they cannot, as the end of a sentence, or returns None.
    ``reference.py`` itself needs no entry and no ``obstacle``, for it serves every call.

    A file is imported where its platform is there, by the first call that asks for it, and not with this package: what
    it imports of Pallas may be missing from a JAX. Python keeps modules, so that later calls only look them up.

    Attributes:
        op: the operation's name, which its folder has too.
        modules: from names of :data:`IMPLEMENTATIONS` to modules, as one imports them.
    """

    def __init__(self, package: str, files: Mapping[str, str]):
        """The files of ``package``, the ``__name__`` of the operation's ``__init__``, by names of :data:`BACKENDS`."""
        self.op = package.rpartition(".")[2]
        self.modules = {name: f"{package}.{file}" for name, file in {**files, REFERENCE: "reference"}.items()}

    def select(
        self,
        implementation: str | None,
        obstacle: Callable[[Any], str | None],
        *,
        order: tuple[str, ...] | None = None,
    ) -> Any:
        """Resolves the ``implementation`` argument of a call.

        Args:
            implementation: a name of :data:`IMPLEMENTATIONS`, or None for the best one that works.
            obstacle: asks a module for its ``obstacle`` to this call; asked only of those whose platform is there.
                An ImportError, of a JAX that lacks the backend or has another interface, is an obstacle too.
            order: in which None tries them; None is that of :data:`IMPLEMENTATIONS`.

        Returns:
            The module whose function to call.

        Raises:
            ValueError: ``implementation`` is not a known name.
            NotImplementedError: the named implementation does not exist for this operation, or does not work on this
                platform or these shapes.
        """
        chosen, found, told = self._first(implementation, obstacle, order)
        if (log := _log.get()) is not None:
            others = (name for name in _names() if name != chosen)
            log.append(Selection(self.op, chosen, {name: self._examined(name, obstacle)[1] for name in others}))
        if chosen is not None:
            return found
        raise NotImplementedError(f"{self.op}: implementation '{implementation}' {told}; use '{REFERENCE}' or None")

    def serves(
        self,
        implementation: str | None,
        obstacle: Callable[[Any], str | None],
        *,
        order: tuple[str, ...] | None = None,
    ) -> Any | None:
        """The module that :meth:`select` finds, for who only asks: nothing is recorded.

        Returns:
            The module; None where the named implementation cannot serve the call.

        Raises:
            ValueError: ``implementation`` is not a known name.
        """
        return self._first(implementation, obstacle, order)[1]

    def _first(
        self, implementation: str | None, obstacle: Callable[[Any], str | None], order: tuple[str, ...] | None
    ) -> tuple[str | None, Any, str | None]:
        """Name and module of the first that can serve a call, or None twice, and the last obstacle."""
        if implementation is None:
            names = order or _names()
        elif implementation in _names():
            names = (implementation,)
        else:
            known = ", ".join(_names())
            raise ValueError(f"{self.op}: unknown implementation {implementation!r}; use one of {known}, or None")
        told = None
        for name in names:
            module, told = self._examined(name, obstacle)
            if told is None:
                return name, module, None
        return None, None, told

    def _examined(self, name: str, obstacle: Callable[[Any], str | None]) -> tuple[Any, str | None]:
        """The module of a name, and its obstacle to a call: that of the platform comes first."""
        if (told := _platform_obstacle(name, None)) is not None and not _interpreting.value:
            return None, told
        if name not in self.modules:
            return None, "does not exist for this operation"
        try:
            module: Any = importlib.import_module(self.modules[name])
            told = None if name == REFERENCE else obstacle(module)
            if told is None and name != REFERENCE and _interpreting.value:
                if "interpret" not in inspect.signature(getattr(module, self.op)).parameters:
                    return None, "cannot be interpreted"
                module = _InterpretedModule(module)
            if told is None and name != REFERENCE and _has_64_bits():
                module = _ModuleOf32Bits(module)
            return module, told
        except ImportError as error:
            return None, f"cannot be imported: {error}"


def _names() -> tuple[str, ...]:
    """Those of the table as it is now, to which who tries a backend may have added."""
    return (*BACKENDS, REFERENCE)


def described_device() -> Any:
    """The device that a program is lowered for without being there; None where it is one of this machine.

    A mesh describes its devices as well, in the program of one of them: those can be asked themselves.
    """
    described = jax.sharding.get_abstract_mesh().abstract_device
    is_here = described is not None and described.device_kind == jax.local_devices()[0].device_kind
    return None if is_here else described


def _platform_obstacle(name: str, platform: str | None) -> str | None:
    """Why an implementation cannot run on a platform, as the end of a sentence; None if it can."""
    if name == REFERENCE:
        return None
    backend = BACKENDS[name]
    described = described_device()
    where = platform or (jax.default_backend() if described is None else described.platform)
    if where not in backend.platforms:
        return f"needs {backend.device}; this is {where}"
    if platform is not None or described is not None or backend.compute_capability is None:
        return None
    device = jax.local_devices()[0]
    if "rocm" in device.client.platform_version.lower():
        return f"needs {backend.device}; this is an AMD GPU"
    capability = tuple(int(part) for part in device.compute_capability.split("."))
    first, end, wanted = backend.compute_capability
    if capability < first or (end is not None and capability >= end):
        return f"needs {backend.device} of compute capability {wanted}; this one has {device.compute_capability}"
    return None
