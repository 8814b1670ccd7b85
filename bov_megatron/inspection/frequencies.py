"""How often tokens occur in a run's training data, and bins of tokens that occur about equally often."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from bov_megatron.data.shards import DataSet, open_data_sets
from bov_megatron.recipe import Recipe

BINS_PER_DECADE = 2
CHUNK = 256
"""Samples read at once."""


@dataclass(frozen=True)
class Frequencies:
    """Counts of a sample of the training text."""

    counts: np.ndarray
    """int64 `[V]`"""

    @property
    def total(self) -> int:
        return int(self.counts.sum())

    def per_million(self) -> np.ndarray:
        """float64 `[V]`; 0 for tokens that the sample doesn't have."""
        return 1e6 * self.counts / max(self.total, 1)

    def edges(self) -> np.ndarray:
        """Ascending edges of the bins, per million tokens: halves of decades that hold every token that occurs."""
        seen = self.per_million()[self.counts > 0]
        low, high = np.log10([seen.min(), seen.max()])
        first, last = np.floor(low * BINS_PER_DECADE), np.floor(high * BINS_PER_DECADE) + 1
        return 10 ** (np.arange(first, last + 1) / BINS_PER_DECADE)

    def bins(self) -> np.ndarray:
        """int64 `[V]`: the bin of each token; -1 for tokens that don't occur."""
        found = np.searchsorted(self.edges(), self.per_million(), side="right") - 1
        return np.where(self.counts > 0, found, -1)

    def centres(self) -> np.ndarray:
        edges = self.edges()
        return np.sqrt(edges[:-1] * edges[1:])


def open_data(recipe: Recipe, tokenizer_hash: str) -> list[DataSet]:
    """The run's data sets. Raises DataError where they are not there any more, or of another tokenizer."""
    return open_data_sets(recipe.data, recipe.model.sequence_length, recipe.model.vocab_size, tokenizer_hash)


def count_tokens(data_sets: list[DataSet], weights: list[float], vocab_size: int, tokens: int) -> Frequencies:
    """Counts over about `tokens` inputs, samples spread evenly over each data set's training split, in proportion to
    the weights."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for data_set, weight in zip(data_sets, weights, strict=True):
        split = data_set.split("train")
        wanted = max(1, round(tokens * weight / sum(weights) / (split.length - 1)))
        samples = np.unique(np.linspace(0, split.num_samples - 1, min(wanted, split.num_samples)).astype(np.int64))
        for begin in range(0, len(samples), CHUNK):
            inputs = split.read(samples[begin : begin + CHUNK])[:, :-1]
            counts += np.bincount(inputs.reshape(-1), minlength=vocab_size)
    return Frequencies(counts)
