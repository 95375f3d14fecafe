"""``python -m qspec_jax.harness``: lm-eval, EleutherAI's evaluation harness, with the model class ``qspec``.

Takes what ``lm_eval`` takes, for example::

    python -m qspec_jax.harness run --model qspec --model_args model=CHECKPOINT,mode=w4a16 --tasks piqa

``mode`` is a mode of ``generate``; ``qspec`` generates with drafts (``draft``, ``draft_length``), and its likelihoods
are those of W4A16, which decides what it generates. Needs ``pip install 'qspec-jax[eval]'``; importing this module
registers the class. Tasks come from the Hugging Face hub, unless they are local ones (``--include_path``).
"""

from __future__ import annotations

import sys


def main() -> None:
    """Runs the command of lm-eval, which then knows the model class ``qspec``."""
    from lm_eval.__main__ import cli_evaluate

    from qspec_jax.evaluation import harness_model  # noqa: F401 - registers the class

    cli_evaluate()


if __name__ == "__main__":
    sys.exit(main())
