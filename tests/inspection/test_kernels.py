"""The self-test compares every operation, and nothing that a kernel does wrong escapes it or ends it."""

from __future__ import annotations

import collections
import dataclasses
import functools
import importlib
import inspect
import json
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels
from pallas_kernels import PartialSums, QuantizedActivation, QuantizedWeight
from pallas_kernels.accuracy import allowed_error, differing_codes
from pallas_kernels.dispatch import BACKENDS, Backend, operations
from qspec_jax import info
from qspec_jax.inspection.kernel_case import DEMO
from qspec_jax.inspection.kernel_cases import kernel_cases
from qspec_jax.inspection.self_test import Outcome, all_cases, run_cases, verdict
from qspec_jax.inspection.text import WIDTH, outcome_line, self_test_text
from qspec_jax.model.config import GROUP_SIZES, WEIGHT_BITS
from qspec_jax.model.linear import WeightFormat
from tests.pallas_kernels.kernel_cases import random_nested_weight, random_weight

run = functools.partial(run_cases, with_interpreted=False, most_seconds=60)


@pytest.fixture(scope="module")
def gate():
    """A case that is cheap: the gated unit of two small tokens."""
    case = next(case for case in kernel_cases(DEMO, "bfloat16") if case.op == "swiglu")
    operands = lambda: (jnp.linspace(-4, 4, 2 * 64, dtype=jnp.bfloat16).reshape(2, 64),)  # noqa: E731
    return dataclasses.replace(case, operands=operands)


@pytest.fixture
def backend(monkeypatch):
    """Adds an implementation of the gated unit, which runs on this device."""

    def make(function):
        name = "pallas_kernels.swiglu.other"
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(obstacle=lambda: None, swiglu=function))
        monkeypatch.setitem(operations()["swiglu"].modules, "other", name)
        monkeypatch.setitem(BACKENDS, "other", Backend(("cpu",), "a CPU"))

    return make


def right(gate_up):
    return importlib.import_module("pallas_kernels.swiglu.reference").swiglu(gate_up)


def functions():
    """Name to signature of all that run an implementation; what leaves partial sums is what a case calls as well."""
    found = {name: getattr(pallas_kernels, name) for name in pallas_kernels.__all__}
    signatures = {name: inspect.signature(one) for name, one in found.items() if inspect.isfunction(one)}
    others = {"best_layout", "best_layout_for_codes", "rows_alike", "rows_read"}
    others |= {"float_prefill_is_alike", "float_partial_sums", "w4a4_partial_sums", "w4a16_partial_sums"}
    others |= {"w4a4_swiglu_quantize_is_fused", "w4a16_swiglu_is_fused"}
    return {name: one for name, one in signatures.items() if "implementation" in one.parameters and name not in others}


@pytest.fixture(scope="module")
def calls():
    """The arguments of every case at small widths, by function; operands are there."""
    made = collections.defaultdict(list)
    for case in all_cases(small=True):
        made[case.function].append(functions()[case.function].bind(*given(case)[0], **given(case)[1]).arguments)
    return made


def given(case):
    """Positional and named arguments of a case."""
    arguments = []
    patched = SimpleNamespace(**{case.function: lambda *given, **named: arguments.append((given, named))})
    operands = jax.eval_shape(case.operands)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("qspec_jax.inspection.kernel_case.pallas_kernels", patched)
        case.call(operands, "reference")
    return arguments[0]


def test_every_operation_and_function_with_implementations_has_a_case():
    """Of a new operation, whose folder is found by itself, somebody has to say how it is called."""
    cases = all_cases(small=True)
    assert {case.op for case in cases} == operations().keys()
    assert {case.function for case in cases} == functions().keys()
    assert {case.function for case in all_cases()} == functions().keys()
    assert [case.op for case in all_cases(["hadamard"], small=True)] == ["hadamard"]


@pytest.mark.parametrize("function", functions())
def test_every_option_of_a_function_is_given_by_a_case(function, calls):
    """With another value than its default; and of what may be left out, some case does leave it out."""
    for name, parameter in functions()[function].parameters.items():
        if parameter.default is parameter.empty or name == "implementation":
            continue
        values = [arguments.get(name, parameter.default) for arguments in calls[function]]
        is_default = [value is parameter.default or value == parameter.default for value in values]
        assert not all(is_default), f"no case of {function} gives {name}"
        assert any(is_default), f"every case of {function} gives {name}"


