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
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from bov_megatron.errors import StudyError

if TYPE_CHECKING:
    from bov_megatron.studies.results import Results
    from bov_megatron.studies.study import Study

_NO_SPEEDS = "leave out what clocks measured: for runs that shared their machines with other work"


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
        try:
            print(text, end="") if str(path) == "-" else path.write_text(text)
        except OSError as error:
            raise StudyError(f"--json {path}: {error.strerror}; name a file that can be written") from error


def _add_plan(command: argparse.ArgumentParser) -> None:
    from bov_megatron.recipe.gpus import DEFAULT_GPU, GPUS

    _add_study(command)
    command.add_argument("--gpu", default=DEFAULT_GPU, help=f"one of {', '.join(GPUS)} (%(default)s)")
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
    command.add_argument("--dry-run", action="store_true", help="only print what would be called")
    command.add_argument(
        "--set-aside", action="store_true", help="move runs of cells whose recipe has changed away, and start them anew"
    )
    slurm = command.add_argument_group("on Slurm")
    slurm.add_argument("--max-nodes", type=int, metavar="N", help="nodes in use at once (default: no limit)")
    slurm.add_argument("--ntasks-per-node", type=int, default=8, metavar="N", help="ranks per node (%(default)s)")
    slurm.add_argument("--gpus-per-node", type=int, metavar="N", help="default: as many as ranks; 0 without GPUs")
    slurm.add_argument("--cpus-per-task", type=int, default=6, metavar="N", help="cores per rank (%(default)s)")
    slurm.add_argument(
        "--sbatch",
        action="append",
        default=[],
        metavar="FLAG",
        help="for sbatch: --sbatch=--partition=gpu; repeat it",
    )


