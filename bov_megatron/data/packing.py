"""Packing documents into samples in MDS shards: what a worker does with a unit.

Documents are joined as `<|bos|> document <|bos|> document …` and cut every `sequence_length + 1` tokens. The rest at a
unit's end, less than a sample, is its *tail*; all units' tails are packed together at the end.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np

from bov_megatron.data.corpus import Document, LineNumbers, Place, Unit, read_documents
from bov_megatron.data.files import json_bytes, write_atomically
from bov_megatron.data.manifest import COLUMN, SPLITS
from bov_megatron.data.tokenizer import Encoder, load_encoder

HASH = "xxh64"
BATCH_BYTES = 1 << 20
"""Text per call of the tokenizer."""
HELD_OUT_NAME = "documents.jsonl"


@dataclass(frozen=True)
class PackingOptions:
    """Options that determine the shards; an unfinished data set is only continued with the same ones."""

    tokenizer: str
    tokenizer_hash: str
    sequence_length: int
    shard_bytes: int
    text_field: str
    invalid_utf8: str
    skip_bad: bool
    validation_fraction: float
    seed: int
    keep_held_out_text: bool


@dataclass
class PackedSplit:
    """A unit's share of one split. `shards` are index entries, with names relative to the split's folder."""

    documents: int = 0
    bytes: int = 0
    samples: int = 0
    shards: list[dict] = field(default_factory=list)
    tail: list[int] = field(default_factory=list)


@dataclass
class PackedUnit:
    """A unit's marker: once it is in the work folder, the unit's shards are in place."""

    splits: dict[str, PackedSplit]
    empty_documents: int = 0
    invalid_documents: int = 0
    bad_rows: int = 0
    """Listed in the work folder's `<unit>.bad.jsonl` if any."""

    def write(self, path: Path) -> None:
        write_atomically(path, json_bytes(asdict(self)))

    @staticmethod
    def read(path: Path) -> PackedUnit:
        values = json.loads(path.read_bytes())
        splits = {name: PackedSplit(**split) for name, split in values.pop("splits").items()}
        return PackedUnit(splits, **values)


class SampleWriter:
    """Packs token arrays into MDS shards of one folder."""

    def __init__(self, folder: Path, sequence_length: int, dtype: str, shard_bytes: int) -> None:
        from streaming import MDSWriter

        self.folder = folder
        self.length = sequence_length + 1
        self.dtype = dtype
        self.samples = 0
        self.tail = np.empty(0, dtype=dtype)
        columns = {COLUMN: f"ndarray:{dtype}:{self.length}"}
        self._writer = MDSWriter(columns=columns, out=str(folder), hashes=[HASH], size_limit=shard_bytes, max_workers=1)

    def add(self, arrays: Iterable[np.ndarray]) -> None:
        """Append tokens; writes each sample as it fills."""
        tokens = np.concatenate([self.tail, *arrays])
        count = len(tokens) // self.length
        for row in tokens[: count * self.length].reshape(count, self.length):
            self._writer.write({COLUMN: row})
        self.samples += count
        self.tail = tokens[count * self.length :].copy()

    def finish(self, name: str) -> list[dict]:
        """Flush; returns the shards' index entries, with names below the folder `name`."""
        self._writer.finish()
        index = self.folder / "index.json"
        shards = json.loads(index.read_bytes())["shards"]
        index.unlink()
        for shard in shards:
            shard["raw_data"]["basename"] = f"{name}/{shard['raw_data']['basename']}"
        return shards


def is_held_out(document: bytes, fraction: float, seed: int) -> bool:
    """Whether a document belongs to the held-out split."""
    # Chosen by content, so that copies of a document are never in both splits.
    import xxhash

    return xxhash.xxh64_intdigest(document, seed=seed) < fraction * 2.0**64


def unit_name(number: int) -> str:
    return f"unit-{number:06d}"


def check_unit(unit: Unit, options: PackingOptions) -> None:
    """Raise DataError at the first row of a unit that `pack_unit` would refuse."""
    for segment in unit.segments:
        for _ in read_documents(segment, options.text_field, options.invalid_utf8, options.skip_bad):
            pass


