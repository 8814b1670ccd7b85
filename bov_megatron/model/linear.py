"""The blocks' linear layers: Megatron's, or Transformer Engine's, which also multiply in FP8.

Without Transformer Engine, Megatron silently substitutes mocks for its classes and ignores FP8, so that a run would
train in bf16. This module therefore checks for it before anything is built.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util

from megatron.core.extensions import transformer_engine
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.utils import is_te_min_version
from torch import nn

from bov_megatron.errors import RecipeError
from bov_megatron.recipe import Recipe

FP8 = {"tensorwise": ("hybrid", "2.2"), "blockwise": ("e4m3", "2.3"), "mxfp8": ("e4m3", "2.1")}
"""Per value of `train.fp8`: Megatron's format for this scaling, and the oldest Transformer Engine that has it.

All three use current scaling. Delayed scaling is not supported: its history of maxima per rank would have to be in the
checkpoint, and could not be read in another layout.
"""
EXTRA_STATE = "_extra_state"


def linear_layers(recipe: Recipe) -> tuple[type[nn.Module], type[nn.Module]]:
    """The column-parallel and the row-parallel class.

    Raises RecipeError where Transformer Engine is needed, but missing, broken or too old.
    """
    if recipe.model.linear_layers == "megatron":
        return ColumnParallelLinear, RowParallelLinear
    if not transformer_engine.HAVE_TE:
        present = importlib.util.find_spec("transformer_engine") is not None
        raise RecipeError(
            "model.linear_layers=transformer_engine: Transformer Engine "
            + ("is installed but cannot be imported" if present else "is not installed")
            + "; install it (docs/use/setup.md), or set model.linear_layers=megatron and train.fp8=none"
        )
    oldest = FP8.get(recipe.train.fp8, (None, "2.1"))[1]
    if not is_te_min_version(oldest):
        raise RecipeError(
            f"train.fp8={recipe.train.fp8} needs Transformer Engine {oldest} or newer, found "
            f"{importlib.metadata.version('transformer_engine')}; install a newer one, or set train.fp8=none"
        )
    return transformer_engine.TEColumnParallelLinear, transformer_engine.TERowParallelLinear


def fp8_settings(recipe: Recipe) -> dict:
    """Megatron's configuration of FP8. Only products are in FP8; weights stay in bf16, with fp32 main weights."""
    if recipe.train.fp8 == "none":
        return {}
    return {"fp8": FP8[recipe.train.fp8][0], "fp8_recipe": recipe.train.fp8}


def load_without_extra_state(model: nn.Module) -> None:
    """Let a model load weights without the extra state of linear layers.

    None of the scalings in `FP8` needs it, and it would tie a checkpoint to Transformer Engine and to the number of
    ranks.
    """

    def fill_in(state_dict, prefix, *_):
        state_dict.setdefault(f"{prefix}{EXTRA_STATE}", None)

    for module in model.modules():
        if type(module).set_extra_state is not nn.Module.set_extra_state:
            module._register_load_state_dict_pre_hook(fill_in)


def without_extra_state(sharded_state_dict: dict) -> dict:
    return {key: value for key, value in sharded_state_dict.items() if not key.endswith(EXTRA_STATE)}
