"""The manifest of a checkpoint: size and checksum of each file, and the layout that wrote them. Doesn't need torch.

    RUN/checkpoints/step_00000200/manifest.json

It is written last, just before the folder gets its final name, so a folder with an intact manifest was complete once;
comparing sizes or checksums shows whether it still is.
"""

from __future__ import annotations

import errno
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

MANIFEST_FILE = "manifest.json"
CHUNK_BYTES = 4 * 2**20
_OWN_CHECKSUM = "manifest_xxh3_64"


@dataclass(frozen=True)
class FileEntry:
    """A file as it was written."""

    size: int
    """Bytes."""
    xxh3_64: str
    """Checksum of the content, 16 hexadecimal digits (XXH3, 64 bits)."""


@dataclass(frozen=True)
class Manifest:
    """Contents of a checkpoint."""

    step: int
    layout: dict[str, int]
    """`world_size` and the parallel sizes of the run that saved it."""
    files: dict[str, FileEntry]
    """By path below the checkpoint's folder."""

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(entry.size for entry in self.files.values())


@dataclass(frozen=True)
class Damage:
    """A file that differs from the manifest."""

    file: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.file}: expected {self.expected}, found {self.found}"


class ManifestError(ValueError):
    """A manifest that is missing or damaged; `damage` says which."""

    def __init__(self, found: str):
        self.damage = Damage(MANIFEST_FILE, "a manifest", found)
        super().__init__(str(self.damage))


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write the manifest and flush it to disk."""
    content = {"version": 1, **asdict(manifest)}
    content[_OWN_CHECKSUM] = _checksum_of(content)
    with (folder / MANIFEST_FILE).open("w") as file:
        json.dump(content, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_manifest(folder: Path) -> Manifest:
    """Read a checkpoint's manifest. Raises ManifestError if it is missing or damaged."""
    try:
        content = json.loads((folder / MANIFEST_FILE).read_bytes())
        stated = content.pop(_OWN_CHECKSUM)
        files = {name: FileEntry(**entry) for name, entry in content["files"].items()}
        manifest = Manifest(content["step"], content["layout"], files)
    except FileNotFoundError:
        raise ManifestError("none") from None
    except OSError as error:
        raise ManifestError(_unreadable(error)) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ManifestError(f"a damaged one ({type(error).__name__})") from error
    if stated != _checksum_of(content):
        raise ManifestError("one with another checksum than it states")
    return manifest


def find_damage(folder: Path, contents: bool) -> list[Damage]:
    """Files of a checkpoint that differ from its manifest. `contents`, and what is raised: as for `compare`."""
    try:
        manifest = read_manifest(folder)
    except ManifestError as error:
        return [error.damage]
    return compare(folder, manifest, contents)


def compare(folder: Path, manifest: Manifest, contents: bool, share: int = 0, shares: int = 1) -> list[Damage]:
    """Files of a checkpoint that differ from its manifest.

    Args:
        contents: compare checksums too, which reads every byte; else sizes only.
        share, shares: check only one of `shares` parts, about equal in size.

    Raises OSError for a file that exists but can't be read, except for bad disks.
    """
    by_size = sorted(manifest.files, key=lambda name: (-manifest.files[name].size, name))
    damages = (_damage_of(folder, name, manifest.files[name], contents) for name in by_size[share::shares])
    return [damage for damage in damages if damage]


def _damage_of(folder: Path, name: str, entry: FileEntry, contents: bool) -> Damage | None:
    expected = f"{entry.size} bytes"
    try:
        size = (folder / name).stat().st_size
        if size != entry.size:
            return Damage(name, expected, f"{size} bytes")
        checksum = file_checksum(folder / name) if contents else entry.xxh3_64
    except FileNotFoundError:
        return Damage(name, expected, "no such file")
    except OSError as error:
        return Damage(name, expected, _unreadable(error))
    if checksum != entry.xxh3_64:
        return Damage(name, f"checksum {entry.xxh3_64}", f"checksum {checksum}")
    return None


def _unreadable(error: OSError) -> str:
    """Description of a file that the disk can't read (EIO); other errors, e.g. of permissions, are raised again."""
    if error.errno != errno.EIO:
        raise error
    return str(error.strerror)


def describe_file(path: Path) -> FileEntry:
    """Size and checksum of a file on disk."""
    return FileEntry(path.stat().st_size, file_checksum(path))


def file_checksum(path: Path) -> str:
    """XXH3 (64 bits) of a file's content, 16 hexadecimal digits."""
    digest, buffer = xxhash.xxh3_64(), memoryview(bytearray(CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def _checksum_of(content: dict) -> str:
    return xxhash.xxh3_64_hexdigest(json.dumps(content, sort_keys=True).encode())
