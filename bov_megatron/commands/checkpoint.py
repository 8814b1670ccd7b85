"""Look at the checkpoints of a run, in one process, whatever layout of ranks saved them.

    bov checkpoint list RUN_DIR          steps, sizes, who saved, whether files have the right sizes
    bov checkpoint inspect RUN_DIR       tensors, shapes and dtypes; how the recipe differs from the run's
    bov checkpoint verify RUN_DIR        read every byte and compare checksums

Each takes a run folder or one checkpoint's folder (RUN_DIR/checkpoints/step_00000200). Exit status: 0; 1 where verify
found damage; 2 where there is nothing to look at.
"""

import argparse
import json
from pathlib import Path

from bov_megatron.errors import CheckpointError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bov checkpoint", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True)
    for name, text in (
        ("list", "steps, sizes, layout and validity (by size) of a run's checkpoints"),
        ("inspect", "tensors of a checkpoint (of a run folder: the newest), its step, and how its recipe differs"),
        ("verify", "compare the checksums of every file; status 1 where one is damaged"),
    ):
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument("path", type=Path, metavar="RUN_DIR_OR_CHECKPOINT")
        command.add_argument("--json", action="store_true", help="machine-readable")
        if name == "inspect":
            command.add_argument("--recipe", type=Path, help="recipe to compare with (default: RUN_DIR/recipe.yaml)")
    options = parser.parse_args(arguments)

    from bov_megatron.compat import quiet_megatron_imports

    quiet_megatron_imports()
    try:
        return _COMMANDS[options.command](options)
    except OSError as error:
        raise CheckpointError(error) from error


def _list(options) -> int:
    from bov_megatron.checkpoint import report

    entries = report.list_run(options.path)
    print(json.dumps(entries, indent=2) if options.json else report.format_list(entries))
    return 0


def _inspect(options) -> int:
    from bov_megatron.checkpoint import report

    found = report.inspect(options.path, options.recipe)
    print(json.dumps(found, indent=2) if options.json else report.format_inspection(found))
    return 0


def _verify(options) -> int:
    from bov_megatron.checkpoint import report

    damage = report.verify(options.path)
    if options.json:
        print(json.dumps({str(path): [vars(one) for one in found] for path, found in damage.items()}, indent=2))
    else:
        for path, found in damage.items():
            print(f"{path}: {'valid' if not found else f'DAMAGED, {len(found)} files'}")
            for one in found:
                print(f"  {one}")
    return 1 if any(damage.values()) else 0


_COMMANDS = {"list": _list, "inspect": _inspect, "verify": _verify}
