"""Preparing a data set: worker processes pack units of text, then index and manifest are written.

OUT/manifest.json            written last: a folder without it is not a data set
OUT/tokenizer/               copy of the tokenizer, with bytes per token
OUT/train/index.json         all shards of the split, in the order of the input
OUT/train/unit-000000/shard.00000.mds
OUT/train/tails/             samples packed from the units' remainders
OUT/val/…                    the held-out split
OUT/bad_rows.jsonl           with --skip-bad: file, line and problem of every row left out
OUT/.work/                   while preparing: the plan, and a marker per finished unit
"""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.metadata import version
from pathlib import Path

import numpy as np

from bov_megatron.data.corpus import (
    INVALID_UTF8_POLICIES,
    SHOWN_BAD_ROWS,
    Unit,
    bad_rows_message,
    find_files,
    make_units,
    read_documents,
)
from bov_megatron.data.files import full_disk_message, json_bytes, why_full, write_atomically
from bov_megatron.data.manifest import MANIFEST_NAME, SPLITS, WORK_NAME, Manifest, SplitManifest, read_manifest
from bov_megatron.data.packing import (
    HELD_OUT_NAME,
    PackedUnit,
    PackingOptions,
    SampleWriter,
    check_unit,
    pack_unit,
    read_bad_rows,
    unit_name,
)
from bov_megatron.data.tokenizer import Encoder, copy_tokenizer, load_encoder
from bov_megatron.data.workers import run_in_workers
from bov_megatron.errors import DataError

BAD_ROWS_NAME = "bad_rows.jsonl"
LOCK_NAME = ".prepare.lock"
LOCK_SECONDS = 3
"""Longer than workers take to notice that their parent has died."""
SHOWN_INPUTS = 16
ESTIMATE_BYTES = 1 << 18
PLAN_NAME = "plan.json"
OWN_NAMES = frozenset({MANIFEST_NAME, WORK_NAME, LOCK_NAME, BAD_ROWS_NAME, "tokenizer", *SPLITS})


@dataclass(frozen=True)
class PrepareOptions:
    """Arguments of `bov prepare-data`."""

    inputs: Sequence[str]
    tokenizer: str
    out: str
    sequence_length: int = 2048
    validation: Sequence[str] = field(default_factory=tuple)
    """Inputs to hold out whole."""
    validation_fraction: float | None = None
    """Share of the documents of `inputs` to hold out; None means 0.01, or 0 if `validation` is given."""
    exclude: Sequence[str] = field(default_factory=tuple)
    """Patterns for names of files and folders to leave out of input folders."""
    text_field: str = "text"
    invalid_utf8: str = "error"
    skip_bad: bool = False
    """Leave out rows that are null, malformed or without the field, and list them in `bad_rows.jsonl`."""
    seed: int = 0
    """For the choice of held-out documents."""
    workers: int | None = None
    """Processes; None means one per core. The data set doesn't depend on it."""
    unit_bytes: int | None = None
    shard_bytes: int = 1 << 26
    keep_held_out_text: bool = False
    overwrite: bool = False

    def fraction(self) -> float:
        if self.validation_fraction is not None:
            return self.validation_fraction
        return 0.0 if self.validation else 0.01


def prepare_data(options: PrepareOptions, progress: bool = True) -> Manifest:
    """Write the data set `options.out`; see the head of this file for its layout.

    After an interruption the same call continues behind the finished units, with the same result. Raises DataError for
    bad options and inputs, a full disk, and without `overwrite` for an existing data set, or an unfinished one with
    other options.
    """
    _check_options(options)
    encoder = load_encoder(options.tokenizer)
    out = Path(options.out).expanduser()
    units: list[Unit] = []
    try:
        with _sole_writer(out):
            units += make_units(find_files(options.inputs, options.exclude), options.unit_bytes)
            if options.validation:
                units += make_units(find_files(options.validation, options.exclude), options.unit_bytes, split="val")
            return _prepare(options, encoder, out, units, progress)
    except OSError as error:
        reason = why_full(error)
        if reason is None:
            raise DataError(f"{error.filename or out}: {error.strerror or error}") from None
        remedy = "free space there and run the same command again: what is finished is kept"
        needed = _bytes_needed(units, encoder, options)
        raise DataError(full_disk_message(out, reason, needed, remedy)) from None


