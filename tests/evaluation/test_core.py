"""CORE: scores against a computation by brute force, example by example; layouts; interruptions; bad bundles."""

import json
import math
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import yaml

from bov_megatron.commands.evaluate import parse_arguments
from bov_megatron.errors import EvaluationError
from bov_megatron.evaluation.core.bundle import read_bundle
from tests.support.core_bundle import TASKS, write_bundle
from tests.support.distributed import run_ranks, warm_context

ROOT = Path(__file__).resolve().parents[2]
ITEMS = 12


@pytest.fixture(scope="module")
def model(exact_export):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(exact_export)
    loaded = AutoModelForCausalLM.from_pretrained(exact_export, trust_remote_code=True, dtype=torch.float32)
    return loaded.eval(), tokenizer


@pytest.fixture(scope="module")
def bundle(model, tmp_path_factory) -> Path:
    def greedy(context: str) -> str | None:
        """The next token of the trained model, where encoding the whole text gives it back."""
        ids = encode(model[1], context)
        ids.append(int(logits(model[0], ids)[-1].argmax()))
        text = model[1].decode(ids[-1:])
        return text if encode(model[1], context + text) == ids else None

    return write_bundle(tmp_path_factory.mktemp("core") / "bundle", ITEMS, greedy)


def encode(tokenizer, text: str) -> list[int]:
    return [tokenizer.bos_token_id, *tokenizer(text, add_special_tokens=False)["input_ids"]]


@torch.no_grad()
def logits(model, ids: list[int]) -> torch.Tensor:
    return model(torch.tensor([ids]), use_cache=False).logits[0].double()


def by_brute_force(model, tokenizer, bundle: Path, normalisation: str) -> dict:
    """`(task, index): (correct, losses)`, from the definition: one sequence at a time, without cache and padding."""
    found = {}
    for label, (kind, shots, delimiter, _) in TASKS.items():
        delimiter = " " if delimiter is None else delimiter
        lines = (bundle / "eval_data/tasks" / f"{label}.jsonl").read_text(encoding="utf-8").splitlines()
        items = [json.loads(line) for line in lines]
        random.Random(1337).shuffle(items)
        for index, item in enumerate(items):
            others = [other for number, other in enumerate(items) if number != index]
            chosen = random.Random(1234 + index).sample(others, shots)
            head = ""
            for shot in chosen:
                if kind == "multiple_choice":
                    head += shot["query"] + delimiter + shot["choices"][shot["gold"]] + "\n\n"
                elif kind == "schema":
                    head += shot["context_options"][shot["gold"]] + delimiter + shot["continuation"] + "\n\n"
                else:
                    head += shot["context"].strip() + delimiter + shot["continuation"] + "\n\n"
            if kind == "multiple_choice":
                prompts = [head + item["query"] + delimiter + choice for choice in item["choices"]]
            elif kind == "schema":
                prompts = [head + context + delimiter + item["continuation"] for context in item["context_options"]]
            else:
                without = head + item["context"].strip() + delimiter
                prompts = [without.strip(), without + item["continuation"]]
            sequences = [encode(tokenizer, prompt) for prompt in prompts]
            if kind == "schema":
                same = 0
                while len({ids[-1 - same] for ids in sequences}) == 1 and same + 1 < min(map(len, sequences)):
                    same += 1
                starts = [len(ids) - same for ids in sequences]
            else:
                same = 0
                while same < min(map(len, sequences)) and len({ids[same] for ids in sequences}) == 1:
                    same += 1
                starts = [same] * len(sequences)
            if kind == "language_modeling":
                sequences, starts = sequences[1:], starts[1:]
            losses, greedy = [], []
            for ids, start in zip(sequences, starts, strict=True):
                start = min(start, len(ids) - 1)
                crop = max(0, len(ids) - model.config.max_position_embeddings)
                ids, start = ids[crop:], max(1, start - crop)
                logprobs = logits(model, ids).log_softmax(-1)
                nats = -sum(float(logprobs[place - 1, ids[place]]) for place in range(start, len(ids)))
                greedy.append(all(int(logprobs[p - 1].argmax()) == ids[p] for p in range(start, len(ids))))
                size = sum(len(raw_bytes(tokenizer, token)) for token in ids[start:])
                losses.append(nats / (size if normalisation == "bytes" else len(ids) - start))
            correct = greedy[0] if kind == "language_modeling" else losses.index(min(losses)) == item["gold"]
            found[label, index] = (correct, losses)
    return found


