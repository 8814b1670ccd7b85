"""lm-eval on an export, on local YAML tasks, against the plain model."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from bov_megatron.commands import main
from bov_megatron.data.tokenizer import load_bytes_per_token, load_encoder
from bov_megatron.errors import EvaluationError
from bov_megatron.evaluation.bits_per_byte import score_samples, write_rolling_task
from bov_megatron.evaluation.lm_eval_tasks import as_lm_eval_model, find_tasks, load_tasks
from tests.evaluation.conftest import SEQUENCE_LENGTH
from tests.evaluation.test_bits_per_byte import held_out_documents


def write_task(folder, name, rows, output_type, metrics, **fields):
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": name,
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(folder / f"{name}.jsonl")}},
        "test_split": "test",
        "output_type": output_type,
        "metric_list": [{"metric": metric} for metric in metrics],
        **fields,
    }
    (folder / f"{name}.yaml").write_text(yaml.safe_dump(task))


WORDS = ["return", "import", "class", "while", "self", "None", "lambda", "yield"]
CHOICES = [
    {"query": f"def {word}(", "choices": [WORDS[i - 1], WORDS[i - 3], word], "gold": i % 3}
    for i, word in enumerate(WORDS)
]
ENDINGS = [{"query": f"the {word} of", "ending": WORDS[i - 1]} for i, word in enumerate(WORDS)]


@pytest.fixture(scope="module")
def tasks_dir(tmp_path_factory, exported):
    return write_tasks(tmp_path_factory.mktemp("tasks"), *exported)


def write_tasks(folder, export, model):
    """A task of every kind of request but rolling ones."""
    choice = {"doc_to_text": "{{query}}", "doc_to_choice": "{{choices}}", "doc_to_target": "gold"}
    write_task(folder, "local_choice", CHOICES, "multiple_choice", ["acc"], **choice)
    ending = {"doc_to_text": "{{query}}", "doc_to_target": " {{ending}}"}
    write_task(folder, "local_ending", ENDINGS, "loglikelihood", ["perplexity"], **ending)
    # Every second answer is what the plain model says to this prompt alone.
    rows = [
        {"query": row["query"], "answer": greedy(export, model, row["query"]) if i % 2 else "\n"}
        for i, row in enumerate(ENDINGS)
    ]
    generation = {"doc_to_text": "{{query}}", "doc_to_target": "answer"}
    generation["generation_kwargs"] = {"until": ["\n\n"], "max_gen_toks": 5, "do_sample": False}
    write_task(folder, "local_generation", rows, "generate_until", ["exact_match"], **generation)
    return folder


def greedy(folder, model, prompt):
    """Five tokens by repeated forward passes, without cache or `generate`."""
    encoder = load_encoder(folder)
    ids = [encoder.bos_token_id, *encoder.encode([prompt])[0].tolist()]
    start = len(ids)
    with torch.no_grad():
        while len(ids) < start + 5 and ids[-1] != encoder.bos_token_id or len(ids) == start:
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
    return encoder.fast.decode(ids[start:]).split("\n\n")[0]


def log_likelihood(model, encoder, context, continuation):
    """ln p of the continuation after `<|bos|>` and the context, split as the joint encoding splits."""
    whole, before = (ids.tolist() for ids in encoder.encode([context + continuation, context]))
    ids = torch.tensor([[encoder.bos_token_id, *whole]])
    with torch.no_grad():
        logprobs = torch.log_softmax(model(ids[:, :-1]).logits[0].double(), -1)
    return sum(float(logprobs[i, whole[i]]) for i in range(len(before), len(whole)))


def test_local_tasks_agree_with_the_plain_model(exported, tasks_dir):
    folder, model = exported
    encoder = load_encoder(folder)
    names = ["local_choice", "local_ending", "local_generation"]
    found = load_tasks(names, tasks_dir).run(as_lm_eval_model(model, folder, batch_size=4, bos=True))["scores"]

    right = 0
    for row in CHOICES:
        likelihoods = [log_likelihood(model, encoder, row["query"], " " + choice) for choice in row["choices"]]
        right += likelihoods.index(max(likelihoods)) == row["gold"]
    assert found["local_choice"]["acc"] == pytest.approx(right / len(CHOICES))
    mean = sum(log_likelihood(model, encoder, row["query"], " " + row["ending"]) for row in ENDINGS) / len(ENDINGS)
    assert found["local_ending"]["perplexity"] == pytest.approx(torch.tensor(-mean).exp().item(), rel=1e-4)
    assert found["local_generation"]["exact_match"] == 0.5


def test_rolling_task_equals_the_trainers_definition(exported, tmp_path):
    """Through the command line: bits per byte of lm-eval, and of the same windows as samples."""
    folder, model = exported
    task = write_rolling_task(
        [*held_out_documents(), "a <|bos|> inside", "“ü€𝄞”" * 40], folder, SEQUENCE_LENGTH, tmp_path
    )
    output = tmp_path / "results" / "scores.json"
    arguments = [str(folder), "--tasks", task.name, "--tasks-dir", str(task.tasks_dir), "--json", str(output)]
    assert main(["evaluate", *arguments, "--device", "cpu"]) == 0
    report = json.loads(output.read_text())
    ours = score_samples(model, task.samples, load_bytes_per_token(folder))
    assert report["scores"]["held_out"]["bits_per_byte"] == pytest.approx(ours.value, rel=1e-6)
    assert report["samples"]["held_out"] == len(task.samples)


def test_only_scores_are_printed(exported, tasks_dir, capfd):
    """No progress bars, log lines or prints of lm-eval, datasets or transformers."""
    folder, _ = exported
    names = "local_choice,local_ending,local_generation"
    assert main(["evaluate", str(folder), "--tasks", names, "--tasks-dir", str(tasks_dir), "--device", "cpu"]) == 0
    out, err = capfd.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == names.split(",")
    assert err == ""


def test_a_task_without_its_data_is_one_line(exported, tmp_path, capfd, monkeypatch):
    import datasets
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    write_task(tmp_path, "remote", [], "loglikelihood", ["acc"], dataset_path="some/data-set", dataset_kwargs={})
    assert main(["evaluate", str(exported[0]), "--tasks", "remote", "--tasks-dir", str(tmp_path)]) == 2
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("error: --tasks remote could not be loaded (") and err.count("\n") == 1
    assert "some/data-set" in err and "--tasks-dir" in err


def test_unknown_tasks_are_refused_with_the_nearest_name(tasks_dir, tmp_path, monkeypatch):
    """Of lm-eval's own tasks, a few: to index all takes half a minute."""
    from lm_eval.tasks import manager

    own = Path(manager.__file__).parent
    for folder in ("hellaswag", "arc"):
        shutil.copytree(own / folder, tmp_path / folder)
    monkeypatch.setattr(manager, "__file__", str(tmp_path / "manager.py"))
    with pytest.raises(EvaluationError, match=r"--tasks hellaswagg: neither a local .* did you mean hellaswag\?"):
        find_tasks(["local_choice", "hellaswagg"], tasks_dir)


def test_unknown_places_are_refused(tmp_path):
    with pytest.raises(EvaluationError, match="is not a folder"):
        find_tasks(["x"], tmp_path / "none")
    with pytest.raises(EvaluationError, match="no such file"):
        find_tasks([str(tmp_path / "none.yaml")], None)
    with pytest.raises(EvaluationError, match="names no task"):
        find_tasks([], None)
