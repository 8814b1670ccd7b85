"""What a study costs before anything runs: every cell, and the whole. Doesn't need torch."""

from __future__ import annotations

import functools
import json
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from bov_megatron.errors import StudyError
from bov_megatron.lifecycle import run_folder
from bov_megatron.plan import DEFAULT_MFU
from bov_megatron.recipe.gpus import DEFAULT_GPU, GPUS, Gpu
from bov_megatron.recipe.limits import nearest
from bov_megatron.recipe.quantities import flops_per_token, parameters_by_convention, total_steps
from bov_megatron.studies.layouts import GPUS_PER_NODE, MOST_RANKS, Layout, layout_of, smallest_layout, usable_bytes
from bov_megatron.studies.study import Cell, Study


@dataclass(frozen=True)
class CellPlan:
    """Costs of one cell, in bytes, FLOPs and hours."""

    cell: str
    variant: str
    size: str
    budget: str
    seed: int
    parameters: dict[str, int]
    """By convention: `all`, `without_embeddings`, `without_tables`, `matrices`, `matrices_and_head`."""
    flops_per_token: float
    batch_tokens: int
    steps: int
    tokens: int
    flops: float
    layout: Layout
    """As the study has it."""
    fits: bool
    """Whether `layout` fits the GPU's memory."""
    suggested: Layout | None
    """The smallest that fits; None where none was found."""
    gpu_hours: float
    """At the plan's GPU and MFU, recomputation included; of `suggested` where `layout` does not fit."""
    hours: float
    """Wall clock on the ranks of that layout."""
    cost: float | None


@dataclass(frozen=True)
class StudyPlan:
    """Costs of a study. `cost` is None where no price was given."""

    study: str
    gpu: Gpu
    mfu: float
    mfu_source: str
    price: float | None
    """Per GPU-hour."""
    cells: list[CellPlan]
    flops: float
    gpu_hours: float
    cost: float | None


def plan_study(
    study: Study, gpu: str = DEFAULT_GPU, mfu: float | str | Path = DEFAULT_MFU, price: float | None = None
) -> StudyPlan:
    """Costs of `study` on GPUs of the name `gpu`.

    Args:
        mfu: share of the GPU's peak, or a run folder whose measured one is taken.

    Raises StudyError for an unknown GPU, an impossible MFU or price, or a run folder without measurements.
    """
    if gpu not in GPUS:
        raise StudyError(f"--gpu {gpu}: unknown GPU{nearest(gpu, GPUS)}")
    if price is not None and not price >= 0:
        raise StudyError(f"--price {price}: must be 0 or more, per GPU-hour")
    share, source = _mfu(mfu)
    layouts = functools.cache(lambda variant, size: _layouts(first[variant, size], GPUS[gpu]))
    # Layouts depend on variant and size alone.
    first = {(cell.variant, cell.size): cell for cell in reversed(study.cells)}
    cells = [_plan_cell(cell, *layouts(cell.variant, cell.size), GPUS[gpu], share, price) for cell in study.cells]
    hours = sum(cell.gpu_hours for cell in cells)
    return StudyPlan(
        study=study.name,
        gpu=GPUS[gpu],
        mfu=share,
        mfu_source=source,
        price=price,
        cells=cells,
        flops=sum(cell.flops for cell in cells),
        gpu_hours=hours,
        cost=None if price is None else hours * price,
    )


def _layouts(cell: Cell, gpu: Gpu) -> tuple[Layout, Layout | None]:
    return layout_of(cell.recipe, cell.world_size), smallest_layout(cell.recipe, cell.world_size, gpu)


def _plan_cell(
    cell: Cell, layout: Layout, suggested: Layout | None, gpu: Gpu, mfu: float, price: float | None
) -> CellPlan:
    recipe = cell.recipe
    steps, per_token = total_steps(recipe), flops_per_token(recipe.model)
    tokens = steps * recipe.batch_tokens
    fits = layout.fits(gpu)
    used = layout if fits or suggested is None else suggested
    repeated = 4 / 3 if used.recompute == "full" else 1.0
    hours = gpu_hours(per_token * tokens * repeated, gpu, mfu)
    return CellPlan(
        cell=cell.name,
        variant=cell.variant,
        size=cell.size,
        budget=cell.budget,
        seed=cell.seed,
        parameters=parameters_by_convention(recipe.model),
        flops_per_token=per_token,
        batch_tokens=recipe.batch_tokens,
        steps=steps,
        tokens=tokens,
        flops=per_token * tokens,
        layout=layout,
        fits=fits,
        suggested=suggested,
        gpu_hours=hours,
        hours=hours / used.world_size,
        cost=None if price is None else hours * price,
    )


def gpu_hours(flops: float, gpu: Gpu, mfu: float) -> float:
    """Hours of one `gpu` that reaches the share `mfu` of its peak."""
    return flops / (gpu.peak_flops * mfu) / 3600


def describe_cost(flops: float) -> str:
    """FLOPs, and hours by the assumptions that `plan` makes unless told otherwise."""
    hours = gpu_hours(flops, GPUS[DEFAULT_GPU], DEFAULT_MFU)
    return f"{flops:.2g} FLOPs, {hours:.2g} GPU-hours of {DEFAULT_GPU} at an assumed MFU of {DEFAULT_MFU:.0%}"


