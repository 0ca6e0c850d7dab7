"""Core attention against the softmax written out, and its memory."""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dsmoe_megatron.model.core_attention import ScaledDotProductCoreAttention


def core_attention(
    attn_mask_type: AttnMaskType = AttnMaskType.causal, dropout: float = 0.0, sequence_parallel: bool = False
) -> ScaledDotProductCoreAttention:
    config = SimpleNamespace(attention_dropout=dropout, sequence_parallel=sequence_parallel)
    groups = SimpleNamespace(cp=SimpleNamespace(size=lambda: 1))
    return ScaledDotProductCoreAttention(config, attn_mask_type, pg_collection=groups)


def written_out(query_SBND: Tensor, key_SBKD: Tensor, value_SBKD: Tensor) -> Tensor:
    group = query_SBND.shape[2] // key_SBKD.shape[2]
    keys_SBND, values_SBND = (part.repeat_interleave(group, dim=2) for part in (key_SBKD, value_SBKD))
    scores_BNST = torch.einsum("sbnd,tbnd->bnst", query_SBND, keys_SBND) / math.sqrt(query_SBND.shape[-1])
    future = torch.ones(scores_BNST.shape[-2:], dtype=torch.bool).triu(1)
    weights_BNST = scores_BNST.masked_fill(future, float("-inf")).softmax(dim=-1)
    return torch.einsum("bnst,tbnd->sbnd", weights_BNST, values_SBND).flatten(2)


@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_equals_the_softmax_written_out(kv_heads: int) -> None:
    torch.manual_seed(0)
    query, key, value = (torch.randn(17, 3, heads, 8, dtype=torch.float64) for heads in (6, kv_heads, kv_heads))

    output = core_attention()(query, key, value, None)

    torch.testing.assert_close(output, written_out(query, key, value))


def test_memory_grows_with_the_sequence_not_its_square() -> None:
    def largest_tensor(length: int) -> int:
        inputs = [torch.randn(length, 1, 2, 16, requires_grad=True) for _ in range(3)]
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            core_attention()(*inputs, None).sum().backward()
        return max(event.cpu_memory_usage for event in record.events())

    assert largest_tensor(4096) < 5 * largest_tensor(1024)


@pytest.mark.parametrize(("sequence_parallel", "own_masks"), [(False, True), (True, False)])
def test_tensor_parallel_ranks_drop_weights_of_their_own(sequence_parallel: bool, own_masks: bool) -> None:
    # under sequence parallelism megatron-core has forked the random state around the block
    attention = core_attention(dropout=0.5, sequence_parallel=sequence_parallel)
    parts = [torch.randn(16, 1, 2, 8) for _ in range(3)]

    def seed(rank: int) -> None:
        torch.manual_seed(7)
        tensor_parallel.model_parallel_cuda_manual_seed(7, tp_rank=rank, ep_rank=0, etp_rank=0, force_reset_rng=True)

    def output(rank: int) -> Tensor:
        seed(rank)
        return attention(*parts, None)

    def gradient(recompute: bool) -> Tensor:
        seed(rank=1)
        own = torch.stack(parts).requires_grad_()
        forward = partial(tensor_parallel.checkpoint, attention, False) if recompute else attention
        forward(*own, None).square().sum().backward()
        assert own.grad is not None
        return own.grad

    assert torch.equal(output(rank=0), output(rank=0))
    assert torch.equal(output(rank=0), output(rank=1)) != own_masks
    assert torch.equal(gradient(recompute=True), gradient(recompute=False))


def test_refuses_other_masks() -> None:
    with pytest.raises(ValueError, match="causal"):
        core_attention(AttnMaskType.padding)
