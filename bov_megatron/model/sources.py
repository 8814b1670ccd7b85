"""Where a layer's attention values come from: one small class per source of arXiv 2606.02780.

A source sees its layer's projected values (if the layer projects any) and what travels beside the hidden
states, and returns the values that attention mixes. What travels is one tensor, Megatron's `context`,
passed from layer to layer and through activation recomputation; which one depends on the source:

    bank, gated value embedding, sum with the bank    a ticket `[1]` to take looked-up values with (lookup_ahead.py),
                                                      where rows are sent ahead; else token ids `[B, S]`
    the same with one shared table                    a ticket; else the values `[S, B, G, D]`, looked up once
    embedding sources                                 the decoder's input x0 `[S, B, H]` (this rank's chunk
                                                      under sequence parallelism)
    first-layer sources                               layer 0's values `[S, B, G, D]`, put there by layer 0

Nothing is kept on a module between calls: under recomputation with a pipeline, micro-batch i is recomputed
after j has run, and anything stored would be j's.

Shapes: S sequence, B batch, H hidden, G this rank's query groups, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from bov_megatron.model.bank import lookup_ahead
from bov_megatron.model.bank.table import ValueTable, rows_sent_ahead
from bov_megatron.model.norm import rms_norm
from bov_megatron.recipe import ModelConfig
from bov_megatron.recipe.parameters import GATE_CHANNELS
from bov_megatron.recipe.value_sources import SOURCES_WITH_TABLE, SOURCES_WITH_TWO_COEFFICIENTS

Project = Callable[[Tensor], Tensor]
"""Applies the layer's value matrix: `[S, B, H]` (a chunk under sequence parallelism) -> `[S, B, G, D]`."""


class ValueSource(torch.nn.Module):
    """Base of all sources; on its own, the standard attention's `W_V · x`.

    `projects`: whether `W_V · x` is needed, fused with query and key.
    `separate_projection`: whether `W_V` must stand alone, because it is applied to something other than x.
    """

    projects = True
    separate_projection = False

    def __init__(self, tp_group):
        super().__init__()
        self.tp_group = tp_group

    def forward(self, projected_SBGD: Tensor | None, hidden_SBH: Tensor, carried: Tensor, project: Project) -> Tensor:
        """Values `[S, B, G, D]`.

        Args:
            projected_SBGD: `W_V · x`, or None where the source doesn't need it.
            hidden_SBH: x, the layer's normalised input.
            carried: what travels beside the hidden states, see the head of this file.
            project: applies `W_V`, only for sources with `separate_projection`.
        """
        return projected_SBGD

    def looked_up(self, carried: Tensor) -> Tensor:
        """Values `[S, B, G, D]` of this layer's table, or of the shared one."""
        if self.ahead:
            return lookup_ahead.take(carried, self.table)
        return carried if self.table is None else self.table(carried)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: dict | None = None) -> dict:
        """Megatron's default for a module of torch's would store every parameter below it as replicated, a
        tensor-parallel rank's rows of the table in the place of all rows."""
        own: dict[str, Tensor] = {}
        self._save_to_state_dict(own, "", keep_vars=True)
        state = make_sharded_tensors_for_checkpoint(
            own,
            prefix,
            {"gate": 0},
            sharded_offsets,
            tp_group=self.tp_group,
            dp_cp_group=metadata["dp_cp_group"],
        )
        for name, table in self.named_children():
            state.update(table.sharded_state_dict(f"{prefix}{name}.", sharded_offsets, metadata))
        return state


