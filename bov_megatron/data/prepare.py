"""Preparing a data set: worker processes pack units of text, then index and manifest are written.

OUT/manifest.json            written last: a folder without it is not a data set
OUT/tokenizer/               copy of the tokenizer, with bytes per token
OUT/train/index.json         all shards of the split, in the order of the input
OUT/train/unit-000000/shard.00000.mds
OUT/train/tails/             samples packed from the units' remainders
OUT/val/…                    the held-out split
OUT/.work/                   while preparing: the plan, and a marker per finished unit
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import numpy as np

from bov_megatron.data.corpus import INVALID_UTF8_POLICIES, Unit, find_files, make_units
from bov_megatron.data.files import json_bytes, write_atomically
from bov_megatron.data.manifest import MANIFEST_NAME, SPLITS, WORK_NAME, Manifest, SplitManifest, read_manifest
from bov_megatron.data.packing import (
    HELD_OUT_NAME,
    PackedUnit,
    PackingOptions,
    SampleWriter,
    pack_unit,
    unit_name,
)
from bov_megatron.data.tokenizer import Encoder, copy_tokenizer, load_encoder
from bov_megatron.errors import DataError

LOCK_NAME = ".prepare.lock"
LOCK_SECONDS = 3
"""Longer than workers take to notice that their parent has died."""
SHOWN_INPUTS = 16
OWN_NAMES = frozenset({MANIFEST_NAME, WORK_NAME, LOCK_NAME, "tokenizer", *SPLITS})


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
    bad options and inputs, and without `overwrite` for an existing data set, or an unfinished one with other options.
    """
    _check_options(options)
    encoder = load_encoder(options.tokenizer)
    out = Path(options.out).expanduser()
    with _sole_writer(out):
        _clear_or_refuse(out, options.overwrite)
        units = make_units(find_files(options.inputs, options.exclude), options.unit_bytes)
        if options.validation:
            units += make_units(find_files(options.validation, options.exclude), options.unit_bytes, split="val")
        packing = PackingOptions(
            tokenizer=str(encoder.folder.resolve()),
            tokenizer_hash=encoder.hash,
            sequence_length=options.sequence_length,
            shard_bytes=options.shard_bytes,
            text_field=options.text_field,
            invalid_utf8=options.invalid_utf8,
            validation_fraction=options.fraction(),
            seed=options.seed,
            keep_held_out_text=options.keep_held_out_text,
        )
        work = _open_work(out, units, packing)
        _run_units(units, packing, out, work, options.workers, progress)
        manifest = _finish(options, encoder, out, work, len(units))
        shutil.rmtree(work)
    return manifest


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


def _clear_or_refuse(out: Path, overwrite: bool) -> None:
    foreign = sorted(path.name for path in out.iterdir() if path.name not in OWN_NAMES)
    if foreign:
        raise DataError(f"--out {out} holds other files ({', '.join(foreign[:5])}); choose an empty or new folder")
    if overwrite:
        # The manifest first: from here on the folder is not a data set.
        for name in (MANIFEST_NAME, WORK_NAME, "tokenizer", *SPLITS):
            path = out / name
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    elif (out / MANIFEST_NAME).exists():
        raise DataError(f"--out {out} holds a complete data set; pass --overwrite to replace it")


def _open_work(out: Path, units: list[Unit], packing: PackingOptions) -> Path:
    """The work folder: a new one, or that of an interrupted run with the same plan."""
    work = out / WORK_NAME
    sizes = [[s.path, os.stat(s.path).st_size, os.stat(s.path).st_mtime_ns] for u in units for s in u.segments]
    plan = json.loads(json_bytes({"options": asdict(packing), "units": [asdict(u) for u in units], "files": sizes}))
    path = work / "plan.json"
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
        write_atomically(path, json_bytes(plan))
    for stale in work.glob("*.tmp"):
        shutil.rmtree(stale) if stale.is_dir() else stale.unlink()
    return work


