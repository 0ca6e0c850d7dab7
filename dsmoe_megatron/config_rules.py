"""What the values of a recipe must satisfy, alone and together, before any process group starts.

Each rule raises ConfigurationError with the key, the value found and what to set instead. Nothing here imports torch.
"""

import math
from operator import attrgetter
from typing import Any, NoReturn

from dsmoe_megatron.batch_ramp import batch_sizes
from dsmoe_megatron.config import Config, ModelConfig, OptimizerConfig, PolicyConfig
from dsmoe_megatron.deepspeed_settings import check_deepspeed_config
from dsmoe_megatron.errors import ConfigurationError

AT_LEAST_ONE = (
    "model.hidden_size",
    "model.num_hidden_layers",
    "model.num_attention_heads",
    "model.num_key_value_heads",
    "model.head_dim",
    "model.num_attention_experts",
    "model.num_experts",
    "model.moe_intermediate_size",
    "model.router_hidden_size",
    "model.vocab_size",
    "model.vocab_size_multiple",
    "model.max_position_embeddings",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.first_stage_layers",
    "parallel.last_stage_layers",
    "parallel.expert",
    "parallel.expert_tensor",
    "parallel.context",
    "optimizer.decay_steps",
    "optimizer.wsd_decay_steps",
    "train.steps",
    "train.micro_batch_size",
    "train.global_batch_size",
    "train.ramp_up.start_batch_size",
    "train.ramp_up.increment",
    "train.ramp_up.samples",
    "train.sequence_length",
    "train.stop_after_skipped",
    "checkpoint.interval",
    "logging.interval",
    "logging.profile.first_step",
    "logging.profile.last_step",
    "evaluation.batches",
)
ABOVE_ZERO = (
    "model.rms_norm_eps",
    "model.rope_parameters.rope_theta",
    "model.initializer_range",
    "optimizer.lr",
    "optimizer.eps",
    "train.timeout_minutes",
)
NOT_NEGATIVE = (
    "model.mi_alpha_attention",
    "model.mi_alpha_mlp",
    "model.switch_loss_coefficient",
    "data.num_workers",
    "optimizer.min_lr",
    "optimizer.weight_decay",
    "optimizer.clip_grad",
    "optimizer.warmup_steps",
    "train.spike_deviations",
    "checkpoint.keep_last",
    "checkpoint.keep_every",
    "evaluation.interval",
)
BELOW_ONE = ("model.hidden_dropout", "model.attention_dropout", "optimizer.beta1", "optimizer.beta2")
LARGEST_SEED = 2**31 - 1  # seeds of single ranks are offsets from it, and numpy's end at 2**32


def check_config(config: Config, world_size: int) -> None:
    """Refuse a recipe that cannot run on `world_size` processes.

    Raises:
        ConfigurationError: the first rule that is broken.
    """
    _check_ranges(config)
    _check_attention(config)
    _check_experts(config)
    _check_sparse_training(config)
    _check_schedule(config)
    data_parallel = data_parallel_size(config, world_size)
    _check_tensor_parallel(config)
    _check_expert_parallel(config, world_size)
    _check_sequence_split(config)
    _check_pipeline(config)
    _check_batch(config, data_parallel)
    _check_data(config)
    _check_profile(config)
    _check_engine(config, data_parallel)


def data_parallel_size(config: Config, world_size: int) -> int:
    """Data-parallel replicas: the world size over tensor x pipeline x context.

    Raises:
        ConfigurationError: the layout does not divide the world size.
    """
    parallel = config.parallel
    model_parallel = parallel.tensor * parallel.pipeline * parallel.context
    if world_size % model_parallel:
        sizes = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "context": parallel.context}
        largest = max(sizes, key=lambda name: sizes[name])
        _refuse(
            config,
            f"parallel.{largest}",
            f"tensor x pipeline x context = {parallel.tensor} x {parallel.pipeline} x {parallel.context} must divide "
            f"the number of processes, {world_size}; start a multiple of {model_parallel} or make the layout smaller",
        )
    return world_size // model_parallel


