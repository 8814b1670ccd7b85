"""A figure on a page: drawn for wide and for narrow screens, embedded, and kept as a PNG."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from bov_megatron.studies.report.style import NARROW, WIDE, Layout


@dataclass(frozen=True)
class Picture:
    """A figure that the page will show."""

    name: str
    caption: str
    alt: str
    draw: Callable[[Layout], Figure]


@dataclass(frozen=True)
class Drawn:
    """A figure as the template embeds it: data URIs for wide and for narrow screens."""

    name: str
    caption: str
    alt: str
    wide: str
    narrow: str


def draw_picture(picture: Picture, folder: Path) -> Drawn:
    """Both layouts of a figure as SVG; the wide one also as a PNG in `folder`."""
    wide, narrow = picture.draw(WIDE), picture.draw(NARROW)
    wide.savefig(folder / f"{picture.name}.png", dpi=160)
    return Drawn(picture.name, picture.caption, picture.alt, _svg(wide), _svg(narrow))


def _svg(figure: Figure) -> str:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    return "data:image/svg+xml;base64," + base64.b64encode(buffer.getvalue()).decode()