def _differences(unfinished: dict, plan: dict) -> str:
    then, now = unfinished.get("options", {}), plan["options"]
    different = [f"{key}={then.get(key)!r} (now {now[key]!r})" for key in now if then.get(key) != now[key]]
    if unfinished.get("files") != plan["files"] or unfinished.get("units") != plan["units"]:
        different.append("other input files, or files changed since")
    return ", ".join(different)


def _run_units(
    units: list[Unit], packing: PackingOptions, out: Path, work: Path, workers: int | None, progress: bool
) -> None:
    """Pack the units that have no marker yet, over processes."""
    # Imported once here, so that forked workers don't each take seconds to.
    import streaming  # noqa: F401
    from tqdm import tqdm

    todo = [number for number in range(len(units)) if not (work / f"{unit_name(number)}.json").is_file()]
    workers = min(workers or len(os.sched_getaffinity(0)), max(len(todo), 1))
    context = multiprocessing.get_context("fork")
    with (
        ProcessPoolExecutor(workers, context, _start_worker, (os.getpid(),)) as pool,
        tqdm(
            total=sum(unit.text_bytes for unit in units),
            initial=sum(unit.text_bytes for unit in units) - sum(units[n].text_bytes for n in todo),
            unit="B", unit_scale=True, desc="packing", disable=not progress, file=sys.stderr,
        ) as bar,
    ):  # fmt: skip
        futures = {pool.submit(pack_unit, n, units[n], packing, out, work): n for n in todo}
        try:
            while futures:
                done, _ = wait(futures, return_when=FIRST_COMPLETED)
                for future in done:
                    number = futures.pop(future)
                    future.result()
                    bar.update(units[number].text_bytes)
        except BrokenProcessPool:
            raise DataError(
                "a worker process was killed, perhaps for memory; the finished units are kept: "
                "run the same command again, with fewer --workers if memory was short"
            ) from None
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            for worker in multiprocessing.active_children():
                worker.kill()  # its unit has no marker yet, and leaving the pool would wait for it
            raise


def _start_worker(parent: int) -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there is a process per core already
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches workers too: the parent ends them

    # A killed parent can't stop its workers, so they poll.
    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.2)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _finish(options: PrepareOptions, encoder: Encoder, out: Path, work: Path, num_units: int) -> Manifest:
    """Write index files and tokenizer, then the manifest."""
    markers = [PackedUnit.read(work / f"{unit_name(number)}.json") for number in range(num_units)]
    splits = {split: _finish_split(split, markers, options, encoder, out, work) for split in SPLITS}
    empty = sum(marker.empty_documents for marker in markers)
    if not splits["train"].samples:
        raise DataError(
            f"the input gives no training sample: {splits['train'].documents} documents with "
            f"{splits['train'].dropped_tokens} tokens ({empty} empty documents), and one sample takes "
            f"{options.sequence_length + 1}; give more text or a smaller --sequence-length, with --overwrite"
        )
    if not splits["val"].samples and (options.fraction() > 0 or options.validation):
        raise DataError(
            f"the held-out split has no sample: {splits['val'].documents} documents with "
            f"{splits['val'].dropped_tokens} tokens, and one sample takes {options.sequence_length + 1}; "
            "raise --validation-fraction (0 for no held-out split) or give --validation INPUT; then pass --overwrite"
        )
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
        versions={name: version(name) for name in ("mosaicml-streaming", "tokenizers", "numpy")},
    )
    manifest.write(out)
    return read_manifest(out)


def _shown(inputs: Sequence[str]) -> list[str]:
    """The inputs as given, cut short where a shell has expanded a pattern to many."""
    shown = [str(text) for text in inputs[:SHOWN_INPUTS]]
    return shown if len(inputs) <= SHOWN_INPUTS else [*shown, f"and {len(inputs) - SHOWN_INPUTS} more"]


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
