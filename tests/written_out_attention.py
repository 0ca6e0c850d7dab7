"""Causal attention as the equation has it, scores and all: what fast kernels are held against."""

import math

import torch
from torch import Tensor


def written_out(query_BNQD: Tensor, key_BNKD: Tensor, value_BNKD: Tensor, scale: float) -> Tensor:
    """Softmax(scale Q K^T) V; the last query belongs to the last key. Heads of keys may be fewer, by a whole factor."""
    group = query_BNQD.shape[1] // key_BNKD.shape[1]
    key_BNKD, value_BNKD = (part.repeat_interleave(group, dim=1) for part in (key_BNKD, value_BNKD))
    queries, keys = query_BNQD.shape[2], key_BNKD.shape[2]
    places_K = torch.arange(keys, device=query_BNQD.device)
    seen_QK = places_K <= places_K[keys - queries :, None]
    scores_BNQK = (query_BNQD @ key_BNKD.mT * scale).masked_fill(~seen_QK, -math.inf)
    return scores_BNQK.softmax(dim=-1) @ value_BNKD
