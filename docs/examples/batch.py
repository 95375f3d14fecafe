"""Many prompts in two rows: some greedy, some sampled, one that is too long, with the figures of the whole run."""

import qspec_jax

model = qspec_jax.load()
batch = model.pipeline(batch_size=2, max_seq_len=128)
batch.submit("Name three fruits.", max_new_tokens=32)
batch.submit("Name three fruits.", max_new_tokens=32, sampling={"temperature": 0.8, "top_p": 0.95, "seed": 7})
batch.submit("word " * 1000)  # does not fit: it fails alone
for result in batch.results():
    if len(batch) == 0 and batch.totals.requests < 3:  # more may be submitted while results are taken
        batch.submit("What is a prime number?", max_new_tokens=32)
    print(result.error or result.text)
totals = batch.totals
print(f"{totals.requests} requests, {totals.tokens} tokens, {totals.tokens_per_s:.0f} tokens/s")
print(f"occupancy {totals.occupancy:.0%}, {model.num_compilations} programs")
