"""Outputs of plans on two GPUs, by one process or by a process for each; ``test_on_two_gpus.py`` runs it.

``python -m tests.gpu.on_two_gpus demo data=2`` reads prompts of the demo model, ``llama model=2`` noise that four
layers of Llama-3-8B shapes read. For each plan it prints how many outputs differ from those of plain decoding on the
same mesh. To find faults, ``--wait`` waits for each program and names the one that fails, and ``--greedy`` samples
nothing.
"""

from __future__ import annotations

import argparse
import functools
from contextlib import nullcontext

import jax

import qspec_jax
from qspec_jax.decoding import on_mesh
from qspec_jax.weights.resolve import demo_gguf_path
from tests.gpu.serving import DTYPE, few_layers, noise, outputs, texts

PLANS = {
    "qspec": {"mode": "qspec", "draft_length": 3},
    "7 drafts": {"mode": "qspec", "draft_length": 7},
    "lookup": {"mode": "lookup"},
}
MODELS = {"demo": lambda mesh: qspec_jax.load(demo_gguf_path(), dtype=DTYPE, mesh=mesh), "llama": few_layers}


def differences(model, given, *, rows, expected):
    """Of plans that do not yield what is expected: how many of their outputs differ."""
    found = {}
    for name, plan in PLANS.items():
        others = outputs(model, given, rows=rows, **plan)
        count = sum(one != other for one, other in zip(others, expected, strict=True))
        print(f"{model.name}, {name}, {rows} rows: {count} of {len(expected)} differ", flush=True)
        found |= {name: count} if count else {}
    return found


def wait_for_each_program():
    """A fault is then told by the program that has it, not by the next one whose results are read."""
    run = on_mesh.OnMesh.run

    @functools.wraps(run)
    def waiting(self, program, *arguments):
        returned = run(self, program, *arguments)
        try:
            return jax.block_until_ready(returned)
        except jax.errors.JaxRuntimeError:
            print(f"failed: {program}", flush=True)
            raise

    on_mesh.OnMesh.run = waiting


def main():
    """Compares, and returns 1 where outputs differ."""
    parser = argparse.ArgumentParser(prog="python -m tests.gpu.on_two_gpus", description=__doc__)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("mesh")
    parser.add_argument("--prompts", type=int, default=96)
    parser.add_argument("--greedy", action="store_true")
    parser.add_argument("--wait", action="store_true")
    parser.add_argument("--packing", action="store_true", help="read prompts together")
    parser.add_argument("--coordinator")
    parser.add_argument("--process-id", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.wait:
        wait_for_each_program()
    several = arguments.coordinator is not None
    who = {"num_processes": 2, "process_id": arguments.process_id}
    with qspec_jax.join(arguments.coordinator, **who) if several else nullcontext():
        model = MODELS[arguments.model](mesh=arguments.mesh)
        if arguments.process_id:
            return 0
        model.programs.packing = arguments.packing or None
        given = (texts if arguments.model == "demo" else noise)(arguments.prompts)
        if arguments.greedy:
            given = given._replace(sampling={})
        plain = outputs(model, given, rows=32, mode="w4a16")
        assert len({tuple(ids) for ids in plain}) > len(plain) / 2 or arguments.greedy
        print(f"plain: {len(plain)} outputs", flush=True)
        return int(bool(differences(model, given, rows=32, expected=plain)))


if __name__ == "__main__":
    raise SystemExit(main())
