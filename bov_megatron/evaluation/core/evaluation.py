"""Scoring a bundle: batches, what is kept of every example, going on after an interruption, and the report."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TextIO

import numpy as np

from bov_megatron.data.files import write_atomically
from bov_megatron.data.tokenizer import Encoder, bytes_per_token
from bov_megatron.errors import EvaluationError
from bov_megatron.evaluation.core.bundle import BASELINES, NOT_IN_CORE, Bundle, Task
from bov_megatron.evaluation.core.prompts import Question, questions
from bov_megatron.evaluation.core.scorers import OptionScore, Scorer

Normalisation = Literal["bytes", "tokens"]
CHUNK = 128
"""Items that are tokenized together, put into batches by length, and given to one data-parallel rank."""


@dataclass(frozen=True)
class Place:
    """This process among those that share the evaluation."""

    data_rank: int = 0
    data_size: int = 1
    keeps: bool = True
    """Whether it writes examples: one rank of each model replica."""
    wait: Callable[[], object] = lambda: None
    """Returns when all processes have called it."""


def score_bundle(
    scorer: Scorer,
    encoder: Encoder,
    bundle: Bundle,
    examples: Path,
    *,
    model: str,
    context: int,
    normalisation: Normalisation = "bytes",
    limit: int | None = None,
    batch_size: int,
    place: Place | None = None,
    on_progress: Callable[[int], object] = lambda items: None,
) -> list[dict[str, Any]]:
    """Score every item of the bundle's tasks; collective over the processes of `place`.

    Lines are appended to files in the folder `<examples>.parts`, and become `examples` at the end. The same call after
    an interruption goes on there, on any number of processes; batches are the same then, and so are results.

    Args:
        examples: JSONL to be written; see `example` for its fields.
        model: names what is scored; with another one, lines that lie there are refused.
        context: longest sequence, in tokens.
        limit: items per task.
        batch_size: sequences in a forward pass.
        on_progress: called with the number of this rank's items that have been scored, or were before.

    Returns the lines of `examples`, by task and index, on the process that writes them; elsewhere nothing. Raises
    EvaluationError.
    """
    place = place or Place()
    parts = examples.with_name(examples.name + ".parts")
    settings = {
        "model": model, "bundle": bundle.digest, "normalisation": normalisation, "limit": limit,
        "batch_size": batch_size,
    }  # fmt: skip
    done = _open_parts(parts, settings)
    place.wait()  # no rank may write before all have seen the same
    sizes = bytes_per_token(encoder)
    with _new_part(parts, place.data_rank) if place.keeps else nullcontext() as out:
        for task, items, indices in _own_chunks(bundle.tasks, limit, place):
            for batch in batches(list(questions(task, items, indices, encoder, context)), batch_size):
                if not all((question.task.label, question.index) in done for question in batch):
                    scores = scorer.score(batch)
                    _write(out, [example(q, s, sizes, normalisation) for q, s in zip(batch, scores, strict=True)])
                on_progress(len(batch))
    place.wait()
    if not place.keeps or place.data_rank > 0:
        return []
    order = {task.label: number for number, task in enumerate(bundle.tasks)}
    lines = sorted(_read_parts(parts).values(), key=lambda line: (order[line["task"]], line["index"]))
    write_atomically(examples, "".join(json.dumps(line) + "\n" for line in lines).encode())
    shutil.rmtree(parts)
    return lines


def _own_chunks(
    tasks: Sequence[Task], limit: int | None, place: Place
) -> Iterator[tuple[Task, list[dict[str, Any]], range]]:
    """A task, all its items, and the indices of a chunk: of all chunks, each `data_size`-th."""
    number = 0
    for task in tasks:
        items = task.read_items()
        for chunk in _chunks(len(items) if limit is None else min(limit, len(items))):
            if number % place.data_size == place.data_rank:
                yield task, items, chunk
            number += 1


def _chunks(count: int) -> Iterator[range]:
    for first in range(0, count, CHUNK):
        yield range(first, min(first + CHUNK, count))


def batches(asked: Sequence[Question], batch_size: int) -> Iterator[list[Question]]:
    """Questions of about the same length together, at most `batch_size` options unless one question has more."""
    batch: list[Question] = []
    for question in sorted(asked, key=lambda question: -max(len(option.ids) for option in question.options)):
        if batch and sum(len(q.options) for q in [*batch, question]) > batch_size:
            yield batch
            batch = []
        batch.append(question)
    if batch:
        yield batch


def example(
    question: Question, scores: Sequence[OptionScore], sizes: np.ndarray, normalisation: Normalisation
) -> dict[str, Any]:
    """What is known of an item once its options are scored; `sizes` are the bytes of each token id."""
    tokens = [len(option.scored) for option in question.options]
    lengths = [int(sizes[option.scored].sum()) for option in question.options]
    divisors = lengths if normalisation == "bytes" else tokens
    losses = [score.nats / max(divisor, 1) for score, divisor in zip(scores, divisors, strict=True)]
    if question.gold is None:
        answer: int | None = None
        correct = scores[0].is_greedy
    else:
        answer = losses.index(min(losses))
        correct = answer == question.gold
    return {
        "task": question.task.label, "index": question.index, "correct": correct, "losses": losses, "answer": answer,
        "gold": question.gold, "tokens": tokens, "bytes": lengths, "baseline": question.task.baseline,
    }  # fmt: skip


# What is kept while an evaluation is under way.


def _open_parts(parts: Path, settings: dict[str, Any]) -> set[tuple[str, int]]:
    """Make the folder, or read which items were scored before. Raises EvaluationError where it is of another
    evaluation."""
    parts.mkdir(parents=True, exist_ok=True)
    file = parts / "settings.json"
    try:
        found = json.loads(file.read_text())
    except FileNotFoundError:
        write_atomically(file, json.dumps(settings).encode())
        return set()
    if differing := [name for name, value in settings.items() if found.get(name) != value]:
        name = differing[0]
        raise EvaluationError(
            f"{parts} has examples of another evaluation ({name} {found.get(name)}, not {settings[name]}): finish that "
            "one, remove the folder, or name another file with --examples"
        )
    return set(_read_parts(parts))


def _new_part(parts: Path, data_rank: int) -> TextIO:
    number = 0
    while True:
        try:
            return (parts / f"{data_rank}-{number}.jsonl").open("x")
        except FileExistsError:
            number += 1


def _write(out: TextIO | None, lines: Sequence[dict[str, Any]]) -> None:
    if out:
        out.write("".join(json.dumps(line) + "\n" for line in lines))
        out.flush()


def _read_parts(parts: Path) -> dict[tuple[str, int], dict[str, Any]]:
    found = {}
    for path in parts.glob("*.jsonl"):
        for line in path.read_text().splitlines(keepends=True):
            if line.endswith("\n"):  # else a process was killed while it wrote
                example = json.loads(line)
                found[example["task"], example["index"]] = example
    return found


# The report.


def summarize(lines: Sequence[dict[str, Any]], bundle: Bundle, normalisation: Normalisation) -> dict[str, Any]:
    """Accuracies, centred accuracies and their standard errors by task; their means; the same under other baselines."""
    right: dict[str, list[bool]] = {task.label: [] for task in bundle.tasks}
    for line in lines:
        right[line["task"]].append(line["correct"])
    tasks = {task.label: task_scores(task, sum(right[task.label]), len(right[task.label])) for task in bundle.tasks}
    report: dict[str, Any] = {
        **mean_scores(tasks),
        "normalisation": normalisation,
        "baselines": bundle.baselines,
        "core_by_baselines": {bundle.baselines: mean_scores(tasks)["core"]},
        "tasks": tasks,
    }
    for name in BASELINES:
        if name != bundle.baselines:
            other = {
                task.label: task_scores(task, sum(right[task.label]), len(right[task.label]))
                for task in bundle.under_baselines(name)
            }
            report["core_by_baselines"][name] = mean_scores(other)["core"]
    return report


def task_scores(task: Task, right: int, count: int) -> dict[str, Any]:
    """Scores of a task, of whose `count` items `right` were answered right."""
    accuracy = right / count
    error = math.sqrt(accuracy * (1 - accuracy) / (count - 1)) if count > 1 else math.nan
    return {
        "accuracy": accuracy, "centered": task.centered(accuracy), "standard_error": error,
        "centered_standard_error": error / (1 - task.baseline), "examples": count, "kind": task.kind,
        "shots": task.shots, "baseline": task.baseline,
    }  # fmt: skip


def mean_scores(tasks: dict[str, dict[str, Any]]) -> dict[str, float]:
    """CORE, the mean of the paper's tasks, and its standard error from the items that were drawn: what another seed of
    training would change is not in it. With HellaSwag at 0 shots, DCLM's mean of 22 as well."""
    means = {}
    for name, labels in (("core", [label for label in tasks if label != NOT_IN_CORE]), ("core_dclm", list(tasks))):
        if name == "core" or NOT_IN_CORE in tasks:
            means[name] = sum(tasks[label]["centered"] for label in labels) / len(labels)
            squares = sum(tasks[label]["centered_standard_error"] ** 2 for label in labels)
            means[f"{name}_standard_error"] = math.sqrt(squares) / len(labels)
    return means


