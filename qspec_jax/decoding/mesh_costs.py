"""What a decoder takes on a mesh, by formula: bytes on each device, bytes over its links, and the time of a pass.

Every figure is a prediction. A pass reads weights and cache, multiplies, and has its devices tell each other sums::

    time = layers * time of a layer + bytes read / share / bandwidth + operations / peak
         + bytes received / link + messages * latency

On one H100, one H200 and two H200s that is within a sixth of what was measured (``tests/decoding/test_mesh_costs.py``).
What devices receive is what a compiled program has them send each other, counted. ``docs/scaling.md`` has tables and
the inputs of both.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from qspec_jax.decoding import packing
from qspec_jax.decoding.chunks import CHUNK_WIDTHS, fitting_capacity
from qspec_jax.decoding.plan import DRAFT_BUDGET, FULL_BELOW
from qspec_jax.decoding.speedup import expected_tokens
from qspec_jax.device.mesh import MeshShape
from qspec_jax.model import cache as cached
from qspec_jax.model.config import ModelConfig
from qspec_jax.model.decoder import Decoder, num_bytes
from qspec_jax.model.linear import PIECE
from qspec_jax.model.parameters import layer_anatomy
from qspec_jax.model.sharding import local_config


@dataclasses.dataclass(frozen=True)
class Links:
    """How devices reach each other.

    Attributes:
        bytes_per_s: that a device receives.
        latency_s: of a collective, however small.
    """

    bytes_per_s: float
    latency_s: float


@dataclasses.dataclass(frozen=True)
class Hardware:
    """A kind of device.

    Attributes:
        name: of the kind.
        memory_bytes: that a program may use.
        bytes_per_s: of its memory, as a copy reaches it.
        layer_s: that kernels of a layer take to start and to end, however little they read.
        of_weights, of_cache: shares of that speed at which a pass reads them.
        bf16, int8: operations per second of a matmul of many rows.
        links: between devices of one host.
        network: between those of several hosts.
        host: devices of a host.
    """

    name: str
    memory_bytes: float
    bytes_per_s: float
    layer_s: float
    of_weights: float
    of_cache: float
    bf16: float
    int8: float
    links: Links
    network: Links
    host: int

    def between(self, split: int) -> Links:
        """What the devices that share a model have between them."""
        return self.links if split <= self.host else self.network


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a device receives in a pass.

    Attributes:
        messages: collectives.
        num_bytes: received.
    """

    messages: int
    num_bytes: int

    def seconds(self, links: Links) -> float:
        """That they take."""
        return self.messages * links.latency_s + self.num_bytes / links.bytes_per_s


