"""Runs to fit: read from a CSV file or from a study's results, checked, and named if they cannot be used."""

from __future__ import annotations

import dataclasses
import difflib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from bov_megatron.errors import StudyError

FLOPS_PER_PARAMETER_AND_TOKEN = 6
"""Where a table has only one of compute and tokens: C = 6 N D (Kaplan et al., arXiv 2001.08361)."""
CONVENTIONS = {
    "n_without_tables": "without tables",
    "n_all": "all parameters",
    "n_without_embeddings": "without embeddings",
    "n_matrices": "matrices only",
    "n_matrices_and_head": "matrices and output",
}
"""What N counts: column of a study's results -> words. The first is that of a study's headline."""
_ONLY_VARIANT = "baseline"
_SHOWN = 5


@dataclass(frozen=True)
class Columns:
    """Names of a table's columns. Without `variant` all runs are of one; without `seed` every run stands alone."""

    n: str
    loss: str
    c: str | None = None
    d: str | None = None
    variant: str | None = None
    seed: str | None = None
    size: str | None = None
    tokens_per_second: str | None = None
    name: str | None = None

    def __post_init__(self):
        if self.c is None and self.d is None:
            raise StudyError("give --c COLUMN (FLOPs), --d COLUMN (tokens) or both: a run's N alone says too little")


STUDY_COLUMNS = {
    "c": "flops", "d": "tokens", "variant": "variant", "seed": "seed", "size": "size",
    "tokens_per_second": "tokens_per_second", "name": "cell",
}  # fmt: skip
"""Those of a study's results; `n` and `loss` are chosen among CONVENTIONS and `loss`, `bits_per_byte`."""


@dataclass(frozen=True)
class Runs:
    """Runs that have been checked; arrays `[R]`."""

    name: np.ndarray
    n: np.ndarray
    d: np.ndarray
    flops: np.ndarray
    loss: np.ndarray
    variant: np.ndarray
    variants: tuple[str, ...]
    """The baseline first."""
    size: np.ndarray
    """Labels; runs of different variants with the same label belong together."""
    seed: np.ndarray | None
    tokens_per_second: np.ndarray | None
    n_column: str
    loss_column: str

    def __len__(self) -> int:
        return len(self.n)

    @property
    def baseline(self) -> str:
        return self.variants[0]

    def where(self, kept: np.ndarray) -> Runs:
        """The runs that the mask `kept [R]` picks; variants that have none left are gone."""
        arrays: dict[str, Any] = {
            name: values[kept] for name, values in vars(self).items() if isinstance(values, np.ndarray)
        }
        left = set(arrays["variant"])
        return dataclasses.replace(self, **arrays, variants=tuple(name for name in self.variants if name in left))

    def of(self, variant: str) -> Runs:
        return self.where(self.variant == variant)

    def cells(self) -> np.ndarray:
        """A number per run `[R]`, the same for runs that differ in their seed alone."""
        return _numbers(self.variant, np.round(np.log(self.n), 4), np.round(np.log(self.d), 4))

    def clusters(self) -> np.ndarray:
        """A number per run `[R]`, the same for runs of one size and seed; without seeds every run has its own."""
        return np.arange(len(self)) if self.seed is None else _numbers(self.size, self.seed)

    def noise_groups(self) -> list[np.ndarray]:
        """Runs that may have noise in common, as `intervals.bootstrap` takes them: those of one size and seed, over
        all variants and of one, and those of one cell."""
        if self.seed is None:
            return []
        kinds = [self.clusters(), _numbers(self.size, self.seed, self.variant), self.cells()]
        different: list[np.ndarray] = []
        for kind in kinds:
            alone = kind.max() + 1 == len(self)
            if not alone and not any(np.array_equal(kind, other) for other in different):
                different.append(kind)
        return different


def _numbers(*labels: np.ndarray) -> np.ndarray:
    """0, 1, … per distinct combination of labels."""
    frame = pd.DataFrame({str(i): label for i, label in enumerate(labels)})
    return frame.groupby(list(frame.columns), sort=True).ngroup().to_numpy()


def read_table(path: str | Path) -> pd.DataFrame:
    """A CSV file (or Parquet, by its suffix). Raises StudyError if there is none or it cannot be read."""
    path = Path(path)
    if not path.is_file():
        raise StudyError(f"--table {path}: no such file; give a CSV file with one row per run")
    try:
        table = pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_csv(path)
    except (ValueError, OSError, UnicodeDecodeError) as error:  # pandas' parser errors are ValueErrors
        reason = str(error).strip().splitlines()[0]
        raise StudyError(
            f"--table {path} cannot be read as a table ({reason}); give a CSV file with a header"
        ) from None
    if table.empty:
        raise StudyError(f"--table {path} has no rows; give one row per run")
    return table


