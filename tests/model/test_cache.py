"""What a cache takes, by its format, and which formats there are where."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from pallas_kernels import Int8Cache
from qspec_jax import UsageError
from qspec_jax.model.cache import KV_FORMATS, KV_INT8, KV_OF_MODEL, KVCache, LayerCache, position_bytes, row_bytes
from qspec_jax.model.config import KV_NAMES, ModelConfig
from qspec_jax.model.placement import kv_format
from tests import tiny

CONFIG = ModelConfig.from_hf(tiny.BASE_HF_CONFIG)
LLAMA_8B = dataclasses.replace(CONFIG, num_layers=32, num_heads=32, num_kv_heads=8, head_dim=128)


@pytest.mark.parametrize("config", [CONFIG, LLAMA_8B], ids=["tiny", "8B"])
@pytest.mark.parametrize("kv", KV_FORMATS)
@pytest.mark.parametrize("stacked", [True, False], ids=["stacked", "unrolled"])
def test_bytes_are_those_of_the_arrays(config, kv, stacked):
    sizes = {"batch": 3, "capacity": 1024, "dtype": jnp.bfloat16, "stacked": stacked, "kv": kv}
    cache = jax.eval_shape(lambda: KVCache.create(config, **sizes))
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(cache.layers))
    one = {"dtype_bytes": 2, "kv": kv}
    assert size == 3 * (1024 * position_bytes(config, **one) + row_bytes(config, **one))
    assert cache.capacity == 1024
    first = cache.layers if stacked else cache.layers[0]
    assert isinstance(first, Int8Cache if kv == KV_INT8 else LayerCache)


def test_int8_takes_about_half_of_bfloat16():
    whole, half = (4096 * position_bytes(LLAMA_8B, dtype_bytes=2, kv=kv) for kv in KV_FORMATS)
    assert (half + row_bytes(LLAMA_8B, dtype_bytes=2, kv=KV_INT8)) / whole < 0.56


@pytest.mark.parametrize(
    ("kv", "options", "expected"),
    [
        ("model", {}, KV_OF_MODEL),
        ("bf16", {}, KV_OF_MODEL),
        ("int8", {}, KV_INT8),
        ("int8", {"dtype": "float32"}, KV_INT8),
        ("model", {"dtype": "float32"}, KV_OF_MODEL),
        ("bf16", {"dtype": "float32"}, "this one runs in float32: use kv='model'"),
        ("int4", {}, f"kv='int4' is not supported; use one of {', '.join(KV_NAMES)}"),
        ("INT8", {}, "is not supported"),
        ("", {}, "is not supported"),
        (None, {}, "kv=None is not supported"),
        (8, {}, "kv=8 is not supported"),
        (["int8"], {}, "is not supported"),
    ],
    ids=str,
)
def test_a_format_is_known_or_refused_with_those_that_are(kv, options, expected):
    given = {"dtype": "bfloat16", **options}
    if expected in KV_FORMATS:
        assert kv_format(kv, **given) == expected
        return
    with pytest.raises(UsageError) as refused:
        kv_format(kv, **given)
    assert expected in str(refused.value)
