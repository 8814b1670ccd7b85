"""What a model does on held-out text: the loss of each target, and how large each layer's attention output is.

Shapes: B samples, T targets of a sample, S positions, C hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from bov_megatron.data.shards import DataSet

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@dataclass(frozen=True)
class Behaviour:
    """Of a model on some samples."""

    targets: np.ndarray
    """int64 `[N]`: token ids."""
    losses: np.ndarray
    """float64 `[N]`: nats of each target."""
    length: int
    """Targets of a sample."""
    attention: np.ndarray
    """float64 `[layers]`: mean squared norm of what attention adds to a token's residual stream."""


def held_out_samples(data_sets: list[DataSet], count: int) -> np.ndarray:
    """The first `count` samples of the held-out splits, `[count, T + 1]`."""
    splits = [data_set.split("val") for data_set in data_sets if "val" in data_set.manifest.splits]
    split = splits[0] if splits else data_sets[0].split("val")  # which says that there is none
    return split.read(np.arange(min(count, split.num_samples)))


@torch.no_grad()
def observe(
    model: PreTrainedModel, samples: np.ndarray, batch_size: int, on_progress: Callable[[int], object]
) -> Behaviour:
    """Run an exported model over samples `[count, T + 1]`; `on_progress` gets the number of samples of each batch."""
    squares: list[list[Tensor]] = [[] for _ in model.model.layers]
    targets, losses = [], []
    with _attention_outputs(model, squares):
        for begin in range(0, len(samples), batch_size):
            ids = torch.as_tensor(samples[begin : begin + batch_size]).to(model.device)
            logits = model(ids[:, :-1], use_cache=False).logits
            nats = torch.nn.functional.cross_entropy(
                logits.flatten(0, 1).float(), ids[:, 1:].flatten(), reduction="none"
            )
            targets.append(ids[:, 1:].flatten().cpu().numpy())
            losses.append(nats.double().cpu().numpy())
            on_progress(len(ids))
    attention = [torch.cat(of_layer).double().mean().item() for of_layer in squares]
    return Behaviour(np.concatenate(targets), np.concatenate(losses), samples.shape[1] - 1, np.array(attention))


@contextmanager
def _attention_outputs(model: PreTrainedModel, squares: list[list[Tensor]]) -> Iterator[None]:
    """Within, squared norms of each layer's attention output are appended to its list."""

    def listen(found: list[Tensor]):
        return lambda module, inputs, output_BSC: found.append(output_BSC.float().square().sum(-1).flatten().cpu())

    hooks = [
        layer.self_attn.register_forward_hook(listen(found))
        for layer, found in zip(model.model.layers, squares, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
