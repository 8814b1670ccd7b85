"""Statistics of value tables by row, in one pass over their pieces, and nearest rows in a second one.

Shapes: V rows (token ids), K columns of a table, Q rows that are asked about.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from bov_megatron.inspection.pieces import EMBEDDING, StoredTensors, table_keys
from bov_megatron.model.initialization import initial_rows
from bov_megatron.recipe import Recipe
from bov_megatron.recipe.parameters import ParameterSpec, parameter_specs

ROWS = 8192
"""Rows that are compared at once."""
PARALLEL = {torch.float32: 1e-9, torch.bfloat16: 1e-4}
"""By the precision that is stored: squared sine of the angle to the initial row, up to which a row was never updated.
Weight decay alone only makes a row shorter; other rounding than fp32's turns it a little."""


@dataclass(frozen=True)
class TableRows:
    """What is known of each row of a table, `[V]` float64."""

    name: str
    layer: int | None
    """None for the table that all target layers share."""
    squares: np.ndarray
    """Squared norm."""
    initial_squares: np.ndarray
    """Squared norm of the initial row, `W_V · rms(embedding row)`."""
    products: np.ndarray
    """Row times initial row."""
    parallel: float
    """See PARALLEL."""

    @property
    def label(self) -> str:
        return "shared" if self.layer is None else f"layer {self.layer}"

    @property
    def norms(self) -> np.ndarray:
        return np.sqrt(self.squares)

    @property
    def distances(self) -> np.ndarray:
        """Of each row from its initial one, relative to that one's norm."""
        squares = np.maximum(self.squares - 2 * self.products + self.initial_squares, 0)
        return np.sqrt(squares / np.maximum(self.initial_squares, 1e-300))

    @property
    def untouched(self) -> np.ndarray:
        """bool: whether a row was never updated: it still points where it did at first."""
        both = np.maximum(self.squares * self.initial_squares, 1e-300)
        return (1 - self.products**2 / both < self.parallel) & (self.products >= 0)

    @property
    def distance(self) -> float:
        """Of the whole table from its initial one, relative to that one's norm."""
        squares = self.squares.sum() - 2 * self.products.sum() + self.initial_squares.sum()
        return math.sqrt(max(squares, 0.0) / self.initial_squares.sum())

    @property
    def cosine(self) -> float:
        """Of the whole table with its initial one."""
        return float(self.products.sum() / math.sqrt(self.squares.sum() * self.initial_squares.sum()))


def read_tables(stored: StoredTensors, recipe: Recipe) -> list[TableRows]:
    """Statistics of all value tables of a checkpoint, by layer; a piece of one table is held at a time."""
    specs = {spec.name: spec for spec in parameter_specs(recipe.model)}
    return [_read_table(stored, key, specs[name], recipe) for name, key in table_keys(recipe.model).items()]


@torch.no_grad()
def _read_table(stored: StoredTensors, key: str, spec: ParameterSpec, recipe: Recipe) -> TableRows:
    vocab = recipe.model.vocab_size
    sums = torch.zeros(3, vocab, dtype=torch.float64)
    parallel = 0.0
    for first_row, first_column, piece in stored.pieces(stored.weights_key(key)):
        parallel = PARALLEL.get(piece.dtype, PARALLEL[torch.bfloat16])
        columns = slice(first_column, first_column + piece.size(1))
        for begin in range(first_row, min(first_row + len(piece), vocab), ROWS):
            end = min(begin + ROWS, first_row + len(piece), vocab)  # what follows is padding
            rows = piece[begin - first_row : end - first_row].double()
            initial = initial_rows(spec, recipe, begin, end)[:, columns].double()
            sums[:, begin:end] += torch.stack([rows.square().sum(1), initial.square().sum(1), (rows * initial).sum(1)])
    squares, initial_squares, products = sums.numpy()
    return TableRows(spec.name, spec.layer, squares, initial_squares, products, parallel)


@dataclass(frozen=True)
class Neighbour:
    token: int
    cosine: float


def nearest_rows(
    stored: StoredTensors, key: str, asked: Sequence[int], allowed: np.ndarray, count: int
) -> list[list[Neighbour]]:
    """For each row of `asked` the `count` other rows that point most nearly where it does.

    Args:
        key: of the table or the embedding.
        allowed: bool `[V]`, rows to choose from.
    """
    vocab = len(allowed)
    rows_QK, squares_V = torch.zeros(len(asked), stored.shape(key)[1]), torch.zeros(vocab)
    for first_row, first_column, piece in stored.pieces(key):
        columns = slice(first_column, first_column + piece.size(1))
        stop = min(first_row + len(piece), vocab)
        squares_V[first_row:stop] += piece[: stop - first_row].float().square().sum(1)
        for number, token in enumerate(asked):
            if first_row <= token < stop:
                rows_QK[number, columns] = piece[token - first_row].float()
    products_QV = torch.zeros(len(asked), vocab)
    for first_row, first_column, piece in stored.pieces(key):
        stop = min(first_row + len(piece), vocab)
        part = rows_QK[:, first_column : first_column + piece.size(1)] @ piece[: stop - first_row].float().t()
        products_QV[:, first_row:stop] += part
    norms = squares_V.sqrt().clamp(min=1e-30)
    cosines_QV = products_QV / norms / norms[list(asked)][:, None]
    cosines_QV[:, ~torch.from_numpy(allowed)] = -2.0
    cosines_QV[torch.arange(len(asked)), list(asked)] = -2.0
    best = cosines_QV.topk(min(count, vocab), dim=1)
    return [
        [Neighbour(token, value) for token, value in zip(tokens, values, strict=True) if value > -2]
        for tokens, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]


def embedding_key(stored: StoredTensors) -> str:
    return stored.weights_key(EMBEDDING)


def by_frequency(values: np.ndarray, bins: Tensor | np.ndarray, number: int, share: float) -> np.ndarray:
    """The `share` quantile of `values` in each of `number` bins, `nan` where one has none."""
    found = np.full(number, np.nan)
    for place in range(number):
        inside = values[np.asarray(bins) == place]
        if len(inside):
            found[place] = np.quantile(inside, share)
    return found
