"""What one forward pass is, whichever engine runs it: the batch on its device, the model's losses, their mean."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.module import Float16Module, MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor, nn

from dsmoe_megatron.config import Config
from dsmoe_megatron.model.core_attention import document_starts
from dsmoe_megatron.model.gpt import build_chunks, unwrap
from dsmoe_megatron.runtime.backends import layer_backend
from dsmoe_megatron.training.engines.protocol import Batch

EXTRA_STATE = "._extra_state"


def initial_chunks(config: Config, transformer: TransformerConfig, device: torch.device) -> list[MegatronModule]:
    """This rank's model chunks on their device, in the precision of training."""
    chunks = [chunk.to(device) for chunk in build_chunks(config, transformer, layer_backend(device))]
    return [Float16Module(transformer, chunk) for chunk in chunks] if transformer.bf16 else chunks


def on_device(batch: Batch, config: Config, device: torch.device) -> Batch:
    """This context-parallel rank's part of the batch."""
    moved = {name: tensor.to(device, non_blocking=True) for name, tensor in batch.items()}
    part: Batch = get_batch_on_this_cp_rank(moved)
    if config.data.separate_documents:
        group = parallel_state.get_context_parallel_group()
        # stays on the CPU: it decides which kernels are called, layer by layer
        part["document_starts"] = document_starts(batch["position_ids"], group.rank(), group.size())
    return part


def forward(chunk: nn.Module, batch: Batch) -> Tensor:
    """Cross-entropy of every token on the last stage [B, S], hidden states on the others."""
    # no attention mask: the core attention is causal by itself. Rotary embeddings know distances only, so that
    # positions need not begin anew with a document
    output: Tensor = chunk(batch["tokens"], batch["position_ids"], batch.get("document_starts"), labels=batch["labels"])
    return output


def masked_mean(loss_mask_BS: Tensor, losses_BS: Tensor) -> Tensor:
    """This context-parallel rank's share of the mean loss over the tokens that count."""
    context_group = parallel_state.get_context_parallel_group()
    count = loss_mask_BS.sum()
    if context_group.size() > 1:
        dist.all_reduce(count, group=context_group)
    return (losses_BS.float() * loss_mask_BS).sum() / count.clamp(min=1.0)


def mean_over_ranks(losses: Sequence[Tensor], device: torch.device) -> float:
    """Mean over micro-batches and ranks of what `masked_mean` gave.

    Only the last pipeline stage has losses; context-parallel ranks hold shares of one loss.
    """
    mean = torch.stack(list(losses)).mean() if losses else torch.zeros((), device=device)
    mean = mean.to(torch.float64 if device.type == "cpu" else torch.float32)
    dist.all_reduce(mean, group=parallel_state.get_pipeline_model_parallel_group())
    dist.all_reduce(mean, group=parallel_state.get_data_parallel_group(with_context_parallel=True))
    return float(mean) / parallel_state.get_data_parallel_world_size()


def sharded_weights_of(chunk: MegatronModule) -> dict[str, Any]:
    """Weights of one chunk as megatron-core's sharded tensors.

    The layers' extra states are left out: they are empty without fp8, and torch reads such objects by unpickling.
    """
    state = unwrap(chunk).sharded_state_dict()
    return {key: value for key, value in state.items() if not key.endswith(EXTRA_STATE)}