def _check_ranges(config: Config) -> None:
    for keys, holds, rule in (
        (AT_LEAST_ONE, lambda value: value >= 1, "must be at least 1"),
        (ABOVE_ZERO, lambda value: 0 < value < math.inf, "must be above 0"),
        (NOT_NEGATIVE, lambda value: 0 <= value < math.inf, "must not be negative"),
        (BELOW_ONE, lambda value: 0 <= value < 1, "must be at least 0 and below 1"),
    ):
        for key in keys:
            value = _value(config, key)
            if value is not None and not holds(value):  # the order of the comparison refuses NaN as well
                _refuse(config, key, rule)
    if not config.train.spike_window >= 4:
        _refuse(config, "train.spike_window", "must be at least 4: fewer values have no deviation to speak of")
    if not 0 <= config.train.seed <= LARGEST_SEED:
        _refuse(config, "train.seed", f"must be from 0 to {LARGEST_SEED}")


def _check_attention(config: Config) -> None:
    model = config.model
    if model.head_dim % 2:
        _refuse(config, "model.head_dim", "must be even: rotary embeddings turn pairs")
    if model.attention_type == "gqa":
        if model.num_attention_experts != 1:
            _refuse(config, "model.num_attention_experts", "must be 1 with attention_type gqa, which has no experts")
        if model.num_attention_heads % model.num_key_value_heads:
            rule = f"must be a multiple of num_key_value_heads, {model.num_key_value_heads}"
            _refuse(config, "model.num_attention_heads", rule)
        return
    if model.num_attention_experts == 1:
        rule = "a mixture of attention heads needs at least 2 experts; set attention_type gqa for plain attention"
        _refuse(config, "model.num_attention_experts", rule)
    heads = model.num_attention_experts * model.num_key_value_heads
    if model.num_attention_heads != heads:
        rule = (
            f"must be num_attention_experts x num_key_value_heads = {model.num_attention_experts} x "
            f"{model.num_key_value_heads} = {heads} with attention_type moa"
        )
        _refuse(config, "model.num_attention_heads", rule)


def _check_experts(config: Config) -> None:
    model = config.model
    if model.mi_alpha_attention and not model.has_attention_router:
        _refuse(config, "model.mi_alpha_attention", "has no router to act on with attention_type gqa; set 0")
    if model.mi_alpha_mlp and not model.has_mlp_router:
        _refuse(config, "model.mi_alpha_mlp", "has no router to act on with num_experts 1; set 0")
    _check_policy(model, model, "model")
    for index, policy in enumerate(config.evaluation.policies):
        _check_policy(policy, model, f"evaluation.policies[{index}]")


def _check_policy(policy: ModelConfig | PolicyConfig, model: ModelConfig, key: str) -> None:
    """K of an active router is from 1 to its number of experts; thresholds are not negative."""
    experts = model.num_experts if model.has_mlp_router else None
    attention_experts = model.num_attention_experts if model.has_attention_router else None
    for name, top_k, limit in (
        ("num_experts_per_tok", policy.num_experts_per_tok, experts),
        ("attention_experts_per_tok", policy.attention_experts_per_tok, attention_experts),
    ):
        if top_k is not None and limit is not None and not 1 <= top_k <= limit:
            raise ConfigurationError(f"{key}.{name}", top_k, f"must be from 1 to the number of experts, {limit}")
    for name, threshold in (
        ("expert_threshold", policy.expert_threshold),
        ("attention_expert_threshold", policy.attention_expert_threshold),
    ):
        if threshold is not None and not 0 <= threshold < math.inf:
            raise ConfigurationError(f"{key}.{name}", threshold, "must not be negative")