def _prepare(options: PrepareOptions, encoder: Encoder, out: Path, units: list[Unit], progress: bool) -> Manifest:
    packing = PackingOptions(
        tokenizer=str(encoder.folder.resolve()),
        tokenizer_hash=encoder.hash,
        sequence_length=options.sequence_length,
        shard_bytes=options.shard_bytes,
        text_field=options.text_field,
        invalid_utf8=options.invalid_utf8,
        skip_bad=options.skip_bad,
        validation_fraction=options.fraction(),
        seed=options.seed,
        keep_held_out_text=options.keep_held_out_text,
    )
    workers = options.workers or len(os.sched_getaffinity(0))
    _refuse_what_is_there(out, options.overwrite)
    if options.overwrite or not (out / WORK_NAME / PLAN_NAME).is_file():
        _check_rows(units, packing, workers, progress)
    if options.overwrite:
        _clear(out)
    work = _open_work(out, units, packing)
    try:
        _run_units(units, packing, out, work, workers, progress)
        manifest = _finish(options, encoder, out, work, len(units))
    finally:
        _remove_unfinished(work)
    shutil.rmtree(work)
    return manifest


def _bytes_needed(units: Sequence[Unit], encoder: Encoder, options: PrepareOptions) -> float:
    """Bytes of all tokens, estimated from the first documents."""
    text = tokens = 0
    for segment in itertools.chain.from_iterable(unit.segments for unit in units):
        for document in read_documents(segment, options.text_field, "skip", skip_bad=True):
            piece = (document.data or b"")[:ESTIMATE_BYTES].decode(errors="ignore")
            text += len(piece.encode())
            tokens += 1 + len(encoder.encode([piece])[0])
            if text >= ESTIMATE_BYTES:
                break
        if text >= ESTIMATE_BYTES:
            break
    return sum(unit.text_bytes for unit in units) * tokens / max(text, 1) * np.dtype(encoder.dtype).itemsize


def _check_options(options: PrepareOptions) -> None:
    if options.sequence_length < 1:
        raise DataError(f"--sequence-length {options.sequence_length}: must be at least 1")
    if not 0 <= options.fraction() < 1:
        raise DataError(f"--validation-fraction {options.fraction()}: must be at least 0 and less than 1")
    if options.invalid_utf8 not in INVALID_UTF8_POLICIES:
        raise DataError(f"--invalid-utf8 {options.invalid_utf8}: choose {', '.join(INVALID_UTF8_POLICIES)}")
    if options.workers is not None and options.workers < 1:
        raise DataError(f"--workers {options.workers}: must be at least 1")
    if options.unit_bytes is not None and options.unit_bytes < 1:
        raise DataError(f"--unit-bytes {options.unit_bytes}: must be at least 1")
    sample_bytes = 4 * (options.sequence_length + 1)
    if not 4 * sample_bytes <= options.shard_bytes < 1 << 32:
        raise DataError(f"--shard-bytes {options.shard_bytes}: must be from {4 * sample_bytes} to {(1 << 32) - 1}")


@contextmanager
def _sole_writer(out: Path) -> Iterator[None]:
    """Lock the folder."""
    # Forked workers inherit the lock, so no other run starts while a killed parent's workers still write.
    from filelock import FileLock, Timeout

    new = not out.exists()
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK_NAME)
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        raise DataError(f"--out {out}: another run is writing there; wait for it or choose another folder") from None
    try:
        yield
    finally:
        lock.release()
        (out / LOCK_NAME).unlink(missing_ok=True)
        if new and not any(out.iterdir()):
            out.rmdir()


def _refuse_what_is_there(out: Path, overwrite: bool) -> None:
    foreign = sorted(path.name for path in out.iterdir() if path.name not in OWN_NAMES)
    if foreign:
        raise DataError(f"--out {out} holds other files ({', '.join(foreign[:5])}); choose an empty or new folder")
    if (out / MANIFEST_NAME).exists() and not overwrite:
        raise DataError(f"--out {out} holds a complete data set; pass --overwrite to replace it")


