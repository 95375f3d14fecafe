"""The recipes: ways to make 4-bit weights of a model, each a chain of steps.

To add one, enter it into ``RECIPES``. Commands and documents take its name and summary from here; files that name one
and hold options are read by :mod:`qspec_jax.recipes.files`. Importing this file does not import JAX.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from qspec_jax.errors import UsageError
from qspec_jax.model.config import ACTIVATION_GROUP, ActivationQuantization, ModelConfig, QuantConfig
from qspec_jax.recipes.steps import (
    AS_FLOATS,
    GPTQ,
    KEEP_CODES,
    ROTATE,
    SORT_CHANNELS,
    TURN_ONTO_AXES,
    RecipeContext,
    Step,
)

if TYPE_CHECKING:
    from qspec_jax.weights.source import Source


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A way to make 4-bit weights.

    Attributes:
        name: as a user gives it.
        summary: what it does, for people.
        steps: in order. Linears that they leave in floats are rounded to nearest.
        quantization: grid and draft activations where nobody says otherwise.
    """

    name: str
    summary: str
    steps: tuple[Step, ...]
    quantization: QuantConfig = dataclasses.field(default_factory=QuantConfig)

    @property
    def needs_text(self) -> bool:
        """Whether a step runs the model on calibration text."""
        return any(step.needs_text for step in self.steps)

    @property
    def keeps_parts(self) -> bool:
        """Whether finished layers lie beside the checkpoint until it is complete."""
        return GPTQ in self.steps

    @property
    def turns(self) -> bool:
        """Whether a step changes what linears read and write."""
        return any(step.turns for step in self.steps)

    def check_floats(self) -> None:
        """Refuses to keep a model's floats beside weights that expect other inputs.

        Raises:
            UsageError: the recipe makes such weights.
        """
        if self.turns:
            fitting = [recipe.name for recipe in RECIPES.values() if not recipe.turns]
            raise UsageError(
                f"recipe {self.name} rotates or sorts what linears read, which the model's own floats do not expect: "
                f"they cannot be kept beside its weights. Leave --keep-floats (keep_floats) out, or use "
                f"{', '.join(fitting[:-1])} or {fitting[-1]}"
            )

    def check_bits(self) -> None:
        """Refuses bits that are asked for of codes that stay as they are.

        Raises:
            UsageError: the recipe keeps codes.
        """
        if KEEP_CODES in self.steps:
            raise UsageError(
                f"--recipe {self.name} leaves codes the bits that they have; leave --bits out, or use --recipe rtn"
            )

    def config(self, config: ModelConfig) -> ModelConfig:
        """Config of the model that comes out, from that of the model that goes in.

        Raises:
            UsageError: the recipe cannot be followed with such a model.
        """
        for step in self.steps:
            config = step.config(config)
        return config

    def apply(self, source: Source, context: RecipeContext) -> Source:
        """What the steps make of a source."""
        for step in self.steps:
            source = step.apply(source, context)
        return source


# One group is much louder than the others: with one scale per token, 8 bits would hardly see those.
_OF_PRINCIPAL_AXES = QuantConfig(
    w4a4=ActivationQuantization(group_size=ACTIVATION_GROUP, symmetric=False, outlier_groups=10),
    w4a8=ActivationQuantization(group_size=ACTIVATION_GROUP),
)

RECIPES = {
    recipe.name: recipe
    for recipe in (
        Recipe("keep", "leaves 4-bit codes as they are", (KEEP_CODES,)),
        Recipe("rtn", "rounds each weight to the nearest value of its grid", (AS_FLOATS,)),
        Recipe("gptq", "rounds so that later weights make up for earlier errors, on calibration text", (GPTQ,)),
        Recipe("quarot-rtn", "rotates by Hadamard matrices, then rounds as rtn does", (AS_FLOATS, ROTATE)),
        Recipe("quarot-gptq", "rotates by Hadamard matrices, then rounds as gptq does", (AS_FLOATS, ROTATE, GPTQ)),
        Recipe(
            "atom",
            "sorts channels by their energy on calibration text, then rounds as gptq does",
            (AS_FLOATS, SORT_CHANNELS, GPTQ),
        ),
        Recipe(
            "resq",
            "turns onto principal axes of calibration text and mixes by groups, then rounds as gptq does",
            (AS_FLOATS, TURN_ONTO_AXES, GPTQ),
            quantization=_OF_PRINCIPAL_AXES,
        ),
    )
}
