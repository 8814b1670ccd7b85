"""Output layer and loss by themselves, forward and backward: ours, against Megatron's cross-entropy.

Shapes: s sequence, B batch, H hidden, V vocabulary.
"""

from __future__ import annotations

import functools

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor

from benchmarks.memory import peak_bytes
from benchmarks.timing import Spread, speed_ratio, take_turns
from benchmarks.training_step import one_process
from bov_megatron.model.output import OutputLayer
from bov_megatron.model.spec import transformer_config
from bov_megatron.parallel.device import device, has_gpu
from bov_megatron.recipe import Recipe, recipe_from_dict


def bench_loss(turns: int, quick: bool) -> dict:
    """Milliseconds and peak memory of 16,384 tokens with 32,768 logits each in bf16, and both as ratios. The width is
    the 780M model's on a GPU, 256 on a CPU."""
    recipe, (length, batch) = loss_recipe(quick), (1024, 2) if quick else (2048, 8)
    with one_process(recipe):
        layer = make_output_layer(recipe)
        hidden_sBH = torch.randn(
            length, batch, recipe.model.hidden_size, dtype=layer.weight.dtype, device=device(), requires_grad=True
        )
        labels_Bs = torch.randint(recipe.model.vocab_size, (batch, length), device=device())
        variants = {"ours": layer, "megatron": functools.partial(megatron_loss, layer)}
        losses: dict[str, float] = {}

        def step(name: str) -> None:
            layer.weight.grad = hidden_sBH.grad = None
            loss = variants[name](hidden_sBH, labels_Bs).mean()
            loss.backward()
            losses[name] = loss.item()

        steps = {name: functools.partial(step, name) for name in variants}
        peaks = {name: peak_bytes(run) for name, run in steps.items()}
        timings = take_turns({name: lambda turn, run=run: run() for name, run in steps.items()}, turns)
    return {
        "tokens": length * batch,
        "vocabulary": recipe.model.vocab_size,
        "hidden_size": recipe.model.hidden_size,
        "variants": {
            name: {
                "milliseconds": Spread.of([1e3 * seconds for seconds in timings[name].wall]),
                "peak_bytes": peaks[name],
                "losses": [losses[name]],
            }
            for name in variants
        },
        "ours / megatron": speed_ratio(timings, "ours", "megatron"),
        "peak megatron / ours": peaks["megatron"] / peaks["ours"],
    }


def loss_recipe(quick: bool) -> Recipe:
    hidden = 1536 if has_gpu() else 256
    model = {"hidden_size": 64 if quick else hidden, "num_attention_heads": 4, "vocab_size": 8192 if quick else 32768}
    train = {"precision": "bf16", "steps": 1, "global_batch_size": 1}
    return recipe_from_dict({"name": "loss", "model": model, "train": train, "data": {"path": "unused"}})


def make_output_layer(recipe: Recipe) -> OutputLayer:
    """The recipe's output layer with random weights; inside of `one_process`."""
    layer = OutputLayer(
        transformer_config(recipe),
        recipe.model.vocab_size,
        recipe.padded_vocab_size(),
        recipe.model.logit_softcap,
        parallel_state.get_tensor_model_parallel_group(),
    )
    with torch.no_grad():
        layer.weight.normal_()
    return layer


def megatron_loss(layer: OutputLayer, hidden_sBH: Tensor, labels_Bs: Tensor) -> Tensor:
    """Nats per token `[B, s]` by Megatron's output layer and cross-entropy, with a soft cap in fp32 between them."""
    logits_sBV, _ = ColumnParallelLinear.forward(layer, hidden_sBH)
    capped = _SoftCap.apply(logits_sBV, layer.softcap)
    padding = torch.arange(capped.size(-1), device=capped.device) >= layer.real_columns
    if layer.real_columns < capped.size(-1):
        capped = capped.masked_fill(padding, float("-inf"))
    labels_sB = labels_Bs.transpose(0, 1).contiguous()
    return tensor_parallel.vocab_parallel_cross_entropy(capped, labels_sB).transpose(0, 1)


class _SoftCap(torch.autograd.Function):
    """Keeps tanh alone, and has one backward pass instead of autograd's three."""

    @staticmethod
    def forward(ctx, logits, cap):
        tanh = (logits.float() / cap).tanh_()
        ctx.save_for_backward(tanh)
        ctx.dtype = logits.dtype
        return cap * tanh

    @staticmethod
    def backward(ctx, grad):
        (tanh,) = ctx.saved_tensors
        return torch.ops.aten.tanh_backward(grad, tanh).to(ctx.dtype), None
