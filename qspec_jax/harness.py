"""``python -m qspec_jax.harness``: lm-eval, EleutherAI's evaluation harness, with the model class ``qspec``.

Takes what ``lm_eval`` takes, for example::

    python -m qspec_jax.harness run --model qspec --model_args model=CHECKPOINT,mode=w4a16 --tasks piqa

``mode`` is a mode of ``generate``; ``qspec`` generates with drafts (``draft``, ``draft_length``), and its likelihoods
are those of W4A16, which decides what it generates. Needs ``pip install 'qspec-jax[eval]'``. Other programs register
the class by importing :mod:`qspec_jax.evaluation.harness_model`. Tasks come from the Hugging Face hub, unless they are
local ones (``--include_path``).
"""

from __future__ import annotations

from importlib.util import find_spec

from qspec_jax.commands.run import guarded, leave
from qspec_jax.errors import UsageError


def main() -> int:
    """Runs the command of lm-eval, and returns its exit code: 0, or that of an error or an interruption.

    lm-eval knows the model class ``qspec``, and imports it once a model is asked for.
    """
    return guarded(_run)


def _run() -> None:
    if find_spec("lm_eval") is None:
        raise UsageError("the harness needs lm-eval; run `pip install 'qspec-jax[eval]'`")
    import lm_eval.models  # noqa: F401 - registers its own classes, which lm-eval does only where it knows none
    from lm_eval.__main__ import cli_evaluate
    from lm_eval.api.registry import model_registry

    if "qspec" not in model_registry:
        model_registry.register("qspec", target="qspec_jax.evaluation.harness_model:HarnessModel")
    cli_evaluate()


if __name__ == "__main__":
    leave(main())
