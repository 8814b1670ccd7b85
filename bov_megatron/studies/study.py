"""A study: one YAML file that says which runs answer a question. docs/use/studies.md describes the format."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bov_megatron.recipe import Recipe


@dataclass(frozen=True)
class Cell:
    """One run of a study, the same that a person would start by hand: `train BASE OVERRIDES…`."""

    name: str
    """Unique in the study, e.g. `bank-d12-1.5e18-s0`; also the name of its run and of the run's folder."""
    variant: str
    size: str
    budget: str
    """FLOPs, e.g. `1.5e18`, or tokens, e.g. `2e9tokens`."""
    seed: int
    recipe: Recipe
    """Complete and checked."""
    base: Path
    """The recipe file it builds on."""
    overrides: tuple[str, ...]
    """`section.field=value`, those that distinguish this cell from `base`."""
    world_size: int
    """Ranks (GPUs) to run it on; one copy of the model unless its size says more."""

    @property
    def run_dir(self) -> Path:
        return self.recipe.run_dir


@dataclass(frozen=True)
class Study:
    """The cells of a study file, in the order of the file: by variant, size, budget, seed."""

    name: str
    path: Path
    description: str
    baseline: str
    """Name of the variant that the others are compared with."""
    output_dir: Path
    """The runs lie in output_dir/cells/CELL_NAME; whatever else belongs to the study lies beside `cells`."""
    cells: tuple[Cell, ...]
