"""One rank's numbers go bad (a failing GPU, an overflow): all ranks leave the step out together, without a trace."""

import contextlib
import io

import pytest

from bov_megatron.data.loader import TrainLoader
from bov_megatron.recipe import load_recipe
from tests.support.distributed import run_ranks
from tests.support.runs import SMOKE, metrics, overrides
from tests.training.test_spikes import state

LAYOUTS = {
    "dp2": [],
    "tp2": ["parallel.tensor_model_parallel_size=2"],
    "pp2": ["parallel.pipeline_model_parallel_size=2", "parallel.pipeline_layers=[1,2]"],
}
STEPS = 60
HEALTH = ["health.max_not_finite_steps=1000", "health.max_skips=1000"]


def poisoned_rank(rank, world_size, arguments, victim, numbers):
    """The run; at every second step one of the victim's gradients has one bad element before the ranks' gradients are
    brought together, each of its parameters in turn, and after these its loss. Status, stderr, what was poisoned at
    which step, and for each step whether this rank's weights or optimizer state changed."""
    import torch
    from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup as BucketGroup

    from bov_megatron import train as command
    from bov_megatron.engines.megatron import MegatronEngine
    from bov_megatron.training.trainer import Trainer

    poisoned, changed, bad = {}, [], {}

    def start_grad_sync(self, **named):
        for parameter in bad.keys() & self.params:
            parameter.main_grad.view(-1)[-1] = bad.pop(parameter)
        return start(self, **named)

    def forward_backward(self, micro_batches):
        step, parameters = len(changed) + 1, list(self.model.named_parameters())
        number = (step - 2) // 2 if step % 2 == 0 else None
        bad_gradient = number is not None and number < len(parameters)
        bad_loss = number == len(parameters)
        if rank == victim and (bad_gradient or bad_loss):
            poisoned[step] = parameters[number][0] if bad_gradient else "the loss"
        if rank == victim and bad_gradient:
            bad[parameters[number][1]] = numbers[number % len(numbers)]
        loss = original(self, micro_batches)
        return loss * float("nan") if rank == victim and bad_loss else loss

    def train_step(self, *positional):
        before = state(self.engine)
        result = whole_step(self, *positional)
        changed.append(not all(torch.equal(a, b) for a, b in zip(before, state(self.engine), strict=True)))
        return result

    start, BucketGroup.start_grad_sync = BucketGroup.start_grad_sync, start_grad_sync
    original, MegatronEngine.forward_backward = MegatronEngine.forward_backward, forward_backward
    whole_step, Trainer.train_step = Trainer.train_step, train_step
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = command.main([SMOKE, *arguments])
    return code, stderr.getvalue(), poisoned, changed


@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_one_rank_s_numbers_are_not_finite(prepared_data, tmp_path, say, layout, victim):
    """Every gradient of one rank in turn, nan or infinite, then its loss."""
    changes = [f"train.steps={STEPS}", "validation.interval=0", *HEALTH, *LAYOUTS[layout]]
    arguments = overrides(prepared_data, tmp_path, *changes)
    results = run_ranks(poisoned_rank, 2, arguments, victim, (float("nan"), float("inf"), float("-inf")))
    poisoned = results[victim][2]
    say(f"{layout}, rank {victim}: " + ", ".join(f"step {step} {what}" for step, what in poisoned.items()))
    assert [code for code, *_ in results] == [0, 0], results
    assert len(poisoned) > 5 and "the loss" in poisoned.values() and max(poisoned) < STEPS
    expected = [step not in poisoned for step in range(1, STEPS + 1)]
    for rank, (*_, changed) in enumerate(results):
        wrong = [
            f"{step} ({poisoned.get(step)})" for step in range(1, STEPS + 1) if changed[step - 1] != expected[step - 1]
        ]
        assert not wrong, f"rank {rank} at steps {', '.join(wrong)}"
    lines = metrics(tmp_path)
    assert {line["step"] for line in lines if line.get("skipped") == "not finite"} == poisoned.keys()
    assert [line["updated"] for line in lines] == expected
    assert all(line["loss"] is not None for line in lines if line["updated"])
    recipe = load_recipe(SMOKE, arguments)
    sizes = {"global_batch_size": 4, "micro_batch_size": 4, "sequence_length": 256, "vocab_size": 512}
    with TrainLoader(recipe.data, **sizes) as loader:
        for line, batch in zip(lines, loader, strict=False):
            assert line.get("sample_ids") == (batch.ids_B2.tolist() if line["step"] in poisoned else None)
    say(
        f"{len(poisoned)} steps skipped by both ranks, weights and state as before; {sum(expected)} taken; loss "
        f"{lines[0]['loss']:.2f} -> {lines[-1]['loss']:.2f}"
    )
