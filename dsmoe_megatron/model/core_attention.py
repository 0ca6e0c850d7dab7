"""Causal core attention on torch's scaled_dot_product_attention: memory linear in the sequence, grouped heads.

megatron-core's own DotProductAttention materialises the sequence x sequence scores and knows no context parallelism.
Under context parallelism keys and values (few heads) are gathered; each rank's two chunks of queries, in
megatron-core's zig-zag order, attend to the prefix that they may see.
Shape suffixes: S sequence, B micro-batch, N query heads, K key/value heads, D head dim.
"""

from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor


class ScaledDotProductCoreAttention(torch.nn.Module):
    """Softmax(Q K^T / sqrt(D)) V under the causal mask.

    Args:
        config: attention_dropout is read.
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
        self.dropout = config.attention_dropout

    def forward(
        self, query_SBND: Tensor, key_SBKD: Tensor, value_SBKD: Tensor, attention_mask: Tensor | None, **unused: Any
    ) -> Tensor:
        """[S, B, N, D], [S, B, K, D] twice -> [S, B, N*D]. The mask argument is not read: causality needs none."""
        if self.context_group.size() == 1:
            return self._attend(query_SBND, key_SBKD, value_SBKD)
        key_SBKD, value_SBKD = self._whole_sequence(key_SBKD), self._whole_sequence(value_SBKD)
        ranks, rank = self.context_group.size(), self.context_group.rank()
        outputs = []
        for chunk_SBND, position in zip(query_SBND.chunk(2), (rank, 2 * ranks - 1 - rank), strict=True):
            end = (position + 1) * chunk_SBND.shape[0]
            outputs.append(self._attend(chunk_SBND, key_SBKD[:end], value_SBKD[:end]))
        return torch.cat(outputs)

    def _attend(self, query_SBND: Tensor, key_SBKD: Tensor, value_SBKD: Tensor) -> Tensor:
        queries, keys = query_SBND.shape[0], key_SBKD.shape[0]
        # is_causal aligns the mask at the top left: right only where queries and keys begin together
        mask = None
        if queries != keys:
            mask = torch.ones(queries, keys, dtype=torch.bool, device=query_SBND.device).tril(keys - queries)
        output_BNSD = F.scaled_dot_product_attention(
            query_SBND.permute(1, 2, 0, 3),
            key_SBKD.permute(1, 2, 0, 3),
            value_SBKD.permute(1, 2, 0, 3),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=mask is None,
            scale=self.softmax_scale,
            enable_gqa=query_SBND.shape[2] != key_SBKD.shape[2],
        )
        return output_BNSD.permute(2, 0, 1, 3).flatten(2)

    def _whole_sequence(self, part_SBKD: Tensor) -> Tensor:
        """Gather the context-parallel parts and undo megatron-core's order: rank r holds chunks r and 2*ranks-1-r."""
        ranks = self.context_group.size()
        chunks = gather_from_sequence_parallel_region(part_SBKD, group=self.context_group).chunk(2 * ranks)
        return torch.cat([*chunks[0::2], *reversed(chunks[1::2])])
