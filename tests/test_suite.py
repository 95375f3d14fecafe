"""How the tests themselves are run."""

from __future__ import annotations

import dataclasses
import inspect
import sys
import types
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import jaxtyping
import numpy as np
import pytest
from jaxtyping import Array, Float, Int8

import pallas_kernels
from qspec_jax import ModelConfig, texts
from qspec_jax.bench import __main__ as bench
from tests import annotations, tiny
from tests.conftest import THOROUGH
from tests.gpu import figures, torch_serving


@pytest.mark.contract
def test_a_contract_is_compiled_as_users_compile():
    tiny.decoder()  # whose weights are made by programs that compile quickly
    assert jax.config.read("jax_disable_most_optimizations") is False


def test_all_else_is_compiled_quickly_on_a_cpu():
    quickly = jax.default_backend() == "cpu" and not THOROUGH
    assert jax.config.read("jax_disable_most_optimizations") is quickly


@jaxtyping.jaxtyped(typechecker=None)
def _scaled(x: Float[Array, "rows k"], scale: Float[Array, " rows"], *, name: str = "x") -> Float[Array, "rows k"]:
    return (x * scale[:, None])[: 1 + len(name)]


@jaxtyping.jaxtyped(typechecker=None)
@dataclasses.dataclass
class _Sized:
    size: int
    codes: Int8[Array, " rows"] | None = None


@jaxtyping.jaxtyped(typechecker=None)
def _counted(count: int) -> str:
    return "one" if count == 1 else count  # pyrefly: ignore[bad-return]


def _multiply_by(factor):
    @jaxtyping.jaxtyped(typechecker=None)
    def multiply(x: Float[Array, " rows"], again: int = factor) -> Float[Array, " rows"]:
        return x * factor * again if again else "nothing"  # pyrefly: ignore[bad-return]

    return multiply


ASYNC = inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
X = np.ones((2, 3), np.float32)


@pytest.mark.parametrize(
    "call",
    [
        lambda: _scaled(jnp.asarray(X), jnp.ones(3)),  # an axis of two sizes
        lambda: _scaled(jnp.asarray(X, int), jnp.ones(2)),
        lambda: _scaled(jnp.asarray(X), scale=jnp.ones((2, 1))),
        lambda: _scaled(X, jnp.ones(2)),
        lambda: _scaled(jnp.asarray(X), jnp.ones(2), name=3),
        lambda: _scaled(jnp.asarray(X), jnp.ones(2), name=""),  # what comes back
        lambda: _Sized("2"),
        lambda: _Sized(2, codes=jnp.ones(2)),
        lambda: _counted("1"),
        lambda: _counted(2),
        lambda: ModelConfig.from_hf(7),
        lambda: pallas_kernels.rms_norm(X, jnp.ones(3), epsilon=1e-5),  # within the operation's own check
    ],
)
def test_annotations_are_enforced(call):
    with pytest.raises(jaxtyping.TypeCheckError):
        call()


def test_a_function_within_a_function_is_checked_each_time_that_it_is_made():
    """With the closure and the default values of then, though what checks it is written but once."""
    made = [_multiply_by(factor) for factor in (2, 3)]
    assert [multiply(jnp.ones(2)).tolist() for multiply in made] == [[4, 4], [9, 9]]
    for multiply in made:
        for wrong in ((jnp.ones((2, 2)),), (jnp.ones(2), "2"), (jnp.ones(2), 0)):
            with pytest.raises(jaxtyping.TypeCheckError):
                multiply(*wrong)
    assert [code.co_name for code, _ in annotations._checked_within].count("multiply") == 1


def test_what_fits_its_annotations_passes():
    for rows in (2, 1):  # what an axis was before is forgotten
        np.testing.assert_array_equal(_scaled(jnp.asarray(X[:rows]), jnp.ones(rows)), X[:rows])
    assert _Sized(2, jnp.ones(2, jnp.int8)).size == 2
    assert _counted(1) == "one"


def test_all_that_is_annotated_is_checked():
    """Of the functions of the packages' modules that are imported, none is as it was written."""
    modules = [module for name, module in sys.modules.items() if name.split(".")[0] in ("qspec_jax", "pallas_kernels")]
    functions = {
        function
        for module in modules
        for function in vars(module).values()
        if isinstance(function, types.FunctionType) and function.__module__ == module.__name__
    }
    assert len(functions) > 50
    # jaxtyping's hook leaves what is asynchronous alone; anything is allowed where names are of another scope.
    checkable = [f for f in functions if set(f.__annotations__.values()) - {Any} and not f.__code__.co_flags & ASYNC]
    assert [f.__qualname__ for f in checkable if not hasattr(f, "__wrapped__")] == []


# Of the modules that figures.GROUPS runs.
PARSERS = {
    "qspec_jax.bench": bench.build_parser,
    "qspec_jax.texts": texts.build_parser,
    "tests.gpu.torch_serving": torch_serving.build_parser,
}


@pytest.mark.parametrize("group", figures.GROUPS)
def test_the_commands_of_the_figures_that_are_aimed_at_are_understood(group):
    for command in figures.GROUPS[group].commands:
        module, *arguments = figures.arguments_of(command, "measured.json", Path("folder"))
        PARSERS[module]().parse_args(arguments)


def test_a_figure_needs_one_measurement():
    rows = [
        {"part": "step", "batch": batch, "context": 512, "status": "ok", "milliseconds": 2.5} for batch in (1, 2, 2)
    ]
    results = figures.Results([{"measurements": rows}])
    assert results.ms("step", 1) == 2.5
    for batch in (2, 3):
        with pytest.raises(LookupError, match="measurements with"):
            results.ms("step", batch)
