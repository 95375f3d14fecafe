"""A plan that no mode has: drafts at the verify precision. It shows the most that a draft length can yield."""

import qspec_jax
from qspec_jax import DecodingPlan, Precision

PROMPTS = ["Why is the sky blue?", "Name three fruits."]


def run(model, plan):
    batch = model.pipeline(plan, batch_size=2, max_seq_len=128)
    for prompt in PROMPTS:
        batch.submit(prompt, max_new_tokens=32)
    return [result.token_ids for result in batch.results()], batch.totals.tokens_per_cycle


model = qspec_jax.load()
best, most = run(model, DecodingPlan(verify=Precision.W4A16, draft=Precision.W4A16, draft_length=3))
drafted, tokens_per_cycle = run(model, DecodingPlan(verify=Precision.W4A16, draft=Precision.W4A4, draft_length=3))
print(f"{tokens_per_cycle:.2f} tokens per cycle with W4A4 drafts; {most:.2f} with drafts that are always right")
assert drafted == best  # whatever drafts, the text is that of the verify precision
assert most >= tokens_per_cycle
