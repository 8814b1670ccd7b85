"""Keeping other libraries' progress bars, log lines and prints out of the output of an evaluation."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Iterator

LIBRARIES = (
    "lm_eval",
    "datasets",
    "huggingface_hub",
    "transformers",
    "urllib3",
    "httpx",
    "filelock",
    "fsspec",
)


@contextlib.contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within, other libraries print nothing below an error; on a terminal, the bar over lm-eval's requests is shown."""
    loggers = [logging.getLogger(name) for name in LIBRARIES]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), _few_bars():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@contextlib.contextmanager
def _few_bars() -> Iterator[None]:
    # TQDM_DISABLE is read when tqdm is imported, and lm-eval has no switch for most of its bars.
    from tqdm import tqdm

    shown = sys.stderr.isatty()
    original = tqdm.__init__

    def start(self, *arguments, **options):
        wanted = shown and str(options.get("desc")).startswith("Running ")
        original(self, *arguments, **{**options, "disable": options.get("disable") or not wanted})

    tqdm.__init__ = start
    try:
        yield
    finally:
        tqdm.__init__ = original
