"""``python -m qspec_jax.bench.tpu.worker``: compiles for one generation, in a process that the compiler may end.

libtpu reads its options when it is loaded, and a check that fails within the compiler aborts. So ``bench tpu`` starts
one of these for each generation, which writes a line of JSON for each call that it has compiled.
"""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from pathlib import Path
from typing import Any

import jax

_VMEM = re.compile(r'"used_scoped_memory_configs":\[\{"memory_space":"1","offset":"\d+","size":"(\d+)"\}')


def main(argv: list[str]) -> None:
    """Takes the generation, a folder to which the compiler prints, and the settings of ``cases`` as JSON."""
    from qspec_jax.bench.presets import PRESETS
    from qspec_jax.bench.tpu.cases import cases

    generation, folder, settings = argv[0], Path(argv[1]), json.loads(argv[2])
    ops, model = settings.pop("ops"), settings.pop("model")
    for case in cases(PRESETS[model], **settings):
        if case.op in ops:
            print(json.dumps({"op": case.op, "shape": case.shape, **_compiled(generation, folder, case)}), flush=True)


def _compiled(generation: str, folder: Path, case: Any) -> dict[str, Any]:
    from qspec_jax.bench.tpu.bundles import cycles_by_operation
    from qspec_jax.bench.tpu.compiler import GENERATIONS, compile_for

    for path in folder.iterdir():
        path.unlink()
    try:
        program = compile_for(generation, case.function, *case.args, **case.options)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        return {"status": "failed", "error": str(error).splitlines()[0]}
    by_operation, text = cycles_by_operation(folder), program.as_text() or ""
    memory: Any = program.memory_analysis()
    return {
        "status": "ok",
        "is_kernel": "tpu_custom_call" in text,
        "cycles": sum(by_operation.values()),
        "cycles_by_operation": by_operation,
        "cycles_of_bytes": round(GENERATIONS[generation].cycles(case.num_bytes)),
        "num_bytes": case.num_bytes,
        "temporary_bytes": memory.temp_size_in_bytes,
        "vmem_bytes": max((int(size) for size in _VMEM.findall(text)), default=0),
        "generation": dataclasses.asdict(GENERATIONS[generation]),
    }


if __name__ == "__main__":
    main(sys.argv[1:])
