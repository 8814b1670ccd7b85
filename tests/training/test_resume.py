"""Stopped and started again, or spread over other ranks: the same run, down to the bit where nothing changed."""

import os
import random
import signal

import pytest
import torch
import yaml

from bov_megatron.checkpoint.differences import EFFECTS
from bov_megatron.lifecycle import run_folder
from bov_megatron.recipe import Recipe, load_recipe
from bov_megatron.recipe.identity import flatten
from tests.support.distributed import run_ranks
from tests.support.launcher import Launch
from tests.support.results import lines_of, wait_until
from tests.support.runs import SMOKE, metrics, overrides, train

STEPS, SAVED_EVERY = 8, 3
TP2 = "parallel.tensor_model_parallel_size=2"


def stopping_rank(rank, world_size, arguments, after_step):
    """The run, whose first rank dies after a later step than the last saved one."""
    from bov_megatron import train
    from bov_megatron.engines.megatron import MegatronEngine

    forward_backward, steps = MegatronEngine.forward_backward, []

    def dying(self, micro_batches):
        steps.append(1)
        if len(steps) > after_step and rank == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward_backward(self, micro_batches)

    MegatronEngine.forward_backward = dying
    train.main([SMOKE, *arguments])


def signalled_rank(rank, world_size, arguments, at_step):
    """The run, whose second rank alone is sent SIGTERM during a step."""
    from bov_megatron import train
    from bov_megatron.engines.megatron import MegatronEngine

    forward_backward, steps = MegatronEngine.forward_backward, []

    def signalling(self, micro_batches):
        steps.append(1)
        if len(steps) == at_step and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return forward_backward(self, micro_batches)

    MegatronEngine.forward_backward = signalling
    return train.main([SMOKE, *arguments])


def weights_rank(rank, world_size, arguments):
    """Weights and optimizer state of the newest checkpoint, by name, on one rank whatever the layout that saved it."""
    from bov_megatron import checkpoint
    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.lifecycle import run_folder
    from bov_megatron.parallel import process_groups

    recipe = load_recipe(SMOKE, arguments)
    process_groups.initialize(recipe, rank, world_size)
    engine = MegatronEngine(recipe)
    checkpoint.load(engine, run_folder.latest_checkpoint(recipe.run_dir))
    state = {name: parameter.detach().clone() for name, parameter in engine.model.named_parameters()}
    state |= {f"{name}/{shard.local.qualified_name}": t.clone() for name, shard, t in engine.optimizer.state_tensors()}
    return state


def final_state(arguments: list[str]) -> dict[str, torch.Tensor]:
    alone = [item for item in arguments if not item.startswith("parallel.")]
    return run_ranks(weights_rank, 1, [*alone, "parallel.tensor_model_parallel_size=1"])[0]


@pytest.mark.parametrize(
    "layout", [[TP2, "train.precision=bf16"], ["train.precision=fp32"]], ids=["tp2-bf16", "dp2-fp32"]
)
def test_resumed_run_is_bit_identical(prepared_data, tmp_path, layout):
    whole = overrides(prepared_data, tmp_path / "whole", *layout)
    stopped = overrides(prepared_data, tmp_path / "stopped", *layout)
    train(2, whole)
    with pytest.raises(AssertionError, match="exit codes"):
        run_ranks(stopping_rank, 2, stopped, 5)
    assert [line["step"] for line in metrics(tmp_path / "stopped")] == [1, 2, 3, 4, 5]
    assert "resuming after step 3" in train(2, stopped)
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")
    wanted, found = final_state(whole), final_state(stopped)
    assert found.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []
    assert "is finished: 8 steps are done" in train(2, stopped), "a finished run, started again, ends at once"


def test_sigterm_saves_and_stops(prepared_data, tmp_path):
    arguments = overrides(prepared_data, tmp_path, "checkpoint.interval=0")
    assert run_ranks(signalled_rank, 2, arguments, 5) == [143, 143]
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2, 3, 4, 5]
    assert "resuming after step 5" in train(2, arguments)
    assert [line["step"] for line in metrics(tmp_path)] == list(range(1, STEPS + 1))


def test_other_numbers_of_data_parallel_ranks_see_the_same_data(prepared_data, tmp_path):
    """AdamW with a large epsilon is smooth: what is left is the order of summation."""
    runs = {}
    for size in (1, 2, 4):
        smooth = ("optimizer.name=adamw", "optimizer.eps=0.001", "optimizer.adamw_matrix_lr=0.01")
        train(size, overrides(prepared_data, tmp_path / str(size), *smooth))
        runs[size] = metrics(tmp_path / str(size))
    digests = [line["digest"] for line in runs[1]]
    assert len(set(digests)) == STEPS
    for size in (2, 4):
        assert [line["digest"] for line in runs[size]] == digests
        losses = [line["loss"] for line in runs[size]]
        print("DPERR", [abs(loss - line["loss"]) / loss for loss, line in zip(losses, runs[1], strict=True)])
        assert losses == pytest.approx([line["loss"] for line in runs[1]], rel=1e-6)