def runs_of(
    table: pd.DataFrame,
    columns: Columns,
    *,
    baseline: str | None = None,
    drop_highest: int = 0,
    drop_failed: bool = False,
) -> Runs:
    """The runs of a table.

    Args:
        baseline: which variant the others are compared with; default: `baseline` if there is one, else the first.
        drop_highest: leave out as many runs with the highest losses.
        drop_failed: leave out runs whose loss is missing, infinite or not positive, which are refused otherwise.

    Raises StudyError for a missing column, a value that is no positive number, or a run that is there twice.
    """
    _require_columns(table, columns)
    variant = _labels(table, columns.variant) if columns.variant else np.full(len(table), _ONLY_VARIANT)
    name = _labels(table, columns.name) if columns.name else np.array([f"row {i + 1}" for i in range(len(table))])
    loss = _numeric(table, columns.loss)
    failed = ~(np.isfinite(loss) & (loss > 0))
    if failed.any() and not drop_failed:
        raise StudyError(
            f"{failed.sum()} run(s) without a usable {columns.loss}: {_some(name[failed])}; finish or remove them, "
            "or leave them out with --drop-failed"
        )
    table, variant, name, loss = table[~failed], variant[~failed], name[~failed], loss[~failed]
    if not 0 <= drop_highest < len(table):
        raise StudyError(f"--drop-highest {drop_highest}: must be at least 0 and less than the {len(table)} runs")
    kept = np.sort(np.argsort(loss, kind="stable")[: len(table) - drop_highest])
    table, variant, name, loss = table.iloc[kept], variant[kept], name[kept], loss[kept]

    n = _positive(table, columns.n, name)
    if columns.c is not None:
        flops = _positive(table, columns.c, name)
        d = flops / (FLOPS_PER_PARAMETER_AND_TOKEN * n) if columns.d is None else _positive(table, columns.d, name)
    else:
        assert columns.d is not None  # Columns has checked
        d = _positive(table, columns.d, name)
        flops = FLOPS_PER_PARAMETER_AND_TOKEN * n * d
    seed = _labels(table, columns.seed) if columns.seed else None
    _refuse_duplicates(name, variant, n, d, loss, seed)
    size = _labels(table, columns.size) if columns.size else _sizes(variant, n)
    speed = _numeric(table, columns.tokens_per_second) if columns.tokens_per_second else None
    return Runs(
        name, n, d, flops, loss, variant, _variants(variant, baseline), size, seed, speed, columns.n, columns.loss
    )


def _require_columns(table: pd.DataFrame, columns: Columns) -> None:
    for field in dataclasses.fields(columns):
        column, option = getattr(columns, field.name), "--" + field.name.replace("_", "-")
        if column is not None and column not in table.columns:
            near = difflib.get_close_matches(column, map(str, table.columns), 1)
            hint = f"did you mean '{near[0]}'? " if near else ""
            raise StudyError(
                f"{option} {column}: the table has no such column; {hint}it has {', '.join(map(str, table.columns))}"
            )


def _numeric(table: pd.DataFrame, column: str) -> np.ndarray:
    values = pd.to_numeric(table[column], errors="coerce").to_numpy(dtype=float)
    strange = np.isnan(values) & table[column].notna().to_numpy()
    strange &= ~table[column].astype(str).str.strip().str.lower().isin(["nan", "inf", "-inf"]).to_numpy()
    if strange.any():
        first = int(np.flatnonzero(strange)[0])
        raise StudyError(f"column {column}, row {first + 1}: '{table[column].iloc[first]}' is no number; correct it")
    return values


def _positive(table: pd.DataFrame, column: str, name: np.ndarray) -> np.ndarray:
    values = _numeric(table, column)
    wrong = ~(np.isfinite(values) & (values > 0))
    if wrong.any():
        raise StudyError(
            f"column {column} must be positive numbers, and is {values[wrong][0]:g} in {_some(name[wrong])}; correct "
            "or remove these runs"
        )
    return values


def _labels(table: pd.DataFrame, column: str) -> np.ndarray:
    missing = table[column].isna().to_numpy()
    if missing.any():
        rows = [f"row {i + 1}" for i in np.flatnonzero(missing)]
        raise StudyError(f"column {column} is empty in {_some(rows)}; fill it in")
    return table[column].astype(str).to_numpy(dtype=object)


def _refuse_duplicates(name, variant, n, d, loss, seed) -> None:
    """A run that counts twice makes intervals too narrow."""
    keys = pd.DataFrame({"variant": variant, "n": n, "d": d, **({"loss": loss} if seed is None else {"seed": seed})})
    twice = keys.duplicated(keep=False).to_numpy()
    if twice.any():
        remedy = (
            "remove the copies, or name the column that tells them apart with --seed"
            if seed is None
            else "remove all but one, or correct --seed"
        )
        raise StudyError(f"the same run more than once: {_some(name[twice])}; {remedy}")


def _variants(variant: np.ndarray, baseline: str | None) -> tuple[str, ...]:
    found = list(dict.fromkeys(variant.tolist()))
    if baseline is None:
        baseline = _ONLY_VARIANT if _ONLY_VARIANT in found else found[0]
    if baseline not in found:
        raise StudyError(f"--baseline {baseline}: no run of this variant; there are {', '.join(found)}")
    return (baseline, *(name for name in found if name != baseline))


def _sizes(variant: np.ndarray, n: np.ndarray) -> np.ndarray:
    """Labels for a table without sizes: the rank of N among its variant's, if all variants have as many, else N."""
    ranks = np.empty(len(n), dtype=object)
    counts = set()
    for name in set(variant):
        distinct, rank = np.unique(n[variant == name], return_inverse=True)
        ranks[variant == name] = [str(i) for i in rank]
        counts.add(len(distinct))
    return ranks if len(counts) == 1 else n.astype(str).astype(object)


def _some(names: Sequence[str] | np.ndarray) -> str:
    shown = ", ".join(map(str, names[:_SHOWN]))
    return shown if len(names) <= _SHOWN else f"{shown} and {len(names) - _SHOWN} more"