def _check_sparse_training(config: Config) -> None:
    """megatron-core's own MoELayer knows less than the densely trained layers."""
    model = config.model
    if model.expert_training == "dense":
        return
    if not model.has_mlp_router:
        _refuse(config, "model.num_experts", "must be above 1 with expert_training sparse")
    if model.router_type != "linear":
        _refuse(config, "model.router_type", "must be linear with expert_training sparse")
    if model.mi_alpha_mlp:
        rule = "must be 0 with expert_training sparse, which balances by switch_loss_coefficient"
        _refuse(config, "model.mi_alpha_mlp", rule)
    if config.parallel.context > 1:
        _refuse(config, "parallel.context", "must be 1 with expert_training sparse")
    if config.parallel.tensor > 1 and not config.parallel.sequence:
        _refuse(config, "parallel.sequence", "must be true with expert_training sparse and tensor > 1")
    if config.parallel.expert == 1 and config.parallel.tensor_of_experts != config.parallel.tensor:
        rule = (
            "must be null with expert_training sparse and expert 1: megatron-core would reduce the experts' gradients "
            "over the ranks of the dense layers"
        )
        _refuse(config, "parallel.expert_tensor", rule)


def _check_schedule(config: Config) -> None:
    optimizer = config.optimizer
    if optimizer.min_lr is not None and optimizer.min_lr > optimizer.lr:
        _refuse(config, "optimizer.min_lr", f"must not be above optimizer.lr, {optimizer.lr}")
    decay_steps = optimizer.decay_steps or config.train.steps
    if optimizer.warmup_steps >= decay_steps:
        rule = f"must be below optimizer.decay_steps (null: train.steps), {decay_steps}"
        _refuse(config, "optimizer.warmup_steps", rule)
    if optimizer.schedule == "wsd":
        most = decay_steps - optimizer.warmup_steps
        if wsd_decay_steps(optimizer, config.train.steps) > most:
            rule = f"with optimizer.schedule wsd the decay must fit between warm-up and end, {most} steps"
            _refuse(config, "optimizer.wsd_decay_steps", rule)
    elif optimizer.wsd_decay_steps is not None:
        _refuse(config, "optimizer.wsd_decay_steps", "needs optimizer.schedule wsd; leave it null")
    longest = config.model.max_position_embeddings
    if config.train.sequence_length > longest:
        _refuse(config, "train.sequence_length", f"must not be above model.max_position_embeddings, {longest}")


