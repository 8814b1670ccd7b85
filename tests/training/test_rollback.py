"""A run that goes back to its checkpoint ends as one that was never given the samples since, and its metrics say so."""

import contextlib
import io
import os
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch

from tests.support.distributed import run_ranks
from tests.support.runs import SMOKE, metrics, overrides, train
from tests.training.test_resume import final_state

STEPS, SAVED, WRONG, LAST = 12, 6, 9, "train.steps=12"
"""Steps of a run; steps done when it last saved; the step that goes wrong, on the batch at place 8 of the order."""
ROLLBACK = ["health.on_spike=rollback", "health.spike_window=4", "health.spike_deviations=30"]
PATIENCE = "health.max_not_finite_steps=1"
OVERLAP = ["parallel.overlap_param_gather=true"]
LAYOUTS = {
    "dp2": [],
    "dp2-deepspeed": ["engine=deepspeed", "optimizer.name=adamw", "deepspeed.zero_stage=3"],
    "tp2-asynchronous": ["parallel.tensor_model_parallel_size=2", "checkpoint.asynchronous=true"],
}


def disturbed_rank(rank, world_size, arguments, faults):
    """The run, in which something happens to batches by their place in the data's order: what `faults` says. Status,
    stderr, and the places of the batches drawn.

    `spike`: the second rank finds a loss 100 too high. `nan`: its gradients alone get one, in a row that it updates.
    `kill`: it is killed. `lose`: checkpoints vanish, and the loss is a spike.
    """
    from bov_megatron import train as command
    from bov_megatron.data.loader import TrainLoader

    if "engine=deepspeed" in arguments:
        from bov_megatron.engines.deepspeed.engine import DeepSpeedEngine as Engine
    else:
        from bov_megatron.engines.megatron import MegatronEngine as Engine

    places = []

    def forward_backward(self, micro_batches):
        loss, fault = original(self, micro_batches), faults.get(places[-1])
        if rank == 1 and fault == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if rank == 1 and fault == "nan":
            next(p for p in self.optimizer.parameters if p.has_rows).row_gradient().view(-1)[0] = float("nan")
        if fault == "lose":
            torch.distributed.barrier()
            shutil.rmtree(self.recipe.run_dir / "checkpoints", ignore_errors=True)
        return loss + (100.0 if rank == 1 and fault in ("spike", "lose") else 0.0)

    def next_batch(self):
        batch = drawn(self)
        places.append(batch.place)
        return batch

    drawn, TrainLoader.__next__ = TrainLoader.__next__, next_batch
    original, Engine.forward_backward = Engine.forward_backward, forward_backward
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = command.main([SMOKE, *arguments])
    return code, stderr.getvalue(), places


def never_given_rank(rank, world_size, arguments, first, count):
    """The run over an order that has `count` batches less from place `first` on."""
    from bov_megatron import train as command
    from bov_megatron.data.order import SampleOrder

    batch = SampleOrder.batch
    SampleOrder.batch = lambda self, place: batch(self, place + count if place >= first else place)
    return command.main([SMOKE, *arguments])


@pytest.fixture(scope="module")
def never_given(prepared_data, tmp_path_factory):
    """Final state and metrics of runs that were never given the batches at places 6 to 8, by layout."""
    found = {}
    for name, layout in LAYOUTS.items():
        folder = tmp_path_factory.mktemp(name)
        arguments = overrides(prepared_data, folder, LAST, *layout)
        assert run_ranks(never_given_rank, 2, arguments, SAVED, WRONG - SAVED) == [0, 0]
        found[name] = final_state(arguments), metrics(folder)
    return found


def split(lines: list[dict]) -> tuple[list[dict], list[dict]]:
    """Lines of steps, and what those of rollbacks say."""
    return [line for line in lines if "rollback" not in line], [
        line["rollback"] for line in lines if "rollback" in line
    ]


def check(arguments, folder, expected):
    state, steps = expected
    found = final_state(arguments)
    assert found.keys() == state.keys()
    assert [name for name in state if not torch.equal(found[name], state[name])] == []
    assert split(metrics(folder))[0] == steps


@pytest.mark.parametrize(
    ("layout", "fault", "also"),
    [
        ("dp2", "spike", []),
        ("dp2", "nan", OVERLAP),
        ("dp2-deepspeed", "spike", []),
        ("tp2-asynchronous", "spike", []),
    ],
)
def test_as_if_the_samples_had_never_been(prepared_data, tmp_path, never_given, layout, fault, also):
    """Though one rank alone saw what went wrong."""
    arguments = overrides(prepared_data, tmp_path, LAST, *LAYOUTS[layout], *ROLLBACK, PATIENCE, *also)
    results = run_ranks(disturbed_rank, 2, arguments, {8: fault})
    assert [code for code, *_ in results] == [0, 0], results
    assert [places for *_, places in results] == [[*range(9), *range(9, 15)]] * 2, "each batch at most once"
    check(arguments, tmp_path, never_given[layout])
    (told,) = split(metrics(tmp_path))[1]
    assert (told["from_step"], told["to_step"], told["first_batch"], told["last_batch"]) == (WRONG, SAVED, 6, 8)
    assert told["reason"] == {"spike": "spike", "nan": "not finite"}[fault] and len(told["sample_ids"]) == 4
    assert [line["step"] for line in metrics(tmp_path)].index(7) == 7, "its line stands between steps 6 and 7"
    said = [line for line in results[0][1].splitlines() if "back to step 6, without batches 6 to 8" in line]
    assert len(said) == 1


