"""Everything that is known of a run beforehand, from its recipe, the number of GPUs and their figures."""

from collections import defaultdict
from dataclasses import dataclass, replace
from typing import Literal

from dsmoe_megatron.config import Config, ModelConfig, PolicyConfig
from dsmoe_megatron.config_rules import check_config
from dsmoe_megatron.errors import ConfigurationError
from dsmoe_megatron.planning.flops import Flops, TrainingFlops, inference_flops, training_flops
from dsmoe_megatron.planning.hardware import Hardware
from dsmoe_megatron.planning.memory import RankMemory, rank_memory
from dsmoe_megatron.planning.parameters import ParameterCount, active_parameters, count_parameters
from dsmoe_megatron.planning.ranks import RankParameters, rank_parameters
from dsmoe_megatron.planning.step_time import StepTime, step_time
from dsmoe_megatron.planning.traffic import step_traffic

RecomputeMode = Literal["none", "selective", "full"]
RECOMPUTE_MODES: tuple[RecomputeMode, ...] = ("none", "selective", "full")


@dataclass(frozen=True)
class EstimateOptions:
    """What is estimated, and how it is shown."""

    gpus: int | None = None
    """GPUs; null takes WORLD_SIZE, else the fewest that the layout can run on."""
    gpu: str = "h100"
    """Row of the hardware table: h100, h200, a100, cpu, or one of --hardware."""
    hardware: str | None = None
    """YAML file with rows of your own, in the form of planning/hardware.yaml."""
    json: bool = False
    """Print JSON instead of text."""
    picture: str | None = None
    """File for a picture of the memory per rank, .png or .svg."""
    search: bool = False
    """Try every layout instead, and rank those that fit."""
    top: int = 10
    """Layouts that a search prints."""


@dataclass(frozen=True)
class PolicyEstimate:
    """Sparse inference under one policy.

    Attributes:
        name: of the policy, with its K.
        active_mlp_experts, active_attention_experts: per token, mean.
        active_parameters: per token, without embeddings.
        flops: per token of a prompt of train.sequence_length tokens.
    """

    name: str
    active_mlp_experts: float
    active_attention_experts: float
    active_parameters: float
    flops: Flops


@dataclass(frozen=True)
class StageEstimate:
    """One rank of one pipeline stage; all ranks of a stage are alike.

    Attributes:
        layers: of the stage.
        parameters: that the rank holds.
        memory: by recompute mode, in bytes at the peak of a step.
        traffic: bytes that the rank sends per step, by parallelism.
    """

    layers: int
    parameters: RankParameters
    memory: dict[str, RankMemory]
    traffic: dict[str, float]


@dataclass(frozen=True)
class Estimate:
    """What `python -m dsmoe_megatron estimate` shows.

    Attributes:
        config: checked recipe.
        world_size: GPUs.
        hardware: their figures.
        parameters: of the whole model.
        policies: sparse inference.
        flops: per token of training.
        stages: by pipeline rank.
        time: of a step and of the run.
    """

    config: Config
    world_size: int
    hardware: Hardware
    parameters: ParameterCount
    policies: list[PolicyEstimate]
    flops: TrainingFlops
    stages: list[StageEstimate]
    time: StepTime

    @property
    def peak_memory(self) -> int:
        """Of the fullest rank under the recipe's train.recompute [bytes]."""
        return max(stage.memory[self.config.train.recompute].total for stage in self.stages)

    @property
    def fits(self) -> bool:
        return self.peak_memory <= self.hardware.usable_memory


def estimate(config: Config, world_size: int, hardware: Hardware) -> Estimate:
    """Estimate a run.

    Args:
        config: recipe.
        world_size: GPUs.
        hardware: their figures.

    Raises:
        ConfigurationError: a rule of config_rules is broken, the vocabulary is unknown, or the hardware has no peak for
            train.precision.
    """
    check_config(config, world_size)
    require_vocabulary(config)
    return Estimate(
        config=config,
        world_size=world_size,
        hardware=hardware,
        parameters=count_parameters(config.model),
        policies=policy_estimates(config),
        flops=training_flops(config),
        stages=[_stage(config, world_size, rank) for rank in range(config.parallel.pipeline)],
        time=step_time(config, world_size, hardware),
    )


def require_vocabulary(config: Config) -> None:
    """Raise ConfigurationError where the size of embeddings and logits is not known."""
    if config.model.vocab_size is None:
        rule = "embeddings and logits are unknown without the tokenizer's size: give --model.vocab_size TOKENS"
        raise ConfigurationError("model.vocab_size", None, rule)


def is_memory_known(config: Config) -> bool:
    """What is estimated is the default engine; ZeRO-1 cuts up the same tensors, higher stages and offload more."""
    engine = config.engine
    return engine.name == "megatron" or (engine.zero_stage == 1 and not engine.offload_optimizer)


def smallest_world_size(config: Config) -> int:
    """The fewest processes on which the recipe can run.

    Raises:
        ConfigurationError: it runs on no number of processes up to its batch.
    """
    parallel = config.parallel
    replica = parallel.tensor * parallel.pipeline * parallel.context
    most = max(config.train.global_batch_size // config.train.micro_batch_size, 1)
    for replicas in range(1, most):
        try:
            check_config(config, replica * replicas)
        except ConfigurationError:
            continue
        return replica * replicas
    check_config(config, replica * most)
    return replica * most


def policy_estimates(config: Config) -> list[PolicyEstimate]:
    """Sparse inference under the recipe's top-k policies, nothing for models without routers.

    How many experts a threshold activates is known only of a trained model: its validation lines have active shares.
    """
    model = config.model
    if not (model.has_mlp_router or model.has_attention_router):
        return []
    topk = [policy for policy in config.evaluation.policies if policy.expert_policy == "topk"]
    active = dict.fromkeys(_active_experts(model, policy) for policy in topk)  # each once, in the recipe's order
    return [_policy_estimate(config, mlp, attention) for mlp, attention in active]


def _active_experts(model: ModelConfig, policy: PolicyConfig) -> tuple[int, int]:
    """Active experts per token of (MLP, attention) under top-k; a null of the policy is the model section's."""
    attention = policy.attention_experts_per_tok or model.attention_experts_per_tok or model.num_attention_experts
    mlp = policy.num_experts_per_tok or model.num_experts_per_tok
    return (mlp if model.has_mlp_router else 1), (attention if model.has_attention_router else 1)


def _policy_estimate(config: Config, mlp: int, attention: int) -> PolicyEstimate:
    model = config.model
    return PolicyEstimate(
        name=f"topk, {mlp} of {model.num_experts} MLP experts, {attention} of {model.num_attention_experts} attention",
        active_mlp_experts=mlp,
        active_attention_experts=attention,
        active_parameters=active_parameters(model, mlp, attention),
        flops=inference_flops(model, (config.train.sequence_length + 1) / 2, mlp, attention),
    )


def with_recompute(config: Config, mode: RecomputeMode) -> Config:
    return replace(config, train=replace(config.train, recompute=mode))


def _stage(config: Config, world_size: int, rank: int) -> StageEstimate:
    traffic: dict[str, float] = defaultdict(float)
    for transfer in step_traffic(config, world_size, rank):
        traffic[transfer.parallelism] += transfer.sent
    return StageEstimate(
        layers=config.parallel.layers_per_stage(config.model.num_hidden_layers)[rank],
        parameters=rank_parameters(config, rank),
        memory={mode: rank_memory(with_recompute(config, mode), world_size, rank) for mode in RECOMPUTE_MODES},
        traffic=dict(traffic),
    )