def _submit(options) -> int:
    from bov_megatron.studies import submission
    from bov_megatron.studies.status import summary
    from bov_megatron.studies.study import load_study

    for name in ("local", "max_nodes", "ntasks_per_node", "cpus_per_task"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise StudyError(f"--{name.replace('_', '-')} {value}: must be at least 1")
    study = load_study(options.study, options.overrides)
    cells, statuses = submission.cells_to_start(study, options.set_aside and not options.dry_run)
    if str(options.json) != "-":
        print(f"{summary(statuses)}; {len(cells)} to start")
    if options.local is not None:
        return submission.train_here(study, cells, options.local, options.dry_run)
    sizes = (options.ntasks_per_node, options.gpus_per_node, options.cpus_per_task, options.max_nodes)
    jobs = []
    for array, call, job in submission.submit(study, cells, submission.Nodes(*sizes), options.sbatch, options.dry_run):
        jobs.append({"job": job, "call": call, "tasks": [[cell.name for cell in cells] for cells in array.tasks]})
        if str(options.json) != "-":
            print(shlex.join(call) if job is None else f"job {job}: {submission.describe(array)}")
    _write_json(options.json, {"jobs": jobs})
    return 0


def _add_task(command: argparse.ArgumentParser) -> None:
    command.add_argument("tasks", type=Path, metavar="TASKS", help="file that submit wrote")
    command.add_argument("line", type=int, help="task of the array, from 0")
    command.add_argument("--status", type=int, help="don't train: may the job start again that ended with this status?")


def _task(options) -> int:
    from bov_megatron.lifecycle import exit_status
    from bov_megatron.studies.task import may_start_again, read_task, train_task

    runs = read_task(options.tasks, options.line)
    if options.status is None:
        status = train_task(runs)
        exit_status.report(status)
        return status
    again, reason = may_start_again(runs, options.status)
    print(reason)
    return 0 if again else 1


def _add_status(command: argparse.ArgumentParser) -> None:
    _add_study(command)
    command.add_argument("--watch", action="store_true", help="show it until all are complete, or Ctrl-C")


def _status(options) -> int:
    from rich.console import Console

    from bov_megatron.studies.status import as_table, read_status, watch
    from bov_megatron.studies.study import load_study

    study = load_study(options.study, options.overrides)
    console = Console()
    if not console.is_terminal:
        console.width = 160
    statuses = watch(study, console) if options.watch else read_status(study)
    if str(options.json) != "-":
        console.print(as_table(statuses))
    _write_json(options.json, {"cells": [dataclasses.asdict(status) for status in statuses]})
    return 0


def _add_fit(command: argparse.ArgumentParser) -> None:
    command.add_argument("study", type=Path, nargs="?", metavar="STUDY", help="study file; not with --table")
    command.add_argument("overrides", nargs="*", metavar="key=value", help="as for submit, e.g. output_dir=FOLDER")
    command.add_argument("--table", type=Path, metavar="FILE", help="fit the runs of this CSV or Parquet file instead")
    for option, text in {
        "n": "column with parameters; of a study: which count (default: all of them)",
        "c": "column with FLOPs; without --d, D is C/(6N)",
        "d": "column with tokens; without --c, C is 6ND",
        "loss": "column with losses (of a study: loss, the default, or bits_per_byte)",
        "variant": "column with names of variants",
        "seed": "column with seeds: noise that runs of a size and seed share is then accounted for",
        "size": "column with names of sizes (default: by rank of N)",
        "tokens-per-second": "column with speeds, for wall-clock multipliers",
    }.items():
        command.add_argument(f"--{option}", metavar="COLUMN", help=text)
    command.add_argument("--no-speeds", action="store_true", help=_NO_SPEEDS)
    command.add_argument("--baseline", metavar="VARIANT", help="what the others are compared with")
    command.add_argument("--drop-highest", type=int, default=0, metavar="K", help="leave out the K highest losses")
    command.add_argument("--drop-failed", action="store_true", help="leave out rows without a finite, positive loss")
    command.add_argument("--level", type=float, default=0.9, help="of the intervals (default %(default)s)")
    command.add_argument("--bootstraps", type=int, default=2000, metavar="COUNT", help="default %(default)s")
    command.add_argument("--bootstrap-seed", type=int, default=0, metavar="SEED", help="default %(default)s")


def _fit(options) -> int:
    from bov_megatron.studies.findings import as_json
    from bov_megatron.studies.findings_text import format_findings

    if (options.table is None) == (options.study is None):
        raise StudyError("give a study file or --table FILE, one of them")
    findings = _findings_of_study(options) if options.table is None else _findings_of_table(options)
    if str(options.json) != "-":
        print(format_findings(findings))
    _write_json(options.json, as_json(findings))
    return 0 if findings.fits else StudyError.exit_status


def _findings_of_table(options):
    from bov_megatron.studies.findings import findings_of
    from bov_megatron.studies.table import Columns, read_table, runs_of

    for option in ("n", "loss"):
        if getattr(options, option) is None:
            raise StudyError(f"--table {options.table} needs --{option} COLUMN")
    columns = Columns(
        n=options.n, loss=options.loss, c=options.c, d=options.d, variant=options.variant, seed=options.seed,
        size=options.size, tokens_per_second=options.tokens_per_second,
    )  # fmt: skip
    runs = runs_of(
        read_table(options.table), columns, baseline=options.baseline, drop_highest=options.drop_highest,
        drop_failed=options.drop_failed,
    )  # fmt: skip
    return findings_of([runs], level=options.level, bootstraps=options.bootstraps, seed=options.bootstrap_seed)


def _findings_of_study(options):
    from bov_megatron.studies.findings import findings_of_results
    from bov_megatron.studies.study import load_study
    from bov_megatron.studies.table import CONVENTIONS

    study = load_study(options.study, options.overrides)
    results = _results(study, options)
    for problem in results.problems:
        print(f"warning: {problem}", file=sys.stderr)
    if results.table.empty:
        raise StudyError(f"study {options.study}: no cell has finished in {study.output_dir}; `submit` starts them")
    return findings_of_results(
        results.table, options.baseline or study.baseline, loss=options.loss or "loss",
        conventions=[options.n] if options.n else list(CONVENTIONS), drop_highest=options.drop_highest,
        level=options.level, bootstraps=options.bootstraps, seed=options.bootstrap_seed,
    )  # fmt: skip


def _results(study: Study, options) -> Results:
    from bov_megatron.studies.results import read_results, without_speeds

    results = read_results(study)
    return without_speeds(results) if options.no_speeds else results


def _add_report(command: argparse.ArgumentParser) -> None:
    _add_study(command)
    command.add_argument("--out", type=Path, metavar="FOLDER", help="default: report/ beside the study's runs")
    command.add_argument("--no-speeds", action="store_true", help=_NO_SPEEDS)
    command.add_argument("--level", type=float, default=0.9, help="of the intervals (default %(default)s)")
    command.add_argument("--bootstraps", type=int, default=2000, metavar="COUNT", help="default %(default)s")


def _report(options) -> int:
    from bov_megatron.studies.findings import as_json, findings_of_results
    from bov_megatron.studies.report.page import write_report
    from bov_megatron.studies.study import load_study

    study = load_study(options.study, options.overrides)
    results = _results(study, options)
    findings = findings_of_results(results.table, study.baseline, level=options.level, bootstraps=options.bootstraps)
    out = options.out or study.output_dir / "report"
    page = write_report(study, results.table, findings, out, results.problems)
    if str(options.json) != "-":
        print(f"{len(results.table)} of {len(study.cells)} runs finished: {page}")
    _write_json(options.json, as_json(findings))
    return 0


_COMMANDS = {
    "plan": ("what every cell and the whole study cost, before anything runs", _add_plan, _plan),
    "submit": ("start the cells that are missing or have failed", _add_submit, _submit),
    "status": ("state, step, loss and time left of each cell", _add_status, _status),
    "task": ("train one task of a Slurm array; called by slurm/launch.sh", _add_task, _task),
    "fit": ("fit scaling laws to the study's runs, or to a table of runs", _add_fit, _fit),
    "report": ("write the study's page, with its figures and tables", _add_report, _report),
}
"""Name -> help, function that adds its arguments, function that runs it and returns the exit status."""
