"""On a Hopper GPU, at the shapes of Llama-3-8B: a pass that is padded to whole tiles of rows changes no bit."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.backends import early_launch
from qspec_jax.bench.decode.parts import Setting, context_state
from qspec_jax.decoding import speculative
from qspec_jax.decoding.loop_settings import launches_early
from qspec_jax.model.decoder import Decoder
from tests.gpu.serving import few_layers

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
MOST, CONTEXT, CAPACITY, CYCLES = 16, 600, 1024, 24
PLANS = {
    "plain": {"mode": "w4a16"},
    "qspec": {"mode": "qspec", "draft_length": 3},
    "budget": {"mode": "qspec", "draft_length": 3, "draft_context": 256},
}


@pytest.fixture(scope="module", params=["model", "int8"])
def model(request):
    return few_layers(kv=request.param)


@pytest.mark.parametrize("name", PLANS)
def test_rows_have_the_bits_that_they_have_among_others_which_need_no_padding(name, model):
    """Tokens, caches and chosen blocks, after as many cycles. Of 9 rows a verification has 36, which become 40."""
    plan = model.plan(**PLANS[name])
    model.programs.lay_out_weights(plan)

    def after_cycles(rows):
        def begun(decoder: Decoder):
            state = context_state(decoder, Setting(MOST, CONTEXT, CAPACITY), num_blocks=plan.num_blocks)
            lengths = state.cache.lengths - 31 * jnp.arange(MOST, dtype=jnp.int32)
            state = dataclasses.replace(state, cache=state.cache.with_lengths(lengths))
            return jax.tree.map(lambda array: array[:rows], state)

        run = model.programs.repetition(plan, begun, advance=speculative.cycle)
        return run(begun(model.decoder), CYCLES)

    if early_launch.is_supported() and jax.__version_info__ >= (0, 12):
        sizes = {"batch": 12, "capacity": CAPACITY, "num_blocks": plan.num_blocks}
        assert launches_early(model.decoder, plan, jax.eval_shape(lambda: model.decoder.create_cache(**sizes)))
    among_all = after_cycles(MOST)
    assert np.all(np.asarray(among_all.num_tokens) > CYCLES)
    for rows in (12, 9):
        expected = jax.tree.map(lambda array, rows=rows: array[:rows], among_all)
        jax.tree.map(np.testing.assert_array_equal, after_cycles(rows), expected)