def _clear(out: Path) -> None:
    # The manifest first: from here on the folder is not a data set.
    for name in (MANIFEST_NAME, WORK_NAME, BAD_ROWS_NAME, "tokenizer", *SPLITS):
        path = out / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def _check_rows(units: Sequence[Unit], packing: PackingOptions, workers: int, progress: bool) -> None:
    """Read all rows before any is tokenized: reading is some hundred times faster, so a bad one is found early."""
    if packing.skip_bad and packing.invalid_utf8 != "error":
        return
    run_in_workers(
        [partial(check_unit, unit, packing) for unit in units], workers, label="checking",
        sizes=[unit.text_bytes for unit in units], remedy="run again with fewer --workers", progress=progress,
    )  # fmt: skip


def _open_work(out: Path, units: list[Unit], packing: PackingOptions) -> Path:
    """The work folder: a new one, or that of an interrupted run with the same plan."""
    work = out / WORK_NAME
    sizes = [[s.path, os.stat(s.path).st_size, os.stat(s.path).st_mtime_ns] for u in units for s in u.segments]
    plan = json.loads(json_bytes({"options": asdict(packing), "units": [asdict(u) for u in units], "files": sizes}))
    path = work / PLAN_NAME
    if path.is_file():
        unfinished = json.loads(path.read_bytes())
        if unfinished != plan:
            raise DataError(
                f"--out {out} holds an unfinished data set begun with {_differences(unfinished, plan)}; "
                "run again with those arguments to finish it, or pass --overwrite to start over"
            )
    else:
        strays = [name for name in ("tokenizer", *SPLITS) if (out / name).exists()]
        if strays:
            raise DataError(f"--out {out} holds {', '.join(strays)} but neither manifest nor plan; pass --overwrite")
        try:
            write_atomically(path, json_bytes(plan))
        except OSError:
            shutil.rmtree(work, ignore_errors=True)
            raise
    _remove_unfinished(work)
    return work


def _remove_unfinished(work: Path) -> None:
    """Remove what units left behind that were not finished."""
    for stale in work.glob("*.tmp"):
        shutil.rmtree(stale, ignore_errors=True) if stale.is_dir() else stale.unlink(missing_ok=True)


def _differences(unfinished: dict, plan: dict) -> str:
    then, now = unfinished.get("options", {}), plan["options"]
    different = [f"{key}={then.get(key)!r} (now {now[key]!r})" for key in now if then.get(key) != now[key]]
    if unfinished.get("files") != plan["files"] or unfinished.get("units") != plan["units"]:
        different.append("other input files, or files changed since")
    return ", ".join(different)


def _run_units(units: list[Unit], packing: PackingOptions, out: Path, work: Path, workers: int, progress: bool) -> None:
    """Pack the units that have no marker yet, over processes."""
    # Imported once here, so that forked workers don't each take seconds to.
    import streaming  # noqa: F401

    todo = [number for number in range(len(units)) if not (work / f"{unit_name(number)}.json").is_file()]
    run_in_workers(
        [partial(pack_unit, number, units[number], packing, out, work) for number in todo],
        workers,
        label="packing",
        sizes=[units[number].text_bytes for number in todo],
        done=sum(unit.text_bytes for unit in units) - sum(units[number].text_bytes for number in todo),
        remedy="the finished units are kept: run the same command again, with fewer --workers if memory was short",
        progress=progress,
    )


def _finish(options: PrepareOptions, encoder: Encoder, out: Path, work: Path, num_units: int) -> Manifest:
    """Write index files and tokenizer, then the manifest."""
    markers = [PackedUnit.read(work / f"{unit_name(number)}.json") for number in range(num_units)]
    splits = {split: _finish_split(split, markers, options, encoder, out, work) for split in SPLITS}
    empty = sum(marker.empty_documents for marker in markers)
    bad_rows = sum(marker.bad_rows for marker in markers)
    bad = f", {bad_rows} bad rows left out" if bad_rows else ""
    if not splits["train"].samples:
        raise DataError(
            f"the input gives no training sample: {splits['train'].documents} documents with "
            f"{splits['train'].dropped_tokens} tokens ({empty} empty documents{bad}), and one sample takes "
            f"{options.sequence_length + 1}; give more text or a smaller --sequence-length, with --overwrite"
        )
    if not splits["val"].samples and (options.fraction() > 0 or options.validation):
        raise DataError(
            f"the held-out split has no sample: {splits['val'].documents} documents with "
            f"{splits['val'].dropped_tokens} tokens, and one sample takes {options.sequence_length + 1}; "
            "raise --validation-fraction (0 for no held-out split) or give --validation INPUT; then pass --overwrite"
        )
    _write_bad_rows([number for number, marker in enumerate(markers) if marker.bad_rows], out, work)
    manifest = Manifest(
        sequence_length=options.sequence_length,
        vocab_size=encoder.vocab_size,
        dtype=encoder.dtype,
        bos_token_id=encoder.bos_token_id,
        tokenizer_hash=encoder.hash,
        tokenizer_files=copy_tokenizer(encoder, out / "tokenizer"),
        splits={name: split for name, split in splits.items() if split.samples},
        validation_fraction=options.fraction(),
        seed=options.seed,
        inputs=_shown(options.inputs),
        validation_inputs=_shown(options.validation),
        empty_documents=empty,
        invalid_documents=sum(marker.invalid_documents for marker in markers),
        bad_rows=bad_rows,
        versions={name: version(name) for name in ("mosaicml-streaming", "tokenizers", "numpy")},
    )
    manifest.write(out)
    return read_manifest(out)


