"""Look inside a run: what its value tables, coefficients and attention have become, on one page.

  bov inspect_run runs/780m_bov                          writes runs/780m_bov/inspection/index.html
  bov inspect_run runs/780m_bov runs/780m_baseline       with losses by token frequency, one against the other
  bov inspect_run runs/780m_bov --samples 0              without building a model: a piece of one table at a time
  bov inspect_run runs/780m_bov --tokens " the" return   neighbours of these tokens

The page needs no other file and no network; its figures are beside it as PNGs.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from bov_megatron.errors import RunFolderError


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bov inspect_run", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="run folder")
    parser.add_argument("other", type=Path, nargs="?", metavar="OTHER_RUN", help="another one, such as a baseline")
    parser.add_argument("--step", type=int, help="which checkpoint of RUN_DIR (default: the newest)")
    parser.add_argument("--out", type=Path, metavar="DIR", help="folder to write (default: RUN_DIR/inspection)")
    parser.add_argument("--tokens", nargs="+", default=[], metavar="TEXT", help="tokens whose neighbours are shown "
                        "(default: words of all frequencies)")  # fmt: skip
    parser.add_argument("--count", type=int, default=4_000_000, metavar="TOKENS", help="training tokens to count "
                        "frequencies in (default %(default)s)")  # fmt: skip
    parser.add_argument("--samples", type=int, default=32, help="held-out samples for losses and attention; 0 leaves "
                        "them out and builds no model (default %(default)s)")  # fmt: skip
    parser.add_argument("--batch-size", type=int, default=4, help="samples per forward pass (default %(default)s)")
    parser.add_argument("--data", type=Path, metavar="DIR", help="where the run's data are now")
    parser.add_argument("--device", help="cpu, cuda, …; default: a GPU if there is one")
    options = parser.parse_args(arguments)
    if options.count < 1 or options.samples < 0 or options.batch_size < 1:
        parser.error("--count and --batch-size must be at least 1, --samples at least 0")
    from bov_megatron.compat import quiet_megatron_imports

    quiet_megatron_imports()
    from bov_megatron.inspection.findings import Options, inspect
    from bov_megatron.inspection.page import write_page

    found = inspect(
        options.run,
        options.other,
        Options(options.step, options.count, options.samples, options.batch_size, options.tokens, options.data,
                options.device),
        on_progress=_progress,
    )  # fmt: skip
    if sys.stderr.isatty():
        print(file=sys.stderr)
    out = options.out or options.run / "inspection"
    try:
        print(write_page(found, out))
    except OSError as error:
        raise RunFolderError(f"--out {out} cannot be written ({error.strerror}): give another folder") from error
    return 0


def _progress(what: str) -> None:
    if sys.stderr.isatty():
        print(f"\r\033[K{what} …", end="", file=sys.stderr, flush=True)
