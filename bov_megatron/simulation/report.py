"""What a simulated step needs, as numbers and as text."""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from bov_megatron.plan import format_size
from bov_megatron.recipe import Recipe, data_parallel_size
from bov_megatron.recipe.gpus import DEFAULT_GPU, GPUS, Gpu
from bov_megatron.recipe.roofline import Roofline, bubble_share, roofline
from bov_megatron.simulation.collectives import Collective
from bov_megatron.simulation.step import KINDS, Measured, simulated


@dataclass
class Simulation:
    """A step of one rank; in bytes, FLOPs and seconds."""

    name: str
    world_size: int
    rank: int
    place: dict[str, int]
    """Rank within its `tensor`, `context`, `data` and `pipeline` group."""
    peak_memory_bytes: dict[str, int]
    """`total` and by kind (step.KINDS), at the moment of the highest total."""
    phase_peak_bytes: dict[str, dict[str, int]]
    """The same of `forward and backward`, which includes the reduction of gradients, and of `update`."""
    host_memory_bytes: int
    """Tables in host memory: weights, gradients and optimizer state."""
    collectives: list[dict[str, Any]]
    """By `kind`, `group` (its name) and `group_size`: `count`, `bytes` through this rank's link in the busier
    direction, and whether the group is `within_node`."""
    launches: int
    """Kernels; a compiled region is one forward and one backward."""
    host_waits: int
    """How often the host waits for a number from the device."""
    flops: float
    """Of matrix products and attention."""
    moved_bytes: float
    """Read and written by all other kernels."""
    gpu: str
    step_seconds: float
    """The least by the roofline; `roofline` has its parts, in seconds."""
    roofline: dict[str, float]
    bottleneck: str
    assumptions: list[str]


def simulate(recipe: Recipe, world_size: int, rank: int = 0, gpu: Gpu = GPUS[DEFAULT_GPU]) -> Simulation:
    """One step of `rank` among `world_size` ranks, by the code that trains, without memory for weights.

    Raises RecipeError where the recipe doesn't fit the world or cannot be simulated.
    """
    measured = simulated(recipe, world_size, rank)
    layout = recipe.parallel
    micro_batches = recipe.train.global_batch_size // recipe.train.micro_batch_size
    bubble = bubble_share(
        layout.pipeline_model_parallel_size,
        layout.virtual_pipeline_model_parallel_size,
        micro_batches // data_parallel_size(recipe, world_size),
    )
    collectives = _by_group(measured, gpu)
    messages = [(entry["within_node"], entry["bytes"]) for entry in collectives]
    step = roofline(gpu, measured.counts.flops, measured.counts.bytes, messages, bubble)
    phases = {name: _with_total(kinds) for name, kinds in measured.memory.items()}
    return Simulation(
        name=recipe.name,
        world_size=world_size,
        rank=rank,
        place=measured.place,
        peak_memory_bytes=max(phases.values(), key=lambda kinds: kinds["total"]),
        phase_peak_bytes=phases,
        host_memory_bytes=measured.host_memory,
        collectives=collectives,
        launches=measured.counts.launches,
        host_waits=measured.counts.host_waits,
        flops=measured.counts.flops,
        moved_bytes=measured.counts.bytes,
        gpu=gpu.name,
        step_seconds=step.seconds,
        roofline={field.name: getattr(step, field.name) for field in dataclasses.fields(Roofline)},
        bottleneck=step.bottleneck,
        assumptions=_assumptions(recipe),
    )


def _assumptions(recipe: Recipe) -> list[str]:
    compiled = recipe.train.compile is not False
    found = [
        "fake CPU tensors stand for the GPU's, as torch without CUDA cannot train fake CUDA ones",
        "regions of train.compile are one kernel each way and keep their inputs"
        if compiled
        else "uncompiled, norms run in several kernels as on a CPU, with copies in fp32 that a GPU doesn't make",
        "attention is one flash kernel, which keeps its output and a number per query and head",
        "matrix products add weight gradients to fp32 themselves",
        "a micro-batch has as many distinct token ids as it can",
    ]
    if recipe.train.precision == "fp32":
        found.append("products take as long as in bf16; in fp32 they take longer")
    return found


def _with_total(kinds: dict[str, int]) -> dict[str, int]:
    return {"total": sum(kinds.values()), **{kind: kinds.get(kind, 0) for kind in KINDS}}


def _by_group(measured: Measured, gpu: Gpu) -> list[dict[str, Any]]:
    alike: dict[tuple, list[Collective]] = defaultdict(list)
    for collective in measured.collectives:
        if len(collective.group) > 1:
            name = measured.name_of_group(collective)
            alike[collective.kind, name, len(measured.groups.get(name, collective.group))].append(collective)
    return [
        {
            "kind": kind,
            "group": name,
            "group_size": size,
            "count": len(found),
            "bytes": sum(collective.bytes for collective in found),
            "within_node": len({rank // gpu.node_gpus for rank in measured.groups.get(name, found[0].group)}) == 1,
        }
        for (kind, name, size), found in alike.items()
    ]


def format_simulation(result: Simulation) -> str:
    """The simulation as an aligned table."""
    s, peak = result, result.peak_memory_bytes
    place = ", ".join(f"{name} {number}" for name, number in s.place.items())
    lines = [
        f"Step of {s.name}, simulated: rank {s.rank} of {s.world_size:,} ({place})",
        "",
        f"{'Peak memory':<26}{format_size(peak['total'])}",
        *(f"  {kind:<24}{format_size(peak[kind])}" for kind in KINDS if peak[kind]),
        *(f"  in {name:<21}{format_size(kinds['total'])} at most" for name, kinds in s.phase_peak_bytes.items()),
    ]
    if s.host_memory_bytes:
        lines.append(f"{'Host memory':<26}{format_size(s.host_memory_bytes)}")
    lines += _collective_lines(s.collectives)
    lines += [
        f"{'Kernels':<26}{s.launches:,} launched, {s.flops:.4g} FLOPs, {format_size(s.moved_bytes)} moved besides",
        f"{'Waits of the host':<26}{s.host_waits}",
        f"{'Step':<26}{_milliseconds(s.step_seconds)} at the least on {s.gpu}; bottleneck: {s.bottleneck}",
        *(f"  {part:<24}{_milliseconds(seconds)}" for part, seconds in s.roofline.items() if seconds),
        "Assumed",
        *(f"  {assumption}" for assumption in s.assumptions),
    ]
    return "\n".join(lines)


def _collective_lines(collectives: Sequence[dict[str, Any]]) -> list[str]:
    total = sum(entry["bytes"] for entry in collectives)
    lines = [f"{'Collectives':<26}{format_size(total)}" if collectives else f"{'Collectives':<26}none"]
    for entry in sorted(collectives, key=lambda entry: -entry["bytes"]):
        over = f"{entry['group']} {entry['group_size']:,}{'' if entry['within_node'] else ', network'}"
        name = entry["kind"].replace("_", "-")
        lines.append(f"  {name:<24}{format_size(entry['bytes']):<12}{entry['count']:>8,} × over {over}")
    return lines


def _milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:,.1f} ms"
