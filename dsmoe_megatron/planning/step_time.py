"""The time of one training step on given hardware, from counted work and stated efficiencies. Nothing here is measured.

Matrix products take the longer of computing at the assumed share of the peak and moving their operands through memory
(the roofline), so that efficiency falls where a rank's share gets narrow. Elementwise work moves memory. A layer takes
at least as long as the host needs to start its operations. Communication inside a layer is exposed in full: the part
that megatron-core can hide behind weight gradients is not subtracted. Reducing gradients and gathering weights hide,
with parallel.overlap, behind the last backward and the first forward pass. Routers compute in float32 at the float32
peak: that is what their products do without Transformer Engine.
"""

from collections import defaultdict
from dataclasses import dataclass

from dsmoe_megatron.config import Config
from dsmoe_megatron.planning.flops import FLASH_RECOMPUTE, training_flops
from dsmoe_megatron.planning.hardware import Hardware
from dsmoe_megatron.planning.ranks import (
    FLOAT32,
    element_bytes,
    micro_batches_per_step,
    mlp_matrices,
    mlp_ranks,
    optimizer_shards,
    rank_parameters,
    routed_experts,
    router_weights,
)
from dsmoe_megatron.planning.traffic import (
    Group,
    Parallelism,
    Transfer,
    step_traffic,
)

BACKWARD = 2
"""Passes over the same data, in units of the forward pass: gradients by input and by weight."""
ADAM_BYTES = 7 * FLOAT32
"""Moved for each parameter that a rank's optimizer owns: gradient read, weight and two moments read and written."""
GRADIENT_BYTES = 2 * FLOAT32
"""Moved for each parameter that a rank holds: its gradient is set to zero and read for the norm."""


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step of the slowest path through the pipeline, in parts that add up.

    Attributes:
        matmul: matrix products and core attention, routers left out, of the slowest stage.
        routers: their float32 products.
        elementwise: norms, activations, gates, rotary embedding, residuals, softmax of the logits.
        launch: what the host needs longer to start a layer than the device to compute it.
        recompute: a second forward pass, its communication not included.
        communication: exposed seconds per parallelism.
        bubble: waiting for other stages at the pipeline's ends.
        optimizer: zeroing, norm and AdamW.
        tokens: of one step.
        model_flops: of one step, without what is computed twice.
        world_size: GPUs.
        peak: that utilisation refers to, at train.precision [operations / s].
        steps: of the run.
    """

    matmul: float
    routers: float
    elementwise: float
    launch: float
    recompute: float
    communication: dict[str, float]
    bubble: float
    optimizer: float
    tokens: int
    model_flops: float
    world_size: int
    peak: float
    steps: int

    @property
    def terms(self) -> dict[str, float]:
        """Name -> seconds; they add up to `total`."""
        own = ("matmul", "routers", "elementwise", "launch", "recompute", "bubble", "optimizer")
        communication = {f"{name} communication": seconds for name, seconds in self.communication.items()}
        return {name: getattr(self, name) for name in own} | communication

    @property
    def total(self) -> float:
        return sum(self.terms.values())

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.total

    @property
    def model_flops_utilisation(self) -> float:
        """MFU, 0 to 1: the model's operations over what the peak would do in the same time."""
        return self.model_flops / (self.total * self.world_size * self.peak)

    @property
    def days(self) -> float:
        """Of the whole run."""
        return self.steps * self.total / 86400

    @property
    def gpu_hours(self) -> float:
        """Of the whole run."""
        return self.steps * self.total * self.world_size / 3600


def step_time(config: Config, world_size: int, hardware: Hardware) -> StepTime:
    """Estimate one step.

    Args:
        config: recipe that config_rules accepted, with a known vocabulary size.
        world_size: GPUs.
        hardware: their figures.

    Raises:
        ConfigurationError: the hardware has no peak for train.precision.
        ValueError: the vocabulary size is unknown.
    """
    parallel, train = config.parallel, config.train
    micro_batches = micro_batches_per_step(config, world_size)
    layers = parallel.layers_per_stage(config.model.num_hidden_layers)
    stages = {rank: _Stage(config, world_size, rank, layers[rank], hardware) for rank in distinct_stages(layers)}
    # stages between the outer ones with equally many layers take the same time
    each = [stages[rank if rank in stages else layers.index(layers[rank], 1)] for rank in range(parallel.pipeline)]
    slowest = max(each, key=lambda stage: stage.micro_batch_seconds)
    waiting = sum(stage.micro_batch_seconds for stage in each) - slowest.micro_batch_seconds
    communication = defaultdict(float, slowest.communication)
    communication["data"] = max(stage.data_seconds for stage in each)
    communication["pipeline"] = max(stage.pipeline_seconds for stage in each)
    tokens = train.global_batch_size * train.sequence_length
    return StepTime(
        matmul=slowest.matmul * micro_batches,
        routers=slowest.routers * micro_batches,
        elementwise=slowest.elementwise * micro_batches,
        launch=slowest.launch * micro_batches,
        recompute=slowest.recompute * micro_batches,
        communication={name: seconds for name, seconds in communication.items() if seconds},
        bubble=waiting / parallel.virtual_pipeline,
        optimizer=max(stage.optimizer for stage in each),
        tokens=tokens,
        model_flops=training_flops(config).model * tokens,
        world_size=world_size,
        peak=hardware.peak(train.precision),
        steps=train.steps,
    )


