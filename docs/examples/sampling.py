"""Two samples of a prompt, with and without drafts: a seed gives the same text either way."""

import qspec_jax
from qspec_jax import SamplingParams

model = qspec_jax.load()
sampling = SamplingParams(temperature=0.8, top_p=0.95, seed=1)
drafted = model.generate("Name a colour.", sampling=sampling, num_samples=2, max_new_tokens=64)
plain = model.generate("Name a colour.", mode="w4a16", sampling=sampling, num_samples=2, max_new_tokens=64)
for with_drafts, without in zip(drafted, plain, strict=True):
    print(repr(with_drafts.text), f"{with_drafts.stats.tokens_per_cycle:.2f} tokens per cycle")
    assert with_drafts.token_ids == without.token_ids
