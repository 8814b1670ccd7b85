"""What all ranks need is read once, or once on a node, and sent; a node hashes each shard once."""

import contextlib
import io
import os
import shutil
import sys
from collections import Counter
from pathlib import Path

from tests.support.core_bundle import write_bundle
from tests.support.distributed import run_ranks
from tests.support.runs import SMOKE, overrides

NODE_RANKS = 2


def starting_rank(rank, world_size, folders, arguments):
    """How often this rank opens each file below `folders`, and the number of shards that it takes the hash of."""
    from streaming.base import hashing

    from bov_megatron import train as command

    os.environ |= {"LOCAL_RANK": str(rank % NODE_RANKS), "LOCAL_WORLD_SIZE": str(NODE_RANKS)}
    opened, hashed = Counter(), Counter()

    def note(event, arguments):
        if event == "open" and isinstance(arguments[0], str | os.PathLike):
            path = Path(arguments[0])
            opened.update(str(path.relative_to(folder)) for folder in folders if folder in path.parents)

    def counted(algorithm, content):
        hashed[algorithm] += 1
        return get_hash(algorithm, content)

    get_hash, hashing.get_hash = hashing.get_hash, counted
    sys.addaudithook(note)
    assert command.main([SMOKE, *arguments]) == 0
    return opened, hashed.total()


def test_what_ranks_read(prepared_data, tmp_path):
    """Two starts, of four ranks that take themselves for two nodes on one machine, with an evaluation at the end."""
    shutil.copytree(prepared_data.folder, tmp_path / "held_out")
    write_bundle(tmp_path / "core", 4)
    changes = (
        *("parallel.tensor_model_parallel_size=2", 'validation.prompts=["a"]', "checkpoint.interval=99"),
        f"evaluation.held_out=[{{name: a, path: {tmp_path / 'held_out'}}}]",
        *(f"evaluation.core={tmp_path / 'core'}", "evaluation.limit=1"),
    )
    descriptions = {"manifest.json", "train/index.json", "val/index.json"}
    data_set = descriptions | {f"held_out/{name}" for name in descriptions}
    for steps in (4, 6):
        arguments = overrides(prepared_data, tmp_path, *changes, f"train.steps={steps}")
        ranks = run_ranks(starting_rank, 4, [tmp_path, prepared_data.folder], arguments)
        shards = {name for opened, _ in ranks for name in opened if name.endswith(".mds")}
        assert sum(hashed for _, hashed in ranks) == len(shards) > 1

        first, *others = (
            Counter({name: count for name, count in opened.items() if not name.endswith((".mds", ".distcp"))})
            for opened, _ in ranks
        )
        assert set(first) > data_set | {"tokenizer/tokenizer.json", "core/core.yaml"}
        stored = Counter()
        for opened in others:
            stored += Counter({name: count for name, count in opened.items() if name.startswith("checkpoints/")})
        assert set(stored.values()) <= {1}, "read to compare its checksum, by one rank"
        # A node may have copies of the data set.
        assert [set(opened) - set(stored) for opened in others] == [set(), data_set, set()]
    resumed = {name.rsplit("/")[-1] for name in first if name.startswith("checkpoints/step_00000004/")}
    assert resumed == {"manifest.json", ".metadata", "common.pt", "metadata.json"}


def other_data_rank(rank, world_size, arguments):
    """Exit status and errors of a rank with a node, and arguments, of its own."""
    from bov_megatron import train as command

    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = command.main([SMOKE, *arguments[rank]])
    return code, stderr.getvalue()


def test_a_node_with_other_data_is_refused(prepared_data, other_prepared_data, tmp_path):
    arguments = [overrides(data, tmp_path) for data in (prepared_data, other_prepared_data)]
    results = run_ranks(other_data_rank, 2, arguments)
    assert [code for code, _ in results] == [2, 2], results
    said = "".join(text for _, text in results)
    assert said.count("has other data in") == 1 and f"{other_prepared_data.folder} than rank 0's" in said