def _mfu(given: float | str | Path) -> tuple[float, str]:
    """Share of the peak and where it is from."""
    try:
        share, source = float(given), "assumed"  # type: ignore[arg-type]
    except ValueError:
        path = Path(given) / run_folder.METRICS  # type: ignore[arg-type]
        share, source = _measured_mfu(path), f"median of {path}"
    if not 0 < share <= 1:
        raise StudyError(f"--mfu {given}: must be between 0 and 1, e.g. 0.4, or a run folder that has measured it")
    return share, source


def _measured_mfu(path: Path) -> float:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except OSError:
        raise StudyError(
            f"--mfu {path.parent}: neither a number nor a run folder ({path.name} cannot be read); give e.g. 0.4"
        ) from None
    found = [value for line in lines if '"mfu"' in line and (value := json.loads(line).get("mfu")) is not None]
    if not found:
        raise StudyError(
            f"--mfu {path.parent}: no line of {path.name} has an MFU; it is measured where the device's peak is known "
            "(or logging.peak_flops is set). Give a number, e.g. 0.4"
        )
    return statistics.median(found)


def format_study_plan(plan: StudyPlan) -> str:
    """The plan as aligned tables: models, their layouts, cells; then the whole."""
    gpu = plan.gpu
    models = list({(cell.variant, cell.size): cell for cell in plan.cells}.values())
    cost = "" if plan.cost is None else f", {plan.cost:,.2f} at {plan.price:g} per GPU-hour"
    return "\n".join(
        [
            f"Plan of study {plan.study}",
            "",
            *_aligned(_model_rows(models)),
            "",
            *_aligned(_layout_rows(models), left=(0, 3, 4)),
            *_misfits(models, gpu),
            "",
            *_aligned(_cell_rows(plan)),
            "",
            f"{len(plan.cells)} cells, {plan.flops:.4g} FLOPs: {_hours(plan.gpu_hours)} GPU-hours of {gpu.name}{cost}",
            f"estimated with {plan.mfu:.1%} ({plan.mfu_source}) of {gpu.peak_flops:.4g} FLOP/s and "
            f"{gpu.memory_bytes / 1e9:.0f} GB a GPU ({gpu.source})",
        ]
    )


def _model_rows(models: Iterable[CellPlan]) -> list[tuple[str, ...]]:
    conventions = ("all", "w/o embedding", "w/o tables", "matrices", "and head")
    rows: list[tuple[str, ...]] = [("parameters", *conventions, "FLOPs/token", "batch")]
    for cell in models:
        counts = (f"{count:,}" for count in cell.parameters.values())
        rows.append((_model(cell), *counts, f"{cell.flops_per_token:.6e}", f"{cell.batch_tokens:,}"))
    return rows


def _layout_rows(models: Iterable[CellPlan]) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = [("layout", "ranks", "GiB", "as the study has it", "smallest that fits")]
    for cell in models:
        suggested = f"{cell.suggested} ({_gib(cell.suggested)})" if cell.suggested else "none"
        gib = f"{cell.layout.memory_per_rank_bytes / 2**30:.1f}"
        rows.append((_model(cell), str(cell.layout.world_size), gib, str(cell.layout), suggested))
    return rows


def _cell_rows(plan: StudyPlan) -> list[tuple[str, ...]]:
    cost = () if plan.price is None else ("cost",)
    rows: list[tuple[str, ...]] = [("cell", "steps", "tokens", "FLOPs", "GPU-hours", "hours", *cost)]
    for cell in plan.cells:
        sizes = (f"{cell.steps:,}", f"{cell.tokens:.3e}", f"{cell.flops:.3e}")
        paid = () if cell.cost is None else (f"{cell.cost:,.2f}",)
        rows.append((cell.cell, *sizes, _hours(cell.gpu_hours), _hours(cell.hours), *paid))
    return rows


def _misfits(models: Iterable[CellPlan], gpu: Gpu) -> list[str]:
    """What to change for models that need more memory than the GPU has, one line each."""
    lines = []
    for cell in models:
        if cell.fits:
            continue
        need = f"{_model(cell)} needs {_gib(cell.layout)}, but {gpu.name} has {_gib_left(gpu)} to use"
        if cell.suggested is None:
            lines.append(
                f"{need}. Nor does it in any layout up to {MOST_RANKS} ranks a model, {GPUS_PER_NODE} of them tensor "
                "parallel: use larger GPUs, or leave it out"
            )
        else:
            lines.append(
                f"{need}. Give size {cell.size} world_size: {cell.suggested.world_size} and "
                f"{', '.join(cell.suggested.overrides).replace('=', ': ')}"
            )
    return ["", *lines] if lines else []


def _model(cell: CellPlan) -> str:
    return f"{cell.variant} {cell.size}"


def _hours(hours: float) -> str:
    return f"{hours:,.3g}" if hours < 1000 else f"{hours:,.0f}"


def _gib(layout: Layout) -> str:
    return f"{layout.memory_per_rank_bytes / 2**30:.1f} GiB"


def _gib_left(gpu: Gpu) -> str:
    return f"{usable_bytes(gpu) / 2**30:.1f}"


def _aligned(rows: Sequence[Sequence[str]], left: Sequence[int] = (0,)) -> list[str]:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            text.ljust(width) if i in left else text.rjust(width)
            for i, (text, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]
