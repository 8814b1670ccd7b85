"""Reading prepared data sets: by sample id, from this machine or through a local cache of a remote home.

Uses mosaicml-streaming's storage layer (its downloaders for s3://, gs:// and the rest, its MDS reader) and none of its
StreamingDataset: no shared memory, no barriers, no notion of a world. Several processes may share one cache folder: a
shard is downloaded by one of them under a lock, checked, and only then given its name.
"""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path

import numpy as np

from bov_megatron.data.errors import DataError
from bov_megatron.data.files import sha256_hex
from bov_megatron.data.manifest import COLUMN, MANIFEST_NAME, Manifest, read_manifest
from bov_megatron.data.tokenizer import load_bytes_per_token
from bov_megatron.recipe import DataConfig, StreamConfig

INDEX_NAME = "index.json"
LOCK_FOLDER = ".locks"
INCOMING_FOLDER = ".incoming"
DOWNLOAD_ATTEMPTS = 4
DOWNLOAD_SECONDS = 300.0


class DataSet:
    """A prepared data set: `folder` itself, or the local cache of `remote`.

    Raises DataError where it is missing, incomplete, or differs from its remote home.
    """

    def __init__(self, folder: str | Path, remote: str | None = None) -> None:
        self.folder = Path(folder).expanduser()
        self.cache = Cache(self.folder, remote) if remote else None
        if self.cache:
            self.cache.get_manifest()
        self.manifest: Manifest = read_manifest(self.folder)
        if self.cache:
            for name in self.manifest.tokenizer_files:
                self.cache.get(f"tokenizer/{name}")
        self._splits: dict[str, SplitReader] = {}

    @property
    def tokenizer_folder(self) -> Path:
        """A Hugging Face tokenizer: AutoTokenizer.from_pretrained opens it offline."""
        return self.folder / "tokenizer"

    def bytes_per_token(self) -> np.ndarray:
        """UTF-8 bytes of every id, int64 `[vocab_size]`; 0 for special tokens."""
        return load_bytes_per_token(self.tokenizer_folder)

    def split(self, name: str) -> SplitReader:
        """`train` or `val`; raises DataError where the data set was prepared without it."""
        if name not in self.manifest.splits:
            raise DataError(
                f"data set {self.folder} has no '{name}' split; prepare it again with --validation-fraction "
                "or --validation"
            )
        if name not in self._splits:
            self._splits[name] = SplitReader(self, name)
        return self._splits[name]


class SplitReader:
    """The samples of one split, by id: 0 up to `num_samples`, in the order of the index. Thread-safe."""

    def __init__(self, data_set: DataSet, name: str) -> None:
        self.data_set, self.name = data_set, name
        self.folder = data_set.folder / name
        manifest = data_set.manifest
        self.length = manifest.sequence_length + 1
        self.vocab_size = manifest.vocab_size
        self._shards = self._read_index()
        self.shard_sizes = np.array([shard["samples"] for shard in self._shards], dtype=np.int64)
        self._ends = np.cumsum(self.shard_sizes)
        self.num_samples = int(self.shard_sizes.sum())
        self._readers: dict[int, object] = {}
        self._lock = threading.Lock()
        _import_streaming()

    def _read_index(self) -> list[dict]:
        split = self.data_set.manifest.splits[self.name]
        path = self.folder / INDEX_NAME
        if self.data_set.cache:
            self.data_set.cache.get(f"{self.name}/{INDEX_NAME}", sha256=split.index_sha256)
        if not path.is_file():
            raise DataError(f"{path} is missing; copy the data set again, or prepare it again with --overwrite")
        data = path.read_bytes()
        if sha256_hex(data) != split.index_sha256:
            raise DataError(
                f"{path} is not the one that {MANIFEST_NAME} describes (SHA-256 {sha256_hex(data)[:12]}, "
                f"expected {split.index_sha256[:12]}); copy the data set again"
            )
        return json.loads(data)["shards"]

    def read(self, samples: np.ndarray) -> np.ndarray:
        """Tokens of these samples: int64 `[len(samples), sequence_length + 1]`.

        Raises DataError for a missing or truncated shard, and for ids beyond the vocabulary.
        """
        samples = np.asarray(samples, dtype=np.int64)
        tokens = np.empty((len(samples), self.length), dtype=np.int64)
        shards = np.searchsorted(self._ends, samples, side="right")
        # Shard by shard and in stored order: kind to disks.
        for row in np.argsort(samples, kind="stable"):
            shard = int(shards[row])
            inside = int(samples[row] - self._ends[shard] + self.shard_sizes[shard])
            tokens[row] = self._reader(shard)[inside][COLUMN]
        if tokens.size and int(tokens.max()) >= self.vocab_size:
            row = int(tokens.max(axis=1).argmax())
            raise DataError(
                f"{self._path(int(shards[row]))}: sample {samples[row]} holds id {tokens[row].max()}, beyond the "
                f"vocabulary of {self.vocab_size}; the shard is damaged: copy or prepare it again"
            )
        return tokens

    def ensure(self, shard: int) -> None:
        """Have a shard on this machine, downloading it if need be, and check its size."""
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
        info, path, cache = self._shards[shard]["raw_data"], self._path(shard), self.data_set.cache
        if cache:
            cache.get(f"{self.name}/{info['basename']}", size=info["bytes"], hashes=info["hashes"])
        found = path.stat().st_size if path.is_file() else None
        if found != info["bytes"]:
            state = "is missing" if found is None else f"has {found} bytes"
            raise DataError(
                f"shard {path} {state}, expected {info['bytes']} bytes; copy it again from where the data set was "
                "prepared, or prepare it again with --overwrite"
            )


