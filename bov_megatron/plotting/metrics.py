"""Reading metrics.jsonl into columns, fast enough for many long runs.

Almost all lines of a file have the same keys in the same order, as one program wrote them. So a block of lines is read
as comma-separated cells (`"loss": 2.1`) by pyarrow's CSV reader, which takes a third of the time of its JSON reader.
Every cell that is used is compared with the key it must begin with, and lines of another form are read as JSON.
"""

from __future__ import annotations

import collections
import io
import itertools
import json
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from pyarrow import compute, csv

from bov_megatron.errors import RunFolderError
from bov_megatron.lifecycle import run_folder

BLOCK_BYTES = 8 << 20
"""Lines that are read together."""
SAMPLED_LINES = 20
"""Lines of a block that decide which keys its lines have."""
LONGEST_NUMBER = 1 << 10


@dataclass(frozen=True)
class Columns:
    """Lines of a metrics file in order, without those that later ones replace."""

    numbers: dict[str, np.ndarray]
    """By key, float64 `[lines]`; `nan` where a line has null or doesn't have the key."""
    is_step: np.ndarray
    """bool `[lines]`: whether the line is a training step (others are rollbacks and late validations)."""
    rollbacks: list[dict[str, Any]]

    def __len__(self) -> int:
        return len(self.is_step)


def read_columns(run_dir: Path, keys: Sequence[str]) -> Columns:
    """Numbers of a run's metrics by key (`step` always is one). A last line cut off by a crash is left out, and so are
    steps that the run did again after a restart or a rollback: the last lines of a step count.

    Raises RunFolderError where there is no metrics file, or one without a line.
    """
    path = run_dir / run_folder.METRICS
    try:
        with path.open("rb") as file:
            return parse(file, keys, path)
    except OSError as error:
        raise RunFolderError(
            f"{path} cannot be read ({error.strerror}): give the folder of a run that has begun to train, such as "
            "runs/780m_bov"
        ) from None


def parse(file: BinaryIO, keys: Sequence[str], path: Path) -> Columns:
    """`read_columns` of an open metrics file; `path` is for messages."""
    keys = list(dict.fromkeys(("step", *keys)))
    parts = [_read_block(block, keys, path) for block in _blocks(file)]
    if not parts:
        raise RunFolderError(f"{path} has no complete line yet: wait for the first step, or give another run")
    numbers = {key: np.concatenate([part.numbers[key] for part in parts]) for key in keys}
    is_step = np.concatenate([part.is_step for part in parts])
    rollbacks = [rollback for part in parts for rollback in part.rollbacks]
    kept = _not_undone(numbers["step"], is_step, np.concatenate([part.is_rollback for part in parts]))
    return Columns({key: column[kept] for key, column in numbers.items()}, is_step[kept], rollbacks)


def read_many(run_dirs: Sequence[Path], keys: Sequence[str]) -> list[Columns]:
    """`read_columns` of several runs at once."""
    with ThreadPoolExecutor() as pool:  # pyarrow works without Python's lock
        return list(pool.map(lambda run_dir: read_columns(run_dir, keys), run_dirs))


def _not_undone(step: np.ndarray, is_step: np.ndarray, is_rollback: np.ndarray) -> np.ndarray:
    """bool `[lines]`: False for lines of a step that a line further down does again or takes back."""
    undone_from = np.where(is_step, step, np.where(is_rollback, step + 1, np.inf))
    by_later_lines = np.minimum.accumulate(np.append(undone_from, np.inf)[::-1])[::-1][1:]
    return step < by_later_lines


@dataclass(frozen=True)
class _Part:
    """`Columns` of one block, with all its lines."""

    numbers: dict[str, np.ndarray]
    is_step: np.ndarray
    is_rollback: np.ndarray
    rollbacks: list[dict[str, Any]]


def _blocks(file: BinaryIO) -> Iterator[bytes]:
    # Never the whole file at once: most of the time would go into copies, and into memory new to the process.
    while text := file.read(BLOCK_BYTES) + file.readline():
        if lines := text[: text.rfind(b"\n") + 1]:
            yield lines


