"""Every kernel that runs here against the reference: what a person with an unknown device sends back.

An implementation that fails to compile is a line of the report with its error. Time is bounded: what is not begun in it
is said to be left out. A case takes 200 MB at most on each side, and one is there at a time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import time
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels import QuantizedActivation, QuantizedWeight
from pallas_kernels.accuracy import allowed_error, differing_codes, equal_codes, relative_error
from pallas_kernels.dispatch import REFERENCE, available_implementations, interpreted, operations
from qspec_jax.inspection.kernel_case import DEMO, LLAMA_8B, KernelCase
from qspec_jax.inspection.kernel_cases import kernel_cases

INTERPRETED = "interpreted "  # before the name of an implementation
_LONGEST_REASON = 300


@dataclasses.dataclass(frozen=True)
class Outcome:
    """What came of a case with an implementation.

    Attributes:
        op, function, shape, dtype, implementation, measure: of the case.
        error: of the result; None where there is none.
        allowed: how large it may be.
        ok: whether it is no larger; None where the implementation does not serve the call, or was left out.
        seconds: of the first call, compiling included.
        problem: why there is no result.
    """

    op: str
    function: str
    shape: str
    dtype: str
    implementation: str
    measure: str
    error: float | None = None
    allowed: float | None = None
    ok: bool | None = None
    seconds: float | None = None
    problem: str | None = None


def all_cases(ops: Iterable[str] = (), *, small: bool = False) -> list[KernelCase]:
    """The cases, in the order in which they run: the demo model's first.

    Args:
        ops: names of operations, or none for all of them.
        small: the demo model's widths alone.
    """
    chosen = [*kernel_cases(DEMO, "bfloat16")]
    if not small:
        chosen += [*kernel_cases(DEMO, "float32"), *kernel_cases(LLAMA_8B, "bfloat16")]
    wanted = frozenset(ops)
    return [case for case in chosen if not wanted or case.op in wanted]


def run_cases(cases: Iterable[KernelCase], *, with_interpreted: bool, most_seconds: int) -> Iterator[Outcome]:
    """Runs the cases with every implementation that could run on this device, as long as there is time.

    Args:
        cases: to run.
        with_interpreted: also run, in Pallas' interpreter, implementations that this device cannot.
        most_seconds: after which no other one is begun.
    """
    end = time.monotonic() + most_seconds
    table = operations()
    for case in cases:
        modules = table[case.op].modules
        here = [name for name in available_implementations() if name in modules]
        there = [INTERPRETED + name for name in modules if name not in here] if with_interpreted else []
        if time.monotonic() >= end:
            yield from (_outcome(case, name, problem="left out: the time was up") for name in [*here, *there])
            continue
        yield from _run_case(case, [*here, *there])


def _run_case(case: KernelCase, names: list[str]) -> Iterator[Outcome]:
    try:
        operands = case.operands()
        expected = _expected(case, operands)
    except Exception as error:
        yield from (_outcome(case, name, ok=False, problem=f"the reference fails: {_reason(error)}") for name in names)
        return
    for name in names:
        yield _compare(case, name, operands, expected)


def _compare(case: KernelCase, name: str, operands: tuple[Any, ...], expected: Any) -> Outcome:
    """Runs a case; whatever is raised is a line."""
    implementation = name.removeprefix(INTERPRETED)
    context = contextlib.nullcontext() if name == implementation else interpreted()
    allowed = _allowed(case, implementation, operands)
    start = time.perf_counter()
    try:
        with context, _exact_float32(case):
            laid_out = case.laid_out(operands, implementation)
            out = jax.block_until_ready(case.call(laid_out, implementation))
        seconds = time.perf_counter() - start
        error = max(_errors(case, out, expected))
    except NotImplementedError as refusal:
        return _outcome(case, name, problem=_reason(refusal))
    except Exception as failure:
        return _outcome(case, name, ok=False, problem=_reason(failure), seconds=time.perf_counter() - start)
    return _outcome(case, name, error=error, allowed=allowed, ok=bool(error <= allowed), seconds=seconds)


def _outcome(case: KernelCase, name: str, **result: Any) -> Outcome:
    described = {field: getattr(case, field) for field in ("op", "function", "shape", "dtype", "measure")}
    return Outcome(**described, implementation=name, **result)


def _allowed(case: KernelCase, implementation: str, operands: tuple[Any, ...]) -> float:
    if case.measure == "relative":
        weight = next((one for one in operands if isinstance(one, QuantizedWeight)), None)
        called: dict[str, Any] = {"num_inputs": case.num_inputs, "implementation": implementation, "weight": weight}
        return allowed_error(case.op, case.dtype, **called)
    return 1 - equal_codes(case.op, implementation=implementation) if case.measure == "codes" else 0.0


def _errors(case: KernelCase, out: Any, expected: Any) -> Iterator[float]:
    """That of each array of a result."""
    leaves = functools.partial(jax.tree.leaves, is_leaf=lambda one: isinstance(one, QuantizedActivation))
    for ours, theirs in zip(leaves(out), leaves(expected), strict=True):
        if isinstance(theirs, QuantizedActivation):
            yield differing_codes(ours, theirs, jnp.dtype(case.dtype))
            continue
        ours, theirs = (np.asarray(array, np.float64) for array in (ours, theirs))
        error = float(np.mean(ours != theirs)) if case.measure == "numbers" else relative_error(ours, theirs)
        yield error if np.isfinite(error) else float("inf")


def _expected(case: KernelCase, operands: tuple[Any, ...]) -> Any:
    """The reference's result, on the CPU where JAX has one beside the device."""
    operands = jax.device_put(operands, _reference_device())
    if case.expected is not None:
        return jax.tree.map(np.asarray, case.expected(operands))
    if case.wide:
        operands = jax.tree.map(_widened, operands)
    with jax.default_matmul_precision("highest"):
        return jax.tree.map(np.asarray, case.call(operands, REFERENCE))