@pytest.mark.parametrize("function", functions())
def test_every_form_of_an_array_is_that_of_a_case(function, calls):
    """Partial sums, caches whose heads lie side by side, and activations in 4 and 8 bits of both symmetries."""
    for name, parameter in functions()[function].parameters.items():
        values = [arguments[name] for arguments in calls[function] if name in arguments]
        annotation = str(parameter.annotation)
        if "PartialSums" in annotation:
            assert {isinstance(one, PartialSums) for one in values} == {False, True}, name
        if "*heads" in annotation and name == "keys" and function != "rotate_and_write":
            assert {one.ndim for one in values} == {3, 4}
        if annotation == "QuantizedActivation":
            assert {(one.bits, one.symmetric) for one in values} >= {(8, True), (8, False), (4, True), (4, False)}
            assert {one.num_groups == 1 for one in values} == {False, True}
        if name == "bits":
            assert {*values} == {4, 8}


@pytest.mark.parametrize("function", [name for name, one in functions().items() if "weight" in one.parameters])
def test_every_form_of_a_weight_is_that_of_a_case(function, calls):
    """A form that a model can be stored in; a field that is new there needs cases, and a line here."""
    assert {field.name for field in dataclasses.fields(WeightFormat)} == {"group_size", "symmetric", "bits", "wide"}
    weights = [arguments["weight"] for arguments in calls[function]]
    if function == "float_matmul":
        assert not any(isinstance(weight, QuantizedWeight) for weight in weights)
        return
    groups = {None if one.num_groups == 1 else one.group_size for one in weights}
    assert groups == {*GROUP_SIZES, None}
    assert {one.scale.dtype.name for one in weights} == {"float16", "float32"}
    nested = [one for one in weights if one.low is not None]
    truncated = [one for one in weights if one.truncated]
    kinds = {(one.bits, one.symmetric) for one in weights}
    if function in ("w4a16_matmul", "w4a16_swiglu"):
        assert kinds == {(bits, symmetric) for bits in WEIGHT_BITS for symmetric in (False, True)}
        assert nested
    else:  # of those in 8 bits, drafts read the upper plane
        assert kinds == {(4, False), (4, True)}
        assert truncated
        assert not nested


def test_on_a_cpu_it_says_that_only_the_reference_runs(gate):
    outcomes = list(run([gate]))
    assert [(one.implementation, one.ok) for one in outcomes] == [("reference", True)]
    assert verdict(outcomes).startswith("only the reference (XLA's plain operations) runs on this device")
    assert "no kernel was compared" in self_test_text(outcomes)


@pytest.mark.parametrize(
    ("function", "ok", "problem"),
    [
        (right, True, ()),
        (lambda gate_up: right(gate_up) * 1.02, False, ()),
        (lambda gate_up: right(gate_up) * jnp.nan, False, ()),
        (lambda gate_up: right(gate_up)[:1], False, ("ValueError: ", "TypeCheckError: ")),
        (lambda gate_up: 1 / 0, False, "ZeroDivisionError: division by zero"),
    ],
    ids=["right", "wrong", "nan", "shape", "raises"],
)
def test_a_kernel_is_right_wrong_or_a_line_with_its_error(gate, backend, function, ok, problem):
    backend(function)
    [ours] = [one for one in run([gate]) if one.implementation == "other"]
    assert ours.ok is ok
    assert (ours.problem or "").startswith(problem or "")
    assert (ours.problem is None) is (not problem)
    assert ours.seconds > 0
    assert ("ok  " if ok else "FAIL") in outcome_line(ours)
    assert ("1 of 1 comparisons failed" in verdict([ours])) is not ok


def test_the_interpreter_runs_kernels_of_other_devices(gate):
    outcomes = list(run([gate], with_interpreted=True))
    assert [(one.implementation, one.ok) for one in outcomes] == [("reference", True), ("interpreted triton", True)]
    assert verdict(outcomes) == "2 comparisons, all right: interpreted triton and the reference itself"


def test_a_gate_that_xla_computes_may_round_as_that_of_the_reference():
    """The kernel for TPUs transforms alone, and XLA may round after every operation of a gate."""
    case = next(case for case in kernel_cases(DEMO, "bfloat16") if case.op == "swiglu_hadamard_quantize")
    outcomes = {one.implementation: one for one in run([case], with_interpreted=True)}
    assert [one.ok for one in outcomes.values()] == [True] * 3
    assert outcomes["interpreted tpu"].allowed == outcomes["reference"].allowed
    assert outcomes["interpreted triton"].allowed < 0.01


