"""Scores during training: those of `bov evaluate`, in every layout, and training is as without them."""

import contextlib
import io
import json
import os
import signal
import sysconfig
from pathlib import Path

import pytest

from bov_megatron.lifecycle.run_folder import checkpoint_path
from tests.evaluation.test_lm_eval_tasks import CHOICES, ENDINGS, write_task
from tests.support.core_bundle import TASKS, write_bundle
from tests.support.distributed import run_ranks
from tests.support.runs import SMOKE, launch, metrics, overrides, train
from tests.support.wandb_files import logged
from tests.training.test_tensorboard import shown

TRAINING = ["train.steps=4", "validation.interval=0", "model.num_layers=4", "checkpoint.interval=2"]
LAYOUTS = {
    "tp2-cp2": (4, "parallel.tensor_model_parallel_size=2", "parallel.context_parallel_size=2",
                "parallel.sequence_parallel=true"),
    "pp2-interleaved-dp2": (4, "parallel.pipeline_model_parallel_size=2",
                            "parallel.virtual_pipeline_model_parallel_size=2", "parallel.overlap_param_gather=true"),
}  # fmt: skip
ZERO_3 = (2, "engine=deepspeed", "optimizer.name=adamw", "deepspeed.zero_stage=3")


@pytest.fixture(scope="module")
def other_domain(prepared_data, tmp_path_factory) -> Path:
    """Held-out text of another kind, of the same tokenizer."""
    from bov_megatron.data.prepare import PrepareOptions, prepare_data

    library, folder = Path(sysconfig.get_paths()["stdlib"]), tmp_path_factory.mktemp("other_domain") / "data"
    options = PrepareOptions(
        [str(library / "zoneinfo")], str(prepared_data.tokenizer), str(folder),
        sequence_length=prepared_data.sequence_length, validation=[str(library / "tomllib")], workers=1,
    )  # fmt: skip
    prepare_data(options, progress=False)
    return folder


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("tasks")
    choice = {"doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}", "doc_to_target": "gold", "num_fewshot": 1}
    write_task(folder, "choice", CHOICES, "multiple_choice", ["acc"], **choice)
    ending = {"doc_to_text": "{{query}}", "doc_to_target": " {{ending}}"}
    write_task(folder, "ending", ENDINGS, "loglikelihood", ["perplexity"], **ending)
    generation = {"max_gen_toks": 3, "do_sample": False}
    write_task(folder, "generation", ENDINGS, "generate_until", ["exact_match"], **ending, generation_kwargs=generation)
    return folder


@pytest.fixture(scope="module")
def bundle(tmp_path_factory) -> Path:
    return write_bundle(tmp_path_factory.mktemp("core") / "bundle", 8)


@pytest.fixture(scope="module")
def evaluating(prepared_data, other_domain, tasks_dir, bundle) -> list[str]:
    held_out = [{"name": "wsgi", "path": str(prepared_data.folder)}, {"name": "toml", "path": str(other_domain)}]
    return [
        *("evaluation.every=2", "evaluation.time_share=1", f"evaluation.held_out={json.dumps(held_out)}"),
        *("evaluation.tasks=[choice, ending]", f"evaluation.tasks_dir={tasks_dir}", f"evaluation.core={bundle}"),
        *("evaluation.limit=6", "evaluation.batch_size=7", "evaluation.tokens=2560"),
    ]


@pytest.fixture(scope="module")
def plain_run(prepared_data, evaluating, tmp_path_factory) -> Path:
    """On one process."""
    run = tmp_path_factory.mktemp("plain") / "run"
    said = train(1, overrides(prepared_data, run, *TRAINING, *evaluating, "logging.tensorboard=true",
                              "logging.wandb=offline"))  # fmt: skip
    assert "step 2: bits_per_byte/wsgi " in said and "choice/acc " in said and "core " in said
    return run


