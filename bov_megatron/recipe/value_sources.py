"""What each value source is made of: one record per source, which every other module asks instead of the name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ValueSourceFacts:
    """A layer's values are `a · W_V · x + b · gate · (what it reads)`; a record says which of these there are."""

    projects: bool
    """Whether `W_V · x`, the layer's own projection, is a part of its values."""
    reads: Literal["table", "embedding", "first_layer"] | None = None
    """What else: rows of a table by token id, `W_V · rms(x0)` of the decoder's input, or layer 0's values."""
    coefficients: Literal[0, 1, 2] = 0
    """0, 1 (gamma, on what it reads, or on the projection where it reads nothing), or 2 (a and b)."""
    gated: bool = False
    """Whether a gate per query group scales what it reads. A gated table starts uniform, not aligned with `W_V`."""

    @property
    def has_table(self) -> bool:
        return self.reads == "table"

    @property
    def separate_projection(self) -> bool:
        """Whether `W_V` is applied to something other than x too, and so cannot be fused with query and key."""
        return self.reads == "embedding"

    @property
    def fused_projection(self) -> bool:
        return self.projects and not self.separate_projection

    @property
    def has_value_matrix(self) -> bool:
        return self.projects or self.separate_projection


PROJECTION = "projection"
"""The source of every layer that is no target."""

VALUE_SOURCES = {
    PROJECTION: ValueSourceFacts(projects=True),
    "bank": ValueSourceFacts(projects=False, reads="table", coefficients=1),
    "embedding_projection": ValueSourceFacts(projects=False, reads="embedding", coefficients=1),
    "first_layer": ValueSourceFacts(projects=False, reads="first_layer", coefficients=1),
    "scaled_projection": ValueSourceFacts(projects=True, coefficients=1),
    "projection_plus_first_layer": ValueSourceFacts(projects=True, reads="first_layer", coefficients=2),
    "projection_plus_embedding": ValueSourceFacts(projects=True, reads="embedding", coefficients=2),
    "projection_plus_bank": ValueSourceFacts(projects=True, reads="table", coefficients=2),
    "gated_value_embedding": ValueSourceFacts(projects=True, reads="table", gated=True),
}
