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


def counted_tokens(batches: Sequence[Sequence[Batch]], config: Config, device: torch.device) -> Tensor:
    """How many tokens of each global batch count for the loss, on all data-parallel ranks, which all call it.

    Args:
        batches: this rank's micro-batches of each global batch, before context parallelism cuts them.
        config: recipe; says whether any token is masked.
        device: of this rank.

    Returns:
        float64 [global batches], at least 1.
    """
    counts = [sum(batch["loss_mask"].sum(dtype=torch.float64) for batch in micro_batches) for micro_batches in batches]
    counts_N = torch.stack([torch.as_tensor(count) for count in counts]).to(device)
    if config.data.separate_documents:
        dist.all_reduce(counts_N, group=parallel_state.get_data_parallel_group())
    else:  # nothing is masked, so that no rank has to wait for the others to know what they have
        counts_N *= parallel_state.get_data_parallel_world_size()
    return counts_N.clamp(min=1.0)


def tokens_per_micro_batch(micro_batches: Sequence[Batch], config: Config, device: torch.device) -> Tensor:
    """Tokens that count in a micro-batch, on average over the global batch; all data-parallel ranks call it.

    Returns:
        Scalar, float32: where no token is masked, exactly the tokens of each.
    """
    ranks = parallel_state.get_data_parallel_world_size()
    return (counted_tokens([micro_batches], config, device)[0] / (len(micro_batches) * ranks)).float()


def loss_share(loss_mask_BS: Tensor, losses_BS: Tensor, tokens: Tensor) -> Tensor:
    """What a context-parallel rank's part of a micro-batch adds to the mean loss over the tokens that count.

    Engines average over micro-batches and data-parallel ranks. Were each micro-batch's mean taken over its own tokens,
    a token would weigh less where more of its neighbours count, and the loss would depend on how batches are cut.

    Args:
        loss_mask_BS: 1 for a token that counts, else 0.
        losses_BS: cross-entropies [nats].
        tokens: that tokens_per_micro_batch gave.
    """
    return (losses_BS.float() * loss_mask_BS).sum() / tokens


def mean_over_ranks(losses: Sequence[Tensor], device: torch.device) -> float:
    """Mean over micro-batches and ranks of what `loss_share` gave.

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
