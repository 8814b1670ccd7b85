"""What TensorBoard shows of a run is metrics.jsonl, each step once, also after a crash."""

import os

from tests.support.distributed import run_ranks
from tests.support.runs import SMOKE, metrics, overrides, train


def dying_rank(rank, world_size, arguments, after_step):
    """The run, which is killed after a later step than the last saved one."""
    import signal

    from bov_megatron import train
    from bov_megatron.engines.megatron import MegatronEngine

    forward_backward, steps = MegatronEngine.forward_backward, []

    def dying(self, micro_batches):
        steps.append(1)
        if len(steps) > after_step:
            os.kill(os.getpid(), signal.SIGKILL)
        return forward_backward(self, micro_batches)

    MegatronEngine.forward_backward = dying
    train.main([SMOKE, *arguments])


def shown(folder) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by tag, as TensorBoard itself reads a folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    return {tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_killed_run_shows_each_step_once(prepared_data, tmp_path):
    arguments = overrides(
        prepared_data, tmp_path / "run", "logging.tensorboard=true", 'validation.prompts=["def"]',
        "validation.prompt_tokens=3",
    )  # fmt: skip
    try:
        run_ranks(dying_rank, 1, arguments, 5)
    except AssertionError as killed:
        assert "exit codes [-9]" in str(killed)
    assert [step for step, _ in shown(tmp_path / "run/tensorboard")["loss"]] == [1, 2, 3, 4, 5]
    train(1, arguments)
    lines, found = metrics(tmp_path / "run"), shown(tmp_path / "run/tensorboard")
    assert [line["step"] for line in lines] == list(range(1, 9))
    for key in ("loss", "gradient_norm", "learning_rate/matrix", "validation_bits_per_byte", "tokens"):
        wanted = [(line["step"], line[key]) for line in lines if key in line]
        assert [step for step, _ in found[key]] == [step for step, _ in wanted], key
        assert all(abs(a - b) <= 1e-6 * abs(b) for (_, a), (_, b) in zip(found[key], wanted, strict=True)), key


def test_nothing_is_written_unless_asked_for(prepared_data, tmp_path):
    train(1, overrides(prepared_data, tmp_path / "run", "train.steps=1"))
    assert not (tmp_path / "run/tensorboard").exists()
