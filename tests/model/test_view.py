"""What a pass reads: the views that there are, and that readers keep to them."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from qspec_jax.errors import UsageError
from qspec_jax.model.config import ModelConfig
from qspec_jax.model.precision import Precision
from qspec_jax.model.view import View
from tests import tiny

TOKENS = jnp.asarray([[1, 5, 9, 40, 7, 3, 11, 2]], jnp.int32)


def logits(decoder, view, tokens=TOKENS):
    return tiny.logits(decoder, tokens, view, slots=16)


@pytest.mark.parametrize("precision", Precision)
def test_a_precision_names_a_view_and_the_view_its_precision(precision):
    view = View.of(precision)
    assert View.of(view) is view
    assert (view.precision, view.name) == (precision, precision.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"weight_bits": 2}, "weight_bits=2 is not supported; use 4 or 8 or None"),
        ({"weight_bits": 8, "activation_bits": 8}, "activation_bits=8 needs weight_bits=4"),
        ({"activation_bits": 16}, "activation_bits=16 is not supported; use 4 or 8 or None"),
        ({"head_bits": 8}, "head_bits=8 is not supported; use 4 or None"),
        ({"weight_bits": None, "activation_bits": 8}, "activation_bits=8 needs weight_bits=4"),
        ({"cache_window": 0}, "cache_window=0 must be at least 1"),
        ({"cache_full_below": -1}, "cache_full_below=-1 must be at least 0"),
    ],
)
def test_a_view_that_is_not_there_is_refused_with_those_that_are(options, message):
    with pytest.raises(UsageError, match=message):
        View(**options)


def test_the_narrower_window_counts():
    assert View().window(None) is None
    assert View().window(7) == 7
    assert View(cache_window=5).window(None) == View(cache_window=5).window(7) == 5
    assert View(cache_window=9).window(7) == 7
    assert View(activation_bits=8, cache_window=9).name == "w4a8/9"


def test_a_window_of_the_cache_is_read_as_that_of_a_model_is():
    windowed = ModelConfig.from_hf(
        {**tiny.BASE_HF_CONFIG, "architectures": ["MistralForCausalLM"], "sliding_window": 3}
    )
    expected = logits(tiny.decoder(windowed), Precision.W4A16)
    found = logits(tiny.decoder(), View(cache_window=3))
    assert np.array_equal(found, expected)
    everything = logits(tiny.decoder(), Precision.W4A16)
    assert np.array_equal(found[:, :3], everything[:, :3])
    assert not np.allclose(found[:, 3:], everything[:, 3:], atol=1e-3)
    assert np.array_equal(logits(tiny.decoder(), View(cache_window=8)), everything)


@pytest.mark.parametrize("name", ["weight_bits", "activation_bits", "cache_window", "cache_budget", "cache_full_below"])
@pytest.mark.parametrize("value", ["256", 256.0, True, np.array([256, 512]), 2**40], ids=str)
def test_a_field_that_is_no_whole_number_is_refused(name, value):
    with pytest.raises(UsageError, match=rf"^view: {name}.* (must be|is not supported)"):
        View(**{name: value})


def test_a_field_may_be_a_number_of_numpy_and_nothing_else_is_a_view():
    assert View(cache_window=np.int64(256)) == View(cache_window=256)
    with pytest.raises(UsageError, match="'w4a8' is no view"):
        View.of("w4a8")