def wsd_decay_steps(optimizer: OptimizerConfig, steps: int) -> int:
    """Steps of the last phase of schedule wsd in a run of `steps` steps."""
    return optimizer.wsd_decay_steps or max(1, (optimizer.decay_steps or steps) // 10)


def _check_tensor_parallel(config: Config) -> None:
    model, tensor = config.model, config.parallel.tensor
    groups, heads_per_group = model.num_key_value_heads, model.num_attention_heads // model.num_key_value_heads
    whole_groups = groups % tensor == 0
    parts_of_groups = tensor % groups == 0 and heads_per_group % (tensor // groups) == 0
    if not (whole_groups or parts_of_groups):
        rule = (
            f"must divide the {groups} key/value heads, or be a multiple of them that splits "
            f"the {heads_per_group} query heads of each evenly"
        )
        _refuse(config, "parallel.tensor", rule)
    channels = (model.num_attention_heads + 2 * groups) * model.head_dim
    if channels % tensor:
        rule = f"must divide the {channels} columns of the query-key-value projection, cut evenly above its heads"
        _refuse(config, "parallel.tensor", rule)
    # before the tokenizer is read only the multiple is known of the vocabulary
    rows = model.vocab_size_multiple if model.vocab_size is None else model.padded_vocab_size
    if rows % tensor:
        rule = f"the padded vocabulary, {rows}, must be divisible by tensor = {tensor}"
        _refuse(config, "model.vocab_size_multiple", rule)


def _check_expert_parallel(config: Config, world_size: int) -> None:
    model, parallel = config.model, config.parallel
    if not model.has_mlp_router:
        _check_plain_mlp(config)
        return
    expert_tensor = parallel.tensor_of_experts
    ranks = expert_tensor * parallel.expert
    if (world_size // parallel.pipeline) % ranks:
        rule = (
            f"expert x expert_tensor = {parallel.expert} x {expert_tensor} must divide the "
            f"{world_size // parallel.pipeline} processes of a pipeline stage"
        )
        _refuse(config, "parallel.expert", rule)
    if parallel.splits_experts_apart and parallel.tensor > 1 and not parallel.sequence:
        rule = "must be true where experts are split otherwise than by tensor > 1 alone"
        _refuse(config, "parallel.sequence", rule)
    if model.expert_training == "sparse":
        if model.num_experts % parallel.expert:
            _refuse(config, "parallel.expert", f"must divide model.num_experts, {model.num_experts}")
        if model.moe_intermediate_size % expert_tensor:
            rule = f"must be divisible by expert_tensor (null: tensor), {expert_tensor}"
            _refuse(config, "model.moe_intermediate_size", rule)
    elif model.intermediate_size % ranks:
        rule = (
            f"num_experts x moe_intermediate_size = {model.intermediate_size} hidden units must be "
            f"divisible by expert x expert_tensor = {ranks}"
        )
        _refuse(config, "model.moe_intermediate_size", rule)


def _check_plain_mlp(config: Config) -> None:
    parallel = config.parallel
    if parallel.expert > 1:
        _refuse(config, "parallel.expert", "must be 1 with model.num_experts 1")
    if parallel.expert_tensor not in (None, parallel.tensor):
        _refuse(config, "parallel.expert_tensor", "must be null with model.num_experts 1")
    if config.model.intermediate_size % parallel.tensor:
        _refuse(config, "model.moe_intermediate_size", f"must be divisible by tensor = {parallel.tensor}")


def _check_sequence_split(config: Config) -> None:
    parallel, length = config.parallel, config.train.sequence_length
    if parallel.sequence and parallel.tensor == 1:
        _refuse(config, "parallel.sequence", "needs parallel.tensor > 1; set it to false")
    if parallel.context > 1 and length % (2 * parallel.context):
        rule = f"must be divisible by 2 x context = {2 * parallel.context}: each rank takes an early and a late piece"
        _refuse(config, "train.sequence_length", rule)
    if parallel.sequence and length % (parallel.tensor * parallel.context):
        rule = f"must be divisible by tensor x context = {parallel.tensor * parallel.context} with parallel.sequence"
        _refuse(config, "train.sequence_length", rule)


def _check_pipeline(config: Config) -> None:
    parallel = config.parallel
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        _refuse(config, "parallel.virtual_pipeline", "needs parallel.pipeline > 1; set it to 1")
    layers, chunks = config.model.num_hidden_layers, parallel.virtual_pipeline
    uneven = [name for name in ("first_stage_layers", "last_stage_layers") if getattr(parallel, name) is not None]
    if not uneven and layers % (parallel.pipeline * chunks):
        rule = f"must be divisible by pipeline x virtual_pipeline = {parallel.pipeline * chunks}"
        _refuse(config, "model.num_hidden_layers", rule)
    if uneven and parallel.pipeline == 1:
        _refuse(config, f"parallel.{uneven[0]}", "needs parallel.pipeline > 1; leave it null")
    try:
        stages = parallel.layers_per_stage(layers)
    except ValueError:
        rule = f"the other pipeline ranks must be able to share the rest of the {layers} layers evenly"
        _refuse(config, f"parallel.{uneven[-1]}", rule)
    if len(uneven) == parallel.pipeline and chunks > 1:
        rule = "must be null with first_stage_layers, pipeline 2 and virtual_pipeline > 1; the last rank takes the rest"
        _refuse(config, "parallel.last_stage_layers", rule)
    if uneven and any(stage % chunks for stage in stages):
        rule = f"gives the pipeline ranks {stages} layers, which must be divisible by virtual_pipeline = {chunks}"
        _refuse(config, f"parallel.{uneven[-1]}", rule)


def _check_batch(config: Config, data_parallel: int) -> None:
    _check_ramp_up(config)
    for size in batch_sizes(config.train):
        # the full size is the last: what breaks at a smaller one is the ramp's fault
        _check_batch_size(config, size, data_parallel)


def _check_ramp_up(config: Config) -> None:
    full, ramp_up = config.train.global_batch_size, config.train.ramp_up
    missing = [key for key in ("start_batch_size", "increment", "samples") if getattr(ramp_up, key) is None]
    if missing and len(missing) < 3:
        _refuse(config, f"train.ramp_up.{missing[0]}", "must be set: a ramp needs start_batch_size, increment, samples")
    if ramp_up.start_batch_size is None or ramp_up.increment is None:
        return
    if ramp_up.start_batch_size >= full:
        _refuse(config, "train.ramp_up.start_batch_size", f"must be below train.global_batch_size, {full}")
    growth = full - ramp_up.start_batch_size
    if growth % ramp_up.increment:
        rule = f"must divide train.global_batch_size - start_batch_size = {growth}"
        _refuse(config, "train.ramp_up.increment", rule)


def _check_batch_size(config: Config, size: int, data_parallel: int) -> None:
    """A batch is cut evenly into micro-batches of all replicas."""
    train, parallel = config.train, config.parallel
    key, batch = "train.global_batch_size", "global_batch_size"
    if size < train.global_batch_size:
        first = size == train.ramp_up.start_batch_size
        key = f"train.ramp_up.{'start_batch_size' if first else 'increment'}"
        batch = f"the ramp's batch of {size}"
    samples = train.micro_batch_size * data_parallel
    if size % samples:
        whose = "" if size == train.global_batch_size else f"{batch} "
        rule = f"{whose}must be divisible by micro_batch_size x data-parallel size = {train.micro_batch_size} x "
        _refuse(config, key, f"{rule}{data_parallel}")
    micro_batches = size // samples
    if parallel.virtual_pipeline > 1 and micro_batches % parallel.pipeline:
        rule = (
            f"{micro_batches} micro-batches per replica ({batch} / (micro_batch_size x data-parallel size)) "
            f"must be divisible by pipeline = {parallel.pipeline} with virtual_pipeline > 1"
        )
        _refuse(config, key, rule)


def _check_data(config: Config) -> None:
    for name, sources in (("train", config.data.train), ("validation", config.data.validation)):
        for index, source in enumerate(sources):
            if not source.prefix:
                raise ConfigurationError(f"data.{name}[{index}].prefix", source.prefix, "must not be empty")
            if not 0 < source.weight < math.inf:
                raise ConfigurationError(f"data.{name}[{index}].weight", source.weight, "must be above 0")


def _check_profile(config: Config) -> None:
    profile = config.logging.profile
    if profile.last_step is None:
        return
    if profile.first_step is None or profile.last_step < profile.first_step:
        _refuse(config, "logging.profile.last_step", f"must not be below first_step, {profile.first_step}")


def _check_engine(config: Config, data_parallel: int) -> None:
    engine, parallel = config.engine, config.parallel
    if engine.name == "megatron":
        for key, is_set, default in (
            ("zero_stage", engine.zero_stage != 1, "1"),
            ("offload_optimizer", engine.offload_optimizer, "false"),
            ("deepspeed_config", engine.deepspeed_config is not None, "null"),
        ):
            if is_set:
                _refuse(config, f"engine.{key}", f"needs engine.name deepspeed; leave it {default} without")
        return
    if engine.zero_stage not in (1, 2, 3):
        _refuse(config, "engine.zero_stage", "must be 1, 2 or 3")
    for key in ("pipeline", "expert"):
        if getattr(parallel, key) > 1:
            instead = "split the model by engine.zero_stage 3 and parallel.tensor, or set engine.name megatron"
            _refuse(config, f"parallel.{key}", f"must be 1 with engine.name deepspeed: {instead}")
    if parallel.tensor_of_experts != parallel.tensor:
        _refuse(config, "parallel.expert_tensor", "must be null with engine.name deepspeed")
    if parallel.overlap:
        rule = "must be false with engine.name deepspeed, which has zero_optimization.overlap_comm in stages 2 and 3"
        _refuse(config, "parallel.overlap", f"{rule} (engine.deepspeed_config)")
    check_deepspeed_config(config, data_parallel)


def _refuse(config: Config, key: str, rule: str) -> NoReturn:
    raise ConfigurationError(key, _value(config, key), rule)


def _value(config: Config, key: str) -> Any:
    return attrgetter(key)(config)
