"""Weight gradients of Megatron's linear layers, added to fp32 `main_grad` by the product that makes them.

Without this, a backward pass writes each gradient in the model's precision, and the hook of Megatron's data-parallel
wrapper reads it and adds it. Megatron's layers leave that to Apex's extension `fused_weight_gradient_mlp_cuda`; this
module takes its place, by the extension's own function where it is installed, else by torch's `addmm`.

Shapes: N tokens, I inputs and O outputs of a layer.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor, nn

from bov_megatron.parallel.device import device

try:
    from fused_weight_gradient_mlp_cuda import wgrad_gemm_accum_fp32  # type: ignore[import-not-found]
except ImportError:

    def wgrad_gemm_accum_fp32(input_NI: Tensor, grad_NO: Tensor, main_grad_OI: Tensor) -> None:
        """`main_grad += gradᵀ · input`, without rounding to the inputs' dtype in between."""
        mixed: Any = {} if input_NI.dtype == main_grad_OI.dtype else {"out_dtype": main_grad_OI.dtype}
        torch.addmm(main_grad_OI, grad_NO.t(), input_NI, **mixed, out=main_grad_OI)


def add_to_main_grad(model: nn.Module, dtype: torch.dtype) -> None:
    """Let the linear layers of a model whose weights have a `main_grad` add to it, where that works for `dtype`.

    A weight of these layers must then be used by its layer alone: Megatron's hook drops what autograd has for it.
    """
    if not adds_exactly(dtype):
        return
    layers.fused_weight_gradient_mlp_cuda = sys.modules[__name__]
    for module in model.modules():
        if isinstance(module, layers.ColumnParallelLinear | layers.RowParallelLinear):
            module.gradient_accumulation_fusion = True


def adds_exactly(dtype: torch.dtype) -> bool:
    """Whether this device adds products of `dtype` to fp32 as it should: tried, as torch's releases differ in it."""
    # Integers that fp32 holds exactly, in any order of summation, and bf16 rounds: the sums, not the factors.
    input_NI, grad_NO = (torch.arange(64 * columns, device=device()).view(64, columns) % 29 - 9 for columns in (24, 16))
    # In a buffer of gradients a matrix may begin anywhere.
    main_grad_OI = torch.full((16 * 24 + 1,), 1001.0, device=device())[1:].view(16, 24)
    wanted_OI = main_grad_OI.double() + 2 * grad_NO.double().t() @ input_NI.double()
    try:
        for _ in range(2):
            wgrad_gemm_accum_fp32(input_NI.to(dtype), grad_NO.to(dtype), main_grad_OI)
        return torch.equal(main_grad_OI.double(), wanted_OI)
    except (RuntimeError, TypeError):  # no kernel, or no such argument
        return False


def weight_gradient(weight_OI: Any, input_NI: Tensor, grad_NO: Tensor, into_main_grad: bool) -> Tensor:
    """What a backward pass returns for a weight, as Megatron's layers do: its gradient or, where that is added to
    `main_grad`, memory that the data-parallel wrapper's hook throws away (it must be given some)."""
    if not into_main_grad:
        return grad_NO.t() @ input_NI
    wgrad_gemm_accum_fp32(input_NI, grad_NO, weight_OI.main_grad)
    weight_OI.grad_added_to_main_grad = True
    return torch.empty_like(weight_OI)
