"""Log-probabilities of a text, by the text of each token."""

from __future__ import annotations

from qspec_jax.engine.answer import Piece
from qspec_jax.serving.asked import Kind
from qspec_jax.serving.scores import Scores
from qspec_jax.tokenizer.tokenizer import Tokenizer


class Halves(Tokenizer):
    """A tokenizer in which tokens from 10 on are pieces of characters."""

    def __init__(self):
        pass

    def stream_decoder(self):
        return self

    def push(self, tokens):
        return "".join(map(self.token_text, tokens))

    def token_text(self, token):
        return "\ufffd" if token >= 10 else "abcdefghij"[token]


def test_of_tokens_of_one_text_the_most_likely_is_told_and_the_chosen_one_always_is():
    scores = Scores(Halves(), num_top=3)
    tops = [{11: -0.5, 3: -1.0, 12: -3.0}, {12: -4.0, 2: -0.25, 11: -2.0}]
    piece = Piece("\ufffda", [11, 0], [-0.5, -7.0], tops, finished=True)
    found = scores.to_dict(scores.take(piece), Kind.TEXT)["top_logprobs"]
    assert found == [{"\ufffd": -0.5, "d": -1.0}, {"c": -0.25, "\ufffd": -2.0, "a": -7.0}]
    assert [list(one) for one in found] == [["\ufffd", "d"], ["c", "\ufffd", "a"]]
