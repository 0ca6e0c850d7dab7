"""Bytes that one rank of a layout holds at the peak of a training step.

What is modelled is the engine that trains: megatron-core's DDP with float32 gradient buffers, its distributed
optimizer, its 1F1B and interleaved schedules. Bytes are those of live tensors; an allocator's fragmentation and the
libraries' own memory (CUDA context, NCCL's and cuBLAS's buffers) come on top.
"""

from dataclasses import dataclass, fields

from dsmoe_megatron.config import Config
from dsmoe_megatron.planning.activations import DeviceType, LayerActivations, Moment
from dsmoe_megatron.planning.ranks import (
    FLOAT32,
    RankParameters,
    element_bytes,
    micro_batches_per_step,
    optimizer_shards,
    rank_parameters,
)

# tokens, labels and positions as int64, the loss mask as float32
BATCH_BYTES_PER_TOKEN = 3 * 8 + 4


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank.

    `activations` and `logits` are what is alive of them at the peak, so that `total` is the peak.
    """

    weights: int
    gradients: int
    """float32 buffers, whatever the precision of the weights."""
    optimizer: int
    """This rank's shard of AdamW's two moments and, in bf16, of the float32 master weights."""
    activations: int
    """Kept for the backward passes of all micro-batches in flight, and the largest transient of one layer (or,
    where that is more, of the optimizer's step); the micro-batches themselves."""
    logits: int
    """Logits, their float32 copy and their gradient; 0 where the peak is elsewhere."""

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


@dataclass(frozen=True)
class _Peak:
    activations: int
    logits: int

    @property
    def total(self) -> int:
        return self.activations + self.logits


def rank_memory(config: Config, world_size: int, pipeline_rank: int, device: DeviceType = "cuda") -> RankMemory:
    """Bytes of each rank of a pipeline stage; all of its ranks hold equally much.

    Args:
        config: recipe that config_rules accepted, with a known vocabulary size.
        world_size: processes.
        pipeline_rank: from 0.
        device: whose kernels. Measured, within a tenth, is the CPU (float32 and bf16, see tests/planning). For CUDA
            the same tables hold less what a CPU's kernels keep beside them; that was not measured. Sparse-trained
            experts are counted as if tokens were spread evenly over them.
    """
    parameters = rank_parameters(config, pipeline_rank)
    bf16 = config.train.precision == "bf16"
    of_shard = _parameters_of_shard(parameters, config, world_size)
    if device == "cpu":
        # gloo copies a buffer of gradients to scatter its sum; AdamW's temporaries, of one parameter, are smaller
        buffer = max(parameters.dense, parameters.experts) // config.parallel.virtual_pipeline
        step = Moment("gradient reduction", buffer * FLOAT32)
    else:
        # torch's AdamW takes the root of all second moments at once; Transformer Engine's and apex's need nothing
        step = Moment("AdamW", of_shard * FLOAT32)
    peak = _activation_peak(config, world_size, pipeline_rank, device, step)
    return RankMemory(
        weights=parameters.total * element_bytes(config),
        gradients=parameters.total * FLOAT32,
        optimizer=of_shard * FLOAT32 * (3 if bf16 else 2),
        activations=peak.activations,
        logits=peak.logits,
    )


def _activation_peak(
    config: Config, world_size: int, pipeline_rank: int, device: DeviceType, optimizer_step: Moment
) -> _Peak:
    """The moment of a step when most is alive; `optimizer_step` comes after the last backward pass."""
    layer = LayerActivations(config, device)
    micro_batches = micro_batches_per_step(config, world_size)
    parallel = config.parallel
    first, last = pipeline_rank == 0, pipeline_rank == parallel.pipeline - 1
    chunks = parallel.virtual_pipeline
    layers_per_chunk = parallel.layers_per_stage(config.model.num_hidden_layers)[pipeline_rank] // chunks
    in_flight = chunks_in_flight(config, micro_batches, pipeline_rank)

    full_recompute = config.train.recompute == "full"
    per_layer = layer.checkpointed_layer() if full_recompute else layer.layer
    of_chunk = layers_per_chunk * per_layer
    sends_on = parallel.pipeline > 1 and (chunks > 1 or not last)
    if sends_on and device == "cpu":
        # the output; on CUDA megatron-core frees it once it is sent
        of_chunk += layer.own_tokens * layer.hidden_row
    stored = in_flight * of_chunk
    always = layer.gather_buffer() + micro_batches * BATCH_BYTES_PER_TOKEN * layer.tokens

    peaks = [_peak(optimizer_step, always)]
    recomputed = layer.layer - layer.own_tokens * layer.hidden_row if full_recompute else 0
    peaks += [_peak(moment, always + stored + recomputed) for moment in layer.layer_moments()]
    if last:
        after = sum(layer.after_last_layer.values())
        peaks += [_peak(moment, always + stored + after) for moment in layer.output_moments()]
    if first:
        peaks.append(_peak(layer.embedding_moment(), always + stored - of_chunk))
    return max(peaks, key=lambda peak: peak.total)


def chunks_in_flight(config: Config, micro_batches: int, pipeline_rank: int) -> int:
    """Forward passes of a model chunk whose backward pass is still to come, at most, the one being computed included.

    Source: megatron-core 0.16.1, pipeline_parallel/schedules.py, get_pp_rank_microbatches.
    """
    stages, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline
    stages_to_come = stages - pipeline_rank - 1
    warmup = stages_to_come if chunks == 1 else 2 * stages_to_come + (chunks - 1) * stages
    return min(warmup + 1, micro_batches * chunks)


def _peak(moment: Moment, kept: int) -> _Peak:
    return _Peak(kept + moment.born - moment.freed - moment.logits, moment.logits)


def _parameters_of_shard(parameters: RankParameters, config: Config, world_size: int) -> int:
    """Parameters whose optimizer state a rank holds; the padding of the buffers' ends is left out."""
    dense_shards, expert_shards = optimizer_shards(config, world_size)
    return -(-parameters.dense // dense_shards) + -(-parameters.experts // expert_shards)
