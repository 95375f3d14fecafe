"""Which programs send their sums to mailboxes, where letters lie in them, and that no letter is lost or read twice."""

from __future__ import annotations

import contextlib
import itertools
import random
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AbstractMesh, Mesh, PartitionSpec

from pallas_kernels.arrays.partial_sums import PartialSums
from qspec_jax.decoding import mailboxes
from qspec_jax.decoding.lowering import Lowering
from qspec_jax.decoding.plan import DecodingPlan, Lookup
from qspec_jax.decoding.speculative import generate
from qspec_jax.decoding.state import DecodeState
from qspec_jax.device import driver
from qspec_jax.device.mesh import AXES, DATA, MODEL
from qspec_jax.model import collectives
from qspec_jax.model.precision import Precision
from qspec_jax.model.view import View
from tests.decoding.test_early_launch import on_hopper  # noqa: F401
from tests.model.test_whole_tiles import decoder_of

mailbox: Any = pytest.importorskip("pallas_kernels.backends.mosaic.mailbox", reason="needs Mosaic GPU")

PLAIN, QSPEC = DecodingPlan(Precision.W4A16), DecodingPlan(Precision.W4A16, Precision.W4A8, 3)
LOOKUP_QSPEC = DecodingPlan(Precision.W4A16, Lookup(View.of(Precision.W4A8)), 3)


class Gpu:
    """What a mesh and obstacles ask of a device."""

    platform, process_index = "gpu", 0

    def __init__(self, number: int):
        self.id = self.local_hardware_id = number


def mesh_of(*ids: int, data: int = 1) -> Mesh:
    return Mesh(np.array([Gpu(number) for number in ids]).reshape(data, -1), AXES)