def test_right_after_a_save_that_is_still_being_written(prepared_data, tmp_path, never_given):
    """The checkpoint that is newest once it is written is the one to go back to."""
    arguments = overrides(prepared_data, tmp_path, LAST, *LAYOUTS["tp2-asynchronous"], *ROLLBACK)
    results = run_ranks(disturbed_rank, 2, arguments, {6: "spike", 7: "spike", 8: "spike"})
    assert [code for code, *_ in results] == [0, 0], results
    check(arguments, tmp_path, never_given["tp2-asynchronous"])
    told = split(metrics(tmp_path))[1]
    assert [(one["number"], one["first_batch"], one["last_batch"]) for one in told] == [(1, 6, 6), (2, 7, 7), (3, 8, 8)]


def test_killed_at_once_and_resumed(prepared_data, tmp_path, never_given):
    """What is left out was saved with the rollback; other ranks read the same."""
    arguments = overrides(prepared_data, tmp_path / "same", LAST, *ROLLBACK)
    with pytest.raises(AssertionError, match="exit codes"):
        run_ranks(disturbed_rank, 2, arguments, {8: "spike", 9: "kill"})
    shutil.copytree(tmp_path / "same", tmp_path / "other")
    (tmp_path / "other" / "lease.json").unlink(missing_ok=True)
    result = run_ranks(disturbed_rank, 2, arguments, {})[0]
    assert "resuming after step 6" in result[1] and result[2] == list(range(9, 15))
    check(arguments, tmp_path / "same", never_given["dp2"])
    assert len(split(metrics(tmp_path / "same"))[1]) == 1

    train(2, overrides(prepared_data, tmp_path / "other", LAST, *ROLLBACK, *LAYOUTS["tp2-asynchronous"]))
    steps, expected = split(metrics(tmp_path / "other"))[0], never_given["dp2"][1]
    assert [line["digest"] for line in steps] == [line["digest"] for line in expected]
    assert [line["loss"] for line in steps] == pytest.approx([line["loss"] for line in expected], rel=1e-3)


def test_before_the_first_checkpoint(prepared_data, tmp_path):
    """The initial weights are one: the run starts again, without the samples so far."""
    arguments = overrides(
        prepared_data, tmp_path / "back", *ROLLBACK, "checkpoint.interval=0", "checkpoint.keep_last=1"
    )
    assert [code for code, *_ in run_ranks(disturbed_rank, 2, arguments, {4: "spike"})] == [0, 0]
    reference = overrides(prepared_data, tmp_path / "reference", "checkpoint.interval=0")
    assert run_ranks(never_given_rank, 2, reference, 0, 5) == [0, 0]
    check(arguments, tmp_path / "back", (final_state(reference), metrics(tmp_path / "reference")))
    assert metrics(tmp_path / "back")[0]["rollback"]["to_step"] == 0


@pytest.mark.parametrize(
    ("faults", "limit", "message"),
    [
        ({8: "spike", 10: "spike"}, 1, "of step 8 is a spike, .* times before (from step, to step: 9 to 6)"),
        ({8: "lose"}, 3, "of step 9 is a spike, .* no checkpoint to go back to: none could be written"),
    ],
    ids=["too often", "no checkpoint"],
)
def test_runs_that_are_ended(prepared_data, tmp_path, faults, limit, message):
    arguments = overrides(prepared_data, tmp_path, LAST, *ROLLBACK, f"health.max_rollbacks={limit}")
    results = run_ranks(disturbed_rank, 2, arguments, faults)
    assert [code for code, *_ in results] == [3, 3], results
    errors = [line for _, text, _ in results for line in text.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1
    first, second = message.split(" .* ")
    assert first in errors[0] and second in errors[0]


@pytest.mark.parametrize("to_step", [2, 4, 5])
def test_lines_that_a_full_disk_has_not_taken_are_dropped_too(tmp_path, monkeypatch, to_step):
    from bov_megatron.training.callbacks import metrics_file

    monkeypatch.setattr(metrics_file.dist, "get_rank", lambda: 0)
    health = SimpleNamespace(rollbacks=[{}])
    trainer = SimpleNamespace(step=0, owed=set(), health=health, is_due=lambda interval: True)
    file = metrics_file.MetricsFile(tmp_path, 1)
    file.start(trainer)
    earlier = {"step": 3, "rollback": {"number": 1}}
    for line in [*({"step": step} for step in (1, 2, 3)), earlier, *({"step": step} for step in (4, 5, 6))]:
        file.after_step(trainer, line)
    whole = file.path.read_bytes()
    taken = whole.index(b'{"step": 5}') + 4
    file.file.truncate(taken)
    file.unwritten = whole[taken:]
    trainer.step, health.rollbacks = to_step, [{}, {}]
    file.after_line(trainer, {"step": to_step, "rollback": {"number": 2}})
    file.finish(trainer)
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines if "rollback" not in line] == list(range(1, to_step + 1))
    assert [line["rollback"]["number"] for line in lines if "rollback" in line] == [1, 2]
