"""The command lines: `bov COMMAND …`; the files in tools/ are the same. Imports nothing heavy before a command runs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys
import time
from typing import NoReturn

from bov_megatron import __version__
from bov_megatron.errors import BovError
from bov_megatron.lifecycle.interruption import CtrlC, StopSignals
from bov_megatron.lifecycle.program import run_program
from bov_megatron.lifecycle.signals import Listener, speaks

COMMANDS = {
    "plan": ("bov_megatron.commands.plan", "what a recipe costs, before anything runs"),
    "simulate": ("bov_megatron.commands.simulate", "a step of one rank in a world of any size, without a GPU"),
    "train-tokenizer": ("bov_megatron.commands.train_tokenizer", "train a byte-level BPE tokenizer on text"),
    "prepare-data": ("bov_megatron.commands.prepare_data", "tokenize text and pack it into shards for training"),
    "train": ("bov_megatron.train", "train the model of a recipe or go on with its run, on one rank"),
    "torchrun": (
        "bov_megatron.commands.torchrun",
        "the same on several ranks of this machine; `torchrun … evaluate` too",
    ),
    "checkpoint": ("bov_megatron.commands.checkpoint", "list, inspect or verify the checkpoints of a run"),
    "plot": ("bov_megatron.commands.plot", "draw runs from their metrics, or watch them in the terminal"),
    "inspect_run": ("bov_megatron.commands.inspect_run", "what a run's tables and attention have become, on one page"),
    "convert": ("bov_megatron.commands.convert", "to Hugging Face's format and back, and from nanochat"),
    "generate": ("bov_megatron.commands.generate", "continue texts with a checkpoint or an export"),
    "evaluate": (
        "bov_megatron.commands.evaluate",
        "score a checkpoint or an export: CORE, lm-eval's tasks, packed samples",
    ),
    "study": ("bov_megatron.commands.study", "scaling studies: many runs from one file, and what they say together"),
    "requeue": ("bov_megatron.commands.requeue", "whether a training job that has ended should start again"),
}
"""Name -> module with `main(arguments) -> exit status`, and one line of help."""
_ADVICE = {
    "prepare-data": "; run the same command again to go on",
    "evaluate": "; CORE goes on when the same command is run again",
}
"""What follows "interrupted" where the command has more to say."""
REPEATED_AFTER_SECONDS = 20


def program(*command: str) -> NoReturn:
    """`main` as a process of its own, which Ctrl-C ends with a line and a status, never with a traceback.

    Args:
        command: its name, where the command line begins behind it.
    """
    arguments = [*command, *sys.argv[1:]]
    name = arguments[0] if arguments else ""
    signals: Listener = StopSignals() if name == "train" else CtrlC(_ADVICE.get(name, ""))
    run_program(lambda: main(arguments, signals), signals)


def main(arguments: list[str] | None = None, signals: Listener | None = None) -> int:
    """Run the command that `arguments` begin with (default: the command line's); returns its exit status.

    An error that the user can mend is printed in one line.

    Args:
        signals: those that training is to hear, if they are heard already.
    """
    parser = argparse.ArgumentParser(
        prog="bov",
        usage="bov COMMAND …",
        description="Pretraining of language models with a Bank of Values.",
        epilog="\n".join(
            ["commands:", *(f"  {name:17}{text}" for name, (_, text) in COMMANDS.items())]
            + ["", "`bov COMMAND --help` describes one of them."]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"bov_megatron {__version__}")
    parser.add_argument("command", choices=COMMANDS, metavar="COMMAND", help=argparse.SUPPRESS)
    first, *rest = (sys.argv[1:] if arguments is None else arguments) or ["--help"]
    name = parser.parse_args([first]).command
    module, _ = COMMANDS[name]
    try:
        command = importlib.import_module(module).main
        return command(rest, signals) if name == "train" else command(rest)
    except BovError as error:
        if not speaks():  # where the first rank has met it too, the launcher ends this one meanwhile
            time.sleep(REPEATED_AFTER_SECONDS)
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:  # `bov plan … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at its end
        return 141  # as a process that SIGPIPE has ended
