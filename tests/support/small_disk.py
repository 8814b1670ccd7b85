"""Filling a small file system (the fixture `small_disk`)."""

import os


def fill(folder, leave: int):
    """A file that leaves so many bytes free."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    (folder / "filler").write_bytes(bytes(free - leave))
