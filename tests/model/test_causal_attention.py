"""Queries after a prefix of keys, against the softmax written out: values, gradients, memory."""

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from dsmoe_megatron.model.causal_attention import causal_attention
from tests.written_out_attention import written_out


def inputs(queries: int, keys: int, heads: int, key_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)

    def part(part_heads: int, length: int) -> Tensor:
        return torch.randn(2, part_heads, length, 8, dtype=dtype, requires_grad=True)

    return part(heads, queries), part(key_heads, keys), part(key_heads, keys)


@pytest.mark.parametrize(("queries", "keys"), [(1, 2), (5, 13), (12, 13), (8, 16), (9, 9)])
@pytest.mark.parametrize("key_heads", [6, 2])
def test_equals_the_softmax_written_out(queries: int, keys: int, key_heads: int) -> None:
    parts = inputs(queries, keys, 6, key_heads, torch.float64)
    weights_BNQD = torch.randn(2, 6, queries, 8, dtype=torch.float64)

    output, expected = causal_attention(*parts, scale=0.3), written_out(*parts, scale=0.3)

    torch.testing.assert_close(output, expected)
    gradients = (torch.autograd.grad((each * weights_BNQD).sum(), parts) for each in (output, expected))
    torch.testing.assert_close(*gradients)


def test_dropout_keeps_the_expectation() -> None:
    parts = inputs(4, 12, 2, 2, torch.float32)
    samples = torch.stack([causal_attention(*parts, dropout=0.5) for _ in range(4000)])

    torch.testing.assert_close(samples.mean(0), causal_attention(*parts), rtol=0, atol=0.1)
    assert not samples[0].equal(samples[1])


def test_memory_grows_with_the_keys_not_with_queries_times_keys() -> None:
    def largest_tensor(length: int) -> int:
        query, key, value = (torch.randn(1, 2, size, 16, requires_grad=True) for size in (length // 4, length, length))
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as record:
            causal_attention(query, key, value).sum().backward()
        return max(event.cpu_memory_usage for event in record.events())

    assert largest_tensor(8192) < 5 * largest_tensor(2048)
