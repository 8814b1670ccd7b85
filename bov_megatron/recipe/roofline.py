"""The shortest time that a step can take on a GPU, by its peak, its memory and its links.

Matrix products and attention run at the GPU's peak; all other kernels read and write at the memory's bandwidth;
messages pass at the bandwidth of the link that their group needs. The three follow each other: nothing is overlapped,
and no launch, no wait and no start of a message takes time. With a pipeline of p stages, m micro-batches and v model
chunks per stage a step takes 1 + (p - 1) / (m · v) times as long.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

from bov_megatron.recipe.gpus import Gpu


@dataclass(frozen=True)
class Roofline:
    """Seconds of a step on one rank, by what bounds them."""

    compute: float
    memory: float
    links: float
    bubble: float
    """Waiting for other pipeline stages."""

    @property
    def seconds(self) -> float:
        return self.compute + self.memory + self.links + self.bubble

    @property
    def bottleneck(self) -> str:
        parts = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return max(parts, key=lambda name: parts[name])


def roofline(
    gpu: Gpu, flops: float, moved_bytes: float, messages: Iterable[tuple[bool, float]], bubble_share: float
) -> Roofline:
    """Of one rank's step.

    Args:
        flops: of matrix products and attention.
        moved_bytes: read and written by other kernels.
        messages: whether the group is within a node, and bytes.
        bubble_share: see `bubble_share`.
    """
    compute, memory = flops / gpu.peak_flops, moved_bytes / gpu.memory_bandwidth
    links = sum(size / (gpu.node_bandwidth if within else gpu.network_bandwidth) for within, size in messages)
    return Roofline(compute, memory, links, (compute + memory + links) * bubble_share)


def bubble_share(stages: int, chunks: int, micro_batches: int) -> float:
    """Time that a pipeline stage waits for others, as a share of the time it works."""
    return (stages - 1) / (micro_batches * chunks)