class Cache:
    """Local copies of a remote folder's files, each whole or absent, shared by the processes of a machine."""

    def __init__(self, folder: Path, remote: str) -> None:
        self.folder, self.remote = folder, remote.rstrip("/")
        if Path(remote).expanduser().resolve() == folder.resolve():
            raise DataError(f"data remote and path are the same folder, {remote}; leave remote out")

    def get_manifest(self) -> None:
        """Fetch the manifest anew each time: a cache of what has since been replaced must not be read."""
        path = self.folder / MANIFEST_NAME
        with self._locked(MANIFEST_NAME):
            fresh = self._download(MANIFEST_NAME)
            try:
                if not path.exists():
                    os.replace(fresh, path)
                elif path.read_bytes() != fresh.read_bytes():
                    raise DataError(
                        f"cache {self.folder} holds another data set than {self.remote} (their {MANIFEST_NAME} differ);"
                        " delete the cache folder or name a new one"
                    )
            finally:
                shutil.rmtree(fresh.parent, ignore_errors=True)

    def get(self, name: str, size: int | None = None, hashes: dict | None = None, sha256: str | None = None) -> Path:
        """Have a file locally; returns its path.

        A local file counts if its size is right. A download counts if size and hashes are right; it takes its name
        only then, so a process killed in the middle leaves nothing that could be taken for the file.
        """
        path = self.folder / name
        if _has(path, size):
            return path
        with self._locked(name):
            if _has(path, size):
                return path
            fresh = self._download(name)
            try:
                self._verify(name, fresh, size, hashes or {}, sha256)
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(fresh, path)
            finally:
                shutil.rmtree(fresh.parent, ignore_errors=True)
        return path

    def _locked(self, name: str):
        from filelock import FileLock

        folder = self.folder / LOCK_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        return FileLock(folder / f"{name.replace('/', '--')}.lock")

    def _download(self, name: str) -> Path:
        """Fetch a file into a folder of its own; called with the file's lock held."""
        _import_streaming()
        from streaming.base.storage import CloudDownloader
        from streaming.base.util import retry

        target = self.folder / INCOMING_FOLDER / name.replace("/", "--")
        shutil.rmtree(target, ignore_errors=True)  # left by a killed process: the lock says it is nobody's
        target.mkdir(parents=True)
        file = target / "file"
        attempts = DOWNLOAD_ATTEMPTS if "://" in self.remote else 1
        try:
            downloader = CloudDownloader.get(self.remote)
            retry(clean_up_fn=downloader.clean_up, num_attempts=attempts)(
                lambda: downloader.download(f"{self.remote}/{name}", str(file), DOWNLOAD_SECONDS)
            )()
        except Exception as error:  # every storage library raises its own
            shutil.rmtree(target, ignore_errors=True)
            raise DataError(
                f"can't fetch {self.remote}/{name}: {type(error).__name__}: {error}; is data remote right, is the data "
                "set there complete, and are credentials set?"
            ) from error
        return file

    def _verify(self, name: str, file: Path, size: int | None, hashes: dict, sha256: str | None) -> None:
        from streaming.base.hashing import get_hash

        found = file.stat().st_size
        if size is not None and found != size:
            raise DataError(f"{self.remote}/{name} has {found} bytes, expected {size}; upload the data set again")
        for algorithm, expected in hashes.items():
            if get_hash(algorithm, file.read_bytes()) != expected:
                raise DataError(f"{self.remote}/{name}: {algorithm} differs from the index; upload it again")
        if sha256 is not None and sha256_hex(file.read_bytes()) != sha256:
            raise DataError(f"{self.remote}/{name} is not the one that {MANIFEST_NAME} describes; upload it again")


def _has(path: Path, size: int | None) -> bool:
    try:
        return size is None or path.stat().st_size == size if path.is_file() else False
    except FileNotFoundError:
        return False


def _import_streaming() -> None:
    from bov_megatron.compat import register_missing_torchvision_ops

    register_missing_torchvision_ops()
    import streaming  # noqa: F401


def streams_of(data: DataConfig) -> list[StreamConfig]:
    """The recipe's streams; `data.path` is short for one. Raises DataError where there is none, or both."""
    if data.path and data.streams:
        raise DataError("data.path and data.streams are both set; give one of them")
    streams = data.streams or ([StreamConfig(data.path, data.remote)] if data.path else [])
    if not streams:
        raise DataError("data.path is not set; give the folder that tools/prepare_data.py wrote, e.g. data.path=DIR")
    for number, stream in enumerate(streams):
        if not stream.path:
            raise DataError(f"data.streams[{number}].path is not set; with a remote it is the local cache's folder")
    return streams


def open_data_sets(
    data: DataConfig, sequence_length: int, vocab_size: int, tokenizer_hash: str | None = None
) -> list[DataSet]:
    """Open a recipe's data sets and check that they fit it and each other.

    `tokenizer_hash` is the one a checkpoint was trained with, if there is one. Raises DataError for another tokenizer,
    another sequence length, or a vocabulary larger than the model's.
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