@pytest.fixture(scope="module")
def dp2_run(prepared_data, evaluating, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("dp2") / "run"
    train(2, overrides(prepared_data, run, *TRAINING, *evaluating))
    return run


def scores(line: dict) -> dict[str, float]:
    return {name: value for name, value in line.items() if name.startswith("evaluation/")}


def without_scores(lines: list[dict]) -> list[dict]:
    return [{name: value for name, value in line.items() if not name.startswith("evaluation/")} for line in lines]


def evaluate_rank(rank: int, world_size: int, commands: list[list[str]]) -> None:
    from bov_megatron.commands import main

    for command in commands:
        assert main(["evaluate", *map(str, command), "--dtype", "float32"]) == 0


def test_scores_are_those_of_the_checkpoint(plain_run, prepared_data, other_domain, tasks_dir, bundle, tmp_path):
    """Of step 2 and of step 4, with transformers: the same numbers, so a second evaluation is as the first."""
    checkpoint, commands = plain_run, []
    for step in (2, 4):
        checkpoint = checkpoint_path(plain_run, step)
        packed = [checkpoint, "--packed", other_domain / "val", "--limit", 10, "--json", tmp_path / f"packed{step}"]
        tasks = [checkpoint, "--tasks", "choice", "ending", "--tasks-dir", tasks_dir, "--limit", 6]
        core = [checkpoint, "--core", bundle, "--limit", 6, "--json", tmp_path / f"core{step}"]
        commands += [packed, [*tasks, "--json", tmp_path / f"tasks{step}"], core]
    run_ranks(evaluate_rank, 1, commands)
    lines = {line["step"]: scores(line) for line in metrics(plain_run)}
    assert [step for step in lines if lines[step]] == [2, 4]
    for step in (2, 4):
        found = lines[step]
        packed, tasks, core = (
            json.loads((tmp_path / f"{kind}{step}").read_text()) for kind in ("packed", "tasks", "core")
        )
        bits = packed["scores"]["packed"]["bits_per_byte"]
        assert found.pop("evaluation/bits_per_byte/toml") == pytest.approx(bits, rel=1e-5)
        assert found.pop("evaluation/bits_per_byte/wsgi") > 0
        assert found.pop("evaluation/core") == pytest.approx(core["core"])
        for label in TASKS:
            assert found.pop(f"evaluation/core/{label}") == pytest.approx(core["tasks"][label]["centered"]), label
        expected = {
            f"evaluation/{task}/{metric}": pytest.approx(value, rel=1e-4)
            for task, values in tasks["scores"].items()
            for metric, value in values.items()
            if metric != "perplexity_stderr"  # drawn
        }
        assert {name: value for name, value in found.items() if "perplexity_stderr" not in name} == expected
    assert lines[2]["evaluation/ending/perplexity"] != lines[4]["evaluation/ending/perplexity"]


def test_training_is_as_without_evaluations(plain_run, prepared_data, tmp_path):
    train(1, overrides(prepared_data, tmp_path / "run", *TRAINING))
    assert metrics(tmp_path / "run") == without_scores(metrics(plain_run))


@pytest.mark.parametrize("name", LAYOUTS)
def test_layouts_agree(plain_run, prepared_data, evaluating, tmp_path, name):
    world_size, *layout = LAYOUTS[name]
    train(world_size, overrides(prepared_data, tmp_path / "run", *TRAINING, *evaluating, *layout))
    check_close(metrics(tmp_path / "run"), metrics(plain_run))


def test_two_replicas_agree(plain_run, dp2_run):
    check_close(metrics(dp2_run), metrics(plain_run))


def test_zero_3_agrees(prepared_data, evaluating, tmp_path):
    """All ranks gather the weights of each forward pass: none may do one alone."""
    short = [*TRAINING, *evaluating, "train.steps=2", "optimizer.name=adamw"]
    train(1, overrides(prepared_data, tmp_path / "one", *short))
    world_size, *layout = ZERO_3
    train(world_size, overrides(prepared_data, tmp_path / "run", *short, *layout))
    check_close(metrics(tmp_path / "run"), metrics(tmp_path / "one"))


def check_close(found: list[dict], expected: list[dict]) -> None:
    """Later than step 2, weights have gone apart by rounding so far that an answer on the edge may change."""
    assert len(found) == len(expected) and scores(found[1]) and scores(found[-1])
    assert scores(found[1]) == pytest.approx(scores(expected[1]), rel=1e-3)
    for name in ("evaluation/bits_per_byte/wsgi", "evaluation/bits_per_byte/toml"):
        assert found[-1][name] == pytest.approx(expected[-1][name], rel=1e-3)


def stopped_rank(rank: int, world_size: int, arguments: list[str], at_call: int) -> tuple[int, str]:
    """The run, whose last rank alone is sent SIGUSR1 in the `at_call`-th forward pass over tasks."""
    from bov_megatron import train as command
    from bov_megatron.engines.base import Engine

    calls, original = [], Engine.token_scores

    def signalling(self, *arguments):
        calls.append(1)
        if len(calls) == at_call and rank == world_size - 1:
            os.kill(os.getpid(), signal.SIGUSR1)
        return original(self, *arguments)

    Engine.token_scores = signalling
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        code = command.main([SMOKE, *arguments])
    assert len(calls) == at_call, "it went on"
    return code, stderr.getvalue()


@pytest.mark.parametrize("at_call", [2, 9], ids=["in lm-eval's tasks", "in CORE's"])
def test_an_interrupted_evaluation_is_made_up_for(dp2_run, prepared_data, evaluating, tmp_path, at_call):
    """The one after step 2: the same lines in the end, and none is done twice."""
    arguments = overrides(prepared_data, tmp_path / "run", *TRAINING, *evaluating)
    stopped = run_ranks(stopped_rank, 2, arguments, at_call)
    assert [code for code, _ in stopped] == [143, 143], stopped
    assert [scores(line) for line in metrics(tmp_path / "run")] == [{}, {}]
    train(2, arguments)
    again = metrics(tmp_path / "run")
    assert [(line["step"], "loss" in line, bool(scores(line))) for line in again] == [
        *((1, True, False), (2, True, False), (2, False, True)),
        *((3, True, False), (4, True, True)),
    ]
    assert [scores(line) for line in again if scores(line)] == [scores(line) for line in metrics(dp2_run)[1::2]]
    assert "is finished" in train(2, arguments)
    assert metrics(tmp_path / "run") == again


def test_evaluations_are_spaced(prepared_data, evaluating, tmp_path):
    """Due after every step, and allowed a ten-thousandth of the time: after the first, and at the end."""
    spaced = overrides(prepared_data, tmp_path / "run", *TRAINING, *evaluating, "evaluation.every=1",
                       "evaluation.time_share=0.0001", "evaluation.core=null")  # fmt: skip
    said = train(2, spaced)
    assert [line["step"] for line in metrics(tmp_path / "run") if scores(line)] == [1, 4]
    assert said.count("no evaluation for another") == 2 and "(evaluation.time_share=0.0001)" in said


@pytest.mark.parametrize(
    "change, said",
    [
        ("held_out=[{name: a, path: /nowhere}]", "evaluation.held_out[0] (a): "),
        ("held_out=[{name: a, path: OTHER}]", "evaluation.held_out[0] (a): OTHER was made with tokenizer"),
        ("held_out=[{name: a}]", "evaluation.held_out[0].path is empty"),
        ("held_out=[{name: a, path: x}, {name: a, path: y}]", "evaluation.held_out[1].name='a': must be a name of its"),
        ("held_out=[{name: a/b, path: x}]", "evaluation.held_out[0].name='a/b'"),
        ("tasks_dir=/nowhere", "evaluation.tasks_dir=/nowhere is not a folder"),
        ("tasks=[none.yaml]", "evaluation.tasks=none.yaml: no such file"),
        ("tasks=[]", "evaluation.tasks_dir="),
        ("core=/nowhere", "evaluation.core=/nowhere: core.yaml is missing; the bundle is that of DCLM"),
        ("core_tasks=[arc_eazy]", "evaluation.core_tasks: 'arc_eazy' is not in the bundle; did you mean 'arc_easy'?"),
        ("core=null evaluation.core_tasks=[arc_easy]", "set evaluation.core, the folder of their bundle"),
        ("time_share=0", "evaluation.time_share=0.0: must be greater than 0"),
        ("tokens=100", "evaluation.tokens=100: must be at least 256"),
        ("tasks=[generation] engine=deepspeed optimizer.name=adamw deepspeed.zero_stage=3", "use another stage"),
        ("held_out=[] evaluation.core=null evaluation.tasks=[] evaluation.tasks_dir=null", "there is nothing to evalu"),
    ],
)
def test_bad_input_is_refused_before_training(
    prepared_data, other_prepared_data, evaluating, tmp_path, change, said, capfd
):
    """By --check, which opens the same suite as a start."""
    from bov_megatron import train as command

    other = str(other_prepared_data.folder)
    changes = f"evaluation.{change}".replace("OTHER", other)
    parts = split_overrides(changes)
    arguments = overrides(prepared_data, tmp_path / "run", *TRAINING, *evaluating, *parts)
    assert command.main([SMOKE, *arguments, "--check"]) == 2
    assert said.replace("OTHER", other) in "".join(capfd.readouterr())


def split_overrides(text: str) -> list[str]:
    """At spaces before `field=`."""
    import re

    return re.split(r" (?=[a-z_.]+=)", text)


def test_a_start_refuses_it_too(prepared_data, evaluating, tmp_path):
    wrong = overrides(prepared_data, tmp_path / "run", *TRAINING, *evaluating, "evaluation.core=/nowhere")
    results = launch(2, wrong)
    assert [code for code, _ in results] == [2, 2]
    assert results[0][1].splitlines()[-1].startswith("error: evaluation.core=/nowhere: core.yaml is missing")


def test_what_a_check_says(prepared_data, evaluating, tmp_path, capfd):
    from bov_megatron import train as command

    assert command.main([SMOKE, *overrides(prepared_data, tmp_path / "run", *TRAINING, *evaluating), "--check"]) == 0
    said = capfd.readouterr().out
    assert "to evaluate: held-out sets wsgi, toml; lm-eval tasks choice, ending; 7 tasks of CORE" in said


def test_all_fields_reach_tensorboard(plain_run):
    found: dict[int, dict[str, float]] = {}
    for name, series in shown(plain_run / "tensorboard").items():
        for step, value in series:
            found.setdefault(step, {})[name] = value
    lines = metrics(plain_run)
    assert list(found) == [line["step"] for line in lines] == [1, 2, 3, 4]
    for line in lines:  # fp32 there
        assert scores(found[line["step"]]) == pytest.approx(scores(line), rel=1e-6, nan_ok=True)


def test_all_fields_reach_wandb(plain_run):
    """In the file of an offline run, by wandb's own library."""
    lines = metrics(plain_run)
    found = logged(plain_run)
    assert [line["_step"] for line in found] == [line["step"] for line in lines] == [1, 2, 3, 4]
    for line, expected in zip(found, lines, strict=True):
        assert scores(line) == pytest.approx(scores(expected), nan_ok=True)
        assert line["loss"] == expected["loss"]
    assert len(scores(found[1])) > len(TASKS) and "evaluation_seconds" in found[1]


def test_a_recorded_evaluation_has_the_same_scores(plain_run, tmp_path):
    """What slurm/evaluate.sh does with the checkpoint of a step, here split over two ranks."""
    commands = [[checkpoint_path(plain_run, 2), "--record", "--tensor-parallel", "2"]]
    run_ranks(evaluate_rank, 2, commands)
    found = json.loads((plain_run / "evaluations" / "step_00000002.json").read_text())
    line = metrics(plain_run)[1]
    assert (found["step"], found["tokens"]) == (line["step"], line["tokens"])
    assert scores(found) == pytest.approx(scores(line), rel=1e-4)