def _reference_device() -> Any:
    with contextlib.suppress(RuntimeError):
        return jax.local_devices(backend="cpu")[0]
    return jax.local_devices()[0]


def compared_with() -> str:
    """Which reference results are compared with, for the report."""
    return f"the reference on {_reference_device().device_kind}"


def _widened(array: jax.Array) -> jax.Array:
    """16-bit floats as float32, but the scales of weights, which are float16."""
    return array.astype(jnp.float32) if array.dtype == jnp.bfloat16 else array


def _exact_float32(case: KernelCase) -> contextlib.AbstractContextManager[object]:
    """As a decoder does in float32."""
    return jax.default_matmul_precision("highest") if case.dtype == "float32" else contextlib.nullcontext()


def _reason(error: BaseException) -> str:
    """The first line of an error that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[0] if lines else "no reason given"
    name = "" if isinstance(error, NotImplementedError) else f"{type(error).__name__}: "
    return f"{name}{text}"[:_LONGEST_REASON]


def verdict(outcomes: list[Outcome]) -> str:
    """One sentence on all of them."""
    compared = [one for one in outcomes if one.ok is not None]
    failed = [one for one in compared if not one.ok]
    kernels = sorted({one.implementation for one in compared} - {REFERENCE})
    left = sum(one.problem is not None and one.problem.startswith("left out") for one in outcomes)
    rest = f"; {left} were left out, as the time was up" if left else ""
    if failed:
        return f"{len(failed)} of {len(compared)} comparisons failed{rest}"
    if not compared:
        return f"nothing was compared, so that nothing is known of this device{rest}"
    if not kernels and available_implementations() != (REFERENCE,):
        return f"no kernel was compared; the reference's {len(compared)} results are within the bounds{rest}"
    if not kernels:
        return (
            f"only the reference (XLA's plain operations) runs on this device: its {len(compared)} results are within "
            f"the bounds, and no kernel was compared{rest}"
        )
    return f"{len(compared)} comparisons, all right: {', '.join(kernels)} and the reference itself{rest}"