def raw_bytes(tokenizer, token: int) -> bytes:
    """A byte-level token's bytes, by GPT-2's table of printable characters."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    table = {chr(byte): byte for byte in printable}
    table |= {chr(256 + n): byte for n, byte in enumerate(b for b in range(256) if b not in printable)}
    return bytes(table[character] for character in tokenizer.convert_ids_to_tokens(token))


def evaluate(target: Path, bundle: Path, out: Path, *options) -> tuple[dict, list[dict]]:
    """The report and the examples of a call of the command in this process."""
    from bov_megatron.commands import main

    report, examples = out / "report.json", out / "examples.jsonl"
    call = ["evaluate", target, "--core", bundle, "--json", report, "--examples", examples, "--dtype", "float32"]
    assert main([str(argument) for argument in (*call, *options)]) == 0
    assert not examples.with_name("examples.jsonl.parts").exists()
    return json.loads(report.read_text()), [json.loads(line) for line in examples.read_text().splitlines()]


def evaluate_rank(rank: int, world_size: int, *arguments) -> None:
    from bov_megatron.commands import main

    assert main(["evaluate", *arguments]) == 0


def check_same(lines: list[dict], expected: dict) -> None:
    assert [(line["task"], line["index"]) for line in lines] == list(expected)
    for line in lines:
        correct, losses = expected[line["task"], line["index"]]
        assert line["losses"] == pytest.approx(losses, rel=1e-4), line
        assert line["correct"] == correct, line


@pytest.fixture(scope="module")
def expected(model, bundle):
    return by_brute_force(*model, bundle, "bytes")


@pytest.fixture(scope="module")
def of_export(exact_export, bundle, tmp_path_factory):
    out = tmp_path_factory.mktemp("of_export")
    return evaluate(exact_export, bundle, out)


def test_scores_are_those_of_brute_force(of_export, expected):
    report, lines = of_export
    check_same(lines, expected)
    rights = {label: [correct for (task, _), (correct, _) in expected.items() if task == label] for label in TASKS}
    assert 0 < sum(rights["lambada_openai"]) < ITEMS, "greedy continuations should be right, others wrong"
    for label, right in rights.items():
        accuracy, chance = sum(right) / ITEMS, TASKS[label][3] / 100
        scores = report["tasks"][label]
        assert scores["accuracy"] == pytest.approx(accuracy)
        assert scores["centered"] == pytest.approx((accuracy - chance) / (1 - chance))
        assert scores["standard_error"] == pytest.approx(math.sqrt(accuracy * (1 - accuracy) / (ITEMS - 1)))
    centered = {label: scores["centered"] for label, scores in report["tasks"].items()}
    paper = [value for label, value in centered.items() if label != "hellaswag_zeroshot"]
    assert report["core"] == pytest.approx(sum(paper) / len(paper))
    assert report["core_dclm"] == pytest.approx(sum(centered.values()) / len(centered))
    assert report["normalisation"] == "bytes" and report["baselines"] == "dclm-2025-09-05"
    right = report["tasks"]["commonsense_qa"]["accuracy"]
    other = report["core"] + ((right - 0.2) / 0.8 - centered["commonsense_qa"]) / len(paper)
    assert report["core_by_baselines"]["dclm-original"] == pytest.approx(other)


def test_the_bundle_bites(expected, of_export):
    """Cropping, ties, halves of characters and options that begin one another are among the examples."""
    lines = of_export[1]
    assert any(len(set(line["losses"])) == 1 and line["answer"] == 0 for line in lines if len(line["losses"]) == 3)
    assert any(sum(line["bytes"]) < sum(line["tokens"]) * 1.5 for line in lines)
    assert len({line["correct"] for line in lines}) == 2


def test_per_token_as_dclm(exact_export, bundle, model, expected, tmp_path):
    report, lines = evaluate(exact_export, bundle, tmp_path, "--normalisation", "tokens")
    per_token = by_brute_force(*model, bundle, "tokens")
    check_same(lines, per_token)
    assert report["normalisation"] == "tokens"
    assert any(per_token[key][0] != correct for key, (correct, _) in expected.items()), "both would pass"


@pytest.mark.parametrize(
    "target, world, layout",
    [
        ("export", 2, []),
        ("run", 1, []),
        ("run", 2, []),
        ("run", 2, ["--tensor-parallel", "2"]),
        ("run", 2, ["--pipeline-parallel", "2"]),
        ("run", 4, ["--tensor-parallel", "2"]),
    ],
    ids=["export dp2", "run", "run dp2", "run tp2", "run pp2", "run tp2 dp2"],
)
def test_layouts_agree(trained_run, exact_export, bundle, expected, of_export, tmp_path, target, world, layout):
    folder = exact_export if target == "export" else trained_run
    files = ["--examples", str(tmp_path / "examples.jsonl"), "--json", str(tmp_path / "report.json")]
    call = [str(folder), "--core", str(bundle), "--dtype", "float32", "--batch-size", "7", *files, *layout]
    run_ranks(evaluate_rank, world, *call)
    check_same([json.loads(line) for line in (tmp_path / "examples.jsonl").read_text().splitlines()], expected)
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["tasks"] == of_export[0]["tasks"] and report["core"] == of_export[0]["core"]


def test_ranks_are_started_by_torchrun(exact_export, bundle, of_export, tmp_path):
    """With the exit status and one line for an error, not one per rank."""
    call = [sys.executable, "tools/torchrun.py", "--standalone", "--nproc-per-node", "2", "evaluate", exact_export]
    call += ["--dtype", "float32", "--limit", "3", "--json", tmp_path / "report.json"]

    def run(folder: Path) -> subprocess.CompletedProcess:
        command = [str(word) for word in (*call, "--core", folder)]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)

    done = run(bundle)
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "report.json").read_text())["tasks"]["arc_easy"]["examples"] == 3
    refused = run(tmp_path / "none")
    assert refused.returncode == 2 and "Traceback" not in refused.stderr
    assert refused.stderr.count("error: --core") == 1, refused.stderr


def test_batches_change_nothing(exact_export, bundle, of_export, tmp_path):
    for size in (1, 5):
        (tmp_path / str(size)).mkdir()
        report, lines = evaluate(exact_export, bundle, tmp_path / str(size), "--batch-size", size)
        assert report["tasks"] == of_export[0]["tasks"]
        for line, other in zip(lines, of_export[1], strict=True):
            assert line["losses"] == pytest.approx(other["losses"], rel=1e-4)


def test_killed_at_any_point_it_goes_on(exact_export, bundle, tmp_path):
    """kill -9, in the middle and again; a line that was cut off; the same bytes at the end."""
    calm, hunted = tmp_path / "calm", tmp_path / "hunted"
    calm.mkdir(), hunted.mkdir()
    evaluate(exact_export, bundle, calm, "--batch-size", 3)
    parts = hunted / "examples.jsonl.parts"
    call = [exact_export, "--core", bundle, "--dtype", "float32", "--batch-size", 3]
    call += ["--examples", hunted / "examples.jsonl"]
    context = warm_context()
    scored = 0
    for _ in range(2):
        process = context.Process(target=evaluate_rank, args=(0, 1, *map(str, call)))
        process.start()
        deadline = time.monotonic() + 120
        while lines_of(parts) < scored + 10:
            assert process.is_alive() and time.monotonic() < deadline
            time.sleep(0.005)
        process.kill()
        process.join()
        assert scored + 10 <= (scored := lines_of(parts)) < ITEMS * len(TASKS), "it was done before it was killed"
    with next(parts.glob("*.jsonl")).open("a") as file:
        file.write('{"task": "winograd", "ind')
    evaluate(exact_export, bundle, hunted, "--batch-size", 3)
    assert (hunted / "examples.jsonl").read_bytes() == (calm / "examples.jsonl").read_bytes()


def lines_of(parts: Path) -> int:
    return sum(path.read_text().count("\n") for path in parts.glob("*.jsonl"))


def test_lines_of_another_evaluation_are_not_mixed_in(exact_export, bundle, tmp_path, capsys):
    parts = tmp_path / "examples.jsonl.parts"
    parts.mkdir()
    (parts / "settings.json").write_text(json.dumps({"model": "another"}))
    with pytest.raises(AssertionError):
        evaluate(exact_export, bundle, tmp_path)
    assert "has examples of another evaluation (model another" in capsys.readouterr().err


def test_differences_are_paired(of_export, trained_run, bundle, tmp_path, capsys):
    """Against the run's earlier step; a model against itself has none."""
    import numpy as np

    from bov_megatron.commands import main

    report, lines = of_export
    run_ranks(evaluate_rank, 1, str(trained_run), "--step", "10", "--core", str(bundle), "--dtype", "float32",
              "--json", str(tmp_path / "earlier.json"))  # fmt: skip
    now, earlier = tmp_path / "now.jsonl", tmp_path / "earlier.examples.jsonl"
    now.write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert main(["evaluate", "--compare", str(earlier), str(now), "--json", str(tmp_path / "c.json")]) == 0
    found = json.loads((tmp_path / "c.json").read_text())
    before = [json.loads(line) for line in earlier.read_text().splitlines()]
    gains = np.array([[float(a["correct"]) - float(b["correct"]) for a, b in zip(lines, before, strict=True)]])
    gains = gains.reshape(len(TASKS), ITEMS)
    assert np.abs(gains).sum() > 0
    for row, label in zip(gains, TASKS, strict=True):
        assert found["tasks"][label]["difference"] == pytest.approx(row.mean())
        assert found["tasks"][label]["standard_error"] == pytest.approx(row.std(ddof=1) / math.sqrt(ITEMS))
    assert found["core"]["difference"] == pytest.approx(
        report["core"] - json.loads((tmp_path / "earlier.json").read_text())["core"]
    )
    assert "CORE (centred)" in capsys.readouterr().out
    assert main(["evaluate", "--compare", str(now), str(now), "--json", str(tmp_path / "c.json")]) == 0
    assert json.loads((tmp_path / "c.json").read_text())["core"]["interval"] == [0, 0]
    now.write_text("".join(json.dumps(line) + "\n" for line in lines[:-1]))
    assert main(["evaluate", "--compare", str(earlier), str(now)]) == 2
    assert "not of the same examples" in capsys.readouterr().err


