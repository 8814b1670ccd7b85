#!/usr/bin/env python
"""The whole path on this machine, in minutes: train a tokenizer on Python's own sources, write shards, train a
Bank-of-Values model and its baseline on two tensor-parallel ranks, export both to Hugging Face, evaluate them,
and leave a table of results and a plot of the loss curves.

Every step but the comparison at the end is one of the project's own commands, printed before it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from bov_megatron.lifecycle.interruption import CALLED_BY, CtrlC  # noqa: E402
from bov_megatron.lifecycle.program import run_program  # noqa: E402

if TYPE_CHECKING:
    from bov_megatron.evaluation.bits_per_byte import RollingTask

RECIPE = "recipes/smoke.yaml"
VARIANTS = {"bov": "bank", "baseline": "projection"}
"""Run name -> value source."""

PROMPT = "def read_"
WINDOWS = 300
"""Held-out windows of 256 tokens that lm-eval scores."""
PATIENCE_SECONDS = 10.0
"""After Ctrl-C, for the command that is running to end."""


@dataclass
class Result:
    """What was measured of one trained model."""

    name: str
    source: str
    parameters: int
    seconds: float
    trainer_packed: float
    """Bits per byte of the held-out samples, as the trainer logged it last."""
    export_packed: float
    """The same samples, the exported model."""
    lm_eval: float
    """Bits per byte of held-out documents, cut into windows, through lm-eval."""
    trainer_windows: float
    """The same windows, scored by the trainer's engine from the checkpoint."""
    parity: str
    sample: str


def _tensor_parallel() -> int:
    """Two ranks, but on a machine with a single GPU, which ranks can't share."""
    import torch

    return 1 if torch.cuda.device_count() == 1 else 2


def run_demo(out: Path, steps: int | None = None) -> list[Result]:
    """Run everything into folder `out`; returns the results. Raises CalledProcessError where a command fails."""
    started = time.monotonic()
    out.mkdir(parents=True, exist_ok=True)
    data = _prepare(out)
    results = [_train_and_evaluate(name, source, out, data, steps) for name, source in VARIANTS.items()]
    _report(results, out, time.monotonic() - started)
    return results


def _prepare(out: Path) -> Path:
    """Tokenizer and shards from this machine's own Python sources."""
    library = sysconfig.get_paths()["stdlib"]
    corpus = [library, "--exclude", "site-packages", "test", "--invalid-utf8", "skip"]
    tokenizer, data = out / "tokenizer", out / "data"
    _title("1. Train a tokenizer on the sources and documentation of this machine's Python")
    _tool("train_tokenizer.py", *corpus, "--vocab-size", 4096, "--out", tokenizer, "--overwrite")
    _title("2. Tokenize and pack into MDS shards, with a held-out split")
    _tool("prepare_data.py", *corpus, "--tokenizer", tokenizer, "--out", data, "--sequence-length", 256,
          "--validation-fraction", 0.03, "--keep-held-out-text", "--overwrite")  # fmt: skip
    return data


def _train_and_evaluate(name: str, source: str, out: Path, data: Path, steps: int | None) -> Result:
    run_dir, export = out / "runs" / name, out / "hf" / name
    shutil.rmtree(run_dir, ignore_errors=True)  # an earlier demo's would be continued
    _title(f"3. {name}: train with values from `{source}`, {_tensor_parallel()} tensor-parallel rank(s)")
    overrides = [f"name={name}", f"model.value.source={source}", f"data.path={data}", f"output_dir={run_dir}"]
    overrides.append(f"parallel.tensor_model_parallel_size={_tensor_parallel()}")
    if steps is not None:
        overrides.append(f"train.steps={steps}")
    seconds = _torchrun(RECIPE, *overrides)

    _title(f"4. {name}: export to Hugging Face, logits compared with the Megatron model's")
    parity = _tool("convert.py", "to-hf", run_dir, export, "--overwrite", capture=True).strip().splitlines()[-1]
    print(parity)

    _title(f"5. {name}: evaluate the export, packed samples and through lm-eval")
    windows = _held_out_windows(data, out / "tasks")
    report = out / f"evaluation_{name}.json"
    _tool("evaluate.py", export, "--tasks", windows.name, "--tasks-dir", windows.tasks_dir, "--packed", data / "val",
          "--offline", "--json", report)  # fmt: skip
    scores = json.loads(report.read_text())["scores"]
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return Result(
        name=name,
        source=source,
        parameters=_parameters(run_dir),
        seconds=seconds,
        trainer_packed=lines[-1]["validation_bits_per_byte"],
        export_packed=scores["packed"]["bits_per_byte"],
        lm_eval=scores[windows.name]["bits_per_byte"],
        trainer_windows=_score_with_engine(run_dir, windows.samples),
        parity=parity.rsplit(" ", 1)[-1],
        sample=_generate(export),
    )


def _held_out_windows(data: Path, tasks_dir: Path) -> RollingTask:
    """The held-out documents cut into windows: a local task for lm-eval, and the same as samples for the trainer."""
    from bov_megatron.evaluation.bits_per_byte import write_rolling_task

    lines = (data / "val" / "documents.jsonl").read_text().splitlines()
    documents = [json.loads(line)["text"] for line in lines]
    return write_rolling_task(documents, data / "tokenizer", 256, tasks_dir, max_windows=WINDOWS)


