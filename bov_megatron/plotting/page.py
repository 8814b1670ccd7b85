"""The picture as a page of its own: pointing at a run's row shows its lines, a click hides or brings them back."""

from __future__ import annotations

import html
import io
import re
import time
from collections.abc import Sequence
from pathlib import Path

from bov_megatron.plotting.curves import Run
from bov_megatron.plotting.figure import draw, style

COLUMNS = (
    ("step", "step"),
    ("tokens", "tokens"),
    ("loss", "loss (nats/token)"),
    ("validation_bits_per_byte", "validation (bits/byte)"),
    ("tokens_per_second", "tokens/s"),
    ("mfu", "MFU"),
)
_PAGE = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>{title}</title><style>
body {{ font: 14px/1.4 system-ui, sans-serif; margin: 1.2em; color: #222 }}
svg {{ max-width: 100%; height: auto }}
table {{ border-collapse: collapse; margin: .6em 0 }}
th, td {{ padding: .25em .9em; text-align: right; font-variant-numeric: tabular-nums }}
th {{ border-bottom: 2px solid #888 }} td {{ border-bottom: 1px solid #ddd }}
th:first-child, td:first-child {{ text-align: left }}
tbody tr {{ cursor: pointer }} tbody tr:hover {{ background: #f2f2f2 }} tr.hidden {{ opacity: .35 }}
footer {{ color: #777 }}
</style></head><body>
{svg}
<table><thead><tr><th>run</th>{head}</tr></thead><tbody>
{rows}
</tbody></table>
<footer>{footer}</footer>
<script>
const lines = run => document.querySelectorAll(`[id="${{run}}"]`)
const others = run => [...document.querySelectorAll('[id^="run-"]')].filter(line => line.id !== run)
for (const row of document.querySelectorAll('tbody tr')) {{
  const run = row.dataset.run
  row.onmouseenter = () => others(run).forEach(line => line.style.opacity = .08)
  row.onmouseleave = () => others(run).forEach(line => line.style.opacity = 1)
  row.onclick = () => {{
    const hidden = row.classList.toggle('hidden')
    lines(run).forEach(line => line.style.display = hidden ? 'none' : '')
  }}
}}
</script></body></html>
"""


def page(runs: Sequence[Run], x_axis: str = "steps", title: str | None = None) -> str:
    """One HTML file without anything outside of it: the figure of `runs`, and a table of where they stand."""
    svg = io.StringIO()
    draw(runs, x_axis, title).savefig(svg, format="svg")
    picture = re.sub(r"<metadata>.*?</metadata>", "", svg.getvalue()[svg.getvalue().index("<svg") :], flags=re.DOTALL)
    return _PAGE.format(
        title=html.escape(title or ", ".join(run.label for run in runs)),
        svg=picture,
        head="".join(f"<th>{name}</th>" for _, name in COLUMNS),
        rows="\n".join(_row(number, run) for number, run in enumerate(runs)),
        footer=f"drawn {time.strftime('%Y-%m-%d %H:%M')} by bov plot",
    )


def write_page(runs: Sequence[Run], out: Path, x_axis: str = "steps", title: str | None = None) -> None:
    out.write_text(page(runs, x_axis, title), encoding="utf-8")


def _row(number: int, run: Run) -> str:
    cells = "".join(f"<td>{_cell(run, key)}</td>" for key, _ in COLUMNS)
    colour = style(number)["color"]
    name = f'<span style="color:{colour}">&#9632;</span> {number + 1} {html.escape(run.label)}'
    return f'<tr data-run="run-{number}"><td title="{html.escape(str(run.folder))}">{name}</td>{cells}</tr>'


def _cell(run: Run, key: str) -> str:
    value = run.last(key)
    if value is None:
        return "–"
    if key == "mfu":
        return f"{value:.1%}"
    return f"{value:,.0f}" if key in ("step", "tokens", "tokens_per_second") else f"{value:.4f}"