def decode_traffic(config: ModelConfig, split: int, *, tokens: int, dtype_bytes: int, draws: bool = False) -> Traffic:
    """Of a pass over a few new tokens of each sequence: sums of all layers, the embedding, and the choice.

    Args:
        config: of the model.
        split: devices that share it.
        tokens: of all sequences of these devices together.
        dtype_bytes: of an activation, and of a device's sum.
        draws: logits are gathered, as sampling, scores and penalties need; otherwise the most likely tokens alone.
    """
    if split == 1:
        return Traffic(0, 0)
    others, values = split - 1, tokens * config.hidden_size
    sums = 2 * config.num_layers * others * values * dtype_bytes
    embedding = 2 * others * values * dtype_bytes // split  # a ring
    choice = others * tokens * (config.vocab_size * 4 // split if draws else 8)
    return Traffic(2 * config.num_layers + 2, sums + embedding + choice)


@dataclasses.dataclass(frozen=True)
class DeviceBytes:
    """What each device holds.

    Attributes:
        weights: with embedding and head.
        cache: keys and values of its rows, at their capacity.
        temporaries: activations and logits of the larger of a pass and one that reads prompts, about.
    """

    weights: int
    cache: int
    temporaries: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.temporaries


def device_bytes(local: Decoder, mesh: MeshShape, *, rows: int, context: int, draft_length: int = 0) -> DeviceBytes:
    """Of a model on a mesh.

    Args:
        local: what one of the devices that share it has, of shapes or arrays of this size; its ``kv`` is the cache's.
        mesh: its axes.
        rows: sequences of all devices together.
        context: tokens of each.
        draft_length: drafts that a pass verifies.
    """
    config, size = local.config, local.dtype.itemsize
    own_rows = -(-rows // mesh.data)
    kept: Any = {"dtype_bytes": size, "kv": local.kv}
    row = fitting_capacity(context) * position_bytes(config, mesh.model, **kept)
    cache = own_rows * (row + cached.row_bytes(local_config(config, mesh.model), **kept))
    tokens = own_rows * (draft_length + 1)
    parts = mesh.model if mesh.model > 1 else 0
    taken = [_activations(config, mesh.model, tokens=tokens, sums=parts, logits=tokens, dtype_bytes=size)]
    prompts = [(CHUNK_WIDTHS[-1], 1, 1)]  # tokens of each sequence, sequences, and logits of a pass
    if local.kv == cached.KV_OF_MODEL:  # of a cache of int8 they are read one by one, unless asked
        prompts.append((PIECE, packing.sizes(own_rows, fitting_capacity(context))[-1], own_rows))
    for width, sequences, logits in prompts:
        sums = parts if width % mesh.model else min(parts, 2)  # exchanged in shares, see collectives.add_up
        read = {"tokens": width * sequences, "sums": sums, "logits": logits}
        taken.append(_activations(config, mesh.model, **read, dtype_bytes=size))
    return DeviceBytes(num_bytes(local), cache, max(taken))


def position_bytes(config: ModelConfig, split: int, *, dtype_bytes: int, kv: str = cached.KV_OF_MODEL) -> int:
    """Of keys and values of a position in all layers, on one of the devices that share a model."""
    return cached.position_bytes(local_config(config, split), dtype_bytes=dtype_bytes, kv=kv)


def _activations(config: ModelConfig, split: int, *, tokens: int, sums: int, logits: int, dtype_bytes: int) -> int:
    """Of a layer, ``sums`` partial sums of each token, and some tokens' logits."""
    local = local_config(config, split)
    layer = ((2 + sums) * config.hidden_size + 3 * local.intermediate_size) * dtype_bytes
    return tokens * layer + logits * local.vocab_size * 4


@dataclasses.dataclass(frozen=True)
class Prediction:
    """Of decoding on a mesh.

    Attributes:
        step_s: of a plain step, and of it ``link_s`` over the links.
        traffic: of that step.
        cycle_s: of the drafts of a cycle and its verification.
        tokens_per_s, drafted_tokens_per_s: of all rows together, plain and speculative.
    """

    step_s: float
    link_s: float
    traffic: Traffic
    cycle_s: float
    tokens_per_s: float
    drafted_tokens_per_s: float

    @property
    def gain(self) -> float:
        """Of speculation."""
        return self.drafted_tokens_per_s / self.tokens_per_s

    def to_dict(self) -> dict[str, Any]:
        """All figures, JSON-serialisable."""
        return {**dataclasses.asdict(self), "gain": self.gain}


@dataclasses.dataclass(frozen=True)
class Drafting:
    """How a cycle drafts, in 8 bits.

    Attributes:
        length: drafts of a cycle.
        budget: positions of the cache that a draft reads; None for all.
        acceptance: chance of each draft, once those before were accepted.
    """

    length: int = 3
    budget: int | None = DRAFT_BUDGET
    acceptance: float = 0.95

    def seen(self, context: int) -> int:
        """Positions that a draft reads of a context; with a budget, all of a short one."""
        return context if self.budget is None or context < FULL_BELOW else min(context, self.budget)


def predict(
    local: Decoder, mesh: MeshShape, hardware: Hardware, *, rows: int, context: int, drafting: Drafting
) -> Prediction:
    """What decoding takes; arguments as of :func:`device_bytes`."""
    own_rows = -(-rows // mesh.data)

    def of_pass(tokens: int, seen: int, rate: float) -> tuple[float, Traffic]:
        traffic = decode_traffic(local.config, mesh.model, tokens=tokens, dtype_bytes=local.dtype.itemsize)
        seconds = _local_seconds(local, mesh.model, hardware, rows=own_rows, tokens=tokens, seen=seen, rate=rate)
        return seconds + traffic.seconds(hardware.between(mesh.model)), traffic

    step_s, traffic = of_pass(own_rows, context, hardware.bf16)
    draft_s, _ = of_pass(own_rows, drafting.seen(context), hardware.int8)
    verification_s, _ = of_pass(own_rows * (drafting.length + 1), context, hardware.bf16)
    cycle_s = drafting.length * draft_s + verification_s
    tokens = expected_tokens(drafting.acceptance, drafting.length)
    link_s = traffic.seconds(hardware.between(mesh.model))
    return Prediction(step_s, link_s, traffic, cycle_s, rows / step_s, rows * tokens / cycle_s)


def _local_seconds(
    local: Decoder, split: int, hardware: Hardware, *, rows: int, tokens: int, seen: int, rate: float
) -> float:
    """Of what a device reads and multiplies in a pass."""
    config, size = local.config, local.dtype.itemsize
    table = 0 if config.tie_word_embeddings else config.vocab_size // split * config.hidden_size * size
    read = (num_bytes(local) - table) / hardware.of_weights
    read += rows * seen * position_bytes(config, split, dtype_bytes=size, kv=local.kv) / hardware.of_cache
    linears = layer_anatomy(local_config(config, split)).linears.values()
    weights = config.num_layers * sum(linear.num_inputs * linear.num_outputs for linear in linears)
    weights += config.vocab_size // split * config.hidden_size
    return config.num_layers * hardware.layer_s + read / hardware.bytes_per_s + 2 * tokens * weights / rate