def _score_with_engine(run_dir: Path, samples) -> float:
    """Bits per byte of `samples` by the trainer's own engine and code, from the run's last checkpoint."""
    import torch

    from bov_megatron.data.tokenizer import load_bytes_per_token
    from bov_megatron.exchange.convert import open_checkpoint
    from bov_megatron.lifecycle import run_folder

    sizes = torch.as_tensor(load_bytes_per_token(run_dir / "tokenizer"))
    ids = torch.as_tensor(samples)
    with open_checkpoint(run_folder.find_checkpoint(run_dir)) as engine:
        batches = list(ids.split(1))
        score = engine.score(batches, sizes, [torch.ones(1, dtype=torch.bool)] * len(batches))
    return score.nats / (math.log(2) * score.bytes)


def _generate(export: Path) -> str:
    """A short sampled continuation of PROMPT."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(export)
    model = AutoModelForCausalLM.from_pretrained(export, trust_remote_code=True)
    torch.manual_seed(0)
    inputs = tokenizer(tokenizer.bos_token + PROMPT, return_tensors="pt")
    output = model.generate(**inputs, max_new_tokens=60, do_sample=True, temperature=0.7, top_k=40)
    return tokenizer.decode(output[0], skip_special_tokens=True)


def _parameters(run_dir: Path) -> int:
    import yaml

    from bov_megatron.recipe import recipe_from_dict
    from bov_megatron.recipe.quantities import parameter_counts

    recipe = recipe_from_dict(yaml.safe_load((run_dir / "recipe.yaml").read_text()))
    return sum(parameter_counts(recipe.model).values())


def _report(results: Sequence[Result], out: Path, seconds: float) -> None:
    """results.md, results.json and loss_curves.png."""
    _title("6. Results")
    rows = [
        ("value source", [f"`{r.source}`" for r in results]),
        ("parameters", [f"{r.parameters:,}" for r in results]),
        ("training", [f"{r.seconds:.0f} s" for r in results]),
        ("held-out samples, trainer (bits per byte)", [f"{r.trainer_packed:.4f}" for r in results]),
        ("held-out samples, exported model", [f"{r.export_packed:.4f}" for r in results]),
        ("held-out documents, lm-eval", [f"{r.lm_eval:.4f}" for r in results]),
        ("held-out documents, trainer", [f"{r.trainer_windows:.4f}" for r in results]),
        ("logits, export against Megatron (relative error)", [r.parity for r in results]),
    ]
    table = "\n".join(
        [f"| | {' | '.join(r.name for r in results)} |", "|---|" + "---|" * len(results)]
        + [f"| {name} | {' | '.join(values)} |" for name, values in rows]
    )
    samples = "\n\n".join(f"{r.name}:\n\n```python\n{r.sample}\n```" for r in results)
    text = f"# Demo\n\n{table}\n\n![loss curves](loss_curves.png)\n\nContinuations of `{PROMPT}`:\n\n{samples}\n"
    (out / "results.md").write_text(text)
    (out / "results.json").write_text(json.dumps([vars(r) for r in results], indent=2) + "\n")
    runs = [out / "runs" / r.name for r in results]
    title = "Bank of Values against standard attention, smoke recipe"
    _tool("plot.py", *runs, "--x", "tokens", "--out", out / "loss_curves.png", "--title", title)
    print(f"{table}\n\n{samples}\n\n{seconds / 60:.1f} minutes. See {out / 'results.md'} and {out / 'loss_curves.png'}")
    for r in results:
        for pair in ((r.trainer_packed, r.export_packed), (r.trainer_windows, r.lm_eval)):
            if abs(pair[0] - pair[1]) > 1e-4 * pair[0]:
                raise RuntimeError(f"{r.name}: trainer's {pair[0]} and the export's {pair[1]} bits per byte disagree")


def _title(text: str) -> None:
    print(f"\n\033[1m{text}\033[0m" if sys.stdout.isatty() else f"\n== {text}", flush=True)


def _tool(script: str, *arguments, **options) -> str:
    return _call([sys.executable, f"tools/{script}", *map(str, arguments)], **options)


def _torchrun(*arguments: str) -> float:
    """Train on this machine's cores; returns the seconds it took."""
    started = time.monotonic()
    ranks = _tensor_parallel()
    threads = max(1, (os.cpu_count() or 1) // ranks)
    launcher = ["--standalone", "--nproc-per-node", ranks]
    _tool("torchrun.py", *launcher, *arguments, environment={"OMP_NUM_THREADS": str(threads)})
    return time.monotonic() - started


def _call(command: list[str], environment: dict[str, str] | None = None, capture: bool = False) -> str:
    """Print a command as a user would type it, run it in the project's folder, return its output if captured."""
    shown = ["python", *command[1:]]
    text = " ".join(shlex.quote(part) for part in shown)
    print(f"$ {text if len(text) < 300 else text[:200] + ' … ' + text[-90:]}", flush=True)
    with subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, CALLED_BY: "demo", **(environment or {})}, text=True,
        stdout=subprocess.PIPE if capture else None,
    ) as process:  # fmt: skip
        try:
            output, _ = process.communicate()
        except KeyboardInterrupt:
            # A terminal sends Ctrl-C to the command too, which then ends by itself.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE_SECONDS)
            process.terminate()
            raise
    if process.returncode:
        raise subprocess.CalledProcessError(process.returncode, command)
    return output or ""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("demo"), help="folder to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="training steps of each model (default: the recipe's)")
    options = parser.parse_args()

    from bov_megatron.compat import quiet_megatron_imports

    quiet_megatron_imports()
    try:
        run_demo(options.out.resolve(), options.steps)
    except subprocess.CalledProcessError as error:
        print(f"error: the command above ended with status {error.returncode}", file=sys.stderr)
        return error.returncode
    return 0


if __name__ == "__main__":
    run_program(main, CtrlC())
