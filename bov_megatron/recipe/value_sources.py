"""The value sources and their properties. Other modules ask for a property, never for a source's name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ValueSourceFacts:
    """Terms of a layer's values `a · W_V · x + b · gate · r`, where x is the layer's input and r what it reads."""

    projects: bool
    """Whether the values contain `W_V · x`, the layer's own projection."""
    reads: Literal["table", "embedding", "first_layer"] | None = None
    """r: a table's row for the token, `W_V · rms(x0)` of the decoder's input x0, or layer 0's values."""
    coefficients: Literal[0, 1, 2] = 0
    """0; 1: gamma, on r or, without r, on the projection; 2: a and b."""
    gated: bool = False
    """Whether r is scaled by a gate per query group. A gated table is initialised uniformly, not aligned with `W_V`."""

    @property
    def has_table(self) -> bool:
        return self.reads == "table"

    @property
    def separate_projection(self) -> bool:
        """Whether `W_V` is also applied to another input than x, and so cannot be fused with query and key."""
        return self.reads == "embedding"

    @property
    def fused_projection(self) -> bool:
        return self.projects and not self.separate_projection

    @property
    def has_value_matrix(self) -> bool:
        return self.projects or self.separate_projection


PROJECTION = "projection"
"""The source of layers that are not targets."""

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
