"""The value sources of arXiv 2606.02780: where a layer's attention values come from.

A source gets its layer's projected values, if any, and the `carried` tensor, and returns the values for attention.
`carried` is Megatron's `context`, which is passed from layer to layer and through activation recomputation. What it
holds depends on the source:

    bank, gated value embedding, sum with the bank    token ids `[B, S]`, or where rows are sent ahead a ticket `[1]`
                                                      for the looked-up values (lookup_ahead.py)
    the same with one shared table                    the values `[S, B, G, D]`, looked up once, or a ticket
    embedding sources                                 the decoder's input x0 `[S, B, H]` (this rank's chunk
                                                      under sequence parallelism)
    first-layer sources                               layer 0's values `[S, B, G, D]`, set by layer 0

Modules keep nothing between calls: with a pipeline, micro-batch i may be recomputed after j has run, and would then
read j's.

Shapes: S sequence, B batch, H hidden, G this rank's query groups, D head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.tensor_parallel.mappings import (
    copy_to_tensor_model_parallel_region,
    gather_from_sequence_parallel_region,
)
from megatron.core.transformer.utils import make_sharded_tensors_for_checkpoint
from torch import Tensor

from bov_megatron.model.bank import lookup_ahead
from bov_megatron.model.bank.table import ValueTable
from bov_megatron.model.norm import normalise
from bov_megatron.parallel.device import device
from bov_megatron.recipe import ModelConfig
from bov_megatron.recipe.parameters import GATE_CHANNELS
from bov_megatron.recipe.value_sources import ValueSourceFacts

Project = Callable[[Tensor], Tensor]
"""Applies the layer's value matrix: `[S, B, H]` (a chunk under sequence parallelism) -> `[S, B, G, D]`."""


class ValueSource(torch.nn.Module):
    """Base of all sources: creates the parameters that `facts` requires; a subclass computes the values.

    Args:
        facts: the source's properties.
        vocab_size: padded vocabulary of the tables.
        sequence_parallel: whether hidden states are this rank's chunk of the sequence.
    """

    def __init__(
        self,
        facts: ValueSourceFacts,
        model: ModelConfig,
        dtype: torch.dtype,
        tp_group,
        vocab_size: int,
        sequence_parallel: bool,
    ):
        super().__init__()
        self.facts, self.tp_group, self.sequence_parallel = facts, tp_group, sequence_parallel
        learned = facts.coefficients if model.value.coefficient == "learned" else 0
        # Scalars have shape [1], which the optimizer requires.
        self.source_coefficient = _parameter(1, dtype=dtype) if learned else None
        self.projection_coefficient = _parameter(1, dtype=dtype) if learned == 2 else None
        groups = model.kv_heads // tp_group.size()
        self.gate: Any = _parameter(groups, GATE_CHANNELS, dtype=dtype) if facts.gated else None
        own_table = facts.has_table and model.value.table == "per_layer"
        self.table = ValueTable(model, vocab_size, dtype, tp_group) if own_table else None
        self.ahead = model.value.rows_sent_ahead(tp_group.size())
        """Whether `carried` is a ticket, for rows that are sent ahead of the layer."""

    def forward(self, projected_SBGD: Tensor | None, hidden_SBH: Tensor, carried: Tensor, project: Project) -> Tensor:
        """Values `[S, B, G, D]`.

        Args:
            projected_SBGD: `W_V · x`, or None where the source doesn't need it.
            hidden_SBH: x, the layer's normalised input.
            carried: see the head of this file.
            project: applies `W_V`; only for sources with a `separate_projection`.
        """
        raise NotImplementedError

    def scaled(self, values: Tensor) -> Tensor:
        """Values times the layer's gamma or b, if it is learned."""
        return values if self.source_coefficient is None else values * self.on_own_heads(self.source_coefficient)

    def added(self, projected_SBGD: Tensor, other_SBGD: Tensor) -> Tensor:
        """`a · projected + b · other`, with a and b learned, or fixed at 0.5."""
        if self.projection_coefficient is None:
            return 0.5 * projected_SBGD + 0.5 * other_SBGD
        return self.on_own_heads(self.projection_coefficient) * projected_SBGD + self.scaled(other_SBGD)

    def on_own_heads(self, scalar: torch.nn.Parameter) -> Tensor:
        # Every tensor-parallel rank multiplies its own heads by the scalar, so its gradient is the sum over ranks.
        return copy_to_tensor_model_parallel_region(scalar, group=self.tp_group)

    def looked_up(self, carried: Tensor) -> Tensor:
        """Values `[S, B, G, D]` of this layer's table, or of the shared one."""
        if self.ahead:
            return lookup_ahead.take(carried, self.table)
        return carried if self.table is None else self.table(carried)

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: tuple = (), metadata: Any = None) -> dict:
        # Megatron's default for a torch module would store the table as replicated: one rank's rows instead of all.
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
        if self.table is not None:
            state.update(self.table.sharded_state_dict(f"{prefix}table.", sharded_offsets, metadata))
        return state