def distinct_stages(layers: list[int]) -> list[int]:
    """Pipeline ranks that stand for all: first, last, and the first between them of each number of layers."""
    between = {count: rank for rank, count in reversed(list(enumerate(layers))) if 0 < rank < len(layers) - 1}
    return sorted({0, len(layers) - 1, *between.values()})


def link_bandwidth(group: Group, hardware: Hardware) -> float:
    """Bytes per second and direction that each rank of a group can send to the next.

    Across nodes NCCL runs as many rings as the group has ranks in a node, each over a network port of its own, so the
    ring is as fast as these ports together, and never faster than the links inside a node.
    """
    in_node = min(group.size, max(hardware.gpus_per_node // group.stride, 1))
    if in_node == group.size:
        return hardware.node_bandwidth
    return min(hardware.node_bandwidth, in_node * hardware.network_bandwidth)


def transfer_seconds(transfer: Transfer, hardware: Hardware) -> float:
    """All calls of a step, one after the other."""
    bandwidth = link_bandwidth(transfer.group, hardware) * hardware.assumptions.communication_efficiency
    return transfer.sent / bandwidth + transfer.calls * hardware.assumptions.collective_latency


class _Stage:
    """Seconds of one micro-batch, forward and backward, and of what happens once per step, on one pipeline rank."""

    def __init__(self, config: Config, world_size: int, rank: int, layers: int, hardware: Hardware) -> None:
        self.config, self.hardware, self.layers = config, hardware, layers
        last = rank == config.parallel.pipeline - 1
        micro_batches = micro_batches_per_step(config, world_size)
        work = layer_work(config, hardware)
        extra = output_work(config, hardware) if last else (0.0, 0.0)
        self.matmul = layers * work.matmul * (1 + BACKWARD) + layers * work.attention * (1 + BACKWARD + FLASH_RECOMPUTE)
        self.matmul += extra[0]
        self.routers = layers * work.routers * (1 + BACKWARD)
        self.elementwise = layers * work.elementwise * (1 + BACKWARD) + extra[1]
        again = {"none": 0.0, "selective": work.attention, "full": work.seconds}[config.train.recompute]
        self.recompute = layers * again
        device = self.matmul + self.routers + self.elementwise + self.recompute
        self.launch = max(0.0, layers * hardware.assumptions.layer_overhead - device)
        self.communication: dict[Parallelism, float] = defaultdict(float)
        self.pipeline_seconds = 0.0
        reduced = gathered = 0.0
        for transfer in step_traffic(config, world_size, rank):
            seconds = transfer_seconds(transfer, hardware)
            if transfer.parallelism == "pipeline":
                self.pipeline_seconds += seconds
            elif transfer.parallelism != "data" or transfer.operation == "all_reduce":
                self.communication[transfer.parallelism] += seconds
            elif transfer.operation == "reduce_scatter":
                reduced += seconds
            else:
                gathered += seconds
        inside = sum(self.communication.values()) / micro_batches
        self.micro_batch_seconds = device + self.launch + inside
        self.data_seconds = self._exposed(reduced, gathered)
        if config.parallel.virtual_pipeline > 1:
            # the interleaved schedule sends while it computes; only filling and draining wait
            self.pipeline_seconds *= min(1.0, config.parallel.pipeline / micro_batches)
        parameters = rank_parameters(config, rank)
        dense_ranks, expert_ranks = optimizer_shards(config, world_size)
        owned = parameters.dense / dense_ranks + parameters.experts / expert_ranks
        moved = owned * (ADAM_BYTES + element_bytes(config)) + parameters.total * GRADIENT_BYTES
        self.optimizer = moved / (hardware.memory_bandwidth * hardware.assumptions.memory_efficiency)

    def _exposed(self, reduced: float, gathered: float) -> float:
        """Seconds of gradient reduction and weight gathering that nothing hides."""
        if not self.config.parallel.overlap:
            return reduced + gathered
        # only the first chunk's buckets can overlap (training/engines/megatron.py)
        forward = self.micro_batch_seconds / 3 / self.config.parallel.virtual_pipeline
        return max(0.0, reduced - 2 * forward) + max(0.0, gathered - forward)


@dataclass(frozen=True)
class LayerWork:
    """Seconds of one layer's forward pass over one micro-batch on one rank."""

    matmul: float
    attention: float
    routers: float
    elementwise: float

    @property
    def seconds(self) -> float:
        return self.matmul + self.attention + self.routers + self.elementwise


@dataclass(frozen=True)
class _Rates:
    """Reached rates, efficiencies included."""

    matmul: float
    attention: float
    float32_matmul: float
    memory: float

    @classmethod
    def of(cls, hardware: Hardware, precision: str) -> "_Rates":
        assumed, peak = hardware.assumptions, hardware.peak(precision)
        return cls(
            matmul=peak * assumed.matmul_efficiency,
            attention=peak * assumed.attention_efficiency,
            float32_matmul=hardware.peak("fp32") * assumed.matmul_efficiency,
            memory=hardware.memory_bandwidth * assumed.memory_efficiency,
        )


def layer_work(config: Config, hardware: Hardware) -> LayerWork:
    """One layer of a rank; all layers are alike, wherever they are."""
    model, parallel, train = config.model, config.parallel, config.train
    rates = _Rates.of(hardware, train.precision)
    element = element_bytes(config)
    tokens = train.micro_batch_size * train.sequence_length // parallel.context
    held = tokens // parallel.tensor if parallel.sequence else tokens
    # an MLP that is split otherwise than by tensor parallelism computes on the tokens of its whole group
    ranks_of_mlp = mlp_ranks(config)
    mlp_tokens = float(held * ranks_of_mlp if parallel.splits_experts_apart else tokens)
    if model.expert_training == "sparse":
        mlp_tokens *= model.num_experts_per_tok / model.num_experts
    hidden, units, matrices = model.hidden_size, model.intermediate_size // ranks_of_mlp, mlp_matrices(model)
    channels = model.num_attention_heads * model.head_dim // parallel.tensor
    key_value = model.num_key_value_heads * model.head_dim // parallel.tensor

    def product(rows: float, inner: float, columns: float) -> float:
        """Seconds of [rows, inner] x [inner, columns]."""
        moved = (rows * inner + inner * columns + rows * columns) * element
        return max(2 * rows * inner * columns / rates.matmul, moved / rates.memory)

    matmul = product(tokens, hidden, channels + 2 * key_value) + product(tokens, channels, hidden)
    matmul += product(mlp_tokens, hidden, units * (matrices - 1)) + product(mlp_tokens, units, hidden)
    scores = 2 * 2 * tokens * channels * (train.sequence_length + 1) / 2
    routed = routed_experts(model)
    router_weight_count = sum(router_weights(model, experts) for experts in routed)
    # elements read and written: a norm reads and writes, a residual addition reads two and writes one, twice each;
    # rotation multiplies by sine and cosine and adds; activation and gates read and write
    elements: float = held * hidden * (2 * 2 + 2 * 3) + tokens * (channels + key_value) * 8
    elements += tokens * channels * 2 * model.has_attention_router
    elements += mlp_tokens * units * (2 * (matrices - 1) + 2 * model.has_mlp_router)
    return LayerWork(
        matmul=matmul,
        attention=scores / rates.attention,
        routers=2 * held * router_weight_count / rates.float32_matmul,
        elementwise=elements * element / rates.memory,
    )


def output_work(config: Config, hardware: Hardware) -> tuple[float, float]:
    """Seconds of (output layer, cross-entropy), forward and backward, of a micro-batch on a rank of the last stage."""
    model, parallel, train = config.model, config.parallel, config.train
    rates = _Rates.of(hardware, train.precision)
    tokens = train.micro_batch_size * train.sequence_length // parallel.context
    rows = model.padded_vocab_size // parallel.tensor
    products = (1 + BACKWARD) * 2 * tokens * model.hidden_size * rows / rates.matmul
    # logits to float32, maximum, exponential, sum, gradient and back: about ten passes of float32
    return products, 10 * tokens * rows * FLOAT32 / rates.memory
