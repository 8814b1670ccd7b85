"""Local copies of a remote data set's files, shared by the processes of a machine.

A file is downloaded by one process under a lock, checked, and only then given its name. A home that is out of reach is
tried again for a while; one that answers "not there" or "not yours" is not.
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
"""Without a byte, after which a download has failed."""
PATIENCE_SECONDS = 600.0
"""How long a home out of reach is tried again; below health.hang_minutes, so that it is this error that is said."""
FIRST_WAIT_SECONDS, LONGEST_WAIT_SECONDS = 1.0, 30.0


class Cache:
    """Local copies of a remote folder's files, each whole or absent. Thread-safe, and safe between processes."""

    def __init__(self, folder: Path, remote: str) -> None:
        self.folder, self.remote = folder, remote.rstrip("/")
        if Path(remote).expanduser().resolve() == folder.resolve():
            raise DataError(f"data remote and path are the same folder, {remote}; leave remote out")
        self._closing = threading.Event()

    def close(self) -> None:
        """Let every thread that waits for the remote home give up, with a DataError; nothing more is fetched."""
        self._closing.set()

    def get_manifest(self) -> None:
        """Fetch the manifest anew each time: a cache of what has since been replaced must not be read."""
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
        """Have a file locally; returns its path. Size and hashes are compared, of a local file as of a download.

        A download takes its name only then, so a process killed in the middle leaves nothing that could be taken for
        the file. Raises DataError where it cannot be had, naming it and its home.
        """
        path, deadline = self.folder / name, time.monotonic() + PATIENCE_SECONDS
        if find_damage(path, size, hashes) is None:
            return path
        with self._locked(name):
            damage = find_damage(path, size, hashes)
            if damage is None:
                return path
            if path.exists():
                _say(f"cached {path} {damage}; it is fetched again")
            damage = self._fetch(name, path, size, hashes, deadline) and self._fetch(name, path, size, hashes, deadline)
        if damage:
            raise DataError(f"{self.remote}/{name} {damage}; upload the data set again")
        return path

    def _fetch(self, name: str, path: Path, size: int | None, hashes: dict | None, deadline: float) -> str | None:
        """Download a file and give it its name, unless it is damaged: then what is wrong with it."""
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
        """A file fetched into a folder of its own, which goes afterwards; with the file's lock held.

        `deadline` counts from before the lock was waited for, so that a machine's processes don't wait one after the
        other.
        """
        target = self.folder / INCOMING_FOLDER / name.replace("/", "--")
        wait, began, tried = FIRST_WAIT_SECONDS, time.monotonic(), 0
        try:
            while True:
                shutil.rmtree(target, ignore_errors=True)  # also what a killed process left: the lock is ours
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
                        _say(f"{self.remote}/{name} is out of reach ({reason}); trying again for {left:.0f} s")
                    tried += 1
                # Spread out: thousands of machines lose the same home at the same moment.
                if self._closing.wait(min(wait * random.uniform(0.5, 1), left)):
                    raise self._error(name, "given up, as the run ends")
                wait = min(2 * wait, LONGEST_WAIT_SECONDS)
            if tried:
                _say(f"{self.remote}/{name} is back, after {time.monotonic() - began:.0f} s")
            yield target / "file"
        finally:
            shutil.rmtree(target, ignore_errors=True)

    def _download(self, name: str, file: Path) -> None:
        import_streaming()
        from streaming.base.storage import CloudDownloader

        downloader = CloudDownloader.get(self.remote)
        try:
            downloader.download(f"{self.remote}/{name}", str(file), READ_SECONDS)
        finally:
            downloader.clean_up()

    def _error(self, name: str, reason: str) -> DataError:
        return DataError(
            f"can't fetch {self.remote}/{name}: {reason}; is data remote right, is the data set there complete, are "
            "credentials set, and can this machine reach it? What has been fetched is kept: start again to go on"
        )


def find_damage(path: Path, size: int | None, hashes: dict[str, str] | None) -> str | None:
    """What is wrong with a file, in words that follow its name, or None. Reads all of it where there are hashes."""
    try:
        found = path.stat().st_size
        if size is not None and found != size:
            return f"has {found} bytes, expected {size} bytes"
        if hashes:
            import_streaming()
            from streaming.base.hashing import get_hash

            content = path.read_bytes()
            for algorithm, expected in hashes.items():
                if get_hash(algorithm, content) != expected:
                    return f"is damaged: its {algorithm} differs from the index's"
    except FileNotFoundError:
        return "is missing" + (f", expected {size} bytes" if size is not None else "")
    return None


def _is_final(error: Exception) -> bool:
    """Whether trying again cannot help: the file is not there or not ours, or the home is not understood."""
    if isinstance(error, FileNotFoundError | PermissionError | ValueError | ImportError):
        return True
    if "Credentials" in type(error).__name__:  # botocore's NoCredentialsError and its sisters
        return True
    status = _http_status(error)
    return status is not None and 400 <= status < 500 and status not in (408, 429)


def _describe(error: Exception) -> str:
    status = _http_status(error)
    if status is None:
        return f"{type(error).__name__}: {error}"
    meanings = {403: " (credentials are wrong, or give no right to it)", 404: " (not there)"}
    return f"the answer is HTTP status {status}{meanings.get(status, f': {error}')}"


def _http_status(error: Exception) -> int | None:
    response = getattr(error, "response", None)  # botocore's; Google's and Azure's have the number themselves
    response = response.get("ResponseMetadata", {}) if isinstance(response, dict) else {}
    status = response.get("HTTPStatusCode") or getattr(error, "status_code", None) or getattr(error, "code", None)
    return status if isinstance(status, int) else None


def import_streaming() -> None:
    """mosaicml-streaming, which is not imported with this package: it takes seconds."""
    from bov_megatron.compat import register_missing_torchvision_ops

    register_missing_torchvision_ops()
    import streaming  # noqa: F401


def _say(text: str) -> None:
    print(f"WARNING: {text}", file=sys.stderr, flush=True)
