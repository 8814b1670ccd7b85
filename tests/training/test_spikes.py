"""A loss far above those before: found as a robust statistic would, decided by all ranks, skipped without a trace."""

import contextlib
import io
import math
import statistics

import numpy as np
import pytest
import torch

from bov_megatron.data.loader import TrainLoader
from bov_megatron.recipe import HealthConfig, load_recipe
from bov_megatron.training.health import Health, Verdict
from bov_megatron.training.spikes import SpikeDetector
from tests.support.distributed import run_ranks
from tests.support.runs import SMOKE, metrics, overrides, train

SKIP = ["health.on_spike=skip", "health.spike_window=4", "health.spike_deviations=30", "validation.interval=0"]
TP2 = "parallel.tensor_model_parallel_size=2"


def spiking_rank(rank, world_size, arguments, spikes, seen_by):
    """The run, in which the ranks `seen_by` find the loss of the given data steps 100 too high. Status, stderr, and for
    each step whether weights and optimizer state changed."""
    from bov_megatron import train as command
    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.training.trainer import Trainer

    changed = []

    def forward_backward(self, micro_batches):
        step = next(counter)
        return original(self, micro_batches) + (100.0 if step in spikes and rank in seen_by else 0.0)

    def train_step(self, *positional):
        before = state(self.engine)
        result = whole_step(self, *positional)
        changed.append(not all(torch.equal(a, b) for a, b in zip(before, state(self.engine), strict=True)))
        return result

    def next_step(self):
        batch = drawn(self)
        steps.append(batch.place)
        return batch

    steps = []
    counter = iter(lambda: steps[-1], None)
    drawn, TrainLoader.__next__ = TrainLoader.__next__, next_step
    original, MegatronEngine.forward_backward = MegatronEngine.forward_backward, forward_backward
    whole_step, Trainer.train_step = Trainer.train_step, train_step
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = command.main([SMOKE, *arguments])
    return code, stderr.getvalue(), changed


def state(engine) -> list[torch.Tensor]:
    tensors = [parameter for _, parameter in engine.model.named_parameters()]
    tensors += [tensor for _, _, tensor in engine.optimizer.state_tensors()]
    tensors += [tensor for *_, tensor in engine.optimizer.second_moments()]
    return [tensor.detach().clone() for tensor in tensors] + [torch.tensor(engine.optimizer.step_count)]


def test_a_spike_stays_one_where_its_gradients_are_not_finite():
    health = Health(HealthConfig(on_spike="rollback", spike_window=4), {"losses": [5.0, 5.1, 4.9, 5.0]})
    assert health.judge(100.0, math.nan) is Verdict.SPIKE
    assert health.must_roll_back({"updated": False})
    assert health.judge(5.0, math.nan) is health.judge(math.nan) is Verdict.NOT_FINITE
    assert not health.must_roll_back({"updated": False})


def test_deviations_are_those_of_median_and_mad():
    rng = np.random.default_rng(0)
    losses = rng.normal(3.0, 0.1, 500)
    losses[100:110] += 40  # must hardly move what later ones are measured by
    detector = SpikeDetector(64)
    for step, loss in enumerate(losses):
        window = losses[max(0, step - 64) : step]
        wanted = 0.0
        if step >= 64:
            median = statistics.median(window)
            wanted = (loss - median) / (1.4826 * np.median(np.abs(window - median)))
        assert detector.deviations(loss) == pytest.approx(wanted, rel=1e-9)
        detector.add(loss)
    assert detector.deviations(3.0 + 1.0) == pytest.approx(10, rel=0.5)
    assert SpikeDetector(64, detector.losses()).deviations(5.0) == detector.deviations(5.0)


def test_what_is_no_spike():
    flat = SpikeDetector(4, [2.0, 2.0, 2.0, 2.0])
    assert flat.deviations(2.001) < 1, "losses that don't vary make no spike of the next digit"
    assert flat.deviations(1.0) < 0
    assert flat.deviations(float("nan")) == 0
    flat.add(float("nan"))
    assert flat.losses() == [2.0] * 4
    assert SpikeDetector(4, [2.0, 2.0, 2.0]).deviations(90.0) == 0, "not judged before the window is full"


@pytest.mark.parametrize("layout", [[TP2], []], ids=["tp2", "dp2"])
def test_a_skipped_step_changes_nothing_on_any_rank(prepared_data, tmp_path, layout):
    """Though only the second rank saw the spike."""
    arguments = overrides(prepared_data, tmp_path, *SKIP, *layout)
    results = run_ranks(spiking_rank, 2, arguments, {5}, {1})
    assert [code for code, *_ in results] == [0, 0], results
    assert [changed for *_, changed in results] == [[True] * 5 + [False] + [True] * 2] * 2
    lines = metrics(tmp_path)
    assert [line["step"] for line in lines if "skipped" in line] == [6]
    assert (lines[5]["skipped"], lines[5]["updated"]) == ("spike", False)
    recipe = load_recipe(SMOKE, arguments)
    sizes = {"global_batch_size": 4, "micro_batch_size": 4, "sequence_length": 256, "vocab_size": 512}
    with TrainLoader(recipe.data, start_step=5, **sizes) as loader:
        batch = next(loader)
    assert lines[5]["digest"] == batch.digest and lines[5]["sample_ids"] == batch.ids_B2.tolist()


def test_warned_of_and_taken(prepared_data, tmp_path):
    arguments = overrides(prepared_data, tmp_path, *SKIP, "health.on_spike=warn", "logging.interval=4")
    results = run_ranks(spiking_rank, 2, arguments, {5}, {0, 1})
    assert [changed for *_, changed in results] == [[True] * 8] * 2
    assert "deviations above those before, updated anyway (health.on_spike=warn)" in results[0][1]
    (line,) = (line for line in metrics(tmp_path) if "spike_deviations" in line)
    assert line["step"] == 6 and line["updated"] and len(line["sample_ids"]) == 4


def test_decisions_are_the_same_after_a_resume(prepared_data, tmp_path):
    """The window is part of the checkpoint: a spike right after it is found as in a run never stopped."""
    whole = overrides(prepared_data, tmp_path / "whole", *SKIP)
    assert [code for code, *_ in run_ranks(spiking_rank, 2, whole, {4, 6}, {0, 1})] == [0, 0]
    stopped = overrides(prepared_data, tmp_path / "stopped", *SKIP, "health.max_skips=1")
    results = run_ranks(spiking_rank, 2, stopped, {4, 6}, {0, 1})
    assert [code for code, *_ in results] == [3, 3]
    message = "2 of the last 1000 steps were skipped (5, 7), more than health.max_skips=1"
    assert sum(message in text for _, text, _ in results) == 1
    again = [*(item for item in stopped if "max_skips" not in item), "health.max_skips=2"]
    code, stderr, changed = run_ranks(spiking_rank, 2, again, {4, 6}, {0, 1})[0]
    assert code == 0 and "resuming after step 6" in stderr and changed == [False, True]
    assert metrics(tmp_path / "stopped") == metrics(tmp_path / "whole")


def test_losses_of_a_usual_run_are_no_spikes(prepared_data, tmp_path):
    arguments = overrides(prepared_data, tmp_path, "health.spike_window=8", "train.steps=40", "validation.interval=0")
    train(2, arguments)
    assert not any("spike_deviations" in line for line in metrics(tmp_path))
