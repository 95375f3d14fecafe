"""Cycles of a program from the machine code that the TPU's compiler prints: a bundle of instructions is a cycle.

A line of ``*-final_bundles.txt`` is a bundle; the marks ``>`` before its brace count the loops that it is in::

      0x4 LB: > {  first bundle of a loop's body ...
     0x1f   : >> { of a loop within that loop ...  %p6 = scmp.ge.s32.totalorder %s14, 56 /* loop exit test */ }

Where the branches of a loop are taken is not known, so all of it counts, and what is waited for (copies, results of
the matrix unit that the schedule does not cover) does not.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable
from pathlib import Path

_BUNDLE = re.compile(r"^\s*(?:0x)?[0-9a-f]+\s+(LB|LH|LE|PB|PF|CT)?\s*:\s*([> ]*)\{")
_EXIT = re.compile(r"(%\w+) = scmp\.ge\.s32\.totalorder (%\w+), (\d+) /\* loop exit test")
_STEP = r"{} = sadd\.s32 (\d+),"
_BACK = r"sbr.rel (!{})"
_NOT_OF_THE_PROGRAM = ("<late-", "-TLP-", "schedule-analysis")
_STAGES = 2  # turns of a pipelined loop beyond its steps, in which only copies run


@dataclasses.dataclass
class Loop:
    """A loop, or the whole program (one turn)."""

    bundles: int = 0
    turns: int | None = None
    is_pipeline: bool = False
    exit: str | None = None  # the predicate of its last branch, once that is known
    has_ended: bool = False
    inner: list[Loop] = dataclasses.field(default_factory=list)

    def cycles(self) -> int:
        """Of all turns; of one where their number is not in the code."""
        return (self.turns or 1) * (self.bundles + sum(loop.cycles() for loop in self.inner))


def cycles_by_operation(folder: Path) -> dict[str, int]:
    """Cycles of each operation of a program that the compiler has printed to a folder."""
    found: dict[str, int] = {}
    for path in sorted(folder.glob("*-final_bundles.txt")):
        if not any(part in path.name for part in _NOT_OF_THE_PROGRAM):
            name = re.sub(r"^\d+-|-\d+-final_bundles\.txt$", "", path.name)
            found[name] = found.get(name, 0) + parse(path.read_text(encoding="utf-8").splitlines()).cycles()
    return found


def parse(lines: Iterable[str]) -> Loop:
    """The loops of one operation."""
    lines = list(lines)
    text = "\n".join(lines)
    loops = [Loop(turns=1)]  # the innermost last
    for line in lines:
        if match := _BUNDLE.match(line):
            depth = match[2].count(">")
            # Some bundles within a loop have no marks: it ends with the branch back, and what that one delays. One
            # whose branch is not known ends where the marks become fewer.
            while depth < len(loops) - 1 and (loops[-1].has_ended or (not loops[-1].exit and depth)):
                loops.pop()
            if match[1] == "LB":
                loops[-1].inner.append(Loop(is_pipeline="iteration index, stage" in line))
                loops.append(loops[-1].inner[-1])
            loops[-1].bundles += 1
        _note_exit(loops[-1], line, text)
    return loops[0]


def _note_exit(loop: Loop, line: str, text: str) -> None:
    """The turns of a loop, where a line tests whether to leave it, and whether it branches back."""
    for predicate, name, bound in _EXIT.findall(line):
        step = re.search(_STEP.format(re.escape(name)), text)
        turns = int(bound) // (int(step[1]) if step else 1)
        loop.turns = turns - _STAGES if loop.is_pipeline and turns > _STAGES else turns
        loop.exit = predicate
    loop.has_ended = loop.has_ended or (loop.exit is not None and _BACK.format(loop.exit) in line)
