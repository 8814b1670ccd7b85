"""What each value source is made of."""

from __future__ import annotations

VALUE_SOURCES = (
    "projection",
    "bank",
    "embedding_projection",
    "first_layer",
    "scaled_projection",
    "projection_plus_first_layer",
    "projection_plus_embedding",
    "projection_plus_bank",
    "gated_value_embedding",
)

# What a value source is made of; every other file asks these sets instead of listing names again.
SOURCES_WITH_TABLE = frozenset({"bank", "projection_plus_bank", "gated_value_embedding"})
SOURCES_WITHOUT_PROJECTION = frozenset({"bank", "first_layer"})
SOURCES_READING_FIRST_LAYER = frozenset({"first_layer", "projection_plus_first_layer"})
SOURCES_READING_EMBEDDING = frozenset({"embedding_projection", "projection_plus_embedding"})
SOURCES_WITH_TWO_COEFFICIENTS = frozenset(
    {"projection_plus_first_layer", "projection_plus_embedding", "projection_plus_bank"}
)
SOURCES_WITHOUT_COEFFICIENT = frozenset({"projection", "gated_value_embedding"})
