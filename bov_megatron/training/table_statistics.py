"""Statistics of value tables and coefficients for the metrics."""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from bov_megatron.engines.base import Engine
from bov_megatron.parallel.device import device
from bov_megatron.parallel.parameter import LocalParameter


@torch.no_grad()
def coefficient_values(engine: Engine) -> dict[str, float]:
    """Learned coefficients: `gamma/layer_8` (gamma or b) and `projection_coefficient/layer_8` (a); collective."""
    model = engine.recipe.model
    values = torch.zeros(2, model.num_layers, dtype=torch.float64, device=device())
    present = torch.zeros_like(values)
    kinds = ("coefficient", "projection_coefficient")
    for local in engine.local_parameters():
        spec = local.specs[0]
        if spec.kind in kinds and _first_tensor_rank():
            values[kinds.index(spec.kind), spec.layer] = local.parameter.double().item()
            present[kinds.index(spec.kind), spec.layer] = 1
    both = torch.stack((values, present))
    _sum_over_model(both)
    names = ("gamma", "projection_coefficient")
    return {f"{names[kind]}/layer_{layer}": both[0, kind, layer].item() for kind, layer in both[1].nonzero().tolist()}


@torch.no_grad()
def table_statistics(engine: Engine) -> dict[str, float]:
    """Per value table: `table_row_norm/layer_8` (or `/shared`), the root mean square of row norms, and
    `table_rows_touched/layer_8`, the share of rows with a gradient in the last step's global batch; collective."""
    model = engine.recipe.model
    layers = model.num_layers
    sums = torch.zeros(layers + 1, 3, dtype=torch.float64, device=device())  # as `_table_sums` returns; last: shared
    for local in engine.local_parameters():
        if local.specs[0].kind == "table":
            index = layers if local.specs[0].layer is None else local.specs[0].layer
            sums[index] += _table_sums(local, engine)
    _sum_over_model(sums)
    statistics = {}
    for index in sums[:, 1].nonzero().flatten().tolist():
        squares, rows, touched = sums[index].tolist()
        name = "shared" if index == layers else f"layer_{index}"
        statistics[f"table_row_norm/{name}"] = (squares / rows) ** 0.5
        statistics[f"table_rows_touched/{name}"] = touched / rows
    return statistics


def _table_sums(local: LocalParameter, engine: Engine) -> torch.Tensor:
    """[sum of squares, number of rows, rows with a gradient] of this rank's part of a table, without padding."""
    table, vocab = local.parameter, engine.recipe.model.vocab_size
    stored = engine.recipe.padded_vocab_size()
    first = 0
    if local.partition_dim == 0:
        stored //= parallel_state.get_tensor_model_parallel_world_size()
        first = parallel_state.get_tensor_model_parallel_rank() * stored
    real = max(0, min(vocab - first, stored))
    squares, touched = engine.table_sums(table, real)
    counts_rows = local.partition_dim == 0 or _first_tensor_rank()
    counts_squares = local.partition_dim >= 0 or _first_tensor_rank()
    sums = [squares * counts_squares, real * counts_rows, touched * counts_rows]
    return torch.tensor(sums, dtype=torch.float64, device=device())


def _first_tensor_rank() -> bool:
    return parallel_state.get_tensor_model_parallel_rank() == 0


def _sum_over_model(values: torch.Tensor) -> None:
    dist.all_reduce(values, group=parallel_state.get_model_parallel_group())
