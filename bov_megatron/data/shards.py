"""Reading prepared data sets by sample id, locally or through a cache of a remote one.

Uses mosaicml-streaming's downloaders (s3://, gs://, …) and MDS reader, but not its StreamingDataset with its shared
memory and barriers.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from bov_megatron.data.cache import Cache, find_damage
from bov_megatron.data.checked import CheckedFiles
from bov_megatron.data.manifest import COLUMN, MANIFEST_NAME, Manifest, read_manifest
from bov_megatron.errors import DataError
from bov_megatron.recipe import DataConfig, StreamConfig

INDEX_NAME = "index.json"


class DataSet:
    """A prepared data set in `folder`, which is the local cache of `remote` if that is given.

    Raises DataError if it is missing, incomplete or differs from `remote`. Can be sent to other processes, which then
    read no manifest and no index.
    """

    def __init__(self, folder: str | Path, remote: str | None = None) -> None:
        self.folder = Path(folder).expanduser()
        self.checked: CheckedFiles | None = None
        """What processes of this machine have checked; None: this process checks every shard that it reads."""
        self._indexes: dict[str, list[dict]] = {}
        self.cache = Cache(self.folder, remote) if remote else None
        if self.cache:
            self.cache.get_manifest()
        self.manifest: Manifest = read_manifest(self.folder)
        if self.cache:
            for name in self.manifest.tokenizer_files:
                self.cache.get(f"tokenizer/{name}")

    @property
    def tokenizer_folder(self) -> Path:
        """A Hugging Face tokenizer."""
        return self.folder / "tokenizer"

    def split(self, name: str) -> SplitReader:
        """`train` or `val`. Raises DataError if the data set was prepared without it."""
        if name not in self.manifest.splits:
            raise DataError(
                f"data set {self.folder} has no '{name}' split; prepare it again with --validation-fraction "
                "or --validation"
            )
        return SplitReader(self, name)

    def index(self, name: str) -> list[dict]:
        """The shards of a split, as in its MDS index. Raises DataError if it is missing or isn't the manifest's."""
        if name not in self._indexes:
            self._indexes[name] = _read_index(self, name)
        return self._indexes[name]


class SplitReader:
    """The samples of one split, by id from 0 to `num_samples` - 1 in the order of the index. Thread-safe."""

    def __init__(self, data_set: DataSet, name: str) -> None:
        self.data_set, self.name = data_set, name
        self.folder = data_set.folder / name
        manifest = data_set.manifest
        self.length = manifest.sequence_length + 1
        self.vocab_size = manifest.vocab_size
        self._shards = data_set.index(name)
        self.shard_sizes = np.array([shard["samples"] for shard in self._shards], dtype=np.int64)
        self._ends = np.cumsum(self.shard_sizes)
        self.num_samples = int(self.shard_sizes.sum())
        self._readers: dict[int, object] = {}
        self._lock = threading.Lock()
        self._first_checked = data_set.checked.reserve(len(self._shards)) if data_set.checked else 0
        import streaming  # noqa: F401  not at the top: it takes seconds

    def read(self, samples: np.ndarray) -> np.ndarray:
        """Tokens of the samples with these ids: int64 `[len(samples), sequence_length + 1]`.

        A shard's checksum is compared when it is first read, on each machine by one process. Raises DataError for a
        shard that is missing or damaged and can't be fetched again, and for token ids beyond the vocabulary.
        """
        samples = np.asarray(samples, dtype=np.int64)
        tokens = np.empty((len(samples), self.length), dtype=np.int64)
        shards = np.searchsorted(self._ends, samples, side="right")
        # Shard by shard, in stored order: sequential reads.
        for row in np.argsort(samples, kind="stable"):
            shard = int(shards[row])
            inside = int(samples[row] - self._ends[shard] + self.shard_sizes[shard])
            tokens[row] = self._sample(shard, inside)
        if tokens.size and int(tokens.max()) >= self.vocab_size:
            row = int(tokens.max(axis=1).argmax())
            raise DataError(
                f"{self._path(int(shards[row]))}: sample {samples[row]} holds id {tokens[row].max()}, beyond the "
                f"vocabulary of {self.vocab_size}; the shard is damaged: copy or prepare it again"
            )
        return tokens

    def _sample(self, shard: int, inside: int) -> np.ndarray:
        try:
            return self._reader(shard)[inside][COLUMN]
        except DataError:
            raise
        except (OSError, ValueError, LookupError):  # deleted or truncated since it was opened: check or fetch again
            self._readers.pop(shard, None)
        try:
            return self._reader(shard)[inside][COLUMN]
        except OSError as error:
            raise DataError(f"shard {self._path(shard)} can't be read: {error}; check its file system") from error

    def ensure(self, shard: int) -> None:
        """Download a shard if it isn't on this machine, and compare its checksum."""
        self._reader(shard)

    def _path(self, shard: int) -> Path:
        return self.folder / self._shards[shard]["raw_data"]["basename"]

    def _reader(self, shard: int):
        reader = self._readers.get(shard)
        if reader is None:
            self._check(shard)
            from streaming.base.format import reader_from_json

            reader = reader_from_json(str(self.data_set.folder), self.name, self._shards[shard])
            with self._lock:
                self._readers[shard] = reader
        return reader

    def _check(self, shard: int) -> None:
        info, path, checked = self._shards[shard]["raw_data"], self._path(shard), self.data_set.checked
        if checked:
            checked.once(self._first_checked + shard, lambda: self._compare(shard))
        if not checked or find_damage(path, info["bytes"], None):  # gone since it was checked
            self._compare(shard)

    def _compare(self, shard: int) -> None:
        info, path, cache = self._shards[shard]["raw_data"], self._path(shard), self.data_set.cache
        if cache:
            cache.get(f"{self.name}/{info['basename']}", info["bytes"], info["hashes"])
        elif damage := find_damage(path, info["bytes"], info["hashes"]):
            raise DataError(
                f"shard {path} {damage}; copy it again from where the data set was prepared, or prepare it again with "
                "--overwrite, and start again"
            )


