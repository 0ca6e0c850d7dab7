"""Causal softmax attention of queries that are the last of their keys, in memory linear in both.

torch's `is_causal` aligns the first query with the first key. Where queries come after a prefix of keys, as in a later
piece of the sequence under context parallelism, the last query belongs to the last key. Flash kernels for CUDA know
this alignment (torch.nn.attention.bias.causal_lower_right); on a CPU it is written out as a queries x keys mask: there
the prefix and the square after it are attended to one by one and joined by their log-sum-exps, as in ring attention.
Shape suffixes: B micro-batch, N heads, Q queries, K keys, P prefix, D head dim.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

FLASH_DTYPES = (torch.bfloat16, torch.float16)


def causal_attention(
    query_BNQD: Tensor, key_BNKD: Tensor, value_BNKD: Tensor, scale: float | None = None, dropout: float = 0.0
) -> Tensor:
    """Query i of Q sees the first K - Q + i + 1 keys.

    Args:
        query_BNQD: queries; Q is at most K.
        key_BNKD, value_BNKD: keys and values; their heads may be fewer than the queries', by a whole factor.
        scale: factor of the scores; None is 1 / sqrt(D).
        dropout: probability of leaving out a weight; above 0 the scores are written out on a CPU.

    Returns:
        [B, N, Q, D].
    """
    queries, keys = query_BNQD.shape[2], key_BNKD.shape[2]
    on_cpu = query_BNQD.device.type == "cpu"
    flash_on_cpu = on_cpu and queries != keys and dropout == 0.0
    # on CUDA only the flash kernel takes groups, and it knows no float32: there the scores would be written out
    takes_groups = not flash_on_cpu if on_cpu else query_BNQD.dtype in FLASH_DTYPES
    grouped = query_BNQD.shape[1] != key_BNKD.shape[1]
    if grouped and not takes_groups:
        heads_per_group = query_BNQD.shape[1] // key_BNKD.shape[1]
        key_BNKD, value_BNKD = (part.repeat_interleave(heads_per_group, dim=1) for part in (key_BNKD, value_BNKD))
        grouped = False
    if queries == keys:
        return F.scaled_dot_product_attention(
            query_BNQD, key_BNKD, value_BNKD, dropout_p=dropout, is_causal=True, scale=scale, enable_gqa=grouped
        )
    if not flash_on_cpu:
        from torch.nn.attention.bias import causal_lower_right  # it brings torch's compiler along

        bias = causal_lower_right(queries, keys)
        return F.scaled_dot_product_attention(
            query_BNQD, key_BNKD, value_BNKD, attn_mask=bias, dropout_p=dropout, scale=scale, enable_gqa=grouped
        )
    output_BNQD: Tensor = _AfterPrefix.apply(query_BNQD, key_BNKD, value_BNKD, scale)
    return output_BNQD


class _AfterPrefix(torch.autograd.Function):
    """softmax over prefix and square = their two softmaxes, weighted by exp(own log-sum-exp - joint log-sum-exp).

    The backward pass of flash attention needs only the joint output and log-sum-exp: each part's gradient is one call.
    """

    @staticmethod
    def forward(ctx: Any, query_BNQD: Tensor, key_BNKD: Tensor, value_BNKD: Tensor, scale: float | None) -> Tensor:
        prefix = key_BNKD.shape[2] - query_BNQD.shape[2]
        parts = [
            torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                query_BNQD, key_BNKD[:, :, keys], value_BNKD[:, :, keys], is_causal=is_causal, scale=scale
            )
            for keys, is_causal in _parts(prefix)
        ]
        log_sums_BNQ = torch.logaddexp(parts[0][1], parts[1][1])
        output_BNQD = torch.zeros_like(query_BNQD)
        for part_BNQD, part_log_sums_BNQ in parts:
            output_BNQD += part_BNQD * (part_log_sums_BNQ - log_sums_BNQ).exp().unsqueeze(-1)
        ctx.save_for_backward(query_BNQD, key_BNKD, value_BNKD, output_BNQD, log_sums_BNQ)
        ctx.prefix, ctx.scale = prefix, scale
        return output_BNQD

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient_BNQD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query_BNQD, key_BNKD, value_BNKD, output_BNQD, log_sums_BNQ = ctx.saved_tensors
        query_gradient_BNQD = torch.zeros_like(query_BNQD)
        key_gradient_BNKD, value_gradient_BNKD = torch.empty_like(key_BNKD), torch.empty_like(value_BNKD)
        for keys, is_causal in _parts(ctx.prefix):
            of_query, of_key, of_value = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                gradient_BNQD.contiguous(),
                query_BNQD,
                key_BNKD[:, :, keys],
                value_BNKD[:, :, keys],
                output_BNQD,
                log_sums_BNQ,
                0.0,
                is_causal,
                scale=ctx.scale,
            )
            query_gradient_BNQD += of_query
            key_gradient_BNKD[:, :, keys] = of_key
            value_gradient_BNKD[:, :, keys] = of_value
        return query_gradient_BNQD, key_gradient_BNKD, value_gradient_BNKD, None


def _parts(prefix: int) -> tuple[tuple[slice, bool], tuple[slice, bool]]:
    """(keys, whether they are seen causally): the prefix, seen by every query, and the square after it."""
    return (slice(None, prefix), False), (slice(prefix, None), True)