def without(*path: str):
    def spoil(folder: Path):
        thing = folder.joinpath(*path)
        shutil.rmtree(thing) if thing.is_dir() else thing.unlink()

    return spoil


def edited(**fields):
    def spoil(folder: Path):
        listing = yaml.safe_load((folder / "core.yaml").read_text())
        listing["icl_tasks"][0].update(fields)
        (folder / "core.yaml").write_text(yaml.safe_dump(listing))

    return spoil


def written(path: str, text: str):
    return lambda folder: (folder / path).write_text(text)


@pytest.mark.parametrize(
    "spoil, said",
    [
        (without("core.yaml"), "core.yaml is missing; the bundle is that of DCLM"),
        (without("eval_data"), "eval_data is missing"),
        (without("eval_data", "tasks", "winograd.jsonl"), "winograd.jsonl of task winograd is missing"),
        (without("eval_meta_data.csv"), "eval_meta_data.csv is missing"),
        (written("core.yaml", "tasks: []"), "no list `icl_tasks` of tasks"),
        (written("eval_meta_data.csv", "a,b\n1,2\n"), "needs columns 'Eval Task' and 'Random baseline'"),
        (written("eval_meta_data.csv", "Eval Task,Random baseline\narc_easy,25\n"), "no row for commonsense_qa"),
        (written("eval_meta_data.csv", "Eval Task,Random baseline\narc_easy,100\n"), "not a percentage below 100"),
        (edited(icl_task_type="essay"), "icl_task_type 'essay' is none of multiple_choice"),
        (edited(num_fewshot=None), "needs label, dataset_uri, icl_task_type and num_fewshot: [N]"),
        (edited(label="winograd"), "winograd stands in it twice"),
    ],
)
def test_half_bundles_are_refused(bundle, tmp_path, spoil, said):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    spoil(folder)
    with pytest.raises(EvaluationError) as error:
        read_bundle(folder)
    assert said in str(error.value)


