"""Continue texts with a trained model, printing tokens as they arrive.

    bov generate runs/780m_bov --prompt 'def main('                      the newest checkpoint, greedily
    bov generate EXPORT --prompt 'Once upon' --temperature 0.8 --top-k 40 --seed 1
    bov generate EXPORT < prompt.txt                                    the whole input is one prompt
    bov generate EXPORT                                                 in a terminal: a prompt a line, until Ctrl-D

A checkpoint of any layout is loaded in this process, as the model that `bov convert to-hf` would export.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from bov_megatron.evaluation.generation import Generator, Sampling


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bov generate", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("target", type=Path, metavar="TARGET", help="export, run folder, or RUN/checkpoints/step_…")
    add("--prompt", action="append", metavar="TEXT", help="text to continue; may be given several times (default: read "
        "from the standard input)")  # fmt: skip
    add("--step", type=int, help="which checkpoint of a run folder (default: the newest)")
    add("--max-new-tokens", type=int, default=128, metavar="N", help="longest continuation (default %(default)s)")
    add("--temperature", type=float, default=0.0, help="0 is greedy, the default; 1 samples as the model says")
    add("--top-k", type=int, default=0, metavar="K", help="sample among the K most probable tokens")
    add("--top-p", type=float, default=1.0, metavar="P", help="sample among tokens of this share of the probability")
    add("--seed", type=int, help="of the sampling; the same seed gives the same text")
    add("--device", help="cpu, cuda, cuda:1, …; default: a GPU if there is one")
    add("--dtype", default="auto", choices=("auto", "float32", "bfloat16"), help="default: as exported or trained")
    add("--bank-device", choices=("cpu", "mmap"), help="keep value tables in the host's memory, or (of an export) in "
        "their file, read row by row")  # fmt: skip
    add("--json", action="store_true", help="a JSON object for each prompt, with its tokens and seconds")
    options = parser.parse_args(arguments)

    from bov_megatron.compat import quiet_megatron_imports

    quiet_megatron_imports()
    from bov_megatron.evaluation.generation import Generator, Sampling

    sampling = Sampling(options.temperature, options.top_k, options.top_p, options.seed)
    generator = Generator(options.target, options.step, options.device, options.dtype, options.bank_device)
    for prompt in options.prompt or _prompts():
        _continue(generator, prompt, options.max_new_tokens, sampling, options.json)
    return 0


def _prompts() -> Iterator[str]:
    if not sys.stdin.isatty():
        yield sys.stdin.read().removesuffix("\n")
        return
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        if not (line := sys.stdin.readline()):
            return
        yield line.removesuffix("\n")


def _continue(generator: Generator, prompt: str, max_new_tokens: int, sampling: Sampling, as_json: bool) -> None:
    if as_json:
        done = generator.generate(prompt, max_new_tokens, sampling)
        print(json.dumps(dataclasses.asdict(done), ensure_ascii=False), flush=True)
        return
    dim, normal = ("\033[2m", "\033[0m") if sys.stdout.isatty() else ("", "")
    print(f"{dim}{prompt}{normal}", end="", flush=True)
    done = generator.generate(prompt, max_new_tokens, sampling, lambda text: print(text, end="", flush=True))
    print(flush=True)
    print(
        f"{generator.source}: {done.tokens} tokens, {done.tokens / done.seconds:.1f} tokens/s, ended by "
        f"{'the end of the document' if done.ended_by == 'end of document' else 'the length'}",
        file=sys.stderr,
    )
