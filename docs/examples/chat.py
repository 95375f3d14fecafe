"""A conversation of two turns, with a system message, shown as it comes: ``python docs/examples/chat.py``."""

import qspec_jax

model = qspec_jax.load()  # the demo model, SmolLM2-135M-Instruct
messages = [{"role": "system", "content": "You answer in one sentence."}]
for question in ("Why is the sky blue?", "And at sunset?"):
    print(f"> {question}")
    messages.append({"role": "user", "content": question})
    answer = ""
    for piece in model.stream(messages, max_new_tokens=48, max_seq_len=256):
        if isinstance(piece, str):  # text comes first, the result with its figures last
            print(piece, end="", flush=True)
            answer += piece
        else:
            print(f"\n  [{piece.stats.num_tokens} tokens, {piece.stats.tokens_per_cycle:.2f} per cycle]")
    messages.append({"role": "assistant", "content": answer})
