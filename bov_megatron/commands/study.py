"""Scaling studies: many runs from one file, and what they say together.

    bov study plan STUDY.yaml            every cell: parameters, FLOPs, memory, layout, GPU-hours, cost
    bov study submit STUDY.yaml          start what is missing, on Slurm or (--local N) here
    bov study status STUDY.yaml          how far each cell is
    bov study fit STUDY.yaml             scaling laws and compute multipliers with intervals
    bov study report STUDY.yaml          one page with all of it

`section.field=value` after the file applies to every cell, e.g. data.path=data/mine; output_dir=FOLDER is where the
study's runs lie. docs/use/studies.md describes the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from pathlib import Path

from bov_megatron.errors import StudyError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bov study", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (text, add_arguments, run) in _COMMANDS.items():
        command = commands.add_parser(name, help=text, description=text[0].upper() + text[1:] + ".")
        command.set_defaults(run=run)
        command.add_argument("--json", type=Path, metavar="FILE", help="also write every number there ('-': print it)")
        add_arguments(command)
    options, rest = parser.parse_known_args(arguments)
    wrong = [word for word in rest if word.startswith("-") or "=" not in word]
    if wrong or (rest and not hasattr(options, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(wrong or rest)}")
    if rest:  # overrides behind options, which argparse doesn't put together with those before
        options.overrides += rest
    return options.run(options)


def _add_study(command: argparse.ArgumentParser) -> None:
    command.add_argument("study", type=Path, metavar="STUDY", help="study file, e.g. recipes/studies/smoke.yaml")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="for every cell, e.g. data.path=data/mine")


def _write_json(path: Path | None, values) -> None:
    if path is not None:
        text = json.dumps(values, indent=2) + "\n"
        print(text, end="") if str(path) == "-" else path.write_text(text)


def _add_plan(command: argparse.ArgumentParser) -> None:
    from bov_megatron.recipe.gpus import GPUS

    _add_study(command)
    command.add_argument("--gpu", default="H100", help=f"one of {', '.join(GPUS)} (%(default)s)")
    command.add_argument(
        "--mfu", default="0.4", help="share of the GPU's peak, or a run folder that has measured it (%(default)s)"
    )
    command.add_argument("--price", type=float, help="of a GPU-hour, in any currency")


def _plan(options) -> int:
    from bov_megatron.studies.planning import format_study_plan, plan_study
    from bov_megatron.studies.study import load_study

    plan = plan_study(load_study(options.study, options.overrides), options.gpu, options.mfu, options.price)
    if str(options.json) != "-":
        print(format_study_plan(plan))
    _write_json(options.json, dataclasses.asdict(plan))
    return 0


def _add_submit(command: argparse.ArgumentParser) -> None:
    _add_study(command)
    command.add_argument("--local", type=int, metavar="N", help="train here, N cells at a time, instead of on Slurm")
    command.add_argument(
        "--set-aside", action="store_true", help="move runs of cells whose recipe has changed away, and start them anew"
    )


def _submit(options) -> int:
    from bov_megatron.studies.study import load_study
    from bov_megatron.studies.submission import cells_to_start, train_here

    study = load_study(options.study, options.overrides)
    cells, _ = cells_to_start(study, options.set_aside)
    if options.local is None:
        raise StudyError("give --local N, to train N cells at a time here")
    if options.local < 1:
        raise StudyError(f"--local {options.local}: train at least one cell at a time")
    return train_here(study, cells, options.local)


def _add_status(command: argparse.ArgumentParser) -> None:
    _add_study(command)
    command.add_argument("--watch", action="store_true", help="show it again and again, until Ctrl-C")


def _status(options) -> int:
    from rich.console import Console

    from bov_megatron.studies.status import as_table, read_status
    from bov_megatron.studies.study import load_study

    study = load_study(options.study, options.overrides)
    statuses = read_status(study)
    if str(options.json) != "-":
        Console().print(as_table(statuses))
    _write_json(options.json, {"cells": [dataclasses.asdict(status) for status in statuses]})
    return 0


def _fit(options) -> int:
    raise NotImplementedError


def _report(options) -> int:
    raise NotImplementedError


_COMMANDS = {
    "plan": ("what every cell and the whole study cost, before anything runs", _add_plan, _plan),
    "submit": ("start the cells that are missing or have failed", _add_submit, _submit),
    "status": ("state, step, loss and time left of each cell", _add_status, _status),
    "fit": ("fit scaling laws to the study's runs, or to a table of runs", _add_study, _fit),
    "report": ("write the study's page", _add_study, _report),
}
"""Name -> help, function that adds its arguments, function that runs it and returns the exit status."""