def _shown(inputs: Sequence[str]) -> list[str]:
    """The inputs as given, cut short where a shell has expanded a pattern to many."""
    shown = [str(text) for text in inputs[:SHOWN_INPUTS]]
    return shown if len(inputs) <= SHOWN_INPUTS else [*shown, f"and {len(inputs) - SHOWN_INPUTS} more"]


def _write_bad_rows(numbers: Sequence[int], out: Path, work: Path) -> None:
    """Join the units' lists of bad rows, and print the first."""
    if not numbers:
        return
    count, first, temporary = 0, [], work / f"{BAD_ROWS_NAME}.tmp"
    with open(temporary, "w", encoding="utf-8") as file:
        for count, row in enumerate(read_bad_rows(numbers, work), 1):
            first += [row] if count <= SHOWN_BAD_ROWS else []
            values = {"file": row.place.path, row.place.kind: row.place.number, "problem": row.problem}
            file.write(json.dumps(values) + "\n")
    os.replace(temporary, out / BAD_ROWS_NAME)
    print(bad_rows_message(count, first, out / BAD_ROWS_NAME), file=sys.stderr)


def _finish_split(
    split: str, markers: list[PackedUnit], options: PrepareOptions, encoder: Encoder, out: Path, work: Path
) -> SplitManifest:
    parts = [marker.splits[split] for marker in markers]
    writer = SampleWriter(work / f"tails-{split}.tmp", options.sequence_length, encoder.dtype, options.shard_bytes)
    bos = encoder.bos_token_id
    for part in parts:
        if part.tail:
            # A tail that begins inside a document gets its own <|bos|>.
            tail = part.tail if part.tail[0] == bos else [bos, *part.tail]
            writer.add([np.array(tail, dtype=encoder.dtype)])
    shards = [shard for part in parts for shard in part.shards] + writer.finish("tails")
    shutil.rmtree(out / split / "tails", ignore_errors=True)
    if writer.samples:
        (out / split).mkdir(parents=True, exist_ok=True)
        os.rename(writer.folder, out / split / "tails")
    else:
        shutil.rmtree(writer.folder)
    samples = sum(part.samples for part in parts) + writer.samples
    index = json.dumps({"version": 2, "shards": shards}, sort_keys=True).encode()
    if samples:
        write_atomically(out / split / "index.json", index)
    if split == "val" and options.keep_held_out_text:
        _join_held_out(out / split, len(parts))
    return SplitManifest(
        documents=sum(part.documents for part in parts),
        bytes=sum(part.bytes for part in parts),
        tokens=samples * (options.sequence_length + 1),
        dropped_tokens=len(writer.tail),
        samples=samples,
        shards=len(shards),
        index_sha256=hashlib.sha256(index).hexdigest(),
    )


def _join_held_out(folder: Path, num_units: int) -> None:
    """Write one file with all held-out documents' text, in the order of the input."""
    temporary = folder / f".{HELD_OUT_NAME}.tmp"
    with open(temporary, "wb") as joined:
        for number in range(num_units):
            part = folder / unit_name(number) / HELD_OUT_NAME
            if part.is_file():
                with open(part, "rb") as file:
                    shutil.copyfileobj(file, joined)
    os.replace(temporary, folder / HELD_OUT_NAME)
