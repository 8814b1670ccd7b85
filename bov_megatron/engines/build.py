"""Choice of the engine."""

from __future__ import annotations

from bov_megatron.engines.base import Engine
from bov_megatron.engines.megatron import MegatronEngine
from bov_megatron.recipe import Recipe


def build_engine(recipe: Recipe, with_optimizer: bool = True) -> Engine:
    """The engine of the recipe's field `engine`; without an optimizer always Megatron's.

    Call parallel.process_groups.initialize first. Weights are initialised from the recipe's seed.
    """
    if with_optimizer and recipe.engine == "deepspeed":
        from bov_megatron.engines.deepspeed.engine import DeepSpeedEngine  # imports deepspeed, which takes seconds

        return DeepSpeedEngine(recipe)
    return MegatronEngine(recipe, with_optimizer)
