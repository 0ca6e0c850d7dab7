"""The recipe: typed sections, read from a YAML file and dotted command-line overrides.

The model section uses the names of the exported HF config.json. What each combination must satisfy is in
config_rules.py; how text becomes these objects is in config_parsing.py.
"""

from dataclasses import dataclass, field
from typing import Literal

ExpertPolicyName = Literal["dense", "topk", "threshold", "threshold_topk"]


@dataclass
class RopeParameters:
    """Rotary position embedding."""

    rope_theta: float = 10000.0
    """Base of the rotary frequencies."""
    rope_type: Literal["default"] = "default"
    """Frequency scaling; only the unscaled embedding is trained here."""


@dataclass
class ModelConfig:
    """Model architecture. `num_experts: 1` with `attention_type: gqa` is the dense baseline."""

    hidden_size: int = 256
    """Width of the residual stream [units]."""
    num_hidden_layers: int = 4
    """Transformer layers."""
    num_attention_heads: int = 8
    """Query heads in all; for `moa`, num_attention_experts x num_key_value_heads."""
    num_key_value_heads: int = 2
    """Key/value heads, shared by all attention experts."""
    head_dim: int = 32
    """Width of one attention head [units]; even, because rotary embeddings turn pairs."""
    attention_type: Literal["moa", "gqa"] = "moa"
    """`moa`: mixture of attention heads, each expert owns one query head per key/value head; `gqa`: no router."""
    num_attention_experts: int = 4
    """Attention experts per layer (`moa`); 1 for `gqa`."""
    num_experts: int = 8
    """MLP experts per layer; 1 means one plain MLP without a router."""
    moe_intermediate_size: int = 128
    """Hidden units of ONE expert."""
    expert_training: Literal["dense", "sparse"] = "dense"
    """`dense`: every expert computes on every token (DS-MoE); `sparse`: the sparse-trained baseline, whose MLP is
    megatron-core's own MoELayer with num_experts_per_tok experts per token and the switch load-balancing loss;
    attention experts are trained densely in both."""
    switch_loss_coefficient: float = 0.01
    """Weight of the switch load-balancing loss (`expert_training: sparse` only)."""
    hidden_act: Literal["gelu", "silu"] = "gelu"
    """Activation of the experts; gelu is the exact one."""
    gated_mlp: bool = False
    """Gated experts: act(gate) * up (SwiGLU with hidden_act silu)."""
    router_type: Literal["linear", "mlp"] = "linear"
    """`linear`, or a two-layer `mlp` with GeLU of width router_hidden_size."""
    router_hidden_size: int = 512
    """Width of the mlp router [units]."""
    mi_alpha_attention: float = 0.0
    """Weight of the mutual-information loss of each attention router."""
    mi_alpha_mlp: float = 0.0
    """Weight of the mutual-information loss of each MLP router."""
    mi_scope: Literal["micro_batch", "data_parallel"] = "micro_batch"
    """Tokens over which the mean expert probability is taken: one micro-batch, or it on all data-parallel ranks."""
    norm_type: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Normalisation."""
    rms_norm_eps: float = 1e-5
    """Epsilon of the normalisation (of either type)."""
    rope_parameters: RopeParameters = field(default_factory=RopeParameters)
    """Rotary position embedding."""
    vocab_size: int | None = None
    """Tokens of the tokenizer; null takes the tokenizer's own number."""
    vocab_size_multiple: int = 128
    """The embedding is padded to a multiple of this, whatever the layout; padded logits never win."""
    tie_word_embeddings: bool = False
    """Share the input embedding with the output layer."""
    max_position_embeddings: int = 2048
    """Longest sequence the model is meant for [tokens]."""
    initializer_range: float = 0.02
    """Standard deviation of the initial weights; output projections use it over sqrt(2 x layers)."""
    hidden_dropout: float = 0.0
    """Dropout probability after attention and MLP."""
    attention_dropout: float = 0.0
    """Dropout probability of the attention weights."""
    num_experts_per_tok: int = 2
    """Active MLP experts per token: trained with when sparse, the export's default under policy topk."""
    attention_experts_per_tok: int | None = None
    """Active attention experts per token under policy topk; null activates all, as the paper does."""
    expert_policy: ExpertPolicyName = "threshold"
    """Policy that exports carry as their default."""
    expert_threshold: float = 0.48
    """eps: an expert is active where (number of experts) x (its probability) is above it."""
    attention_expert_threshold: float | None = None
    """eps of the attention experts; null uses expert_threshold."""

    @property
    def has_mlp_router(self) -> bool:
        return self.num_experts > 1

    @property
    def has_attention_router(self) -> bool:
        return self.attention_type == "moa"

    @property
    def intermediate_size(self) -> int:
        """Hidden units of all MLP experts together."""
        return self.num_experts * self.moe_intermediate_size

    @property
    def padded_vocab_size(self) -> int:
        """Rows of the embedding: vocab_size rounded up to vocab_size_multiple."""
        if self.vocab_size is None:
            raise ValueError("vocab_size is not known yet: it is taken from the tokenizer when the data is opened")
        return -(-self.vocab_size // self.vocab_size_multiple) * self.vocab_size_multiple


@dataclass
class ParallelConfig:
    """Layout over processes. Data parallelism is what is left of the world size."""

    tensor: int = 1
    """Tensor-parallel size."""
    sequence: bool = False
    """Sequence parallelism: split activations between the tensor-parallel regions; needs tensor > 1."""
    pipeline: int = 1
    """Pipeline-parallel size."""
    virtual_pipeline: int = 1
    """Model chunks per pipeline rank (interleaved schedule)."""
    first_stage_layers: int | None = None
    """Transformer layers of the first pipeline rank, which also holds the embedding; null shares evenly."""
    last_stage_layers: int | None = None
    """Transformer layers of the last pipeline rank, which also computes logits and loss; null shares evenly."""
    expert: int = 1
    """Expert-parallel size: the MLP's hidden units are split over expert x expert_tensor ranks."""
    expert_tensor: int | None = None
    """Tensor-parallel size of the experts; null takes `tensor`."""
    context: int = 1
    """Context-parallel size: the sequence is split over ranks, keys and values are gathered."""
    overlap: bool = False
    """Overlap the gradient reduction and the parameter gather with computation."""

    @property
    def tensor_of_experts(self) -> int:
        """Tensor-parallel size of the experts: expert_tensor, or tensor where that is null."""
        return self.expert_tensor or self.tensor

    @property
    def splits_experts_apart(self) -> bool:
        """Whether the MLP's units are split over other ranks than tensor parallelism's alone."""
        return self.expert > 1 or self.tensor_of_experts != self.tensor

    def layers_per_stage(self, num_layers: int) -> list[int]:
        """Transformer layers of each pipeline rank.

        Raises:
            ValueError: what the outer ranks leave cannot be shared evenly by the others.
        """
        first, last = self.first_stage_layers, self.last_stage_layers
        sharing = self.pipeline - (first is not None) - (last is not None)
        left = num_layers - (first or 0) - (last or 0)
        stages = [left // sharing if sharing > 0 else 0] * self.pipeline
        if first is not None:
            stages[0] = first
        if last is not None:
            stages[-1] = last
        if sum(stages) != num_layers or min(stages) < 1:
            raise ValueError(f"{num_layers} layers cannot be shared by {self.pipeline} pipeline ranks as {stages}")
        return stages


@dataclass
class DatasetSource:
    """One indexed dataset of a blend."""

    prefix: str
    """Path of the .bin/.idx pair without its ending."""
    weight: float = 1.0
    """Share of the samples drawn from it, relative to the other weights."""


@dataclass
class DataConfig:
    """Indexed datasets and their tokenizer."""

    train: list[DatasetSource] = field(default_factory=list)
    """Training blend."""
    validation: list[DatasetSource] = field(default_factory=list)
    """Validation blend; empty switches validation off."""
    tokenizer: str | None = None
    """Tokenizer SPEC: a sentencepiece .model file, a HF tokenizer folder or name, or `codegen`."""
    separate_documents: bool = False
    """Attention sees only tokens of its own document, as if each document of a sample were a sample of its own."""
    cache_dir: str | None = None
    """Folder of the sample indices, which all nodes see and other runs may share; null keeps them in the run folder."""
    num_workers: int = 0
    """Loader processes per rank; 0 reads in the training process."""


@dataclass
class OptimizerConfig:
    """AdamW and the schedule of its learning rate."""

    lr: float = 3e-4
    """Peak learning rate."""
    min_lr: float | None = None
    """Learning rate at the end of the schedule; null is lr / 10."""
    weight_decay: float = 0.01
    """Decoupled weight decay; norms are exempt."""
    beta1: float = 0.9
    """Decay of the first moment."""
    beta2: float = 0.95
    """Decay of the second moment."""
    eps: float = 1e-8
    """Added to the root of the second moment."""
    clip_grad: float = 1.0
    """Largest global gradient norm; 0 switches clipping off."""
    warmup_steps: int = 0
    """Steps of linear warm-up from 0."""
    schedule: Literal["cosine", "wsd"] = "cosine"
    """After the warm-up: a cosine from lr to min_lr, or lr held and then decayed (warm-up, stable, decay)."""
    decay_steps: int | None = None
    """Step at which min_lr is reached; null is train.steps."""
    wsd_decay_steps: int | None = None
    """Steps of wsd's decay, the last before decay_steps; null is a tenth of decay_steps, at least 1."""
    wsd_decay_shape: Literal["linear", "cosine", "exponential", "minus_sqrt"] = "minus_sqrt"
    """Fall from lr to min_lr at share x of wsd's decay: 1 - x, (1 + cos(pi x)) / 2, 2 x 0.5^x - 1 or 1 - sqrt(x)."""


@dataclass
class RampUpConfig:
    """Batches that grow to train.global_batch_size; all three keys, or none."""

    start_batch_size: int | None = None
    """Samples of the first steps over all ranks; null trains with train.global_batch_size from the first step on."""
    increment: int | None = None
    """Samples that a batch grows by each time."""
    samples: int | None = None
    """Samples of the whole ramp; every size before the full one takes an equal share of them."""


@dataclass
class TrainConfig:
    """Length, batch and numerics of the run."""

    run_dir: str = "runs/dsmoe"
    """Folder of the run: resolved recipe, metrics, checkpoints. A run found there is resumed."""
    steps: int = 100
    """Optimizer steps in all, those before a resume included."""
    seed: int = 1234
    """Seed of initial weights, data order and dropout."""
    micro_batch_size: int = 1
    """Samples of one forward pass on one data-parallel rank."""
    global_batch_size: int = 8
    """Samples of one optimizer step over all ranks."""
    ramp_up: RampUpConfig = field(default_factory=RampUpConfig)
    """Smaller batches at the beginning."""
    sequence_length: int = 256
    """Tokens of one sample."""
    precision: Literal["fp32", "bf16"] = "fp32"
    """Weights and activations; bf16 keeps float32 master weights, gradients and optimizer state."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activations computed again in the backward pass: none, the core attention, or whole layers."""
    stop_after_skipped: int = 5
    """Steps in a row whose update is left out (loss or gradient not finite, or a spike) after which the run stops."""
    spike_deviations: float = 0.0
    """An update is left out where the loss or the gradient norm is further above its running mean than so many standard
    deviations; 0 leaves out only what is not finite. OLMo uses 6."""
    spike_window: int = 128
    """Applied steps that this mean and deviation are of; spikes are looked for from half of it on."""
    deterministic: bool = False
    """On GPUs take only algorithms that repeat bit for bit, which costs speed; on a CPU every run does."""
    timeout_minutes: float = 10.0
    """A run that takes longer for its start, a step, a batch of validation or a save has hung: every rank writes its
    stack to run_dir/stacks and the run ends [minutes]."""


@dataclass
class CheckpointConfig:
    """Saving and resuming."""

    interval: int = 1000
    """Steps between checkpoints; the last step always saves one."""
    load: str | None = None
    """Run folder or step folder to start from when run_dir has no checkpoint of its own; one without optimizer state
    (an imported model) gives the weights, and training begins at step 0."""
    keep_last: int = 2
    """Newest checkpoints kept; 0 keeps all."""
    keep_every: int = 0
    """Checkpoints of every so many steps are kept for good, beside the newest; 0 keeps none of them."""
    asynchronous: bool = True
    """Write beside the training: it waits only until the state is copied to host memory, which needs as much again;
    false waits until the checkpoint is on the disk."""
    strict: bool = False
    """Refuse to go on from an older checkpoint where the newest of a run is damaged. A damaged step folder that
    checkpoint.load names is always refused."""
    allow_other_data: bool = False
    """Go on with another blend, sequence length, seed, train.global_batch_size or train.ramp_up than the checkpoint's.
    Other data are read from their beginning; the same data, in other batches, from where they were left."""


@dataclass
class WandbConfig:
    """Weights & Biases; the key is read from the environment or from `wandb login`, never from a recipe."""

    project: str | None = None
    """Project that the run is shown in; null does without Weights & Biases."""
    entity: str | None = None
    """User or team; null is the key's own."""
    name: str | None = None
    """Name of the run; null is that of the run folder."""
    offline: bool = False
    """Write into run_dir/wandb alone, to be sent later by `wandb sync`."""


@dataclass
class ProfileConfig:
    """A trace of some steps by torch's profiler."""

    first_step: int | None = None
    """First step to record; null records none."""
    last_step: int | None = None
    """Last step to record; null is the second after the first."""
    every_rank: bool = False
    """Record every rank; otherwise rank 0 alone."""
    memory: bool = False
    """Record allocations too: on a GPU the allocator's history as a file, on a CPU the peak of live tensor bytes."""


@dataclass
class LoggingConfig:
    """What the run says of itself."""

    interval: int = 10
    """Steps between lines of metrics.jsonl, TensorBoard points and progress lines."""
    tensorboard: bool = True
    """Write TensorBoard event files into run_dir/tensorboard."""
    wandb: WandbConfig = field(default_factory=WandbConfig)
    """Weights & Biases."""
    profile: ProfileConfig = field(default_factory=ProfileConfig)
    """A trace of some steps."""
    expert_use: bool = True
    """Write per-layer expert use: share of mean probability, entropies, active experts at the recipe's eps."""


@dataclass
class PolicyConfig:
    """One sparse policy to evaluate; a null value takes the model section's."""

    expert_policy: Literal["topk", "threshold"] = "topk"
    """How experts are chosen; threshold_topk depends on the batch and so on the layout: evaluate it on an export."""
    num_experts_per_tok: int | None = None
    """K of the MLP experts (topk)."""
    attention_experts_per_tok: int | None = None
    """K of the attention experts (topk); null activates all of them unless the model section says otherwise."""
    expert_threshold: float | None = None
    """eps of the MLP experts (threshold)."""
    attention_expert_threshold: float | None = None
    """eps of the attention experts; null is expert_threshold."""


@dataclass
class EvaluationConfig:
    """Validation in the loop."""

    interval: int = 0
    """Steps between validations; the last step always validates; 0 validates only there."""
    batches: int = 10
    """Global batches of the validation data per validation."""
    policies: list[PolicyConfig] = field(
        default_factory=lambda: [PolicyConfig(expert_policy="topk"), PolicyConfig(expert_policy="threshold")]
    )
    """Sparse policies measured beside the dense one; ignored by sparse-trained models and those without routers."""


@dataclass
class EngineConfig:
    """What runs the optimizer step."""

    name: Literal["megatron", "deepspeed"] = "megatron"
    """megatron-core's DDP and distributed optimizer, or DeepSpeed's ZeRO (docs/deepspeed.md)."""
    zero_stage: int = 1
    """What `deepspeed` shares out over the data-parallel ranks: 1 optimizer state, 2 gradients too, 3 weights too."""
    offload_optimizer: bool = False
    """Keep `deepspeed`'s optimizer state in host memory and update there."""
    deepspeed_config: str | None = None
    """A DeepSpeed configuration (JSON), laid over the one that the recipe makes; its keys must not say otherwise."""


@dataclass
class Config:
    """A whole recipe."""

    model: ModelConfig = field(default_factory=ModelConfig)
    parallel: ParallelConfig = field(default_factory=ParallelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