class _Scaled(ValueSource):
    """A source whose value is multiplied by gamma: one learned scalar of the layer, or 1."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype, tp_group):
        super().__init__(tp_group)
        learned = model.value.coefficient == "learned"
        self.source_coefficient = _scalar(dtype) if learned else None

    def scale(self, values: Tensor) -> Tensor:
        return values if self.source_coefficient is None else values * self._shared(self.source_coefficient)

    def _shared(self, scalar: torch.nn.Parameter) -> Tensor:
        """Every tensor-parallel rank uses the scalar on its own heads: its gradient is the sum over ranks."""
        return copy_to_tensor_model_parallel_region(scalar, group=self.tp_group)


class ScaledProjection(_Scaled):
    """`gamma · W_V · x`"""

    def forward(self, projected_SBGD, hidden_SBH, carried, project):
        return self.scale(projected_SBGD)


class Bank(_Scaled):
    """`gamma · E_l[id]`"""

    projects = False

    def __init__(self, model: ModelConfig, dtype: torch.dtype, tp_group, vocab_size: int):
        super().__init__(model, dtype, tp_group)
        self.table, self.ahead = layer_table(model, dtype, tp_group, vocab_size)

    def forward(self, projected_SBGD, hidden_SBH, carried, project):
        return self.scale(self.looked_up(carried))


class EmbeddingProjection(_Scaled):
    """`gamma · W_V · rms(x0)`"""

    projects = False
    separate_projection = True

    def forward(self, projected_SBGD, hidden_SBH, carried, project):
        return self.scale(project(rms_norm(carried)))


class FirstLayer(_Scaled):
    """`gamma · V_1`, the values of layer 0"""

    projects = False

    def forward(self, projected_SBGD, hidden_SBH, carried, project):
        return self.scale(carried)


class _Sum(_Scaled):
    """`a · V + b · other`: learned from a=1, b=0, or fixed at one half each."""

    def __init__(self, model: ModelConfig, dtype: torch.dtype, tp_group):
        super().__init__(model, dtype, tp_group)
        self.projection_coefficient = _scalar(dtype) if self.source_coefficient is not None else None

    def add(self, projected_SBGD: Tensor, other_SBGD: Tensor) -> Tensor:
        if self.projection_coefficient is None:
            return 0.5 * projected_SBGD + 0.5 * other_SBGD
        return self._shared(self.projection_coefficient) * projected_SBGD + self.scale(other_SBGD)


class ProjectionPlusFirstLayer(_Sum):
    """`a · V + b · V_1`"""

    def forward(self, projected_SBGD, hidden_SBH, carried, project):
        return self.add(projected_SBGD, carried)


class ProjectionPlusEmbedding(_Sum):
    """`a · V + b · W_V · rms(x0)`"""

    projects = False
    separate_projection = True

    def forward(self, projected_SBGD, hidden_SBH, carried, project):
        return self.add(project(hidden_SBH), project(rms_norm(carried)))


class ProjectionPlusBank(_Sum):
    """`a · V + b · E_l[id]`"""

    def __init__(self, model: ModelConfig, dtype: torch.dtype, tp_group, vocab_size: int):
        super().__init__(model, dtype, tp_group)
        self.table, self.ahead = layer_table(model, dtype, tp_group, vocab_size)

    def forward(self, projected_SBGD, hidden_SBH, carried, project):
        return self.add(projected_SBGD, self.looked_up(carried))


class GatedValueEmbedding(ValueSource):
    """`V + 3 · sigmoid(G · x[:12]) · E_l[id]`, one gate per query group"""

    def __init__(self, model: ModelConfig, dtype: torch.dtype, tp_group, vocab_size: int, sequence_parallel: bool):
        super().__init__(tp_group)
        self.sequence_parallel = sequence_parallel
        groups = model.kv_heads // tp_group.size()
        self.gate = torch.nn.Parameter(
            torch.empty(groups, GATE_CHANNELS, dtype=dtype, device=torch.cuda.current_device())
        )
        self.table, self.ahead = layer_table(model, dtype, tp_group, vocab_size)

    def forward(self, projected_SBGD, hidden_SBH, carried, project):
        channels = hidden_SBH[..., :GATE_CHANNELS].contiguous()
        # Each rank gates its own groups, so the gradient of the channels is the sum over ranks.
        if self.sequence_parallel:
            channels = gather_from_sequence_parallel_region(channels, group=self.tp_group)
        else:
            channels = copy_to_tensor_model_parallel_region(channels, group=self.tp_group)
        gate_SBG = 3 * torch.sigmoid(torch.nn.functional.linear(channels, self.gate))
        embedded_SBGD = self.looked_up(carried)
        return projected_SBGD + gate_SBG.unsqueeze(-1) * embedded_SBGD


def build_value_source(
    source: str, model: ModelConfig, dtype: torch.dtype, tp_group, vocab_size: int, sequence_parallel: bool
) -> ValueSource:
    """The value source of one layer.

    Args:
        source: one of recipe.VALUE_SOURCES.
        vocab_size: padded vocabulary of the tables.
        sequence_parallel: whether hidden states arrive as this rank's chunk of the sequence.
    """
    if source == "projection":
        return ValueSource(tp_group)
    if source == "gated_value_embedding":
        return GatedValueEmbedding(model, dtype, tp_group, vocab_size, sequence_parallel)
    if source in SOURCES_WITH_TABLE:
        cls = ProjectionPlusBank if source in SOURCES_WITH_TWO_COEFFICIENTS else Bank
        return cls(model, dtype, tp_group, vocab_size)
    cls = {
        "scaled_projection": ScaledProjection,
        "embedding_projection": EmbeddingProjection,
        "first_layer": FirstLayer,
        "projection_plus_first_layer": ProjectionPlusFirstLayer,
        "projection_plus_embedding": ProjectionPlusEmbedding,
    }[source]
    return cls(model, dtype, tp_group)


def new_table(model: ModelConfig, dtype: torch.dtype, tp_group, vocab_size: int) -> ValueTable:
    """A value table of `model`, uninitialised."""
    value = model.value
    on_host = value.table_memory == "host"
    return ValueTable(
        vocab_size, model.kv_heads, model.kv_channels, value.table_partition, value.lookup, dtype, tp_group, on_host
    )


def layer_table(model: ModelConfig, dtype: torch.dtype, tp_group, vocab_size: int) -> tuple[ValueTable | None, bool]:
    """This layer's own table, or None where all layers read the shared one; and whether either's rows are sent ahead,
    so that what travels is a ticket."""
    value = model.value
    ahead = rows_sent_ahead(value.table_partition, value.lookup, value.table_memory == "host", tp_group.size())
    return None if value.table == "shared" else new_table(model, dtype, tp_group, vocab_size), ahead


def _scalar(dtype: torch.dtype) -> torch.nn.Parameter:
    """A learned scalar as shape [1]: a 0-dim parameter would miss Megatron's no-weight-decay rule."""
    return torch.nn.Parameter(torch.empty(1, dtype=dtype, device=torch.cuda.current_device()))