def test_as_many_shots_as_items_are_refused(bundle, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    edited(num_fewshot=[ITEMS])(folder)
    with pytest.raises(EvaluationError, match=f"has {ITEMS} items, not more than its {ITEMS} shots"):
        read_bundle(folder)


@pytest.mark.parametrize(
    "line, said",
    [
        ("{", "no JSON object"),
        ('{"query": "a", "gold": 0}', "an item of a multiple_choice task needs query, choices, gold; missing: choices"),
        ('{"query": "a", "choices": ["b"], "gold": 1}', "gold is 1, but must be the number of an option"),
        ('{"query": "a", "choices": "b", "gold": 0}', "choices is 'b', but must be a list of texts"),
        ('{"query": "a", "choices": ["b", 2], "gold": 0}', r"choices is \['b', 2\], but must be a list of texts"),
        ('{"query": 1, "choices": ["b"], "gold": 0}', "query is 1, but must be a text"),
    ],
)
def test_bad_items_are_named(bundle, tmp_path, line, said):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    with (folder / "eval_data/tasks/arc_easy.jsonl").open("a") as file:
        file.write(line + "\n")
    with pytest.raises(EvaluationError, match=f"arc_easy.jsonl:{ITEMS + 1}: {said}"):
        read_bundle(folder)


def test_text_in_another_encoding_is_named(bundle, tmp_path):
    folder = tmp_path / "bundle"
    shutil.copytree(bundle, folder)
    (folder / "eval_data/tasks/jeopardy.jsonl").write_text("naïve", encoding="latin-1")
    with pytest.raises(EvaluationError, match="jeopardy.jsonl is no text in UTF-8"):
        read_bundle(folder)


def test_a_tokenizer_of_another_model_is_named(
    trained_run, exact_export, other_prepared_data, bundle, tmp_path, capsys
):
    from bov_megatron.commands import main

    run, export = tmp_path / "run", tmp_path / "export"
    shutil.copytree(trained_run, run)
    shutil.copytree(other_prepared_data.tokenizer, run / "tokenizer", dirs_exist_ok=True)
    shutil.copytree(exact_export, export)
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(config | {"vocab_size": config["vocab_size"] - 1}))
    for target, tokenizer in ((run, run / "tokenizer"), (export, export)):
        scores = tmp_path / "scores.json"
        assert main(["evaluate", str(target), "--core", str(bundle), "--json", str(scores)]) == 2
        assert f"{tokenizer} is not the tokenizer of {target}" in capsys.readouterr().err
        assert not list(tmp_path.glob("scores*"))


@pytest.mark.parametrize(
    "options, said",
    [
        (["--limit", "0.5"], "--limit 0.5 with --core: a whole number"),
        (["--tasks", "x"], "--core is evaluated alone"),
        (["--num-fewshot", "0"], "--num-fewshot is for --tasks: leave it out"),
        (["--no-bos"], "--no-bos is for --tasks"),
        (["--tensor-parallel", "2", "--device", "cpu"], "--device cannot be chosen where ranks share a model"),
        (["--tensor-parallel", "2"], "ranks don't divide the 1 that were started"),
    ],
)
def test_what_means_nothing_is_refused(exact_export, bundle, capsys, options, said):
    from bov_megatron.commands import main

    try:
        status = main(["evaluate", str(exact_export), "--core", str(bundle), *options])
    except SystemExit as exit:
        status = exit.code
    assert status == 2 and said in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--examples", "x.jsonl"], ["--normalisation", "bytes"]])
def test_what_only_core_takes_is_refused_elsewhere(capsys, option):
    with pytest.raises(SystemExit):
        parse_arguments(["export", "--tasks", "x", *option])
    assert f"{option[0]} is for --core: leave it out" in capsys.readouterr().err