def _read_block(block: bytes, keys: list[str], path: Path) -> _Part:
    names = _usual_keys(block)
    if "loss" in names:
        try:
            return _read_as_cells(block, names, keys, path)
        except (pa.ArrowInvalid, _OtherForm):
            pass
    lines = list(enumerate(block.splitlines()))
    return _in_order({key: np.empty(0) for key in keys}, np.empty(0), lines, keys, path)


def _usual_keys(block: bytes) -> list[str]:
    """Keys of most of a block's first lines; none where they cannot be read."""
    lines = itertools.islice(io.BytesIO(block), SAMPLED_LINES)
    try:
        forms = collections.Counter(tuple(json.loads(line)) for line in lines)
    except ValueError:
        return []
    return list(forms.most_common(1)[0][0])


class _OtherForm(Exception):
    """A cell doesn't begin with its key."""


def _read_as_cells(block: bytes, names: list[str], keys: list[str], path: Path) -> _Part:
    """Read lines that have the keys `names`, and the others as JSON. Raises _OtherForm or ArrowInvalid."""
    others: list[tuple[int, bytes]] = []

    def note(row: csv.InvalidRow) -> str:
        others.append((row.number - 1, row.text.encode()))
        return "skip"

    wanted = [key for key in names if key in keys]
    table = csv.read_csv(
        pa.BufferReader(block),
        csv.ReadOptions(use_threads=False, column_names=names, block_size=2 * BLOCK_BYTES),
        csv.ParseOptions(quote_char=False, invalid_row_handler=note),
        csv.ConvertOptions(
            include_columns=[*wanted, *([names[0]] if names[0] not in wanted else [])],
            column_types=dict.fromkeys(names, pa.binary()),
        ),
    )
    numbers = {key: np.full(len(table), np.nan) for key in keys}
    for key in wanted:
        begin = f'{{"{key}": ' if key == names[0] else f' "{key}": '
        numbers[key] = _numbers(table[key], begin.encode(), is_last=key == names[-1])
    position = np.delete(np.arange(len(table) + len(others)), [number for number, _ in others])
    return _in_order(numbers, position, others, keys, path)


def _numbers(cells: pa.ChunkedArray, begin: bytes, is_last: bool) -> np.ndarray:
    if not compute.all(compute.starts_with(cells, begin)).as_py():
        raise _OtherForm
    cells = compute.binary_slice(cells, len(begin), LONGEST_NUMBER).cast(pa.string())
    if is_last:
        cells = compute.utf8_rtrim(cells, "}")
    is_null = compute.equal(cells, "null")
    if compute.any(is_null).as_py():
        cells = compute.if_else(is_null, "nan", cells)
    return cells.cast(pa.float64()).to_numpy()


def _in_order(
    numbers: dict[str, np.ndarray], position: np.ndarray, others: list[tuple[int, bytes]], keys: list[str], path: Path
) -> _Part:
    """Join what was read as cells, all of it training steps at `position`, with the lines `others`."""
    lines = [_as_json(text, path) for _, text in others]
    order = np.argsort(np.concatenate([position, [number for number, _ in others]]), kind="stable")
    joined = {
        key: np.concatenate([numbers[key], np.array([_number(line.get(key)) for line in lines])])[order] for key in keys
    }
    cells = len(position)
    is_step = np.array([True] * cells + ["loss" in line for line in lines])[order]
    is_rollback = np.array([False] * cells + ["rollback" in line for line in lines])[order]
    return _Part(joined, is_step, is_rollback, [line["rollback"] for line in lines if "rollback" in line])


def _as_json(text: bytes, path: Path) -> dict[str, Any]:
    try:
        line = json.loads(text)
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            return line
    except ValueError:
        pass
    raise RunFolderError(
        f"{path} has a line that is no line of metrics: {text[:60].decode(errors='replace')}…; remove the line"
    )


def _number(value: Any) -> float:
    return float(value) if isinstance(value, int | float) else float("nan")
