"""Draw one or many runs from their metrics.jsonl: loss, bits per byte, gradient norm, learning rates, tokens/s, MFU.

    bov plot runs/780m_bov                              writes runs/780m_bov/plot.png
    bov plot runs/* --out runs.html --x flops           a page with a table; a click on a row hides a run
    bov plot runs/* --watch                             a live view in the terminal

No value is left out of the picture of a long run: lines are means, and the area around them reaches from the lowest to
the highest value. A loss above the picture is marked at its upper edge by a triangle, the highest with its value.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from bov_megatron.errors import RunFolderError

SUFFIXES = (".png", ".svg", ".pdf", ".html")
X_AXES = ("steps", "tokens", "flops", "hours")


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="bov plot", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folder")
    parser.add_argument("--out", type=Path, metavar="FILE", help="file to write: .png, .svg, .pdf or .html (default: "
                        "plot.png in the run's folder, or in the current one for several runs)")  # fmt: skip
    parser.add_argument("--x", choices=X_AXES, default="steps", help="horizontal axis (default %(default)s)")
    parser.add_argument("--title", help="above the picture")
    parser.add_argument("--watch", action="store_true", help="show where the runs stand in the terminal, until Ctrl-C")
    options = parser.parse_args(arguments)
    if options.watch:
        if options.out:
            parser.error("--watch writes no file: leave --out out")
        from bov_megatron.plotting.watch import watch

        watch(options.runs)
        return 0
    out = options.out or (options.runs[0] if len(options.runs) == 1 else Path()) / "plot.png"
    if out.suffix not in SUFFIXES:
        parser.error(f"--out {out}: the name must end in one of {', '.join(SUFFIXES)}")
    plot(options.runs, out, options.x, options.title)
    print(out)
    return 0


def plot(folders: list[Path], out: Path, x_axis: str, title: str | None) -> None:
    from bov_megatron.plotting.curves import read_runs

    runs = read_runs(folders, x_axis)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".html":
            from bov_megatron.plotting.page import write_page

            write_page(runs, out, x_axis, title)
        else:
            from bov_megatron.plotting.figure import draw, save

            save(draw(runs, x_axis, title), out)
    except OSError as error:
        raise RunFolderError(f"--out {out} cannot be written ({error.strerror}): give another file") from error
