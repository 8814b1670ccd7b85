"""Data sets that all ranks open together, so that each node reads their small files once."""

from __future__ import annotations

import contextlib
import os
import socket

import torch.distributed as dist

from bov_megatron.data.checked import CheckedFiles
from bov_megatron.data.shards import DataSet, open_data_sets
from bov_megatron.errors import DataError
from bov_megatron.parallel import launch
from bov_megatron.parallel.agreement import on_all_ranks, on_first_rank
from bov_megatron.recipe import DataConfig


def open_together(
    data: DataConfig, sequence_length: int, vocab_size: int, tokenizer_hash: str | None = None
) -> list[DataSet]:
    """`open_data_sets` on all ranks: manifests and indexes are read by each node's first rank, and other ranks are sent
    what rank 0 found; collective.

    A node's ranks then check shards together.
    """

    def read() -> list[DataSet]:
        found = open_data_sets(data, sequence_length, vocab_size, tokenizer_hash)
        for data_set in found:
            for split in data_set.manifest.splits:
                data_set.index(split)
        return found

    # A node may have copies or a cache of its own.
    own = on_all_ranks(lambda: read() if launch.is_first_of_node() else [])
    data_sets, start = on_first_rank(lambda: (own, os.urandom(8).hex()))

    def compare() -> None:
        if own and [data_set.manifest for data_set in own] != [data_set.manifest for data_set in data_sets]:
            raise DataError(
                f"node {socket.gethostname()} has other data in {', '.join(str(d.folder) for d in own)} than rank 0's; "
                "copy the same data set to all nodes"
            )

    on_all_ranks(compare)
    with contextlib.suppress(OSError):  # nowhere to tell other processes: each checks for itself
        checked = CheckedFiles(start)
        for data_set in data_sets:
            data_set.checked = checked
    dist.barrier()
    if data_sets[0].checked:
        data_sets[0].checked.remove_name()
    return data_sets
