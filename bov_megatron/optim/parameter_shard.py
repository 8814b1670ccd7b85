"""A parameter and the rows of it that this data-parallel rank updates."""

from __future__ import annotations

import torch
from torch import Tensor

from bov_megatron.optim.sharding import RowAssignment
from bov_megatron.parallel.parameter import LocalParameter


class ParameterShard:
    """`main` are the fp32 weights of this rank's rows: a view of an fp32 parameter, a copy of a bf16 one."""

    def __init__(self, local: LocalParameter, assignment: RowAssignment, data_parallel_rank: int):
        self.local, self.assignment = local, assignment
        self.rows = assignment.ranges[data_parallel_rank]
        weight = local.parameter.detach()[self.rows[0] : self.rows[1]]
        self.main: Tensor = weight.float() if self.has_separate_main else weight

    @property
    def has_rows(self) -> bool:
        return self.rows[0] < self.rows[1]

    @property
    def has_separate_main(self) -> bool:
        """Whether the fp32 main weights are a copy."""
        return self.local.parameter.dtype != torch.float32

    def reload_main(self) -> None:
        """Set the main weights from the parameter, after something else has written to it."""
        if self.has_separate_main:
            self.main.copy_(self.local.parameter.detach()[self.rows[0] : self.rows[1]])

    def gradient(self) -> Tensor:
        """The local gradient, all rows: Megatron's fp32 `main_grad`, or `grad` where there is none. Raises RuntimeError
        without a gradient."""
        gradient = getattr(self.local.parameter, "main_grad", None)
        if gradient is None:
            gradient = self.local.parameter.grad
        if gradient is None:
            raise RuntimeError(
                f"parameter {self.local.qualified_name} has no gradient: run backward over the whole model before "
                "step(), or freeze it with requires_grad=False before the optimizer is made"
            )
        return gradient

    def row_gradient(self) -> Tensor:
        """fp32 gradient of this rank's rows."""
        return self.gradient()[self.rows[0] : self.rows[1]].float()
