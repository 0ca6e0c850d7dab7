"""Causal core attention on torch's scaled_dot_product_attention: memory linear in the sequence, grouped heads.

megatron-core's own DotProductAttention materialises the sequence x sequence scores and knows no context parallelism.
Under context parallelism keys and values (few heads) are gathered; each rank's two chunks of queries, in
megatron-core's zig-zag order, attend to the prefix that they may see. Documents of one sample that must not see each
other are attended to one by one.
Shape suffixes: S sequence, B micro-batch, N query heads, K key/value heads, D head dim.
"""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.tensor_parallel import get_cuda_rng_tracker
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from dsmoe_megatron.model.causal_attention import causal_attention


class ScaledDotProductCoreAttention(torch.nn.Module):
    """Softmax(Q K^T / sqrt(D)) V under the causal mask.

    Args:
        config: attention_dropout and sequence_parallel are read.
        attn_mask_type: must be causal.
        softmax_scale: factor of the scores; None is 1 / sqrt(D).
        pg_collection: process groups; cp is read.
        unused: further arguments of megatron-core's CoreAttentionBuilder.
    """

    def __init__(
        self,
        config: TransformerConfig,
        attn_mask_type: AttnMaskType,
        softmax_scale: float | None = None,
        pg_collection: Any = None,
        **unused: Any,
    ) -> None:
        super().__init__()
        if attn_mask_type != AttnMaskType.causal:
            raise ValueError(f"attention mask type {attn_mask_type}: this core attention is causal")
        self.context_group: dist.ProcessGroup = pg_collection.cp
        self.softmax_scale = softmax_scale
        self.dropout, self.sequence_parallel = config.attention_dropout, config.sequence_parallel

    def forward(
        self, query_SBND: Tensor, key_SBKD: Tensor, value_SBKD: Tensor, attention_mask: Tensor | None, **unused: Any
    ) -> Tensor:
        """[S, B, N, D], [S, B, K, D] twice -> [S, B, N*D].

        Causality needs no mask. In the place of one, megatron-core hands through what separates documents:

        Args:
            query_SBND, key_SBKD, value_SBKD: of this context-parallel rank.
            attention_mask: `document_starts` of this rank's queries, [B, S] on the CPU; None where a token sees all
                that came before it in its sample.
            unused: further arguments of megatron-core.
        """
        with self._dropout_of_own_heads():
            return self._forward(query_SBND, key_SBKD, value_SBKD, attention_mask)

    def _dropout_of_own_heads(self) -> contextlib.AbstractContextManager[None]:
        """Other tensor-parallel ranks hold other heads and draw other masks, as in megatron-core's DotProductAttention.

        Under sequence parallelism the whole block runs so.
        """
        if self.training and self.dropout and not self.sequence_parallel:
            return get_cuda_rng_tracker().fork()
        return contextlib.nullcontext()

    def _forward(self, query_SBND: Tensor, key_SBKD: Tensor, value_SBKD: Tensor, starts_BS: Tensor | None) -> Tensor:
        ranks = self.context_group.size()
        if ranks == 1:
            return self._attend(query_SBND, key_SBKD, value_SBKD, 0, starts_BS)
        key_SBKD, value_SBKD = self._whole_sequence(key_SBKD), self._whole_sequence(value_SBKD)
        chunks = query_SBND.chunk(2)
        starts = (None, None) if starts_BS is None else starts_BS.chunk(2, dim=1)
        places = zigzag_places(self.context_group.rank(), ranks)
        return torch.cat(
            [
                self._attend(chunk_SBND, key_SBKD, value_SBKD, place * chunk_SBND.shape[0], chunk_starts_BS)
                for chunk_SBND, place, chunk_starts_BS in zip(chunks, places, starts, strict=True)
            ]
        )

    def _attend(
        self, query_SBND: Tensor, key_SBKD: Tensor, value_SBKD: Tensor, first: int, starts_BS: Tensor | None
    ) -> Tensor:
        """Queries at the positions from `first` on, to the keys up to each."""
        end = first + query_SBND.shape[0]
        if starts_BS is None:
            return self._attend_from(query_SBND, key_SBKD[:end], value_SBKD[:end])
        samples = []
        for sample, starts_S in enumerate(starts_BS):
            own = slice(sample, sample + 1)
            documents = [
                self._attend_from(
                    query_SBND[begin - first : stop - first, own],
                    key_SBKD[start:stop, own],
                    value_SBKD[start:stop, own],
                )
                for start, begin, stop in _documents(starts_S, first)
            ]
            samples.append(torch.cat(documents))
        return torch.cat(samples, dim=1)

    def _attend_from(self, query_SBND: Tensor, key_SBKD: Tensor, value_SBKD: Tensor) -> Tensor:
        """Queries that are the last of their keys' positions."""
        output_BNSD = causal_attention(
            query_SBND.permute(1, 2, 0, 3),
            key_SBKD.permute(1, 2, 0, 3),
            value_SBKD.permute(1, 2, 0, 3),
            scale=self.softmax_scale,
            dropout=self.dropout if self.training else 0.0,
        )
        return output_BNSD.permute(2, 0, 1, 3).flatten(2)

    def _whole_sequence(self, part_SBKD: Tensor) -> Tensor:
        """Gather the context-parallel parts and undo megatron-core's order."""
        ranks = self.context_group.size()
        chunks = gather_from_sequence_parallel_region(part_SBKD, group=self.context_group).chunk(2 * ranks)
        return torch.cat([*chunks[0::2], *reversed(chunks[1::2])])


def zigzag_places(rank: int, ranks: int) -> tuple[int, int]:
    """Which two of a sequence's 2 x ranks chunks a context-parallel rank holds, so that causal work is even.

    As megatron.core.utils.get_batch_on_this_cp_rank deals them.
    """
    return rank, 2 * ranks - 1 - rank


def document_starts(position_ids_BS: Tensor, rank: int, ranks: int) -> Tensor:
    """For each token of this context-parallel rank the position of its document's first token, [B, S / ranks].

    Args:
        position_ids_BS: positions within the documents, of the whole sequence.
        rank, ranks: of context parallelism.
    """
    starts_BS = torch.arange(position_ids_BS.shape[1]) - position_ids_BS
    return starts_BS.unflatten(1, (2 * ranks, -1))[:, list(zigzag_places(rank, ranks))].flatten(1)


def _documents(starts_S: Tensor, first: int) -> Iterator[tuple[int, int, int]]:
    """(first key, first query, position after the last query) of each document in a run of queries from `first` on."""
    begin = first
    for start, queries in zip(*map(Tensor.tolist, torch.unique_consecutive(starts_S, return_counts=True)), strict=True):
        yield start, begin, begin + queries
        begin += queries
