"""What FlashAttention-2 computes, in plain PyTorch, after the README and docstrings of the package flash_attn.

B batch, S queries, T keys, H heads, G key/value heads, D head size; N and M are queries and keys of all rows together.
"""

import torch


def flash_attn_func(
    q_BSHD, k_BTGD, v_BTGD, dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0
):
    """Row i of S queries sees keys i + T - S - left to i + T - S + right; causal means right = 0. -1 is no limit.

    A query without a key has the output zero.
    """
    assert q_BSHD.dim() == k_BTGD.dim() == 4 and k_BTGD.shape == v_BTGD.shape and dropout_p == softcap == 0.0
    (_, S, H, _), (T, G) = q_BSHD.shape, k_BTGD.shape[1:3]
    q, k, v = (x.transpose(1, 2) for x in (q_BSHD, k_BTGD, v_BTGD))
    k, v = (x.repeat_interleave(H // G, dim=1) for x in (k, v))
    left, right = window_size
    distance = torch.arange(S)[:, None] + T - S - torch.arange(T)  # of a key to the left of the query's position
    visible = torch.ones(S, T, dtype=torch.bool)
    if left >= 0:
        visible &= distance <= left
    if causal or right >= 0:
        visible &= distance >= (0 if causal else -right)
    scores = (q @ k.transpose(-1, -2)) * (q.size(-1) ** -0.5 if softmax_scale is None else softmax_scale)
    weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
    return (weights.nan_to_num(0.0) @ v).transpose(1, 2)


def flash_attn_varlen_func(
    q_NHD, k_MGD, v_MGD, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k,
    dropout_p=0.0, softmax_scale=None, causal=False, window_size=(-1, -1), softcap=0.0,
):  # fmt: skip
    """Rows of different lengths, one after the other; they begin at `cu_seqlens`."""
    assert cu_seqlens_q[-1] == len(q_NHD) and cu_seqlens_k[-1] == len(k_MGD)
    assert cu_seqlens_q.diff().max() == max_seqlen_q and cu_seqlens_k.diff().max() == max_seqlen_k
    options = dict(dropout_p=dropout_p, softmax_scale=softmax_scale, causal=causal, window_size=window_size)
    queries = q_NHD.split(cu_seqlens_q.diff().tolist())
    keys, values = (x.split(cu_seqlens_k.diff().tolist()) for x in (k_MGD, v_MGD))
    rows = zip(queries, keys, values, strict=True)
    return torch.cat([flash_attn_func(q[None], k[None], v[None], **options)[0] for q, k, v in rows])
