"""The output layer: soft-capped logits, or each token's cross-entropy without logits in fp32.

Logits are the largest tensor of a step. For the loss they exist once, in the model's precision; what needs fp32 (soft
cap, softmax) is computed for a chunk of tokens at a time, in the forward pass and again in the backward pass, which
writes their gradient over them. The vocabulary is split over tensor-parallel ranks, which exchange two numbers a token.

Shapes: s this context-parallel rank's part of the sequence, B batch, H hidden, V vocabulary (padded), T tensor-parallel
ranks, v = V/T this rank's rows of the output matrix, N = s·B tokens, n a chunk of them. Under sequence parallelism
hidden states are `[s/T, B, H]`.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from bov_megatron.model.weight_gradients import weight_gradient
from bov_megatron.parallel.regions import region
from bov_megatron.recipe.memory import LOSS_CHUNK_ELEMENTS

CHUNK_ELEMENTS = {"cpu": 2**18, "cuda": LOSS_CHUNK_ELEMENTS}
"""Logits in fp32 at a time, by device: as many as stay in a core's cache, or as fill a GPU."""


class OutputLayer(ColumnParallelLinear):
    """Megatron's column-parallel output matrix, soft cap and loss in one module.

    In one, because a module waits for its own weights: with `parallel.overlap_param_gather`, and under ZeRO 3, which
    gathers them around each module's forward and backward pass.

    Args:
        vocab_size: real tokens; the rows after them are padding, without probability or gradient.
        padded_vocab_size: V.
        softcap: logits are `softcap · tanh(logits / softcap)`.
    """

    def __init__(
        self,
        config: TransformerConfig,
        vocab_size: int,
        padded_vocab_size: int,
        softcap: float,
        tp_group: dist.ProcessGroup,
    ):
        super().__init__(
            config.hidden_size,
            padded_vocab_size,
            config=config,
            init_method=config.init_method,
            bias=False,
            tp_group=tp_group,
        )
        self.softcap = softcap
        width = self.output_size_per_partition
        self.real_columns = min(max(vocab_size - tp_group.rank() * width, 0), width)
        """How many of this rank's rows are tokens."""

    def forward(self, hidden_sBH: Tensor, labels_Bs: Tensor | None = None) -> Tensor:
        """Loss per token in nats, fp32 `[B, s]`; without labels soft-capped fp32 logits of this rank's vocabulary
        `[B, s, v]`, those of padding -inf."""
        if labels_Bs is None:
            logits_sBv, _ = super().forward(hidden_sBH)
            capped = soft_cap(logits_sBv, self.softcap)
            capped[..., self.real_columns :] = float("-inf")
            return capped.transpose(0, 1).contiguous()
        labels_N = labels_Bs.transpose(0, 1).flatten()
        loss_N = _TokenLoss.apply(
            hidden_sBH,
            self.weight,
            labels_N,
            self.softcap,
            self.real_columns,
            self.tp_group,
            self.sequence_parallel,
            self.gradient_accumulation_fusion,
        )
        return loss_N.view(-1, len(labels_Bs)).transpose(0, 1)


def soft_cap(logits: Tensor, cap: float) -> Tensor:
    """`cap · tanh(logits / cap)` in fp32."""
    return cap * torch.tanh(logits.float() / cap)


