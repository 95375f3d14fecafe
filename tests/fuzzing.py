"""How long the tests that make up their inputs run: in CI a few, the same each time; ``QSPEC_JAX_FUZZ=N`` tries N."""

from __future__ import annotations

import os

from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

_EXAMPLES = int(os.environ.get("QSPEC_JAX_FUZZ", "0"))

# Derandomised, a test tries the same inputs on every machine; a longer run tries others each time.
fuzzed = settings(
    max_examples=_EXAMPLES or 25,
    derandomize=not _EXAMPLES,
    database=None,
    deadline=None,
    suppress_health_check=list(HealthCheck),
)

ODD_NUMBERS = st.one_of(
    st.sampled_from([0, 1, -1, 2, 48, 64, 2**31, 2**32 - 1, 2**63, -(2**63), 10**30, 0.0, -0.0, 1e-45, 1e39, 1e300]),
    st.sampled_from([float("nan"), float("inf"), float("-inf"), 0.5, 4.0]),
    st.integers(-5, 200),
    st.floats(width=32),
)
ODD_TEXTS = st.one_of(
    st.sampled_from(["", "default", "none", "linear", "yarn", "llama3", "gptq", "</s>", "\ud800", "\0", "a" * 300]),
    st.text(max_size=8),
)
# Whatever JSON can say, as Python reads it.
JSON_VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), ODD_NUMBERS, ODD_TEXTS),
    lambda inner: st.one_of(st.lists(inner, max_size=4), st.dictionaries(ODD_TEXTS, inner, max_size=4)),
    max_leaves=8,
)