def pack_unit(number: int, unit: Unit, options: PackingOptions, out: Path, work: Path) -> PackedUnit:
    """Tokenize and pack one unit, put its shards in place, then write its marker to `work`.

    Can be killed at any time and run again: shards are written elsewhere and renamed, and the marker comes last.
    """
    name = unit_name(number)
    temporary = work / f"{name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    encoder = load_encoder(options.tokenizer)
    packed = PackedUnit({})
    writers = {
        split: SampleWriter(temporary / split, options.sequence_length, encoder.dtype, options.shard_bytes)
        for split in SPLITS
    }
    counts = {split: PackedSplit() for split in SPLITS}
    bad_rows: list[Document] = []
    for batch in _batches(unit, options, packed, bad_rows):
        for split in SPLITS:
            documents = [data for data, target in batch if target == split]
            if documents:
                writers[split].add(_with_bos(documents, encoder))
                counts[split].documents += len(documents)
                counts[split].bytes += sum(map(len, documents))
                if split == "val" and options.keep_held_out_text:
                    _append_held_out(temporary / split / HELD_OUT_NAME, documents)
    for split, writer in writers.items():
        counts[split].shards = writer.finish(name)
        counts[split].samples = writer.samples
        counts[split].tail = writer.tail.tolist()
        _put_in_place(temporary / split, out / split / name)
    shutil.rmtree(temporary)
    packed.splits = counts
    packed.bad_rows = len(bad_rows)
    if bad_rows:
        rows = [[row.place.path, row.place.kind, row.place.number, row.problem] for row in bad_rows]
        write_atomically(work / f"{name}.bad.jsonl", "".join(json.dumps(row) + "\n" for row in rows).encode())
    packed.write(work / f"{name}.json")
    return packed


def _batches(
    unit: Unit, options: PackingOptions, packed: PackedUnit, bad_rows: list[Document]
) -> Iterator[list[tuple[bytes, str]]]:
    """The unit's documents with their splits, about BATCH_BYTES at a time; counts skipped ones in `packed`, and appends
    bad rows to `bad_rows`."""
    batch, size = [], 0
    for segment in unit.segments:
        for document in read_documents(segment, options.text_field, options.invalid_utf8, options.skip_bad):
            if document.problem is not None:
                bad_rows.append(document)
            elif document.data is None:
                packed.invalid_documents += 1
            elif not document.data:
                packed.empty_documents += 1
            else:
                held_out = is_held_out(document.data, options.validation_fraction, options.seed)
                batch.append((document.data, unit.split or ("val" if held_out else "train")))
                size += len(document.data)
                if size >= BATCH_BYTES:
                    yield batch
                    batch, size = [], 0
    if batch:
        yield batch


def _with_bos(documents: list[bytes], encoder: Encoder) -> Iterator[np.ndarray]:
    bos = np.array([encoder.bos_token_id], dtype=encoder.dtype)
    for ids in encoder.encode([document.decode() for document in documents]):
        yield bos
        yield ids


def _append_held_out(path: Path, documents: list[bytes]) -> None:
    with open(path, "a", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"text": document.decode()}, ensure_ascii=False) + "\n")


def _put_in_place(source: Path, target: Path) -> None:
    """Rename a finished folder, replacing what a killed attempt may have left there."""
    if not any(source.iterdir()):
        return
    for path in source.iterdir():  # so that a crash of the machine can't keep the marker and lose the shards
        with open(path, "rb") as file:
            os.fsync(file.fileno())
    if target.exists():
        shutil.rmtree(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    os.rename(source, target)


def read_bad_rows(numbers: Iterable[int], work: Path) -> Iterator[Document]:
    """The bad rows of units that have any, in the order of the input, each by its line or row."""
    lines = LineNumbers()
    for number in numbers:
        with open(work / f"{unit_name(number)}.bad.jsonl", encoding="utf-8") as file:
            for path, kind, place, problem in map(json.loads, file):
                yield Document(None, lines.resolve(Place(path, kind, place)), problem)