class _TokenLoss(torch.autograd.Function):
    """Cross-entropy of soft-capped logits, from hidden states and output matrix to nats per token `[N]`."""

    @staticmethod
    def forward(ctx, hidden, weight_vH, labels_N, cap, real_columns, group, sequence_parallel, into_main_grad):
        hidden_NH = _gather(hidden, group) if sequence_parallel else hidden.flatten(0, 1)
        logits_Nv = hidden_NH @ weight_vH.t()
        own_N = labels_N - group.rank() * len(weight_vH)
        is_own_N = (own_N >= 0) & (own_N < real_columns)
        own_N = own_N.masked_fill(~is_own_N, 0)[:, None]
        chosen_N = torch.where(is_own_N, soft_cap(logits_Nv.gather(1, own_N), cap)[:, 0], 0.0)
        real_logits = logits_Nv[:, :real_columns].chunk(_number_of_chunks(logits_Nv))
        own_logsumexp_N = torch.cat([logsumexp_of_capped(chunk, cap) for chunk in real_logits])
        logsumexp_N, chosen_N = _over_vocabulary(own_logsumexp_N, chosen_N, group)
        # Not among the saved tensors: the backward pass overwrites them.
        ctx.logits_Nv = logits_Nv
        ctx.save_for_backward(hidden, weight_vH, own_N, is_own_N, logsumexp_N, chosen_N)
        ctx.settings = cap, real_columns, group, sequence_parallel, into_main_grad
        return logsumexp_N - chosen_N

    @staticmethod
    def backward(ctx, grad_N):
        hidden, weight_vH, own_N, is_own_N, logsumexp_N, chosen_N = ctx.saved_tensors
        cap, real_columns, group, sequence_parallel, into_main_grad = ctx.settings
        if ctx.logits_Nv is None:
            raise RuntimeError("the loss has no second backward pass: the first one overwrites the logits")
        gradient_Nv, ctx.logits_Nv = ctx.logits_Nv, None
        chunks = [x.chunk(_number_of_chunks(gradient_Nv)) for x in (gradient_Nv[:, :real_columns], logsumexp_N, grad_N)]
        for logits_nv, logsumexp_n, grad_n in zip(*chunks, strict=True):
            overwrite_with_gradient(logits_nv, logsumexp_n, grad_n, cap)
        gradient_Nv[:, real_columns:] = 0
        # The labels' own logits: softmax - 1 in place of softmax.
        at_label_N = grad_N * ((chosen_N - logsumexp_N).exp() - 1) * (1 - (chosen_N / cap).square())
        others_N = gradient_Nv.gather(1, own_N)[:, 0]
        gradient_Nv.scatter_(1, own_N, torch.where(is_own_N, at_label_N.to(others_N.dtype), others_N)[:, None])

        grad_hidden, work = _reduce(gradient_Nv @ weight_vH, hidden, group, sequence_parallel)
        grad_weight = None
        if ctx.needs_input_grad[1]:
            hidden_NH = _gather(hidden, group) if sequence_parallel else hidden.flatten(0, 1)
            grad_weight = weight_gradient(weight_vH, hidden_NH, gradient_Nv, into_main_grad)
        if work is not None:
            work.wait()
        return grad_hidden, grad_weight, *[None] * 6


@region
def logsumexp_of_capped(logits_nv: Tensor, cap: float) -> Tensor:
    """`log Σ exp(soft_cap(logits))` over this rank's vocabulary, fp32 `[n]`; -inf where the rank has only padding."""
    return torch.logsumexp(soft_cap(logits_nv, cap), dim=1)


@region
def overwrite_with_gradient(logits_nv: Tensor, logsumexp_n: Tensor, grad_n: Tensor, cap: float) -> None:
    """Replace logits by the gradient of `Σ grad · logsumexp` with respect to them, before the soft cap."""
    tanh = torch.tanh(logits_nv.float() / cap)
    softmax = torch.exp(cap * tanh - logsumexp_n[:, None])
    logits_nv.copy_(softmax * grad_n[:, None] * (1 - tanh * tanh))


def _number_of_chunks(logits_Nv: Tensor) -> int:
    return -(-logits_Nv.numel() // CHUNK_ELEMENTS[logits_Nv.device.type])


def _over_vocabulary(logsumexp_N: Tensor, chosen_N: Tensor, group: dist.ProcessGroup) -> tuple[Tensor, Tensor]:
    """Both over the whole vocabulary, from each tensor-parallel rank's part, by one all-gather."""
    if group.size() == 1:
        return logsumexp_N, chosen_N
    mine = torch.stack((logsumexp_N, chosen_N))
    parts = mine.new_empty(group.size(), *mine.shape)
    dist.all_gather_into_tensor(parts.flatten(0, 1), mine, group=group)
    return torch.logsumexp(parts[:, 0], dim=0), parts[:, 1].sum(0)


def _gather(hidden: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Whole sequences `[N, H]` from this rank's chunk `[s/T, B, H]`."""
    whole = hidden.new_empty(group.size() * hidden.size(0), *hidden.shape[1:])
    dist.all_gather_into_tensor(whole, hidden.contiguous(), group=group)
    return whole.flatten(0, 1)


def _reduce(
    grad_NH: Tensor, hidden: Tensor, group: dist.ProcessGroup, sequence_parallel: bool
) -> tuple[Tensor, dist.Work | None]:
    """Gradient of `hidden`, summed over the parts of the vocabulary; complete once the work is waited for."""
    if sequence_parallel:
        grad = torch.empty_like(hidden)
        return grad, dist.reduce_scatter_tensor(grad, grad_NH.view(-1, *hidden.shape[1:]), group=group, async_op=True)
    grad = grad_NH.view(hidden.shape)
    return grad, dist.all_reduce(grad, group=group, async_op=True) if group.size() > 1 else None
