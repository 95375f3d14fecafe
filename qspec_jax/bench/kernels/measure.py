"""Measures every operation x implementation x shape x rows, one weight at a time."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, Literal

import jax

from pallas_kernels import QuantizedWeight
from pallas_kernels.dispatch import REFERENCE
from qspec_jax.bench.kernels import operands, producers, torch_int4
from qspec_jax.bench.kernels.ceilings import Ceilings
from qspec_jax.bench.kernels.names import BASELINE, MATMULS, PAIRS, PRODUCERS, TORCH, W4A16_ALONE, WEIGHT_ONLY, XLA
from qspec_jax.bench.kernels.operands import Workload
from qspec_jax.bench.presets import MatmulShape
from qspec_jax.bench.timing import Clock, compile_calls, run_in_threads, time_calls
from qspec_jax.commands.run import say

_TORCH_BOUND = 1e-2  # it rounds scales and zero points to bfloat16 too
Status = Literal["ok", "wrong", "unsupported", "failed"]


@dataclasses.dataclass(frozen=True)
class Measurement:
    """One operation by one implementation on one shape.

    Attributes:
        op, implementation: names; see ``names.OPS``.
        k, n: inputs and outputs; ``n`` is None where there is no weight.
        group_size, symmetric: of the weight; None where there is none in 4 bits.
        rows: M.
        layers: where models have this shape.
        status: ``wrong`` is a result beyond ``Workload.error_bound``, ``unsupported`` a call that the
            implementation refuses, ``failed`` one that does not compile or run.
        reason: of a status that is not ``ok``.
        microseconds, clock: of a call.
        num_bytes, num_operations: that it must move and compute.
        relative_error: against the float32 reference; None if it is not a number.
    """

    op: str
    implementation: str
    k: int
    n: int | None
    group_size: int | None
    symmetric: bool | None
    rows: int
    layers: str = ""
    status: Status = "ok"
    reason: str | None = None
    microseconds: float | None = None
    clock: Clock | None = None
    num_bytes: int | None = None
    num_operations: int | None = None
    relative_error: float | None = None

    @property
    def tb_per_s(self) -> float | None:
        return self.num_bytes / self.microseconds * 1e-6 if self.microseconds and self.num_bytes else None

    @property
    def top_per_s(self) -> float | None:
        return self.num_operations / self.microseconds * 1e-6 if self.microseconds and self.num_operations else None

    @property
    def intensity(self) -> float | None:
        """Operations per byte."""
        return self.num_operations / self.num_bytes if self.num_operations and self.num_bytes else None

    def to_dict(self, ceilings: Ceilings) -> dict[str, Any]:
        """All fields, and what follows from them, for JSON."""
        copy_share = None if self.tb_per_s is None else self.tb_per_s / ceilings.copy_tb_per_s
        matmul_share = None if self.top_per_s is None else self.top_per_s / ceilings.top_per_s(self.op)
        return {
            **dataclasses.asdict(self),
            "tb_per_s": self.tb_per_s,
            "top_per_s": self.top_per_s,
            "share_of_copy_bandwidth": copy_share,
            "share_of_matmul_rate": matmul_share,
            "operations_per_byte": self.intensity,
        }


@dataclasses.dataclass(frozen=True)
class MeasurementPlan:
    """What to measure.

    Attributes:
        ops: some of ``names.OPS``.
        implementations: of the library's operations; ``names.W4A16_ALONE`` add others of that one.
        rows: values of M.
        symmetric: weights without zero points.
        repeats: timed runs, of which the median counts.
    """

    ops: Sequence[str]
    implementations: Sequence[str]
    rows: Sequence[int]
    symmetric: bool
    repeats: int


@dataclasses.dataclass(frozen=True, eq=False)
class _Case:
    subject: Measurement
    workload: Workload

    def compile(self) -> jax.stages.Compiled:
        function = self.workload.implement(self.subject.implementation)
        return compile_calls(function, self.workload.shared, self.workload.copies)


def measure_all(shapes: Sequence[tuple[MatmulShape, Sequence[int]]], plan: MeasurementPlan) -> Iterator[Measurement]:
    """Measures shapes, each with its group sizes, then the producers of their distinct K, and torch last.

    The profiler of torch keeps CUPTI to itself from its first use on.
    """
    for shape, group_sizes in shapes:
        if BASELINE in plan.ops:
            yield from _measure(_float_cases(shape, plan), plan, f"{shape} bf16")
        for group_size in group_sizes if set(plan.ops) & set(MATMULS) else ():
            yield from _measure_quantized(shape, group_size, plan)
    for k in dict.fromkeys(shape.k for shape, _ in shapes):
        yield from _measure_producers(k, plan)
    if "w4a16" in plan.ops and TORCH in plan.implementations:
        for shape, group_sizes in shapes:
            for group_size in group_sizes:
                yield from _measure_torch_int4(shape, group_size, plan)


def _measure_producers(k: int, plan: MeasurementPlan) -> Iterator[Measurement]:
    cases: list[_Case] = []
    for op in PRODUCERS:
        if op not in plan.ops:
            continue
        subjects = [Measurement(op, name, k, None, None, None, rows) for rows in plan.rows for name in _library(plan)]
        if (reason := producers.obstacle(op, k)) is not None:
            yield from (dataclasses.replace(one, status="unsupported", reason=reason) for one in subjects)
            continue
        cases += [_Case(one, producers.producer_workload(op, one.rows, k)) for one in subjects]
    yield from _measure(cases, plan, f"producers of K={k}")


def _by_activation_groups(subjects: Sequence[Measurement]) -> tuple[list[Measurement], list[Measurement]]:
    """Those whose activation groups divide K, and the others with the reason."""
    possible, refused = [], []
    for one in subjects:
        size = operands.recipe(one.op)[1].group_size or one.k
        if one.op in WEIGHT_ONLY or one.k % size == 0:
            possible.append(one)
        else:
            reason = f"{one.op}: its activation groups of {size} do not divide K={one.k}"
            refused.append(dataclasses.replace(one, status="unsupported", reason=reason))
    return possible, refused


def _library(plan: MeasurementPlan) -> list[str]:
    return [name for name in plan.implementations if name not in W4A16_ALONE]


def _float_cases(shape: MatmulShape, plan: MeasurementPlan) -> list[_Case]:
    most_rows = operands.random_rows(max(plan.rows), shape.k)
    widest = operands.float_workload(most_rows, operands.float_weights(shape.k, shape.n))
    # The reference is XLA.
    names = [XLA, *[name for name in _library(plan) if name != REFERENCE]]
    return [
        _Case(Measurement(BASELINE, name, shape.k, shape.n, None, None, rows, shape.name), widest.of_first(rows))
        for rows in plan.rows
        for name in names
    ]


def _measure_quantized(shape: MatmulShape, group_size: int, plan: MeasurementPlan) -> Iterator[Measurement]:
    """The quantised matmuls with one weight, all implementations of one M beside each other."""
    make = functools.partial(operands.random_weights, shape.k, shape.n, symmetric=plan.symmetric)
    plain = make(group_size=group_size)
    cases: list[_Case] = []
    for op in MATMULS:
        if op not in plan.ops:
            continue
        names = [*_library(plan), *[PAIRS] * (op == "w4a16" and PAIRS in plan.implementations)]
        subjects = [
            Measurement(op, name, shape.k, shape.n, group_size, plan.symmetric, rows, shape.name)
            for rows in plan.rows
            for name in names
        ]
        possible, refused = _by_activation_groups(subjects)
        yield from refused
        if possible:
            weights = make(group_size=group_size, bits=8) if op == "w8a16" else operands.weights_for(op, plain)
            cases += _matmul_cases(possible, weights)
    yield from _measure(cases, plan, f"{shape} groups of {group_size}")


def _measure_torch_int4(shape: MatmulShape, group_size: int, plan: MeasurementPlan) -> Iterator[Measurement]:
    weights = operands.random_weights(shape.k, shape.n, group_size=group_size, symmetric=plan.symmetric)
    for rows in plan.rows:
        workload = operands.matmul_workload("w4a16", operands.random_rows(rows, shape.k), weights)
        sizes = (shape.k, shape.n, group_size, plan.symmetric, rows, shape.name)
        yield _measure_torch(Measurement("w4a16", TORCH, *sizes), workload, plan)


def _matmul_cases(subjects: Sequence[Measurement], weights: Sequence[QuantizedWeight]) -> list[_Case]:
    """The subjects are of one operation; all implementations that read one layout share the operands of one M."""
    [op] = {one.op for one in subjects}
    rows = operands.random_rows(max(one.rows for one in subjects), weights[0].num_inputs)
    laid_out = {name: operands.in_layout_for(name, weights) for name in {one.implementation for one in subjects}}
    by_layout = {mine[0].layout: mine for mine in laid_out.values()}
    # Compiling the reference takes longer than anything else, so it computes the most rows alone.
    widest = {layout: operands.matmul_workload(op, rows, mine) for layout, mine in by_layout.items()}
    return [_Case(one, widest[laid_out[one.implementation][0].layout].of_first(one.rows)) for one in subjects]


def _measure(cases: Sequence[_Case], plan: MeasurementPlan, what: str) -> Iterator[Measurement]:
    """Compiles all cases, then times one after the other."""
    if not cases:
        return
    say(f"{what}: {len(cases)} programs ...")
    errors = (NotImplementedError, ValueError, jax.errors.JaxRuntimeError)
    programs = run_in_threads([case.compile for case in cases], errors=errors)
    for case, program in zip(cases, programs, strict=True):
        if isinstance(program, Exception):
            yield _without_time(case.subject, program)
            continue
        try:
            yield _timed(case, program, plan.repeats)
        except jax.errors.JaxRuntimeError as error:
            yield _without_time(case.subject, error)


def _timed(case: _Case, program: jax.stages.Compiled, repeats: int) -> Measurement:
    workload = case.workload
    out = program(workload.shared, list(workload.copies))[0]
    timing = time_calls(program, workload.shared, workload.copies, repeats=repeats)
    return _judged(
        dataclasses.replace(
            case.subject,
            microseconds=timing.microseconds,
            clock=timing.clock,
            num_bytes=workload.num_bytes(out),
            num_operations=workload.num_operations,
        ),
        workload.relative_error(out),
        workload.error_bound,
    )


def _judged(subject: Measurement, error: float, bound: float) -> Measurement:
    if error <= bound:  # false for NaN
        return dataclasses.replace(subject, relative_error=error)
    reason = f"relative error {error:.3g} against the float32 reference; the bound is {bound}"
    known = error if math.isfinite(error) else None
    return dataclasses.replace(subject, status="wrong", reason=reason, relative_error=known)


def _without_time(subject: Measurement, error: Exception) -> Measurement:
    status: Status = "unsupported" if isinstance(error, NotImplementedError) else "failed"
    first_line = next(iter(str(error).splitlines()), "") or type(error).__name__
    return dataclasses.replace(subject, status=status, reason=first_line)


def _measure_torch(subject: Measurement, workload: Workload, plan: MeasurementPlan) -> Measurement:
    """Torch's kernel is a yardstick: whatever goes wrong there is a reason to leave it out, not to stop."""
    try:
        out, microseconds = torch_int4.measure(workload.shared, workload.copies, repeats=plan.repeats)
    except Exception as error:
        return _without_time(subject, NotImplementedError(f"torch: {error}"))
    found = dataclasses.replace(
        subject,
        microseconds=microseconds,
        clock="kernel",
        num_bytes=workload.num_bytes(out),
        num_operations=workload.num_operations,
    )
    return _judged(found, workload.relative_error(out), _TORCH_BOUND)
