"""A small evaluation bundle in DCLM's layout: every kind of scoring, shots, cropping and ties, on sentences of Python's
own documentation strings."""

from __future__ import annotations

import csv
import inspect
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import yaml

TASKS = {
    # label: kind, shots, delimiter (None: the default), percent of guessing
    "commonsense_qa": ("multiple_choice", 3, None, 40.3),
    "arc_easy": ("multiple_choice", 2, "\nAnswer: ", 25.0),
    "hellaswag_zeroshot": ("multiple_choice", 0, None, 25.0),
    "winograd": ("schema", 0, None, 50.0),
    "winogrande": ("schema", 2, None, 50.0),
    "lambada_openai": ("language_modeling", 0, "", 0.0),
    "jeopardy": ("language_modeling", 2, "\nAnswer: ", 0.0),
}


def write_bundle(folder: Path, items: int = 10, greedy: Callable[[str], str | None] | None = None) -> Path:
    """`items` per task.

    Args:
        greedy: what a model says to a prompt, or None; every second continuation of `lambada_openai` is that.
    """
    (folder / "eval_data").mkdir(parents=True)
    listing = []
    for number, (label, (kind, shots, delimiter, _)) in enumerate(TASKS.items()):
        file = f"tasks/{label}.jsonl"
        entry = {"label": label, "dataset_uri": file, "num_fewshot": [shots], "icl_task_type": kind}
        listing.append(entry if delimiter is None else entry | {"continuation_delimiter": delimiter})
        path = folder / "eval_data" / file
        path.parent.mkdir(exist_ok=True)
        made = _items(kind, items, random.Random(number))
        if label == "lambada_openai":
            for number, item in enumerate(made):
                said = greedy(item["context"].strip()) if greedy and number % 2 == 0 else None
                item["continuation"] = said or f" {item['continuation']}"
        path.write_text("".join(json.dumps(item, ensure_ascii=False) + "\n" for item in made), encoding="utf-8")
    (folder / "core.yaml").write_text(yaml.safe_dump({"icl_tasks": listing}))
    with (folder / "eval_meta_data.csv").open("w", newline="") as out:
        rows = csv.writer(out)
        rows.writerow(["Eval Task", "Task Category", "Random baseline"])
        rows.writerows([label, "reading", percent] for label, (*_, percent) in TASKS.items())
        rows.writerow(["of_no_interest", "symbols", ""])
    return folder


def _items(kind: str, count: int, chance: random.Random) -> list[dict]:
    sentences = _sentences()

    def some() -> str:
        return chance.choice(sentences)

    if kind == "multiple_choice":
        made = [{"query": some(), "choices": [some() for _ in range(3)], "gold": i % 3} for i in range(count)]
        made[0]["choices"] = [some()] * 3  # a tie
        made[1]["choices"][1] = made[1]["choices"][0] + " and more"  # one begins with another
        made[2]["choices"] = ["naïve ☃", "naïve ☂", "π"]  # tokens that are parts of a character
        made[3]["query"] = " ".join(some() for _ in range(60))  # longer than a tiny model's context
        return made
    if kind == "schema":
        made = [
            {"context_options": [f"{some()} {word}" for word in ("one", "another thing")], "continuation": some(),
             "gold": i % 2} for i in range(count)
        ]  # fmt: skip
        made[3]["context_options"][1] = " ".join(some() for _ in range(60))
        return made
    made = [{"context": f" {some()} \n", "continuation": some().split()[0]} for _ in range(count)]
    made[3]["context"] = " ".join(some() for _ in range(60))
    return made


def _sentences() -> list[str]:
    import argparse
    import logging
    import random
    import threading

    found = []
    for module in (argparse, logging, random, threading):
        for _, thing in inspect.getmembers(
            module, lambda member: inspect.isclass(member) or inspect.isfunction(member)
        ):
            found += re.split(r"(?<=\.)\s+", inspect.cleandoc(thing.__doc__ or ""))
    return sorted({" ".join(text.split()) for text in found if 15 < len(text) < 90})
