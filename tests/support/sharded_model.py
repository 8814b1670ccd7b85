"""A model that is only its weights, sharded as Megatron's modules shard theirs, with gradients made up per step.

Everything is drawn whole from a seed and then sliced, so every layout holds the same model and the same gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import nn

from bov_megatron.optim.optimizer import BovOptimizer
from bov_megatron.parallel import process_groups
from bov_megatron.parallel.parameter import LocalParameter
from bov_megatron.recipe import ModelConfig, OptimizerConfig, ParallelConfig, Recipe, TrainConfig, ValueConfig
from bov_megatron.recipe.parameters import ParameterSpec

VOCAB, HIDDEN, GROUPS, HEAD, QUERIES = 550, 128, 4, 16, 2
"""Two query heads per key/value head, so that q differs from k and v in shape."""
VOCAB_MULTIPLE = 51
"""561 rows at TP=1, 612 at TP=2 and 4: padding differs, and 561 rows divide over neither 2 nor 4 ranks."""
SPLIT_QKV = (QUERIES * HEAD, HEAD, HEAD)
TOTAL_STEPS = 10


@dataclass(frozen=True)
class Weight:
    """One weight of the whole model."""

    key: str
    shape: tuple[int, ...]
    kind: str
    partition_dim: int
    names: tuple[str, ...]
    split: tuple[int, ...] | None = None
    stage: int = 0
    """Pipeline stage, of two."""
    vocabulary: bool = False


def weights() -> list[Weight]:
    """Every kind, every partition, q/k/v and q/k fused, a matrix that is replicated."""
    query, kv, layer = GROUPS * QUERIES * HEAD, GROUPS * HEAD, "model.layers.{}.self_attn.{}_proj.weight".format
    vocabulary = {"partition_dim": 0, "vocabulary": True}
    qkv = tuple(layer(0, n) for n in "qkv")
    return [
        Weight("embedding", (VOCAB, HIDDEN), "embedding", names=("model.embed_tokens.weight",), **vocabulary),
        Weight("smear_gate", (1, 24), "smear", -1, ("model.smear.gate.weight",)),
        Weight("smear_scale", (1,), "smear", -1, ("model.smear.scale",)),
        Weight("qkv", (query + 2 * kv, HIDDEN), "matrix", 0, qkv, SPLIT_QKV),
        Weight("out", (HIDDEN, query), "matrix", 1, (layer(0, "o"),)),
        Weight("gate", (GROUPS, 12), "matrix", 0, ("model.layers.0.self_attn.value_gate.weight",)),
        Weight("qk", (query + kv, HIDDEN), "matrix", 0, (layer(1, "q"), layer(1, "k")), SPLIT_QKV[:2], stage=1),
        Weight(
            "table", (VOCAB, kv), "table", names=("model.layers.1.self_attn.value_table.weight",), stage=1, **vocabulary
        ),
        Weight("gamma", (1,), "coefficient", -1, ("model.layers.1.self_attn.source_coefficient",), stage=1),
        Weight("a", (1,), "projection_coefficient", -1, ("model.layers.1.self_attn.projection_coefficient",), stage=1),
        Weight("up", (4 * HIDDEN, HIDDEN), "matrix", 0, ("model.layers.1.mlp.up_proj.weight",), stage=1),
        Weight("down", (HIDDEN, 4 * HIDDEN), "matrix", 1, ("model.layers.1.mlp.down_proj.weight",), stage=1),
        Weight("replicated", (96, 64), "matrix", -1, ("model.layers.1.mlp.replicated.weight",), stage=1),
        Weight("output", (VOCAB, HIDDEN), "output", names=("lm_head.weight",), stage=1, **vocabulary),
    ]


def recipe(tensor: int = 1, pipeline: int = 1, sharded: bool = True, bf16: bool = False, **optimizer) -> Recipe:
    parallel = ParallelConfig(
        tensor_model_parallel_size=tensor,
        pipeline_model_parallel_size=pipeline,
        use_distributed_optimizer=sharded,
        make_vocab_size_divisible_by=VOCAB_MULTIPLE,
    )
    value = ValueConfig(source="projection_plus_bank")
    model = ModelConfig(num_layers=2, hidden_size=HIDDEN, vocab_size=VOCAB, num_attention_heads=8, value=value)
    config = OptimizerConfig(
        warmup_steps=2, momentum_warmup_steps=4, reference_batch_tokens=None, reference_parameters=None
    )
    return Recipe(
        model=model,
        parallel=parallel,
        train=TrainConfig(precision="bf16" if bf16 else "fp32", global_batch_size=12),
        optimizer=replace(config, **optimizer),
    )


def whole(weight: Weight, seed: int) -> torch.Tensor:
    """An unpadded tensor of the weight's shape, a function of its name and `seed` alone."""
    generator = torch.Generator().manual_seed(seed * 1000 + sum(map(ord, weight.key)))
    return torch.randn(weight.shape, generator=generator) * 0.1


