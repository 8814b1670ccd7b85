"""An error on one rank is raised on all, and costs one number a rank where there is none."""

import torch.distributed as dist

from bov_megatron.errors import DataError, RunFolderError
from tests.support.distributed import run_ranks


def agreeing_rank(rank, world_size):
    from bov_megatron.parallel.agreement import gather_items, on_all_ranks, on_first_rank

    dist.init_process_group("gloo", rank=rank, world_size=world_size)

    def fail_on(rank_that_fails: int, error: Exception):
        if rank == rank_that_fails:
            raise error
        return rank

    def raised(function) -> tuple[type, str] | None:
        try:
            function()
        except Exception as error:
            return type(error), str(error)
        return None

    found = {
        "all": on_all_ranks(lambda: rank),
        "second fails": raised(lambda: on_all_ranks(lambda: fail_on(1, DataError("damaged")))),
        "first fails": raised(lambda: on_all_ranks(lambda: fail_on(0, DataError("damaged")))),
        "disk fails": raised(lambda: on_first_rank(lambda: fail_on(0, OSError(28, "No space left", "/run/x")))),
        "library fails": raised(lambda: on_first_rank(lambda: fail_on(0, OSError("no tokenizer there")))),
        "first": on_first_rank(lambda: f"from rank {rank}"),
        "first rank fails": raised(lambda: on_first_rank(lambda: fail_on(0, DataError("damaged")))),
        "gathered": gather_items([rank] * (rank % 2)),
    }
    travels = []
    for name in ("all_gather_object", "broadcast_object_list"):
        setattr(dist, name, lambda *_, name=name, **__: travels.append(name))
    found["nothing to gather"] = gather_items([])
    on_all_ranks(lambda: None)
    found["objects sent"] = travels
    return found


def test_what_one_rank_meets_all_ranks_hear():
    for rank, found in enumerate(run_ranks(agreeing_rank, 4)):
        assert found["all"] == rank
        assert found["second fails"] == (DataError, "damaged (on rank 1)")
        assert found["first fails"] == (DataError, "damaged")
        kind, text = found["disk fails"]
        assert kind is RunFolderError and text.startswith("/run/x: No space left")
        assert found["library fails"][1].startswith("no tokenizer there; ")
        assert found["first"] == "from rank 0"
        assert found["first rank fails"] == (DataError, "damaged")
        assert found["gathered"] == [1, 3]
        assert (found["nothing to gather"], found["objects sent"]) == ([], [])
