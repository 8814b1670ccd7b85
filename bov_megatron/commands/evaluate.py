"""Run lm-eval on an exported model: on its own tasks, and on local YAML tasks.

  bov evaluate EXPORT --tasks hellaswag arc_easy --limit 200
  bov evaluate EXPORT --tasks held_out --tasks-dir my_tasks --offline --json results.json
  bov evaluate EXPORT --packed DATA/val         bits per byte on packed held-out samples, as in training

Where every task is found in --tasks-dir (or is the path of a YAML file), lm-eval's own tasks are not indexed, which
saves up to half a minute. A local task's data_files are relative to the current folder unless absolute.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="bov evaluate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model", metavar="EXPORT", help="folder written by `bov convert to-hf`")
    parser.add_argument("--tasks", nargs="+", default=[], help="names, or paths of YAML files; commas separate too")
    parser.add_argument("--tasks-dir", help="folder searched (with its subfolders) for local YAML tasks")
    parser.add_argument("--packed", metavar="MDS", help="score the packed samples of this folder of MDS shards as well")
    parser.add_argument("--limit", type=float, help="examples per task (below 1: a share), or packed samples")
    parser.add_argument("--num-fewshot", type=int, help="examples in the prompt; default: what the task says")
    parser.add_argument("--batch-size", type=int, default=8, help="sequences per forward pass (default 8)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …; default: a GPU if there is one")
    parser.add_argument("--dtype", default="auto", help="auto (as stored), float32 or bfloat16")
    parser.add_argument("--no-bos", action="store_true", help="don't start prompts with the bos token")
    parser.add_argument("--offline", action="store_true", help="never ask the Hugging Face hub; for local tasks")
    parser.add_argument("--json", metavar="FILE", help="write the scores there as well")
    options = parser.parse_args(arguments)
    options.tasks = [name for argument in options.tasks for name in argument.split(",") if name]
    if not options.tasks and not options.packed:
        parser.error("give --tasks or --packed: there is nothing to evaluate")
    return options


def main(arguments: list[str] | None = None) -> int:
    options = parse_arguments(arguments)
    if options.offline:  # read when the libraries are imported
        os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", TRANSFORMERS_OFFLINE="1")
    from bov_megatron.evaluation.report import evaluate

    report = evaluate(
        options.model,
        tasks=options.tasks,
        tasks_dir=options.tasks_dir,
        packed=options.packed,
        limit=options.limit,
        num_fewshot=options.num_fewshot,
        batch_size=options.batch_size,
        device=options.device,
        dtype=options.dtype,
        bos=not options.no_bos,
    )
    for task, metrics in report["scores"].items():
        for metric, value in metrics.items():
            if not metric.endswith("_stderr"):
                stderr = metrics.get(f"{metric}_stderr")
                print(f"{task:32} {metric:16} {value:.6f}" + (f" ± {stderr:.6f}" if stderr is not None else ""))
    if options.json:
        Path(options.json).parent.mkdir(parents=True, exist_ok=True)
        Path(options.json).write_text(json.dumps(report, indent=2) + "\n")
    return 0
