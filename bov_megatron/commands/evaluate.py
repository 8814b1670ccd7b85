"""Score a model: an export, or a run's checkpoint, which is loaded as the model that it exports to.

  bov evaluate runs/780m_bov --core eval_bundle --json core.json    CORE, with the newest checkpoint
  bov evaluate EXPORT --tasks hellaswag arc_easy --limit 200        lm-eval's own tasks
  bov evaluate EXPORT --tasks held_out --tasks-dir my_tasks --offline
  bov evaluate EXPORT --packed DATA/val         bits per byte on packed held-out samples, as in training
  bov evaluate RUN --step 1000 --record         what RUN's recipe lists under `evaluation`, into RUN/evaluations/
  bov evaluate --compare A.jsonl B.jsonl        differences of two CORE evaluations, example by example

Where every task is found in --tasks-dir (or is the path of a YAML file), lm-eval's own tasks are not indexed, which
saves up to half a minute. A local task's data_files are relative to the current folder unless absolute.

On several processes: bov torchrun --nproc-per-node N evaluate RUN … . Each has a model of its own, or with
--tensor-parallel and --pipeline-parallel a part of one, and they share the examples. After an interruption of CORE, the
same command goes on.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bov_megatron.errors import EvaluationError
from bov_megatron.lifecycle.terminal import say

if TYPE_CHECKING:
    from bov_megatron.evaluation.layout import Layout


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bov evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "target", metavar="TARGET", nargs="?", type=Path, help="export, run folder, or RUN/checkpoints/step_…"
    )
    parser.add_argument("--step", type=int, help="which checkpoint of a run folder (default: the newest)")
    parser.add_argument("--core", metavar="BUNDLE", type=Path, help="folder of DCLM's evaluation bundle: score CORE")
    parser.add_argument("--tasks", nargs="+", default=[], help="names, or paths of YAML files; commas separate too")
    parser.add_argument("--tasks-dir", help="folder searched (with its subfolders) for local YAML tasks")
    parser.add_argument("--packed", metavar="MDS", help="score the packed samples of this folder of MDS shards as well")
    parser.add_argument("--record", action="store_true", help="score what the run's recipe lists under `evaluation`, "
                        "and write it to RUN/evaluations/")  # fmt: skip
    parser.add_argument("--limit", type=float, help="examples per task (below 1: a share), or packed samples")
    parser.add_argument("--num-fewshot", type=int, help="examples in lm-eval's prompts; default: what the task says")
    parser.add_argument("--batch-size", type=int, help="sequences per forward pass (default 8; of CORE 32)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …; default: a GPU if there is one")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"),
                        help="default: as exported or trained")  # fmt: skip
    parser.add_argument("--bank-device", choices=("cpu", "mmap"), help="keep value tables in the host's memory, or "
                        "(of an export) in their file, read row by row; of a model that no ranks share")  # fmt: skip
    parser.add_argument("--no-bos", action="store_true", help="don't start lm-eval's prompts with the bos token")
    parser.add_argument("--offline", action="store_true", help="never ask the Hugging Face hub; for local tasks")
    parser.add_argument("--json", metavar="FILE", type=Path, help="write the scores there as well")
    parser.add_argument("--tensor-parallel", type=int, default=1, metavar="N", help="ranks that share a layer")
    parser.add_argument("--pipeline-parallel", type=int, default=1, metavar="N", help="ranks that share the layers")
    core = parser.add_argument_group("CORE")
    core.add_argument("--normalisation", choices=("bytes", "tokens"), help="an option's loss is "
                      "divided by its UTF-8 bytes (as in the paper; default) or its tokens (as DCLM)")  # fmt: skip
    core.add_argument("--examples", metavar="FILE.jsonl", type=Path,
                      help="keep every example there (default with --json FILE.json: FILE.examples.jsonl)")  # fmt: skip
    core.add_argument("--compare", nargs=2, type=Path, metavar=("A", "B"), help="two files of examples; no TARGET")
    options = parser.parse_args(arguments)
    options.tasks = [name for argument in options.tasks for name in argument.split(",") if name]
    if options.compare:
        if options.target or options.core or options.tasks or options.packed:
            parser.error("--compare reads two files of examples: leave out TARGET, --core, --tasks and --packed")
    elif options.target is None:
        parser.error("give TARGET: an export, a run folder or a checkpoint")
    elif options.record:
        given = (
            *("core", "tasks", "packed", "limit", "num_fewshot", "no_bos", "tasks_dir", "batch_size"),
            *("device", "bank_device"),
        )
        _refuse_given(parser, options, given, "does not go with --record, which takes from the recipe what to score")
    elif not options.tasks and not options.packed and not options.core:
        parser.error("give --core, --tasks, --packed or --record: there is nothing to evaluate")
    elif options.core and (options.tasks or options.packed):
        parser.error("--core is evaluated alone: leave out --tasks and --packed, or call twice")
    if options.compare or options.core:
        _refuse_given(parser, options, ("num_fewshot", "no_bos", "tasks_dir"), "is for --tasks")
    if options.compare or not options.core:
        _refuse_given(parser, options, ("examples", "normalisation"), "is for --core")
    if options.tensor_parallel * options.pipeline_parallel > 1:
        _refuse_given(parser, options, ("device",), "cannot be chosen where ranks share a model: each takes its own")
    options.normalisation = options.normalisation or "bytes"
    if options.core and options.limit is not None and (options.limit != int(options.limit) or options.limit < 1):
        parser.error(f"--limit {options.limit:g} with --core: a whole number of examples per task, at least 1")
    if options.batch_size is None:
        options.batch_size = 32 if options.core else 8
    if min(options.batch_size, options.tensor_parallel, options.pipeline_parallel) < 1:
        parser.error("--batch-size, --tensor-parallel and --pipeline-parallel must be at least 1")
    return options


def _refuse_given(
    parser: argparse.ArgumentParser, options: argparse.Namespace, names: tuple[str, ...], why: str
) -> None:
    """What would be ignored is an error."""
    for name in names:
        if getattr(options, name) != parser.get_default(name):
            parser.error(f"--{name.replace('_', '-')} {why}: leave it out")


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.offline:  # read when the libraries are imported
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    from bov_megatron.compat import quiet_megatron_imports

    quiet_megatron_imports()
    if options.compare:
        report: dict[str, Any] | None = _compare(*options.compare)
    else:
        from bov_megatron.evaluation.layout import detect_layout

        layout = detect_layout(options.tensor_parallel, options.pipeline_parallel)
        if options.record:
            report = _record(options, layout)
        else:
            report = _evaluate_core(options, layout) if options.core else _evaluate(options, layout)
    if options.json and report:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(report, indent=2) + "\n")
    return 0


def _record(options: argparse.Namespace, layout: Layout) -> dict[str, Any]:
    from bov_megatron.evaluation.record import record
    from bov_megatron.evaluation.target import find_target

    line = record(find_target(options.target, options.step), layout, options.dtype)
    if layout.world.rank == 0:
        for name, value in line.items():
            print(f"{name:60} {value:.6f}" if isinstance(value, float) else f"{name:60} {value:,}")
    return line if layout.world.rank == 0 else {}


def _evaluate(options: argparse.Namespace, layout: Layout) -> dict[str, Any] | None:
    from bov_megatron.evaluation.report import evaluate
    from bov_megatron.evaluation.target import find_target

    report = evaluate(
        find_target(options.target, options.step),
        tasks=options.tasks,
        tasks_dir=options.tasks_dir,
        packed=options.packed,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        batch_size=options.batch_size,
        device=options.device,
        dtype=options.dtype,
        bos=not options.no_bos,
        layout=layout,
        bank_device=options.bank_device,
    )
    if layout.world.rank > 0:
        return None
    for task, metrics in report["scores"].items():
        for metric, value in metrics.items():
            if not metric.endswith("_stderr"):
                stderr = metrics.get(f"{metric}_stderr")
                print(f"{task:32} {metric:16} {value:.6f}" + (f" ± {stderr:.6f}" if stderr is not None else ""))
    return report


def _evaluate_core(options: argparse.Namespace, layout: Layout) -> dict[str, Any] | None:
    """The report, on the process that writes it."""
    from tqdm import tqdm

    from bov_megatron.evaluation.core import bundle as bundles
    from bov_megatron.evaluation.core.evaluation import score_bundle, summarize
    from bov_megatron.evaluation.core.opening import open_scorer
    from bov_megatron.evaluation.quiet import quiet_libraries
    from bov_megatron.evaluation.target import find_target

    bundle = bundles.read_bundle(options.core)
    target = find_target(options.target, options.step)
    encoder = target.encoder()
    limit = None if options.limit is None else int(options.limit)
    started = time.monotonic()
    if layout.world.rank == 0:
        say(f"CORE: {len(bundle.tasks)} tasks of {bundle.folder} with {target.folder}")
    with (
        _examples_file(options, layout.world.world_size) as examples,
        quiet_libraries(),
        open_scorer(target, layout, options.device, options.dtype, options.bank_device) as (scorer, context, place),
        tqdm(unit=" examples", desc="CORE", disable=layout.world.rank > 0 or not sys.stderr.isatty()) as bar,
    ):
        lines = score_bundle(
            scorer,
            encoder,
            bundle,
            examples,
            model=f"{target.folder.resolve()} {target.digest()} {options.dtype}",
            context=context,
            normalisation=options.normalisation,
            limit=limit,
            batch_size=options.batch_size,
            place=place,
            on_progress=bar.update,
        )
    if not lines:
        return None
    report = {"model": str(target.folder), "bundle": bundle.digest, "limit": limit, **summarize(lines, bundle,
              options.normalisation), "seconds": time.monotonic() - started}  # fmt: skip
    _print_core(report)
    return report


@contextlib.contextmanager
def _examples_file(options: argparse.Namespace, world_size: int) -> Iterator[Path]:
    """Where examples are kept; without a name for it, nowhere after the end."""
    named = options.examples or (options.json and options.json.with_suffix(".examples.jsonl"))
    if named:
        yield named
        return
    if world_size > 1:
        raise EvaluationError(f"{world_size} processes share the examples in a file: name it with --examples or --json")
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder) / "examples.jsonl"


def _print_core(report: dict[str, Any]) -> None:
    print(f"{'task':36}{'kind':20}{'shots':>5}{'examples':>10}{'accuracy':>20}{'centred':>20}")
    for label, task in report["tasks"].items():
        print(
            f"{label:36}{task['kind']:20}{task['shots']:5}{task['examples']:10,}"
            f"{task['accuracy']:11.4f} ± {task['standard_error']:.4f}"
            f"{task['centered']:11.4f} ± {task['centered_standard_error']:.4f}"
        )
    print(f"\nCORE {report['core']:.4f} ± {report['core_standard_error']:.4f} (standard error of the examples drawn; "
          f"seeds of training add about 0.005), losses per {report['normalisation'].removesuffix('s')}")  # fmt: skip
    for name, value in report["core_by_baselines"].items():
        print(f"  {value:.4f} with baselines {name}" + (" (this bundle's)" if name == report["baselines"] else ""))
    if "core_dclm" in report:
        print(f"  {report['core_dclm']:.4f} with HellaSwag at 0 shots as a 22nd task, as DCLM averages")


def _compare(first: Path, second: Path) -> dict[str, Any]:
    from bov_megatron.evaluation.core.evaluation import compare

    report = compare(first, second)
    print(f"{second} minus {first}, paired by example; intervals of 95%\n")
    print(f"{'task':36}{'examples':>10}{'accuracy':>12}{'interval':>22}")
    for label, task in [*report["tasks"].items(), ("CORE (centred)", report["core"])]:
        low, high = task["interval"]
        count = f"{task['examples']:,}" if "examples" in task else ""
        verdict = "" if low <= 0 <= high else "  differs"
        print(f"{label:36}{count:>10}{task['difference']:+12.4f}{f'{low:+.4f} to {high:+.4f}':>22}{verdict}")
    return report


if __name__ == "__main__":  # of a rank
    from bov_megatron.commands import program

    program("evaluate")
