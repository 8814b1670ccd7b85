"""A torch parameter with everything the optimizer needs to know about it, read from its attributes once."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from bov_megatron.optim.sharding import RowAssignment
from bov_megatron.recipe.parameters import KINDS


class ManagedParameter:
    """One local parameter: what the model says about it, which rows this rank updates, and their fp32 weights.

    Read from the parameter's attributes:

    - `kind`: one of `parameters.KINDS`.
    - `canonical_name`: a name of `parameters.parameter_specs`, or a tuple of them for a fused matrix.
    - `fused_split`: rows per query group of each matrix inside a fused one, or absent.
    - `partition_dim` (Megatron's): the dimension split over tensor-parallel ranks; -1 or absent if replicated.
    - `on_host`: True on a table in host memory, which may be another device than the other parameters'.
    - `shared` (Megatron's): True on a further copy of a weight that another pipeline stage counts.
    - `forward_position`: ascending in the order in which a forward pass reads weights; absent: first.

    Raises ValueError, naming the parameter, where an attribute is missing or does not fit.
    """

    def __init__(self, qualified_name: str, parameter: nn.Parameter, tensor_parallel_size: int):
        self.qualified_name = qualified_name
        self.parameter = parameter
        self.kind: str = getattr(parameter, "kind", None)
        names = getattr(parameter, "canonical_name", None)
        self.names: tuple[str, ...] = (names,) if isinstance(names, str) else tuple(names or ())
        self.split: tuple[int, ...] | None = getattr(parameter, "fused_split", None)
        self.partition_dim: int = getattr(parameter, "partition_dim", -1)
        self.on_host: bool = getattr(parameter, "on_host", False)
        self.counted_elsewhere: bool = getattr(parameter, "shared", False)
        self.forward_position: int = getattr(parameter, "forward_position", 0)
        self.tensor_parallel_size = tensor_parallel_size if self.partition_dim >= 0 else 1
        self._check()
        self.assignment: RowAssignment | None = None
        self.rows = (0, parameter.size(0))
        self.main: Tensor | None = None

    def _check(self) -> None:
        where, parameter = f"parameter {self.qualified_name}", self.parameter
        if self.kind not in KINDS:
            raise ValueError(f"{where}: attribute kind={self.kind!r}; set it to one of {', '.join(KINDS)}")
        if not self.names:
            raise ValueError(f"{where}: attribute canonical_name is missing")
        if len(self.names) != len(self.split or (0,)):
            raise ValueError(f"{where}: fused_split={self.split} needs as many canonical names, found {self.names}")
        if parameter.dtype not in (torch.float32, torch.bfloat16):
            raise ValueError(f"{where}: dtype {parameter.dtype}; train in float32 or bfloat16")
        if parameter.dim() == 0:
            raise ValueError(f"{where}: a scalar needs shape [1], found []")
        if self.split and self.full_shape[0] % sum(self.split):
            raise ValueError(f"{where}: {self.full_shape[0]} rows do not divide into groups of {self.split}")
        if self.kind == "matrix" and parameter.dim() != 2:
            raise ValueError(f"{where}: kind 'matrix' needs 2 dimensions, found shape {tuple(parameter.shape)}")

    @property
    def full_shape(self) -> tuple[int, ...]:
        """Shape over all tensor-parallel ranks."""
        shape = list(self.parameter.shape)
        if self.partition_dim >= 0:
            shape[self.partition_dim] *= self.tensor_parallel_size
        return tuple(shape)

    def piece_shapes(self) -> list[tuple[int, int]]:
        """Full `(rows, columns)` of each matrix inside, one per canonical name."""
        rows, columns = self.full_shape
        if self.split is None:
            return [(rows, columns)]
        groups = rows // sum(self.split)
        return [(groups * part, columns) for part in self.split]

    def assign(self, assignment: RowAssignment, data_parallel_rank: int) -> None:
        """Take this rank's rows: a view of fp32 weights, or fp32 main weights beside bf16 ones."""
        self.assignment = assignment
        self.rows = assignment.ranges[data_parallel_rank]
        start, stop = self.rows
        if start == stop:
            return
        local = self.parameter.detach()[start:stop]
        self.main = local.float() if self.has_separate_main else local

    @property
    def has_separate_main(self) -> bool:
        """Whether the fp32 main weights live beside the parameter rather than in it."""
        return self.parameter.dtype != torch.float32

    def reload_main(self) -> None:
        """Take the main weights from the parameter again, after something else has written to it."""
        if self.main is not None and self.has_separate_main:
            self.main.copy_(self.parameter.detach()[self.rows[0] : self.rows[1]])

    def gradient(self) -> Tensor:
        """The local gradient, all rows: Megatron's fp32 `main_grad`, or `grad` where no DDP wraps the model."""
        gradient = getattr(self.parameter, "main_grad", None)
        if gradient is None:
            gradient = self.parameter.grad
        if gradient is None:
            raise RuntimeError(
                f"parameter {self.qualified_name} has no gradient: run backward over the whole model before step(), "
                "or freeze it with requires_grad=False before the optimizer is made"
            )
        return gradient

    def row_gradient(self) -> Tensor:
        """fp32 gradient of this rank's rows."""
        return self.gradient()[self.rows[0] : self.rows[1]].float()


def managed_parameters(model_chunks: Iterable[nn.Module], tensor_parallel_size: int) -> list[ManagedParameter]:
    """All trainable parameters of `model_chunks`, each once, in the model's own order, named `<chunk>.<name>`."""
    seen: set[int] = set()
    managed = []
    for index, chunk in enumerate(model_chunks):
        for name, parameter in chunk.named_parameters():
            if parameter.requires_grad and id(parameter) not in seen:
                seen.add(id(parameter))
                managed.append(ManagedParameter(f"{index}.{name}", parameter, tensor_parallel_size))
    return managed
