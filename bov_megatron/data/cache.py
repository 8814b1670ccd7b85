"""Local copies of a remote data set's files, shared by the processes of a machine.

One process downloads a file under a lock, checks it and renames it into place. Downloads are retried while the remote
can't be reached; an answer such as "not found" or "forbidden" is final.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from bov_megatron.data.manifest import MANIFEST_NAME
from bov_megatron.errors import DataError

LOCK_FOLDER = ".locks"
INCOMING_FOLDER = ".incoming"
READ_SECONDS = 60.0
"""A download that receives nothing for this long has failed."""
PATIENCE_SECONDS = 600.0
"""How long to retry; less than health.hang_minutes, so that this error is reported rather than a hang."""
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 30.0


class Cache:
    """Local copies of a remote folder's files, each complete or absent. Safe for threads and processes."""

    def __init__(self, folder: Path, remote: str) -> None:
        self.folder, self.remote = folder, remote.rstrip("/")
        if Path(remote).expanduser().resolve() == folder.resolve():
            raise DataError(f"data remote and path are the same folder, {remote}; leave remote out")
        self._closing = threading.Event()

    def __reduce__(self) -> tuple:  # to send it to another process, without its event
        return Cache, (self.folder, self.remote)

    def close(self) -> None:
        """Make every thread that waits for the remote raise DataError."""
        self._closing.set()

    def get_manifest(self) -> None:
        """Fetch the manifest, every time: a cached data set that the remote has since replaced must not be read."""
        path, deadline = self.folder / MANIFEST_NAME, time.monotonic() + PATIENCE_SECONDS
        with self._locked(MANIFEST_NAME), self._downloaded(MANIFEST_NAME, deadline) as fresh:
            if not path.exists():
                os.replace(fresh, path)
            elif path.read_bytes() != fresh.read_bytes():
                raise DataError(
                    f"cache {self.folder} holds another data set than {self.remote} (their {MANIFEST_NAME} differ);"
                    " delete the cache folder or name a new one"
                )

    def get(self, name: str, size: int | None = None, hashes: dict[str, str] | None = None) -> Path:
        """Local path of a file, downloaded if it is absent or fails the comparison with `size` and `hashes`.

        Raises DataError if it can't be fetched or the remote's copy is damaged.
        """
        path, deadline = self.folder / name, time.monotonic() + PATIENCE_SECONDS
        if find_damage(path, size, hashes) is None:
            return path
        with self._locked(name):
            damage = find_damage(path, size, hashes)
            if damage is None:
                return path
            if path.exists():
                _warn(f"cached {path} {damage}; it is fetched again")
            for _ in range(2):
                damage = self._fetch(name, path, size, hashes, deadline)
                if damage is None:
                    return path
        raise DataError(f"{self.remote}/{name} {damage}; upload the data set again")

    def _fetch(self, name: str, path: Path, size: int | None, hashes: dict | None, deadline: float) -> str | None:
        """Download a file and rename it into place; if it is damaged, return how instead."""
        with self._downloaded(name, deadline) as fresh:
            damage = find_damage(fresh, size, hashes)
            if damage is None:
                path.parent.mkdir(parents=True, exist_ok=True)
                os.replace(fresh, path)
        return damage

    @contextlib.contextmanager
    def _locked(self, name: str) -> Iterator[None]:
        from filelock import FileLock, Timeout

        folder = self.folder / LOCK_FOLDER
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / f"{name.replace('/', '--')}.lock")
        try:
            lock.acquire(cancel_check=self._closing.is_set)
        except Timeout:
            raise self._error(name, "given up, as the run ends") from None
        try:
            yield
        finally:
            lock.release()

    @contextlib.contextmanager
    def _downloaded(self, name: str, deadline: float) -> Iterator[Path]:
        """Path of a fresh download, deleted afterwards unless moved; call with the file's lock held."""
        # The deadline was set before waiting for the lock, so a machine's processes don't each add their own.
        target = self.folder / INCOMING_FOLDER / name.replace("/", "--")
        wait, began, tried = FIRST_WAIT_SECONDS, time.monotonic(), 0
        try:
            while True:
                shutil.rmtree(target, ignore_errors=True)  # what a killed process left; we hold the lock
                target.mkdir(parents=True)
                try:
                    self._download(name, target / "file")
                    break
                except Exception as error:  # every storage library raises its own
                    left = deadline - time.monotonic()
                    reason = _describe(error)
                    if _is_final(error) or left <= 0:
                        raise self._error(name, reason) from error
                    if not tried:
                        _warn(f"{self.remote}/{name} is out of reach ({reason}); trying again for {left:.0f} s")
                    tried += 1
                # Jitter: thousands of machines lose the same remote at the same moment.
                if self._closing.wait(min(wait * random.uniform(0.5, 1), left)):
                    raise self._error(name, "given up, as the run ends")
                wait = min(2 * wait, LONGEST_WAIT_SECONDS)
            if tried:
                _warn(f"{self.remote}/{name} is back, after {time.monotonic() - began:.0f} s")
            yield target / "file"
        finally:
            shutil.rmtree(target, ignore_errors=True)

    def _download(self, name: str, file: Path) -> None:
        from streaming.base.storage import CloudDownloader

        downloader = CloudDownloader.get(self.remote)
        try:
            downloader.download(f"{self.remote}/{name}", str(file), READ_SECONDS)
        finally:
            downloader.clean_up()

    def _error(self, name: str, reason: str) -> DataError:
        return DataError(
            f"can't fetch {self.remote}/{name}: {reason}; check data remote, that the data set there is complete, "
            "credentials and network. Files fetched so far are kept: start again to go on"
        )


def find_damage(path: Path, size: int | None, hashes: dict[str, str] | None) -> str | None:
    """What is wrong with a file, as a phrase to follow its name, or None. Given hashes, reads the whole file."""
    try:
        actual = path.stat().st_size
        if size is not None and actual != size:
            return f"has {actual} bytes, expected {size} bytes"
        if hashes:
            from streaming.base.hashing import get_hash

            content = path.read_bytes()
            for algorithm, expected in hashes.items():
                if get_hash(algorithm, content) != expected:
                    return f"is damaged: its {algorithm} differs from the index's"
    except FileNotFoundError:
        return "is missing" + (f", expected {size} bytes" if size is not None else "")
    return None


def _is_final(error: Exception) -> bool:
    """Whether retrying is pointless."""
    if isinstance(error, FileNotFoundError | PermissionError | ValueError | ImportError):
        return True
    if "Credentials" in type(error).__name__:  # botocore's NoCredentialsError, PartialCredentialsError
        return True
    status = _http_status(error)
    return status is not None and 400 <= status < 500 and status not in (408, 429)


def _describe(error: Exception) -> str:
    status = _http_status(error)
    if status is None:
        return f"{type(error).__name__}: {error}"
    meanings = {403: " (wrong credentials, or no permission)", 404: " (not found)"}
    return f"HTTP status {status}{meanings.get(status, f': {error}')}"


def _http_status(error: Exception) -> int | None:
    response = getattr(error, "response", None)  # botocore's; Google's and Azure's errors carry the number
    response = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    status = response.get("HTTPStatusCode") or getattr(error, "status_code", None) or getattr(error, "code", None)
    return status if isinstance(status, int) else None


def _warn(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr, flush=True)
