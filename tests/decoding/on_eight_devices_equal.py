"""Tokens of a mesh: those of plain decoding on it whatever drafts, and what one device would choose as well.

Run by ``test_on_mesh.py``, in a process with eight devices.
"""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from qspec_jax.evaluation.scores import logits_function
from qspec_jax.model.precision import Precision
from tests import tiny
from tests.decoding.on_mesh import PROMPTS, SAMPLED, model, tokens

BATCH = {"batch_size": 4, "max_new_tokens": 20, "max_seq_len": 64}
IS_GREEDY = [params.temperature == 0 and params.repetition_penalty == 1 for params in SAMPLED]


@pytest.mark.parametrize(
    ("mesh", "family", "scan_layers", "draft", "sampling", "is_greedy"),
    [
        pytest.param(
            *("model=2", "qwen3_qk_norm", True, "w4a4", None, [True] * len(PROMPTS)), marks=pytest.mark.contract
        ),
        ("model=8", "window_and_biases", False, "w4a8", SAMPLED, IS_GREEDY),
        ("data=2,model=4", "smollm2_tied", True, "w4a4", SAMPLED, IS_GREEDY),
    ],
)
def test_qspec_equals_plain(mesh, family, scan_layers, draft, sampling, is_greedy):
    on_mesh = tiny.laid_out(model(family, mesh, scan_layers=scan_layers), draft=draft)
    options = {**BATCH, "sampling": sampling}
    plain = tokens(on_mesh.generate(PROMPTS, mode="w4a16", **options))
    drafted = on_mesh.generate(PROMPTS, mode="qspec", draft=draft, **options)
    assert tokens(drafted) == plain
    assert np.mean([result.stats.acceptance_rate for result in drafted]) > 0.5
    assert_chosen_by(model(family, scan_layers=scan_layers), plain, is_greedy)


def assert_chosen_by(one_device, plain, is_greedy):
    """Teacher forcing: each greedy token is the most likely one, but for sums in another order."""
    logits_of = logits_function(one_device, Precision.W4A16)
    for prompt, new, greedy in zip(PROMPTS, plain, is_greedy, strict=True):
        text = [*prompt, *new]
        padded = jnp.asarray([text + [0] * (64 - len(text))], jnp.int32)
        logits = np.asarray(logits_of(padded))[0, len(prompt) - 1 : len(text) - 1]
        behind = logits.max(-1) - logits[np.arange(len(new)), new]
        assert not greedy or behind.max() <= 1e-3 * np.abs(logits).max()


def test_a_row_alone_has_the_tokens_that_it_has_beside_others():
    """In bfloat16, where a sum in another order is another number."""
    on_mesh = model("llama2", "data=2,model=4", dtype="bfloat16")
    together = tokens(on_mesh.generate(PROMPTS, mode="w4a16", **BATCH))
    alone = [on_mesh.generate([one], mode="w4a16", **BATCH)[0] for one in PROMPTS[:3]]
    assert tokens(alone) == together[:3]
