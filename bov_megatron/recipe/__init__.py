"""The configuration of a run, and what follows from it by arithmetic. Imports no torch, so that `plan` starts fast.

Import order: value_sources, limits -> fields -> parameters -> quantities -> memory -> pipeline, traffic, work ->
checks -> loading.
"""

from bov_megatron.errors import RecipeError
from bov_megatron.recipe.checks import check_recipe
from bov_megatron.recipe.fields import (
    CheckpointConfig,
    DataConfig,
    DeepSpeedConfig,
    EvaluationConfig,
    HealthConfig,
    HeldOutConfig,
    LoggingConfig,
    ModelConfig,
    OptimizerConfig,
    ParallelConfig,
    Recipe,
    StreamConfig,
    TrainConfig,
    ValidationConfig,
    ValueConfig,
)
from bov_megatron.recipe.layout_checks import data_parallel_size
from bov_megatron.recipe.loading import load_recipe, recipe_from_dict

__all__ = [
    "CheckpointConfig",
    "DataConfig",
    "DeepSpeedConfig",
    "EvaluationConfig",
    "HealthConfig",
    "HeldOutConfig",
    "LoggingConfig",
    "ModelConfig",
    "OptimizerConfig",
    "ParallelConfig",
    "Recipe",
    "RecipeError",
    "StreamConfig",
    "TrainConfig",
    "ValidationConfig",
    "ValueConfig",
    "check_recipe",
    "data_parallel_size",
    "load_recipe",
    "recipe_from_dict",
]
