"""Letters of the mailbox kernels on one GPU: those of other devices were written before, theirs are arrays beside."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import PartialSums
from tests.pallas_kernels.kernel_cases import random_rows

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(jax.default_backend() != "gpu", reason="needs an NVIDIA GPU"),
]
mailbox = pytest.importorskip("pallas_kernels.backends.mosaic.mailbox")
# Devices, this one, tokens of the letter and of the longest one, parts, dtype, most blocks.
CASES = [
    (2, 0, 1, 4, 1, jnp.bfloat16, 1024),
    (2, 1, 4, 4, 3, jnp.bfloat16, 1024),
    (3, 1, 5, 8, 2, jnp.bfloat16, 7),  # blocks of several tiles, the last one cut off
    (8, 5, 3, 3, 4, jnp.float16, 1024),
    (4, 3, 2, 2, 1, jnp.float32, 5),
]
WIDTH, EARLIER = 1536, (0, 1, 6)  # letters that were sent before


def as_words(values: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(values).view(np.int32).reshape(-1)


def packets(words: np.ndarray, number: int) -> np.ndarray:
    """Two words to a packet of four, each of them before the number."""
    numbers = np.full(words.shape, number, np.int32)
    return np.stack([words, numbers], axis=-1).reshape(-1)


class Case:
    def __init__(self, case, monkeypatch):
        self.count, self.device, self.tokens, longest, self.parts, self.dtype, most = case
        monkeypatch.setattr(mailbox, "_MOST_BLOCKS", most)
        self.letters = mailbox.Letters(self.count, longest * WIDTH, jnp.dtype(self.dtype))
        assert (self.letters.tiles_of_block > 1) == (most < 1024)

    def memory(self, letters_of_others: dict[int, np.ndarray], earlier: int) -> np.ndarray:
        """With the next letter of each other device, and so many letters counted."""
        words = np.zeros(self.letters.num_bytes // 4, np.int32)
        words[: self.letters.num_blocks] = earlier
        for device, letter in letters_of_others.items():
            first = self.place(device, earlier + 1)
            words[first : first + 2 * letter.size] = packets(letter, earlier + 1)
        return words

    def place(self, device: int, number: int) -> int:
        """The first word of a letter."""
        letter = number % 2 * self.count + device
        return (self.letters.bytes_of_counts + letter * self.letters.bytes_of_letter) // 4

    def program(self, method: str):
        """What a method of a mailbox returns, the mailbox after it, and what is in those of the other devices."""

        def program(own, memory, others):
            memory, others = jax.new_ref(memory), [jax.new_ref(other) for other in others]
            addresses = jax.new_ref(jnp.zeros((self.count + 1, 2), jnp.int32))

            def find(memory, addresses, *others):
                places = [*others[: self.device], memory, *others[self.device :]]
                types = [mailbox._SCALAR, *[mailbox.plgpu.RefType()] * (1 + len(places))]
                mailbox.inline(mailbox._write_addresses, jnp.int32(self.device), addresses, *places, types=types)

            mailbox.plgpu.kernel(find, grid=(1,), grid_names=("block",), compiler_params=mailbox._lanes())(
                memory, addresses, *others
            )
            box = mailbox.Mailbox("model", self.letters, memory, addresses)
            found = getattr(box, method)(own)
            return found, memory[...], [other[...] for other in others]

        compiled = jax.jit(program)

        def run(own, memory: np.ndarray):
            empty = [jnp.zeros_like(memory) for _ in range(self.count - 1)]
            found, memory, others = compiled(own, jnp.asarray(memory), empty)
            return np.asarray(found), np.asarray(memory), [np.asarray(other) for other in others]

        return run

    def check_sent(self, words: np.ndarray, before: np.ndarray, after: np.ndarray, others, earlier: int):
        """The letter lies in all other mailboxes, nothing else does, and it was counted by the blocks that sent it."""
        first = self.place(self.device, earlier + 1)
        blocks = -(-words.size // (self.letters.tiles_of_block * self.letters.words_of_tile))
        expected = before.copy()
        expected[:blocks] += 1
        np.testing.assert_array_equal(after, expected)
        sent = slice(first, first + 2 * words.size)
        reached = first + 2 * blocks * self.letters.tiles_of_block * self.letters.words_of_tile
        for other in others:
            np.testing.assert_array_equal(other[sent], packets(words, earlier + 1))
            other = other.copy()
            other[first:reached] = 0  # with what the last block sends beyond the end
            assert not other.any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_sums_of_devices_are_added_in_their_order_and_sent_to_all(case, monkeypatch):
    case = Case(case, monkeypatch)
    rows = functools.partial(random_rows, dtype=case.dtype)
    theirs = {
        device: np.asarray(rows(case.tokens, WIDTH, seed=device))
        for device in range(case.count)
        if device != case.device
    }
    parts = jnp.stack([random_rows(case.tokens, WIDTH, dtype=jnp.float32, seed=99 + i) for i in range(case.parts)])
    y = parts[0].astype(case.dtype) if case.parts == 1 else PartialSums(parts, case.dtype)
    own = np.asarray(y if case.parts == 1 else y.value())
    ordered = jnp.stack([jnp.asarray(own if device == case.device else theirs[device]) for device in range(case.count)])
    expected = PartialSums(ordered, case.dtype).value()
    add_up = case.program("add_up")
    for earlier in EARLIER:
        memory = case.memory({device: as_words(one) for device, one in theirs.items()}, earlier)
        found, after, others = add_up(y, memory)
        np.testing.assert_array_equal(as_words(found), as_words(np.asarray(expected)))
        case.check_sent(as_words(own), memory, after, others, earlier)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 1), (2, 16, 4)], ids=str)
def test_words_of_devices_are_kept_as_they_are(shape, case, monkeypatch):
    case = Case(case, monkeypatch)
    random = np.random.default_rng(0)
    words = random.integers(-(2**31), 2**31, (case.count, *shape), dtype=np.int64).astype(np.int32)
    tile = case.letters.words_of_tile
    padded = np.zeros((case.count, -(-words[0].size // tile) * tile), np.int32)
    padded[:, : words[0].size] = words.reshape(case.count, -1)
    gather = case.program("gather")
    for earlier in EARLIER:
        memory = case.memory({d: padded[d] for d in range(case.count) if d != case.device}, earlier)
        found, after, others = gather(jnp.asarray(words[case.device]), memory)
        np.testing.assert_array_equal(found, words)
        case.check_sent(padded[case.device], memory, after, others, earlier)