def test_when_the_time_is_up_the_rest_is_listed(gate):
    outcomes = list(run([gate], most_seconds=0))
    assert [one.ok for one in outcomes] == [None]
    assert "1 were left out, as the time was up" in verdict(outcomes)
    assert "not run, reference: left out: the time was up" in self_test_text(outcomes)
    assert verdict(outcomes).startswith("nothing was compared")


def test_a_device_whose_kernels_were_not_compared_is_not_said_to_have_none(gate, backend):
    backend(right)
    ours = [one for one in run([gate]) if one.implementation == "reference"]
    assert verdict(ours) == "no kernel was compared; the reference's 1 results are within the bounds"


def test_a_long_error_is_one_line():
    failed = Outcome("a", "a", "x" * 70, "bfloat16", "triton", "relative", ok=False, problem="E: " + "y" * 200)
    assert max(map(len, self_test_text([failed]).splitlines())) <= WIDTH
    assert outcome_line(failed).count("\n") == 1


@pytest.mark.parametrize(
    ("change", "error"), [(0, 0.0), (1, 0.25), (3, 0.25), (4, 1.0)], ids=["same", "tie", "rounding", "wrong"]
)
def test_codes_may_differ_by_what_roundings_explain(change, error):
    def codes(first):
        return QuantizedActivation(jnp.asarray([[first, 2, 3, 4]], jnp.int8), jnp.ones((1, 1)), None, bits=8)

    assert differing_codes(codes(1 + change), codes(1), jnp.bfloat16) == error
    assert differing_codes(codes(1 + change), codes(1), jnp.float32) == (error if change < 2 else 1.0)


@pytest.mark.parametrize("op", operations())
def test_every_operation_has_a_bound_below_a_percent(op):
    for dtype in ("float32", "bfloat16", "float16"):
        for name in ("reference", "triton", "mosaic", "another"):
            bound = allowed_error(op, dtype, num_inputs=4096, implementation=name)
            assert 0 < bound < (0.01 if dtype != "float32" else 1e-4)
    assert np.isfinite(allowed_error(op, jnp.float32, num_inputs=1, implementation="triton"))


@pytest.mark.parametrize(
    ("bits", "group_size", "symmetric", "rounds"),
    [(4, 32, False, True), (4, 128, False, False), (4, 32, True, False), (4, 512, False, False), (8, 32, False, False)],
)
def test_exact_sums_of_triton_are_held_to_less_than_rounded_weights(bits, group_size, symmetric, rounds):
    make = random_weight if bits == 4 else random_nested_weight
    weight = make(16, 512, group_size, symmetric=symmetric)
    bound = functools.partial(allowed_error, "w4a16_matmul", num_inputs=512)
    exact, rounded = (bound("bfloat16", implementation=name, weight=weight) for name in ("reference", "mosaic"))
    assert exact < rounded
    assert bound("bfloat16", implementation="triton", weight=weight) == (rounded if rounds else exact)
    assert bound("bfloat16", implementation="triton") == exact
    assert bound("float32", implementation="triton", weight=weight) == bound("float32", implementation="reference")


@pytest.mark.parametrize(("function", "code"), [(right, 0), (lambda gate_up: right(gate_up) * 2, 1)])
def test_the_command_prints_a_report_and_an_exit_code(gate, backend, function, code, monkeypatch, tmp_path, capsys):
    monkeypatch.setattr("qspec_jax.inspection.self_test.all_cases", lambda *_, **__: [gate])
    backend(function)
    assert info.main(["--self-test", "--output", str(tmp_path / "report.json")]) == code
    shown = capsys.readouterr().out
    assert ("FAIL swiglu, other, bfloat16" in shown) is bool(code)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["ok"] is not bool(code)
    assert report["machine"]["versions"]["jax"]
    assert [one["implementation"] for one in report["comparisons"]] == ["other", "reference"]
    assert report["compared_with"] == "the reference on cpu"
    assert info.main(["--self-test", "--json"]) == code
    assert json.loads(capsys.readouterr().out)["verdict"] == report["verdict"]


@pytest.mark.parametrize("beside", [(), ("--op", "swiglu")])
def test_an_unknown_operation_is_refused(beside, capsys):
    assert info.main(["--self-test", *beside, "--op", "softmax"]) == 2
    assert "--op softmax is no operation; use w4a16_matmul, " in capsys.readouterr().err