def _read_index(data_set: DataSet, name: str) -> list[dict]:
    split, path = data_set.manifest.splits[name], data_set.folder / name / INDEX_NAME
    if data_set.cache:
        data_set.cache.get(f"{name}/{INDEX_NAME}", hashes={"sha256": split.index_sha256})
    if not path.is_file():
        raise DataError(f"{path} is missing; copy the data set again, or prepare it again with --overwrite")
    data = path.read_bytes()
    actual = hashlib.sha256(data).hexdigest()
    if actual != split.index_sha256:
        raise DataError(
            f"{path} is not the one that {MANIFEST_NAME} describes (SHA-256 {actual[:12]}, expected "
            f"{split.index_sha256[:12]}); copy the data set again"
        )
    return json.loads(data)["shards"]


def find_missing_shards(data_set: DataSet, name: str) -> tuple[int, list[Path]]:
    """How many shards a split has, and those that are not on this machine with the right size; nothing is read."""
    files = [
        (data_set.folder / name / shard["raw_data"]["basename"], shard["raw_data"]["bytes"])
        for shard in data_set.index(name)
    ]
    return len(files), [path for path, size in files if not path.is_file() or path.stat().st_size != size]


def fingerprints(data_sets: Sequence[DataSet]) -> list[str]:
    """Of each data set's training shards, independent of their location."""
    return [data_set.manifest.splits["train"].index_sha256 for data_set in data_sets]


def check_fingerprints(data_sets: Sequence[DataSet], stored: list[str], step: int) -> None:
    """Raise DataError unless the training shards are those that the checkpoint of `step` was trained on."""
    if stored != fingerprints(data_sets):
        raise DataError(
            f"the training shards of {', '.join(str(d.folder) for d in data_sets)} are not those that the "
            f"checkpoint of step {step} was trained on, so its sample ids mean other samples here. Restore "
            "data.path (or data.streams), or start another run with name=…"
        )


def streams_of(data: DataConfig) -> list[StreamConfig]:
    """The recipe's streams; `data.path` is short for a single one. Raises DataError if none or both are set."""
    if data.path and data.streams:
        raise DataError("data.path and data.streams are both set; give one of them")
    streams = data.streams or ([StreamConfig(data.path, data.remote)] if data.path else [])
    if not streams:
        raise DataError("data.path is not set; give the folder that `bov prepare-data` wrote, e.g. data.path=DIR")
    for number, stream in enumerate(streams):
        if not stream.path:
            raise DataError(f"data.streams[{number}].path is not set; with a remote it is the local cache's folder")
    return streams


def open_data_sets(
    data: DataConfig, sequence_length: int, vocab_size: int, tokenizer_hash: str | None = None
) -> list[DataSet]:
    """Open a recipe's data sets.

    `tokenizer_hash` is that of the checkpoint to resume from. Raises DataError for different tokenizers, another
    sequence length or a vocabulary larger than the model's.
    """
    data_sets = [DataSet(stream.path, stream.remote) for stream in streams_of(data)]
    expected, whose = tokenizer_hash, "the checkpoint"
    for data_set in data_sets:
        manifest, folder = data_set.manifest, data_set.folder
        if manifest.sequence_length != sequence_length:
            raise DataError(
                f"data set {folder} is packed for sequence_length {manifest.sequence_length}, "
                f"model.sequence_length is {sequence_length}; prepare it with --sequence-length {sequence_length}"
            )
        if manifest.vocab_size > vocab_size:
            raise DataError(
                f"data set {folder} has a vocabulary of {manifest.vocab_size}, model.vocab_size is {vocab_size}; "
                f"set model.vocab_size={manifest.vocab_size} or prepare it with another tokenizer"
            )
        if expected is not None and manifest.tokenizer_hash != expected:
            raise DataError(
                f"data set {folder} was made with tokenizer {manifest.tokenizer_hash[:12]}, {whose} with "
                f"{expected[:12]}; all must use the same one"
            )
        expected, whose = manifest.tokenizer_hash, f"data set {folder}"
    return data_sets