class Projection(ValueSource):
    """`W_V · x`, as in standard attention"""

    def forward(self, projected_SBGD, hidden_SBH, carried, project):
        return projected_SBGD


class ScaledProjection(ValueSource):
    """`gamma · W_V · x`"""

    def forward(self, projected_SBGD, hidden_SBH, carried, project):
        return self.scaled(projected_SBGD)


class Bank(ValueSource):
    """`gamma · E_l[id]`"""

    def forward(self, projected_SBGD, hidden_SBH, carried, project):
        return self.scaled(self.looked_up(carried))


class EmbeddingProjection(ValueSource):
    """`gamma · W_V · rms(x0)`"""

    def forward(self, projected_SBGD, hidden_SBH, carried, project):
        return self.scaled(project(normalise(carried)))


class FirstLayer(ValueSource):
    """`gamma · V_1`, the values of layer 0"""

    def forward(self, projected_SBGD, hidden_SBH, carried, project):
        return self.scaled(carried)


class ProjectionPlusFirstLayer(ValueSource):
    """`a · V + b · V_1`"""

    def forward(self, projected_SBGD, hidden_SBH, carried, project):
        return self.added(projected_SBGD, carried)


class ProjectionPlusEmbedding(ValueSource):
    """`a · V + b · W_V · rms(x0)`"""

    def forward(self, projected_SBGD, hidden_SBH, carried, project):
        return self.added(project(hidden_SBH), project(normalise(carried)))


class ProjectionPlusBank(ValueSource):
    """`a · V + b · E_l[id]`"""

    def forward(self, projected_SBGD, hidden_SBH, carried, project):
        return self.added(projected_SBGD, self.looked_up(carried))


class GatedValueEmbedding(ValueSource):
    """`V + 3 · sigmoid(G · x[:12]) · E_l[id]`, one gate per query group"""

    def forward(self, projected_SBGD, hidden_SBH, carried, project):
        channels = hidden_SBH[..., :GATE_CHANNELS].contiguous()
        # Every rank gates its own groups, so the gradient of the channels is the sum over ranks.
        if self.sequence_parallel:
            channels = gather_from_sequence_parallel_region(channels, group=self.tp_group)
        else:
            channels = copy_to_tensor_model_parallel_region(channels, group=self.tp_group)
        gate_SBG = 3 * torch.sigmoid(torch.nn.functional.linear(channels, self.gate))
        embedded_SBGD = self.looked_up(carried)
        return projected_SBGD + gate_SBG.unsqueeze(-1) * embedded_SBGD


SOURCE_CLASSES: dict[str, type[ValueSource]] = {
    "projection": Projection,
    "bank": Bank,
    "embedding_projection": EmbeddingProjection,
    "first_layer": FirstLayer,
    "scaled_projection": ScaledProjection,
    "projection_plus_first_layer": ProjectionPlusFirstLayer,
    "projection_plus_embedding": ProjectionPlusEmbedding,
    "projection_plus_bank": ProjectionPlusBank,
    "gated_value_embedding": GatedValueEmbedding,
}
"""By name in `recipe.value_sources.VALUE_SOURCES`."""


def _parameter(*shape: int, dtype: torch.dtype) -> torch.nn.Parameter:
    return torch.nn.Parameter(torch.empty(*shape, dtype=dtype, device=device()))
