"""The description of a parameter that model, optimizer and engines share, and two hooks between them during a step."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from bov_megatron.recipe.parameters import KINDS, ParameterSpec


@dataclass(eq=False)
class LocalParameter:
    """A parameter of this rank: a canonical tensor, part of one, or several fused.

    Raises ValueError where the fields are inconsistent.
    """

    qualified_name: str
    """Name in `named_parameters` of its model chunk."""
    parameter: Any
    """An nn.Parameter, on which Megatron and DeepSpeed set attributes of their own (`main_grad`, `ds_tensor`, …)."""
    specs: tuple[ParameterSpec, ...]
    """Its canonical parameters: one, or query, key (and value) of a fused matrix."""
    partition_dim: int = -1
    """Dimension split over tensor-parallel ranks; -1 if every rank holds all of it."""
    tensor_parallel_size: int = 1
    """Ranks over which it is split; 1 if it isn't."""
    fused_split: tuple[int, ...] | None = None
    """Rows per query group of each canonical parameter in a fused matrix."""
    on_host: bool = False
    """Whether it is in host memory while other parameters are on the device."""
    forward_position: int = 0
    """Ascends in the order in which a forward pass reads weights."""
    shape: torch.Size = field(init=False)
    """This rank's, at construction; ZeRO 3 later empties parameters."""

    def __post_init__(self):
        self.shape = self.parameter.shape
        where, shape = f"parameter {self.qualified_name}", tuple(self.shape)
        for spec in self.specs:
            if spec.kind not in KINDS:
                raise ValueError(f"{where}: kind={spec.kind!r}; it must be one of {', '.join(KINDS)}")
        if len(self.specs) != len(self.fused_split or (0,)):
            raise ValueError(f"{where}: fused_split={self.fused_split} needs as many canonical names, not {self.names}")
        if self.parameter.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{where}: dtype {self.parameter.dtype}; train in float32 or bfloat16")
        if not shape:
            raise ValueError(f"{where}: a scalar needs shape [1], found []")
        if self.fused_split and self.full_shape[0] % sum(self.fused_split):
            raise ValueError(f"{where}: {self.full_shape[0]} rows do not divide into groups of {self.fused_split}")
        if self.kind == "matrix" and len(shape) != 2:
            raise ValueError(f"{where}: kind 'matrix' needs 2 dimensions, found shape {shape}")

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(spec.name for spec in self.specs)

    @property
    def kind(self) -> str:
        return self.specs[0].kind

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape over all tensor-parallel ranks, padding included."""
        sizes = [self.tensor_parallel_size if dim == self.partition_dim else 1 for dim in range(len(self.shape))]
        return tuple(size * ranks for size, ranks in zip(self.shape, sizes, strict=True))

    def piece_shapes(self) -> list[tuple[int, int]]:
        """Full `(rows, columns)` of each canonical matrix."""
        rows, columns = self.full_shape
        if self.fused_split is None:
            return [(rows, columns)]
        groups = rows // sum(self.fused_split)
        return [(groups * part, columns) for part in self.fused_split]

    def fuse(self, pieces: list[Tensor]) -> Tensor:
        """The whole tensor from whole canonical ones."""
        return fuse(pieces, self.fused_split) if self.fused_split else pieces[0]

    def unfuse(self, whole: Tensor) -> list[Tensor]:
        """The inverse of `fuse`."""
        return unfuse(whole, self.fused_split) if self.fused_split else [whole]


def fuse(pieces: list[Tensor], split: tuple[int, ...]) -> Tensor:
    """Query, key (and value) `[rows, H]` interleaved by query group, as in Megatron's linear_qkv.

    Args:
        split: rows per query group of each piece.
    """
    grouped = [piece.unflatten(0, (-1, rows)) for piece, rows in zip(pieces, split, strict=True)]
    return torch.cat(grouped, dim=1).flatten(0, 1)


def unfuse(fused: Tensor, split: tuple[int, ...]) -> list[Tensor]:
    """The inverse of `fuse`."""
    return [piece.flatten(0, 1) for piece in fused.unflatten(0, (-1, sum(split))).split(split, dim=1)]


# Both hooks are attributes of the parameter, because the value tables' autograd functions call them, and those have
# access to nothing but the parameter.


def gradient_ready(parameter: nn.Parameter) -> None:
    """Signal that `parameter.main_grad` is complete for this micro-batch.

    Code that writes `main_grad` without autograd calls this once per backward pass, after the last write. A reduction
    during the backward pass (engines/data_parallel.py) waits for it; otherwise it does nothing.
    """
    ready = getattr(parameter, "on_gradient_ready", None)
    if callable(ready):
        ready()


def await_weight(parameter: nn.Parameter) -> None:
    """Wait until `parameter` has the last update. Call it before reading weights outside their module's forward pass.

    Has an effect only where weights are gathered during the forward pass (optim/weight_gatherer.py).
    """
    on_read = getattr(parameter, "on_read", None)
    if on_read is not None:
        on_read()