@pytest.fixture
def machine(monkeypatch):
    """One on which nothing is an obstacle."""
    for name in (mailboxes._ALLOCATOR, mailboxes._NO_PEERS, "XLA_FLAGS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(mailboxes, "backend_obstacle", lambda _: None)
    monkeypatch.setattr(mailboxes, "_OLDEST_JAX", (0, 0))
    monkeypatch.setattr(mailboxes, "_reach_each_other", lambda _: True)
    return monkeypatch


def test_nothing_is_an_obstacle_on_devices_that_reach_each_other(machine):
    machine.setenv(mailboxes._ALLOCATOR, "BFC")
    machine.setenv(mailboxes._NO_PEERS, "0")
    for mesh, plan in itertools.product([mesh_of(0, 1), mesh_of(0, 1, 2, 3, data=2)], [PLAIN, QSPEC]):
        assert mailboxes.obstacle(mesh, plan) is None
    assert mailboxes.obstacle(mesh_of(0, 1), DecodingPlan(Precision.W4A16, Lookup(), 3), kernels="triton") is None


@pytest.mark.parametrize(
    ("reason", "mesh", "plan", "options"),
    [
        ("devices do not share a model", mesh_of(0, 1, data=2), PLAIN, {}),
        ("the devices are not in their order", mesh_of(1, 0), PLAIN, {}),
        ("the devices are not in their order", mesh_of(1, 2), PLAIN, {}),
        ("a branch would move the mailbox", mesh_of(0, 1), LOOKUP_QSPEC, {}),
        ("XLA's own operations are asked for", mesh_of(0, 1), PLAIN, {"kernels": "reference"}),
    ],
)
def test_a_mesh_or_a_plan_is_an_obstacle(machine, reason, mesh, plan, options):
    assert mailboxes.obstacle(mesh, plan, **options) == reason


@pytest.mark.parametrize(
    ("variable", "value"),
    {
        "XLA_PYTHON_CLIENT_ALLOCATOR": "cuda_async",
        "NCCL_P2P_DISABLE": "1",
        "XLA_FLAGS": "--xla_gpu_experimental_enable_nvshmem=true",
    }.items(),
)
def test_an_environment_is_an_obstacle(machine, variable, value):
    machine.setenv(variable, value)
    found = mailboxes.obstacle(mesh_of(0, 1), PLAIN)
    assert found is not None
    assert variable in found


@pytest.mark.parametrize(
    ("reason", "target", "replacement"),
    [
        ("no GPU", "qspec_jax.decoding.mailboxes.backend_obstacle", lambda _: "no GPU"),
        ("JAX is too old", "qspec_jax.decoding.mailboxes._OLDEST_JAX", (1000, 0)),
        ("JAX is too old", "qspec_jax.decoding.mailboxes._module", lambda: None),
        # Of which one has all devices of the mesh, but kernels would look for their memory in another way.
        ("there are several processes", "jax.process_count", lambda: 2),
        ("the devices do not reach each other's memory", "qspec_jax.decoding.mailboxes._reach_each_other", lambda _: 0),
    ],
)
def test_a_machine_is_an_obstacle(machine, reason, target, replacement):
    machine.setattr(target, replacement)
    assert mailboxes.obstacle(mesh_of(0, 1), PLAIN) == reason


class Cuda:
    """A driver of GPUs, of which some pairs do not reach each other."""

    def __init__(self, *apart, error=0):
        self.apart, self.error = apart, error

    def cuInit(self, _):  # noqa: N802
        return self.error

    def cuDeviceCanAccessPeer(self, can, one, other):  # noqa: N802
        can._obj.value = (one, other) not in self.apart
        return 0


def test_each_device_must_reach_each_other_one(monkeypatch):
    answers = {True: Cuda(), False: Cuda((2, 1))}
    for expected, cuda in answers.items():
        monkeypatch.setattr(driver.ctypes, "CDLL", lambda _, cuda=cuda: cuda)
        assert driver.reach_each_other([0, 1, 2]) is expected
        assert driver.reach_each_other([0, 1])
    monkeypatch.setattr(driver.ctypes, "CDLL", lambda _: Cuda(error=100))
    assert not driver.reach_each_other([0, 1])


class Lines:
    """A mailbox that takes everything and notes what it was asked for."""

    axis = MODEL

    def __init__(self):
        self.asked = []

    def takes(self, _):
        return True

    def add_up(self, y):
        self.asked.append("add_up")
        return y

    def gather(self, words):
        self.asked.append("gather")
        return jnp.stack([words, words])

    def meet(self):
        self.asked.append("meet")


def tell(noted: Any = None, *, axis: str = MODEL) -> Any:
    """What a device of two sends for a sum, an embedding and a choice, as a jaxpr; in a context, where one is given."""

    def told(y):
        with contextlib.nullcontext() if noted is None else collectives.sending_to(noted):
            collectives.meet()
            collectives.add_up(y, axis)
            collectives.embed(y[0], jnp.zeros((1, 1), jnp.int32), axis)
            return collectives.most_likely(y, axis)

    options = {"in_specs": PartitionSpec(), "out_specs": PartitionSpec(), "check_vma": False}
    mapped = jax.shard_map(told, mesh=AbstractMesh((2, 2), AXES), **options)
    return str(jax.make_jaxpr(mapped)(jnp.zeros((1, 2, 4), jnp.float32)))


def test_nothing_is_sent_to_a_mailbox_outside_of_its_context():
    noted = Lines()
    inside, outside = tell(noted), tell()
    assert noted.asked == ["meet", "add_up", "add_up", "gather"]
    assert "all_gather" not in inside
    assert outside.count("all_gather[") == 2
    assert collectives.current_mailbox() is None


def test_a_mailbox_of_one_axis_takes_nothing_for_another():
    noted = Lines()
    assert tell(noted, axis=DATA).count("all_gather[") == 2
    assert noted.asked == ["meet"]


def test_a_context_in_another_has_a_mailbox_of_its_own():
    outer, inner = Lines(), Lines()
    with collectives.sending_to(outer), collectives.sending_to(inner):
        collectives.meet()
    with collectives.sending_to(outer), collectives.sending_to(None):
        collectives.meet()
    assert (outer.asked, inner.asked) == ([], ["meet"])


def test_all_devices_meet_before_the_cycles_of_each_turn():
    """Or the first letters may come before mailboxes are filled with zeros, and to no address."""
    noted, decoder = Lines(), decoder_of()

    def advance(_model, state, *, plan):
        noted.asked.append("cycle")
        return state

    def loop(state):
        with collectives.sending_to(noted):
            return generate(decoder, state, jnp.int32(4), plan=PLAIN, cycles_per_check=2, advance=advance)

    state = jax.eval_shape(lambda: DecodeState.idle(decoder.create_cache(batch=2, capacity=64)))
    program = jax.make_jaxpr(loop)(state)
    assert noted.asked[:2] == ["meet", "cycle"]
    assert noted.asked.count("meet") == sum(one.primitive.name == "while" for one in program.jaxpr.eqns) == 1


@pytest.mark.usefixtures("on_hopper")
@pytest.mark.parametrize(
    ("rows", "plan", "tokens"),
    # Passes have further sequences, so that the kernels of Hopper read whole tiles of 8 rows.
    [(16, PLAIN, 16), (12, PLAIN, 16), (16, QSPEC, 64), (3, QSPEC, 16), (9, QSPEC, 40), (3, PLAIN, 3)],
)
def test_letters_have_room_for_all_rows_that_a_pass_runs(machine, rows, plan, tokens):
    asked = []
    machine.setattr(mailboxes, "empty_mailbox", lambda *given: asked.append(given))
    machine.setattr(Lowering, "mesh", mesh_of(0, 1))
    decoder = decoder_of()
    Lowering(decoder)._mailboxes(decoder, plan, rows)
    assert asked == [(tokens * decoder.config.hidden_size, jnp.bfloat16)]


# Lengths of letters from which on a block has several tiles, and those that the last block has some of.
SIZES = [1, 5, 1023, 1024, 1025, 2500, 4096]
LETTERS = [
    (devices, tiles * mailbox.TILE, dtype)
    for devices, tiles, dtype in itertools.product((2, 3, 8), SIZES, (jnp.float32, jnp.bfloat16, jnp.float16))
]


def place(letters: Any, number: int, of: int, tile: int, thread: int) -> int:
    """As a kernel computes it, of numbers."""
    exchange = object.__new__(mailbox._Exchange)
    exchange.letters, exchange.thread, exchange._number = letters, thread, number
    return exchange._place(0, of, tile)


@pytest.fixture
def numbers(monkeypatch):
    """Has what builds MLIR for a kernel compute with Python's numbers."""
    operations = {
        "addi": lambda a, b: a + b,
        "muli": lambda a, b: a * b,
        "andi": lambda a, b: a & b,
    }
    monkeypatch.setattr(mailbox, "arith", SimpleNamespace(**operations))
    for name in ("i32", "i64", "_wide"):
        monkeypatch.setattr(mailbox, name, int)


@pytest.mark.usefixtures("numbers")
@pytest.mark.parametrize(("num_devices", "num_values", "dtype"), LETTERS)
def test_packets_lie_apart_behind_the_counts_and_inside_of_the_mailbox(num_devices, num_values, dtype):
    letters = mailbox.Letters.of(num_devices, num_values, dtype)
    assert letters.num_blocks <= mailbox._MOST_BLOCKS
    tiles = letters.num_blocks * letters.tiles_of_block
    assert tiles * mailbox.TILE >= letters.num_values  # those of the last block are cut off
    size = letters.packets_of_thread * 16
    ends = [place(letters, number, of, tile, thread) for number, of, tile, thread in corners(num_devices, tiles)]
    # Threads side by side, then tiles, devices, and letters: every step of one is the whole of the one before.
    strides = [
        place(letters, 0, 0, 0, 1),
        place(letters, 0, 0, 1, 0),
        place(letters, 0, 1, 0, 0),
        place(letters, 1, 0, 0, 0),
    ]
    first = place(letters, 0, 0, 0, 0)
    counts = [1, mailbox.THREADS, tiles, num_devices]
    assert [stride - first for stride in strides] == list(size * np.cumprod(counts))
    assert first % 128 == 0
    assert first >= 4 * letters.num_blocks
    assert first == min(ends)
    assert max(ends) + size == letters.num_bytes
    assert letters.num_bytes % 4 == 0
    assert place(letters, 5, 1, 2, 3) == place(letters, 7, 1, 2, 3) != place(letters, 6, 1, 2, 3)


def corners(num_devices: int, tiles: int) -> Iterator[tuple[int, ...]]:
    return itertools.product((0, 1), (0, num_devices - 1), (0, tiles - 1), (0, mailbox.THREADS - 1))


@pytest.mark.parametrize(("num_devices", "sent"), [(2, 4), (3, 2), (4, 1), (8, 1)])
def test_blocks_send_few_tiles_and_longer_letters_are_left_to_a_library(num_devices, sent):
    longest = mailbox.Letters.of(num_devices, 10**9, jnp.bfloat16)
    assert (longest.tiles_of_block, longest.num_blocks) == (sent, mailbox._MOST_BLOCKS)
    box = mailbox.Mailbox(MODEL, longest, None, None)

    def takes(*shape: int, dtype: Any = jnp.bfloat16, parts: Any = None) -> bool:
        asked = []

        def ask(y):
            asked.append(box.takes(y if parts is None else PartialSums(y, parts)))

        jax.eval_shape(ask, jax.ShapeDtypeStruct(shape, dtype))
        return asked[0]

    assert takes(longest.num_values // mailbox.TILE, mailbox.TILE)
    assert not takes(longest.num_values + mailbox.TILE)
    assert not takes(longest.num_values, dtype=jnp.float32)
    assert not takes(mailbox.TILE + 4)
    assert takes(2, 3, mailbox.TILE, dtype=jnp.float32, parts=jnp.bfloat16)
    assert not takes(2, 3, mailbox.TILE, dtype=jnp.bfloat16, parts=jnp.float32)


class Device:
    """One of several that send letters, of a thread for each block, and its mailbox."""

    def __init__(self, number: int, letters: Any):
        self.number, self.letters = number, letters
        self.counts = dict.fromkeys(range(letters.num_blocks), 0)
        self.memory: dict[int, tuple[int, Any]] = {}
        self.ended: list[int] = []

    def run(self, everybody: list[Device], lengths: list[int], order: random.Random) -> Iterator[None]:
        """Sends letters of so many blocks, one after the other; stops after each write and before each read."""
        for letter, num_blocks in enumerate(lengths):
            blocks = [self.block(everybody, letter, block) for block in range(num_blocks)]
            while blocks:
                block = order.choice(blocks)
                try:
                    next(block)
                except StopIteration:
                    blocks.remove(block)
                yield
            self.ended.append(letter)

    def block(self, everybody: list[Device], letter: int, block: int) -> Iterator[None]:
        number = self.counts[block] + 1
        others = [one for one in everybody if one is not self]
        tiles = [block * self.letters.tiles_of_block + index for index in range(self.letters.tiles_of_block)]
        for tile, other in itertools.product(tiles, others):
            other.memory[place(self.letters, number, self.number, tile, 0)] = number, (self.number, letter, tile)
            yield
        for tile, other in itertools.product(tiles, others):
            here = place(self.letters, number, other.number, tile, 0)
            while self.memory.get(here, (0, None))[0] != number:
                yield
            assert self.memory[here][1] == (other.number, letter, tile)
        self.counts[block] = number


@pytest.mark.usefixtures("numbers")
@pytest.mark.parametrize("num_devices", [2, 3])
@pytest.mark.parametrize("seed", range(5))
def test_letters_of_any_lengths_arrive_in_whatever_order_devices_run(seed, num_devices, monkeypatch):
    monkeypatch.setattr(mailbox, "_MOST_BLOCKS", 3)
    letters = mailbox.Letters(num_devices, 5 * mailbox.TILE, jnp.dtype(jnp.bfloat16))
    assert (letters.num_blocks, letters.tiles_of_block) == (3, 2)
    order = random.Random(seed)
    lengths = [order.choice([1, 1, 3]) for _ in range(12)]
    everybody = [Device(number, letters) for number in range(num_devices)]
    running = {device: device.run(everybody, lengths, order) for device in everybody}
    for _ in range(50_000):
        if not running:
            break
        # Mostly one of them: the others fall behind as far as they can.
        device = min(running, key=lambda one: one.number) if order.random() < 0.9 else order.choice([*running])
        for _ in range(order.randrange(1, 30)):
            if next(running[device], 0) == 0:
                del running[device]
                break
    assert [device.ended for device in everybody] == [list(range(12))] * num_devices
