"""``python -m qspec_jax.harness``: lm-eval, EleutherAI's evaluation harness, with the model class ``qspec``.

Takes what ``lm_eval`` takes, for example::

    python -m qspec_jax.harness run --model qspec --model_args model=CHECKPOINT,mode=w4a16 --tasks piqa

``mode`` is a mode of ``generate``; ``qspec`` generates with drafts (``draft``, ``draft_length``), and its likelihoods
are those of W4A16, which decides what it generates. Needs ``pip install 'qspec-jax[eval]'``. Other programs register
the class by importing :mod:`qspec_jax.evaluation.harness_model`. Tasks come from the Hugging Face hub, unless they are
local ones (``--include_path``).

``--coordinator``, ``--num-processes`` and ``--process-id`` run it in several processes, which all get the same other
arguments, with ``mesh=data=2;model=2`` among those of the model.
"""

from __future__ import annotations

if __name__ == "__main__":  # before the rest is imported
    from qspec_jax.commands.beginning import interrupted_in_one_line

    interrupted_in_one_line()

import argparse
import re
import sys
from importlib.util import find_spec

from qspec_jax.commands.processes import add_processes, run_together
from qspec_jax.commands.run import guarded, leave
from qspec_jax.errors import QSpecError, UsageError


def main() -> int:
    """Runs the command of lm-eval, and returns its exit code: 0, or that of an error or an interruption.

    lm-eval knows the model class ``qspec``, and imports it once a model is asked for.
    """
    return guarded(_run, sys.argv[1:])


def _run() -> int:
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    add_processes(parser)
    own, others = parser.parse_known_args(sys.argv[1:])
    mesh = re.search(r"\bmesh=([^,\s]+)", " ".join(others))
    own.mesh = mesh and mesh[1]
    if own.coordinator is not None and own.mesh is None:
        raise UsageError("several processes share a mesh: --model_args needs one, such as mesh=data=2;model=4")
    sys.argv[1:] = others
    return run_together(" ".join(["harness", *others]), _evaluate, own)


def _evaluate(_: argparse.Namespace) -> int:
    """Runs lm-eval, which may end the process as its own parser does."""
    if find_spec("lm_eval") is None:
        raise UsageError("the harness needs lm-eval; run `pip install 'qspec-jax[eval]'`")
    from lm_eval._cli import HarnessCLI  # what lm_eval.__main__ calls, which imports NumPy and more before it parses

    parser = HarnessCLI()
    try:
        arguments = parser.parse_args()
        import lm_eval.models  # noqa: F401 - registers its own classes, which lm-eval does only where it knows none
        from lm_eval.api.registry import model_registry
        from lm_eval.utils import setup_logging

        setup_logging()
        if "qspec" not in model_registry:
            model_registry.register("qspec", target="qspec_jax.evaluation.harness_model:HarnessModel")
        parser.execute(arguments)
    except SystemExit as end:
        if isinstance(end.code, str):
            raise QSpecError(end.code) from end
        return end.code or 0
    return 0


if __name__ == "__main__":
    leave(main())
