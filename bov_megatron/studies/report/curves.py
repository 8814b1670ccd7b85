"""Loss curves of a study's runs, thinned to what a figure can show."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from bov_megatron.lifecycle import run_folder

LINES = 2000
"""Lines of a run's metrics that are parsed at most, evenly spaced; validations always."""
POINTS = 120
"""Points of a training curve: means over lines that follow each other."""


@dataclass(frozen=True)
class Curve:
    """Arrays of the same length in pairs: training loss in nats per token, validation in bits per byte."""

    tokens: np.ndarray
    loss: np.ndarray
    validation_tokens: np.ndarray
    validation: np.ndarray


def read_curve(run_dir: Path) -> Curve | None:
    """The curve of a run; None where there is no step in its metrics."""
    path = run_dir / run_folder.METRICS
    if not path.is_file():
        return None
    texts = path.read_bytes().splitlines()
    stride = max(1, len(texts) // LINES)
    train: list[tuple[float, float]] = []
    validation: list[tuple[float, float]] = []
    for number, text in enumerate(texts):
        scored = b'"validation_bits_per_byte"' in text
        if not scored and number % stride:
            continue
        try:
            line = json.loads(text)
        except ValueError:  # cut off by a crash
            continue
        if line.get("loss") is not None:
            train.append((line["tokens"], line["loss"]))
        if scored and line["validation_bits_per_byte"] is not None:
            validation.append((line["tokens"], line["validation_bits_per_byte"]))
    if not train:
        return None
    blocks = np.array_split(np.array(train, dtype=float), min(POINTS, len(train)))
    means = np.array([block.mean(axis=0) for block in blocks])
    scores = np.array(validation, dtype=float).reshape(-1, 2)
    return Curve(means[:, 0], means[:, 1], scores[:, 0], scores[:, 1])
