"""A recipe file of one's own, the checkpoint that it makes, and text from that checkpoint."""

from pathlib import Path

import qspec_jax
from qspec_jax import quantize

RECIPE = """
recipe = "rtn"          # the demo model is 4-bit already: rounding once more is a warning
group_size = 64
symmetric = true

[w4a4]                  # W4A4 drafts: groups of 64, the two loudest of a token in 8 bits
group_size = 64
outlier_groups = 2
"""

Path("recipe.toml").write_text(RECIPE)
assert quantize.main(["default", "my-checkpoint", "--recipe", "recipe.toml", "--overwrite"]) == 0
model = qspec_jax.load("my-checkpoint")
print(model.quantization)
print(model.generate("Why is the sky blue?", draft="w4a4", max_new_tokens=32)[0].text)
