"""lm-eval's tasks and packed samples on a checkpoint in every layout, against its export on transformers."""

import json

import pytest

from bov_megatron.evaluation.bits_per_byte import write_rolling_task
from tests.evaluation.test_bits_per_byte import held_out_documents
from tests.evaluation.test_lm_eval_tasks import write_tasks
from tests.support.distributed import run_ranks

TASKS = ["local_choice", "local_ending", "local_generation", "held_out"]


@pytest.fixture(scope="module")
def tasks_dir(exact_export, prepared_data, tmp_path_factory):
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("tasks")
    model = AutoModelForCausalLM.from_pretrained(exact_export, trust_remote_code=True, dtype=torch.float32).eval()
    write_tasks(folder, exact_export, model)
    # Longer than the model's context, so that texts are cut into windows.
    write_rolling_task(held_out_documents(), exact_export, 700, folder, max_windows=5)
    return folder


def arguments(target, tasks_dir, prepared_data, out) -> list[str]:
    tasks = ["--tasks", *TASKS, "--tasks-dir", tasks_dir, "--offline", "--dtype", "float32", "--batch-size", 3]
    return [
        str(item) for item in (target, *tasks, "--packed", prepared_data.folder / "val", "--limit", 7, "--json", out)
    ]


def evaluate_rank(rank: int, world_size: int, *command) -> None:
    from bov_megatron.commands import main

    assert main(["evaluate", *command]) == 0


@pytest.fixture(scope="module")
def expected(exact_export, tasks_dir, prepared_data, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("expected") / "scores.json"
    run_ranks(evaluate_rank, 1, *arguments(exact_export, tasks_dir, prepared_data, out))
    return json.loads(out.read_text())


@pytest.mark.parametrize(
    "world, layout",
    [(2, ["--tensor-parallel", "2"]), (2, ["--pipeline-parallel", "2"]), (2, []), (4, ["--tensor-parallel", "2"])],
    ids=["tp2", "pp2", "dp2", "tp2 dp2"],
)
def test_scores_are_those_of_the_export(trained_run, tasks_dir, prepared_data, expected, tmp_path, world, layout):
    out = tmp_path / "scores.json"
    run_ranks(evaluate_rank, world, *arguments(trained_run, tasks_dir, prepared_data, out), *layout)
    found = json.loads(out.read_text())
    assert found["scores"].keys() == {*TASKS, "packed"}
    assert found["samples"] == expected["samples"]
    for task, metrics in expected["scores"].items():
        assert found["scores"][task] == pytest.approx(metrics, rel=1e-5), task
    assert 0 < expected["scores"]["local_generation"]["exact_match"] < 1
