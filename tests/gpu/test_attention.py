"""Causal attention on a GPU against the softmax written out in float64, and its memory."""

import math

import pytest
import torch
from torch import Tensor

from dsmoe_megatron.model.causal_attention import causal_attention
from tests.written_out_attention import written_out

HEADS, SIZE = 8, 32


def parts(queries: int, keys: int, key_heads: int, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator("cuda").manual_seed(0)

    def part(heads: int, length: int) -> Tensor:
        values = torch.randn(2, heads, length, SIZE, generator=generator, device="cuda")
        return values.to(dtype).requires_grad_()

    return part(HEADS, queries), part(key_heads, keys), part(key_heads, keys)


@pytest.mark.parametrize(("queries", "keys"), [(96, 96), (32, 96)])
@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 4e-2)])
def test_equals_the_softmax_written_out(
    queries: int, keys: int, key_heads: int, dtype: torch.dtype, tolerance: float
) -> None:
    inputs = parts(queries, keys, key_heads, dtype)
    query, key, value = (part.detach().double().requires_grad_() for part in inputs)
    weights_BNQD = torch.randn(2, HEADS, queries, SIZE, device="cuda", dtype=torch.float64)

    outputs = causal_attention(*inputs), written_out(query, key, value, scale=1 / math.sqrt(SIZE))

    found, expected = (
        [output, *torch.autograd.grad((output.double() * weights_BNQD).sum(), given)]
        for output, given in zip(outputs, (inputs, (query, key, value)), strict=True)
    )
    for actual, right in zip(found, expected, strict=True):
        torch.testing.assert_close(actual.double(), right, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("prefix", [0, 1])
def test_memory_grows_with_the_sequence_not_with_its_square(dtype: torch.dtype, prefix: int) -> None:
    """With groups of heads; queries that begin with the sequence, and after a prefix as long as they are."""

    def peak(queries: int) -> int:
        inputs = parts(queries, (1 + prefix) * queries, 2, dtype)
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        causal_attention(*inputs).sum().backward()
        return torch.cuda.max_memory_allocated() - before

    assert peak(8192) < 3 * peak(4096)