def compare(first: Path, second: Path) -> dict[str, Any]:
    """Differences, second minus first, of two files of examples, paired by example.

    Returns per task and for CORE the `difference` of accuracies (of centred ones for CORE), its `standard_error` and an
    `interval` of 95%. Raises EvaluationError where the files are of different items.
    """
    a, b = _by_item(first), _by_item(second)
    if a.keys() != b.keys():
        task, index = min(a.keys() ^ b.keys())
        raise EvaluationError(
            f"{first} and {second} are not of the same examples: item {index} of {task} is in one of them only; "
            "compare evaluations of one bundle with the same --limit"
        )
    tasks: dict[str, dict[str, Any]] = {}
    for label in dict.fromkeys(task for task, _ in a):
        pairs = [(line, b[key]) for key, line in a.items() if key[0] == label]
        gains = np.array([float(other["correct"]) - float(line["correct"]) for line, other in pairs])
        error = gains.std(ddof=1) / math.sqrt(len(gains)) if len(gains) > 1 else math.nan
        scale = 1 - pairs[0][0]["baseline"]
        tasks[label] = _difference(gains.mean(), error) | {
            "centered": gains.mean() / scale, "centered_standard_error": error / scale, "examples": len(gains)
        }  # fmt: skip
    means = mean_scores(tasks)
    return {"core": _difference(means["core"], means["core_standard_error"]), "tasks": tasks}


def _difference(value: float, error: float) -> dict[str, Any]:
    return {
        "difference": float(value), "standard_error": float(error),
        "interval": [float(value - 1.96 * error), float(value + 1.96 * error)],
    }  # fmt: skip


def _by_item(path: Path) -> dict[tuple[str, int], dict[str, Any]]:
    try:
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        read = ("correct", "baseline")
        return {(line["task"], line["index"]): {name: line[name] for name in read} for line in lines}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{path} is no file of examples ({error}); give what `bov evaluate --core --examples` wrote"
        ) from None