def local(tensor: torch.Tensor, weight: Weight, ranks: int, rank: int) -> torch.Tensor:
    """Tensor-parallel rank's part, padded with zero rows where the vocabulary is."""
    if weight.vocabulary:
        multiple = VOCAB_MULTIPLE * ranks
        padding = -tensor.size(0) % multiple
        tensor = torch.nn.functional.pad(tensor, (0, 0, 0, padding))
    return tensor if weight.partition_dim < 0 else tensor.chunk(ranks, weight.partition_dim)[rank].contiguous()


class ShardedModel(nn.Module):
    """This rank's parameters, described as the model describes its own."""

    def __init__(self, tensor_size: int, tensor_rank: int, stage: int | None, dtype: torch.dtype):
        super().__init__()
        self.tensor_size, self.tensor_rank = tensor_size, tensor_rank
        self.weights = {w.key: w for w in weights() if stage is None or w.stage == stage}
        self.local_parameters = []
        for key, weight in self.weights.items():
            parameter = nn.Parameter(local(whole(weight, seed=1), weight, tensor_size, tensor_rank).to(dtype))
            self.register_parameter(key, parameter)
            self.local_parameters.append(
                LocalParameter(
                    key,
                    parameter,
                    tuple(ParameterSpec(name, weight.shape, weight.kind) for name in weight.names),
                    partition_dim=weight.partition_dim,
                    tensor_parallel_size=tensor_size if weight.partition_dim >= 0 else 1,
                    fused_split=weight.split,
                )
            )

    def set_gradients(self, step: int) -> None:
        """As after Megatron's DDP: fp32 `main_grad`, the same on all data-parallel ranks. Grows, so clipping shows."""
        for key, weight in self.weights.items():
            gradient = local(whole(weight, seed=100 + step), weight, self.tensor_size, self.tensor_rank)
            getattr(self, key).main_grad = gradient * (1 + step) ** 2

    def sharded_state_dict(self) -> dict:
        from megatron.core.utils import make_sharded_tensor_for_checkpoint, make_tp_sharded_tensor_for_checkpoint

        result = {}
        for key, weight in self.weights.items():
            make = make_sharded_tensor_for_checkpoint
            if weight.partition_dim >= 0:
                make = partial(make_tp_sharded_tensor_for_checkpoint, tp_axis=weight.partition_dim)
            result[key] = make(getattr(self, key), f"model.{key}", allow_shape_mismatch=weight.vocabulary)
        return result


def single_process(recipe: Recipe, steps: int) -> tuple[dict[str, torch.Tensor], list[float]]:
    """Weights by key after `steps` updates on one process without process groups, and gradient norms."""
    model = ShardedModel(1, 0, None, torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32)
    optimizer = BovOptimizer(model.local_parameters, recipe, TOTAL_STEPS)
    norms = advance(model, optimizer, steps)
    return {key: unpadded(parameter, model.weights[key]) for key, parameter in model.named_parameters()}, norms


def advance(model: ShardedModel, optimizer: BovOptimizer, steps: int) -> list[float]:
    norms = []
    for _ in range(steps):
        model.set_gradients(optimizer.step_count)
        result = optimizer.step()
        assert result.applied
        norms.append(result.grad_norm)
    return norms


def unpadded(parameter: torch.Tensor, weight: Weight) -> torch.Tensor:
    tensor = parameter.detach().clone()
    return tensor[: weight.shape[0]] if weight.vocabulary else tensor


def start_rank(rank: int, world_size: int, recipe: Recipe) -> tuple[ShardedModel, BovOptimizer]:
    """Join the world; this rank's model and optimizer."""
    from megatron.core import parallel_state

    process_groups.initialize(recipe, rank, world_size)
    pipeline = recipe.parallel.pipeline_model_parallel_size
    model = ShardedModel(
        recipe.parallel.tensor_model_parallel_size,
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_pipeline_model_parallel_rank() if pipeline > 1 else None,
        torch.bfloat16 if recipe.train.precision == "bf16" else torch.float32,
    )
    return model, BovOptimizer(model.local_parameters, recipe, TOTAL_STEPS)


def local_result(model: ShardedModel) -> dict:
    """This rank's weights and its place, picklable."""
    weights = {key: parameter.detach().clone() for key, parameter in model.named_parameters()}
    return {"tensor_rank": model.tensor_rank, "weights": weights}


def assemble(results: list[dict], tensor_size: int) -> dict[str, torch.Tensor]:
    """Whole, unpadded weights by key; replicas on other ranks must agree bit for bit."""
    parts: dict[tuple[str, int], torch.Tensor] = {}
    for result in results:
        for key, tensor in result["weights"].items():
            previous = parts.setdefault((key, result["tensor_rank"]), tensor)
            assert torch.equal(previous, tensor), f"{key} differs between data-parallel ranks"
    assembled = {}
    for weight in weights():
        local_parts = [parts[weight.key, rank] for rank in range(tensor_size)]
        if weight.partition_dim < 0:
            assert all(torch.equal(part, local_parts[0]) for part in local_parts), f"{weight.key} differs over TP"
            assembled[weight.key] = local_parts[0]
        else:
            assembled[weight.key] = unpadded(torch.cat(local_parts, weight.partition_dim), weight)
    return assembled