def test_killed_and_started_again_by_the_same_command(prepared_data, tmp_path):
    """All processes killed at a random moment; the second start continues by itself."""
    seed = int.from_bytes(os.urandom(2))
    print(f"seed {seed}")
    steps = ["train.steps=20", "checkpoint.interval=4", "validation.interval=10"]
    killed = overrides(prepared_data, tmp_path / "killed", TP2, *steps)
    undisturbed = overrides(prepared_data, tmp_path / "undisturbed", TP2, *steps)
    lines = random.Random(seed).randint(5, 17)
    with Launch(2, killed, tmp_path / "log") as launch:  # leaving it is SIGKILL to both
        wait_until(lambda: lines_of(tmp_path / "killed") >= lines, f"step {lines}", launch.output)
        assert all(rank.is_alive() for rank in launch.ranks), "the run had ended before it could be killed"
    assert "resuming after step" in train(2, killed)
    train(2, undisturbed)
    assert metrics(tmp_path / "killed") == metrics(tmp_path / "undisturbed")
    assert len(metrics(tmp_path / "killed")) == 20


def test_what_differs_is_said_and_the_end_too(prepared_data, tmp_path):
    short = overrides(prepared_data, tmp_path, "train.steps=2", "validation.interval=0")
    train(1, short)
    longer = overrides(
        prepared_data, tmp_path, "train.steps=3", "train.seed=7", "optimizer.matrix_lr=0.01", "validation.interval=0"
    )
    said = train(1, longer).splitlines()
    table = said[said.index("the recipe differs from that of step_00000002:") + 1 :]
    assert [line.split()[:3] for line in table[:4]] == [
        ["field", "checkpoint", "now"], ["train.steps", "2", "3"], ["train.seed", "1234", "7"],
        ["optimizer.matrix_lr", "0.02", "0.01"],
    ]  # fmt: skip
    assert "the run's end" in table[1] and "nothing" in table[2] and "next step" in table[3]

    stored = (tmp_path / run_folder.RECIPE).read_bytes()
    assert "is finished: 3 steps are done, more than the 2 of this recipe" in train(1, short)
    assert "is finished: 3 steps are done; " in train(1, longer)
    assert (tmp_path / run_folder.RECIPE).read_bytes() == stored
    assert run_folder.latest_checkpoint(tmp_path).name == "step_00000003"


def test_rows_that_no_token_trains_are_counted(prepared_data, tmp_path):
    fields = overrides(prepared_data, tmp_path, "train.steps=1", "validation.interval=0", "model.vocab_size=640")
    assert "the data's tokenizer has 512 ids: 128 rows of" in train(1, fields)


def lone_rank(rank, world_size, arguments):
    """A rank that has a node of its own."""
    from bov_megatron import train as command

    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    return command.main([SMOKE, *arguments])


def test_data_stay_in_the_parts_that_a_run_began_with(prepared_data, tmp_path):
    """On two nodes, and then on one."""
    few = ("validation.interval=0", "checkpoint.interval=99")
    unset = [*overrides(prepared_data, tmp_path / "unset", *few, "data.num_canonical_nodes=null")]
    assert run_ranks(lone_rank, 2, [*unset, "train.steps=2"]) == [0, 0]
    train(1, [*unset, "train.steps=4"])
    stored = yaml.safe_load((tmp_path / "unset" / run_folder.RECIPE).read_text())
    assert stored["data"]["num_canonical_nodes"] == 2
    digests = {}
    for parts in (1, 2):
        given = (*few, "train.steps=4", f"data.num_canonical_nodes={parts}")
        train(1, overrides(prepared_data, tmp_path / str(parts), *given))
        digests[parts] = [line["digest"] for line in metrics(tmp_path / str(parts))]
    assert digests[1] != digests[2] == [line["digest"] for line in metrics(tmp_path / "unset")]


def test_every_field_that_may_change_says_what_it_does():
    refused = {"train.global_batch_size", "train.precision", "data.shuffle", "data.shuffle_seed"}
    refused |= {"data.shuffle_block_size", "data.num_canonical_nodes"}
    for field in flatten(Recipe().to_dict()):
        sections = {field.rsplit(".", depth)[0] for depth in range(3)}
        assert sections & EFFECTS.keys() or field in refused, field
