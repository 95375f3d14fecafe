"""A conversation of two turns, with a system message, shown as it comes: ``python docs/examples/chat.py``."""

import qspec_jax

model = qspec_jax.load()  # the demo model, SmolLM2-135M-Instruct
session = model.session(max_seq_len=256)  # of each turn it reads what is new
messages = [{"role": "system", "content": "You answer in one sentence."}]
for question in ("Why is the sky blue?", "And at sunset?"):
    print(f"> {question}")
    messages.append({"role": "user", "content": question})
    answer = ""
    for piece in session.stream(messages, max_new_tokens=48):
        if isinstance(piece, str):  # text comes first, the result with its figures last
            print(piece, end="", flush=True)
            answer += piece
        else:
            stats, read = piece.stats, len(piece.prompt_token_ids) - piece.stats.reused_prompt_tokens
            print(f"\n  [{read} tokens read, {stats.num_tokens} made, {stats.tokens_per_cycle:.2f} per cycle]")
    messages.append({"role": "assistant", "content": answer})
