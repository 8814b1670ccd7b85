"""The depth dial: one number from which a model's shape and batch follow; the rates follow from those in the recipe."""

from __future__ import annotations

import dataclasses
import math

from bov_megatron.recipe import ModelConfig, ValueConfig
from bov_megatron.recipe.fields import OptimizerConfig
from bov_megatron.recipe.quantities import parameter_counts

ASPECT_RATIO = 64
"""Width per layer: 12 layers of 768 and 24 layers of 1536 in arXiv 2606.02780."""
HEAD_DIM = 128
BATCH_EXPONENT = 0.383
"""Best batch size ~ (training tokens)^0.383 (arXiv 2505.13738); tokens grow with the parameters."""
FFN_MULTIPLE = 128
"""Feed-forward widths that are computed are multiples of this, so that tensor-parallel ranks can split them."""


def shape(depth: int, aspect_ratio: int = ASPECT_RATIO, head_dim: int = HEAD_DIM) -> dict[str, int]:
    """Fields of a model of `depth` layers: width = depth · aspect_ratio, rounded up to whole heads."""
    heads = math.ceil(depth * aspect_ratio / head_dim)
    return {"model.num_layers": depth, "model.hidden_size": heads * head_dim, "model.num_attention_heads": heads}


def batch_tokens(model: ModelConfig) -> int:
    """Tokens of a batch for a model of this shape: a power of two, 2^19 at 135M and 2^20 at 780M as in the paper.

    N counts matrices and output of the `projection` model, so every value source has the same batch.
    """
    reference = OptimizerConfig()
    assert reference.reference_batch_tokens and reference.reference_parameters
    ratio = matrices_and_head(model) / reference.reference_parameters
    return 2 ** round(math.log2(reference.reference_batch_tokens * ratio**BATCH_EXPONENT))


def matrices_and_head(model: ModelConfig) -> int:
    """Matrix and output parameters of the `projection` model of this shape: the N of the recipe's scaling rules."""
    counts = parameter_counts(dataclasses.replace(model, value=ValueConfig()))
    return counts["matrix"] + counts["output"]


def ffn_for_parameters(model: ModelConfig, parameters: int) -> int:
    """Feed-forward width (a multiple of FFN_MULTIPLE) that brings `model` closest to `parameters`; may be below 1."""
    each = 2 * model.num_layers * model.hidden_size
    others = sum(parameter_counts(model).values()) - each * model.ffn_size
    return round((parameters - others) / each / FFN_MULTIPLE) * FFN_MULTIPLE
