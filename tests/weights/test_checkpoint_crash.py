"""A writer may be killed at any moment: what is opened afterwards is the old checkpoint or the new one."""

from __future__ import annotations

import itertools
import multiprocessing
import shutil
import signal

import numpy as np
import pytest

from qspec_jax.model.config import QuantConfig
from qspec_jax.weights.checkpoint.arrays import group_names
from qspec_jax.weights.checkpoint.restore import open_checkpoint
from qspec_jax.weights.checkpoint.save import save_checkpoint
from tests import tiny
from tests.conftest import THOROUGH
from tests.weights import checkpoint_writer

NUM_KILLS = 20 if THOROUGH else 12


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    """Two checkpoints of the same shapes with different weights."""
    folder = tmp_path_factory.mktemp("sources")
    for seed in (0, 1):
        decoder = tiny.decoder(seed=seed)
        save_checkpoint(folder / str(seed), decoder, tokenizer=None, quantization=QuantConfig())
    return [folder / "0", folder / "1"]


@pytest.fixture(scope="module")
def originals(sources):
    return [contents(source) for source in sources]


@pytest.fixture(scope="module")
def processes():
    """Starts processes that have imported everything already."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.weights.checkpoint_writer"])
    return context


def contents(path):
    """All arrays of a checkpoint, read and checked."""
    checkpoint = open_checkpoint(path)
    return {
        name: array
        for group in group_names(checkpoint.manifest.model, keep_floats=checkpoint.manifest.quantization.keep_floats)
        for name, array in checkpoint.read_group(group).items()
    }


def same(one, other):
    return one.keys() == other.keys() and all(np.array_equal(one[name], other[name]) for name in one)


def test_killed_at_moments_spread_over_a_write(processes, sources, originals, tmp_path):
    assert not same(*originals)
    path = tmp_path / "checkpoint"
    receiver, sender = processes.Pipe(duplex=False)

    def write(source, event=None):
        writer = processes.Process(target=checkpoint_writer.die_at_event, args=(source, path, event, sender))
        writer.start()
        writer.join(120)
        return writer.exitcode

    def which():
        (index,) = (index for index, original in enumerate(originals) if same(contents(path), original))
        return index

    shutil.copytree(sources[0], path)
    assert write(sources[1]) == 0
    num_events = receiver.recv() * 9 // 10  # threads may do some more or fewer, on a busy machine above all
    assert num_events > 100
    after = checkpoint_writer.AFTER
    found = [which()]
    for event in (*np.linspace(1, num_events, NUM_KILLS - 2).astype(int).tolist(), after, after + 1):
        assert write(sources[1 - found[-1]], event) == -signal.SIGKILL
        found.append(which())
    changed = [one != before for before, one in itertools.pairwise(found)]
    assert changed == [False] * (NUM_KILLS - 2) + [True] * 2


@pytest.mark.parametrize(("overwrites", "step"), [(False, 1), (False, 2), (True, 1), (True, 2), (True, 3), (True, 4)])
def test_killed_at_each_step_of_putting_it_into_place(processes, sources, originals, tmp_path, overwrites, step):
    old, new = originals
    path = tmp_path / "checkpoint"
    if overwrites:
        shutil.copytree(sources[0], path)
    writer = processes.Process(target=checkpoint_writer.die_at_step, args=(sources[1], path, step))
    writer.start()
    writer.join(120)
    assert writer.exitcode == -signal.SIGKILL
    if overwrites:
        assert same(contents(path), old if step <= 2 else new)
    elif step == 1:
        assert not path.exists()
    else:
        assert same(contents(path), new)


def test_what_a_killed_writer_left_is_removed_by_the_next(processes, sources, tmp_path):
    path = tmp_path / "checkpoint"
    shutil.copytree(sources[0], path)
    for step in (1, 2):
        writer = processes.Process(target=checkpoint_writer.die_at_step, args=(sources[1], path, step))
        writer.start()
        writer.join(120)
        assert writer.exitcode == -signal.SIGKILL
    assert len(list(path.iterdir())) > 2
    checkpoint_writer._save(sources[1], path)
    assert list(tmp_path.iterdir()) == [path]
    assert {file.name for file in path.iterdir()} == {"qspec.json", open_checkpoint(path).manifest.data}
