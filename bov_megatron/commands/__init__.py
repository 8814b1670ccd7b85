"""The command lines: `bov COMMAND …`; the files in tools/ are the same. Imports nothing heavy before a command runs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from bov_megatron import __version__
from bov_megatron.errors import BovError

COMMANDS = {
    "plan": ("bov_megatron.commands.plan", "what a recipe costs, before anything runs"),
    "train-tokenizer": ("bov_megatron.commands.train_tokenizer", "train a byte-level BPE tokenizer on text"),
    "prepare-data": ("bov_megatron.commands.prepare_data", "tokenize text and pack it into shards for training"),
    "train": ("bov_megatron.train", "train the model of a recipe or go on with its run; several ranks: see its --help"),
    "checkpoint": ("bov_megatron.commands.checkpoint", "list, inspect or verify the checkpoints of a run"),
    "plot": ("bov_megatron.commands.plot", "draw runs from their metrics, or watch them in the terminal"),
    "convert": ("bov_megatron.commands.convert", "export a checkpoint to Hugging Face's format"),
    "generate": ("bov_megatron.commands.generate", "continue texts with a checkpoint or an export"),
    "evaluate": ("bov_megatron.commands.evaluate", "score an exported model: lm-eval's tasks, packed samples"),
    "study": ("bov_megatron.commands.study", "scaling studies: many runs from one file, and what they say together"),
    "requeue": ("bov_megatron.commands.requeue", "whether a training job that has ended should start again"),
}
"""Name -> module with `main(arguments) -> exit status`, and one line of help."""


def main(arguments: list[str] | None = None) -> int:
    """Run the command that `arguments` begin with (default: the command line's); returns its exit status.

    An error that the user can mend is printed in one line.
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
    module, _ = COMMANDS[parser.parse_args([first]).command]
    try:
        return importlib.import_module(module).main(rest)
    except BovError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_status
    except BrokenPipeError:  # `bov plan … | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # or Python complains again at its end
        return 141  # as a process that SIGPIPE has ended
