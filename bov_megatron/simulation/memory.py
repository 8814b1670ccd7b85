"""Memory by kind: every tensor's storage is followed from its first appearance to its end."""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

HOST = "host"
"""Kind of what lies in the host's memory; peaks leave it out."""


class Memory:
    """Bytes of live storages by kind, and their highest sum in each phase.

    A new storage is of the kind of the innermost `of_kind` block that it appears in; `set_kind` changes it.
    """

    def __init__(self, kind: str):
        self._kinds = [kind]
        self._live: dict[int, tuple[str, int]] = {}
        self.bytes: Counter[str] = Counter()
        self._total = self._highest = 0
        self._at_highest: Counter[str] = Counter()

    @contextmanager
    def of_kind(self, kind: str) -> Iterator[None]:
        self._kinds.append(kind)
        try:
            yield
        finally:
            self._kinds.pop()

    @contextmanager
    def phase(self, peaks: dict[str, dict[str, int]], name: str) -> Iterator[None]:
        """Set `peaks[name]` to the bytes by kind at the moment in the block at which most memory is in use."""
        self._highest, self._at_highest = self._total, self.bytes.copy()
        try:
            yield
        finally:
            peaks[name] = {kind: size for kind, size in self._at_highest.items() if kind != HOST and size}

    def add(self, tensor: Tensor) -> None:
        """Follow the tensor's storage, unless it is followed already."""
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._live:
            return
        kind, size = self._kinds[-1], storage.nbytes()
        self._live[key] = kind, size
        weakref.finalize(storage, self._remove, key).atexit = False
        self._count(kind, size)

    def set_kind(self, tensors: Iterable[Tensor], kind: str) -> None:
        for tensor in tensors:
            self.add(tensor)
            key = tensor.untyped_storage()._cdata
            old, size = self._live[key]
            self._live[key] = kind, size
            self._count(old, -size)
            self._count(kind, size)

    def is_on_host(self, tensor: Tensor) -> bool:
        return self._live.get(tensor.untyped_storage()._cdata, ("", 0))[0] == HOST

    def _remove(self, key: int) -> None:
        kind, size = self._live.pop(key)
        self._count(kind, -size)

    def _count(self, kind: str, size: int) -> None:
        self.bytes[kind] += size
        if kind == HOST:
            return
        self._total += size
        if self._total > self._highest:
            self._highest, self._at_highest = self._total, self.bytes.copy()
