"""The logits of a training checkpoint, run by megatron-core, against those of its export, run by transformers.

Both compute in float32 on the same random tokens. Where the export was rounded to a shorter type the checkpoint's
weights are rounded likewise first, so that one tolerance holds for every type: what remains is the order of summation.

Sparse policies are not continuous: where an expert's score lies within rounding of the threshold, or of its rival, the
two may choose differently and both be right. Such tokens are left out, with those after them in the same sequence,
which attend to them; how many were compared is counted.

Shape suffixes: B sequences, S positions, T tokens (B x S flattened), N experts, V vocabulary.
"""

import copy
import dataclasses
import math
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from checkpoints_tools.export_formats import model_class, read_exported_config
from dsmoe_megatron.config import Config, ModelConfig, ParallelConfig, TrainConfig
from dsmoe_megatron.config_parsing import load_config
from dsmoe_megatron.errors import CheckpointError
from dsmoe_megatron.inference.policy import ExpertPolicy, RouterKind, active_experts

SEQUENCES, PROMPT_TOKENS, NEW_TOKENS = 8, 24, 8
TOLERANCE = 1e-4  # of the largest logit
MARGIN = 2e-5  # around a threshold or a rival's score, in units of the uniform probability
LEAST_COMPARED = 0.25  # of the tokens, below which nothing is shown
ROUTER_OUTPUTS = {
    "dsmoe": {"output_router_logits": True, "output_attention_router_logits": True},
    "qwen2_moe": {"output_router_logits": True},
}

Forward = Callable[[Tensor, ExpertPolicy], Tensor]
"""Logits [B, S, V] of token ids [B, S] under a policy."""


@dataclass(frozen=True)
class Comparison:
    """What one policy gave.

    Args:
        policy: its name.
        tokens: positions that were computed.
        compared: those whose experts do not hang on rounding.
        difference: largest absolute difference of two logits of the same position and token.
        largest: largest absolute logit.
        greedy_tokens: generated tokens that were compared.
        greedy_equal: those that the checkpoint would have generated too.
    """

    policy: str
    tokens: int
    compared: int
    difference: float
    largest: float
    greedy_tokens: int
    greedy_equal: int

    @property
    def relative(self) -> float:
        """The difference as a part of the largest logit."""
        return self.difference / self.largest if self.largest else math.inf if self.difference else 0.0

    @property
    def fault(self) -> str | None:
        """Why this is no agreement; None where it is one."""
        if self.compared < LEAST_COMPARED * self.tokens:
            return f"only {self.compared} of {self.tokens} tokens can be compared, the others hang on rounding"
        if not self.relative <= TOLERANCE:  # NaN too
            share = f"{self.relative:.1e} of the largest"
            return f"logits differ by up to {self.difference:.3g}, {share}: above {TOLERANCE:.0e}"
        if self.greedy_equal < self.greedy_tokens:
            return f"{self.greedy_tokens - self.greedy_equal} of {self.greedy_tokens} greedy tokens differ"
        return None


def compare_logits(step_folder: Path, export: Path) -> Iterator[Comparison]:
    """Run both models under the export's own policy, the dense one and some sparse ones.

    Args:
        step_folder: training checkpoint, of any layout.
        export: folder that was made of it.

    Raises:
        CheckpointError: one of them cannot be loaded, or they have different vocabularies.
    """
    from dsmoe_megatron.runtime.distributed import group_of_one, model_parallel_groups, prepare_device

    device = prepare_device()  # before anything of megatron.core is imported
    config = _single_process(load_config(step_folder / "config.yaml"))
    exported = _load_export(export, device)
    if config.model.vocab_size not in (None, exported.config.vocab_size):
        found, own = exported.config.vocab_size, config.model.vocab_size
        raise CheckpointError(f"{export}: has a vocabulary of {found}, but {step_folder} one of {own}")
    config.model.vocab_size = exported.config.vocab_size
    with group_of_one(), model_parallel_groups(config.parallel, config.train.seed), torch.no_grad():
        trained = _load_megatron(config, step_folder, device, read_exported_config(export).dtype or torch.float32)
        for policy in _policies(config.model, exported):
            yield _compare(policy, trained, exported, device)


def _single_process(config: Config) -> Config:
    train = dataclasses.replace(config.train, precision="fp32", recompute=TrainConfig().recompute)
    return dataclasses.replace(config, parallel=ParallelConfig(), train=train, model=copy.deepcopy(config.model))


def _load_export(folder: Path, device: torch.device) -> Any:
    from transformers.utils.logging import disable_progress_bar

    config = read_exported_config(folder)
    if not sys.stderr.isatty():  # no bar where nobody watches it
        disable_progress_bar()
    try:
        return model_class(config).from_pretrained(folder, dtype=torch.float32, local_files_only=True).to(device).eval()
    except Exception as error:  # transformers and safetensors have many
        raise CheckpointError(f"{folder}: cannot be loaded: {error}") from error


def _load_megatron(config: Config, folder: Path, device: torch.device, rounded_to: torch.dtype) -> Forward:
    """The training model with a checkpoint's weights, by megatron-core's own loader."""
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.core import CheckpointingException
    from torch.distributed.checkpoint.api import CheckpointException  # derives from BaseException

    from dsmoe_megatron.checkpoint_metadata import read_metadata
    from dsmoe_megatron.model.gpt import build_chunks, routers
    from dsmoe_megatron.model.transformer_config import transformer_config
    from dsmoe_megatron.runtime.backends import layer_backend
    from dsmoe_megatron.training.engines.passes import EXTRA_STATE

    (model,) = build_chunks(config, transformer_config(config, device), layer_backend(device))
    model = model.to(device).eval()
    wanted = {name: shard for name, shard in model.sharded_state_dict().items() if not name.endswith(EXTRA_STATE)}
    read_metadata(folder)  # torch unpickles it without asking: look at it first
    try:
        loaded = dist_checkpointing.load({"model": wanted}, str(folder))["model"]
    except (OSError, RuntimeError, KeyError, EOFError, CheckpointingException, CheckpointException) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
        raise CheckpointError(f"{folder}: cannot be loaded: {reason}") from error
    extra_states = {name: None for name in model.state_dict() if name.endswith(EXTRA_STATE)}
    model.load_state_dict({**loaded, **extra_states})
    for parameter in model.parameters():
        parameter.data.copy_(parameter.to(rounded_to))

    def forward(ids_BS: Tensor, policy: ExpertPolicy) -> Tensor:
        def choose(scores_TE: Tensor, layer_index: int, kind: RouterKind) -> Tensor:
            return active_experts(scores_TE, policy, layer_index, kind)

        for router in routers([model]):
            router.control.choose_experts = choose
        positions_BS = torch.arange(ids_BS.shape[1], device=device).expand_as(ids_BS)
        logits_BSV: Tensor = model(ids_BS, positions_BS, None)
        return logits_BSV[..., : config.model.vocab_size]

    return forward


def _policies(model: ModelConfig, exported: Any) -> list[ExpertPolicy]:
    """The export's own policy first, then those that a model with switchable ones is for; with every limit named."""
    if exported.config.model_type == "llama" or not (model.has_mlp_router or model.has_attention_router):
        return [ExpertPolicy()]
    if exported.config.model_type == "qwen2_moe":
        return [ExpertPolicy("topk", exported.config.num_experts_per_tok)]
    if model.expert_training == "sparse":
        return [ExpertPolicy.from_config(exported.config)]
    own = ExpertPolicy.from_config(exported.config)
    top_k, all_heads = min(model.num_experts_per_tok, model.num_experts), model.num_attention_experts
    policies = [
        *([own] if own.expert_policy != "threshold_topk" else []),  # which is for evaluation only
        ExpertPolicy(),
        ExpertPolicy("topk", top_k, all_heads if model.has_attention_router else None),
        *([ExpertPolicy("topk", top_k, max(1, all_heads // 2))] if model.has_attention_router else []),
        ExpertPolicy("threshold", expert_threshold=model.expert_threshold),
    ]
    named: dict[str, ExpertPolicy] = {}
    for policy in policies:
        named.setdefault(_name(policy), policy)
    return list(named.values())


def _name(policy: ExpertPolicy) -> str:
    from dsmoe_megatron.training.validation import policy_name

    if policy.expert_policy == "dense":
        return "dense"
    return f"{policy.expert_policy}, per layer" if policy.expert_policy_layers else policy_name(policy)


def _compare(policy: ExpertPolicy, trained: Forward, exported: Any, device: torch.device) -> Comparison:
    if hasattr(exported, "set_policy"):
        limits = {field: value for field, value in dataclasses.asdict(policy).items() if field != "expert_policy"}
        exported.set_policy(policy.expert_policy, **limits)
    generator = torch.Generator().manual_seed(1234)
    vocab_size = exported.config.vocab_size
    prompts = torch.randint(vocab_size, (SEQUENCES, PROMPT_TOKENS), generator=generator).to(device)
    generated = exported.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    ids_BS, next_BS = generated[:, :-1], generated[:, 1:]
    output = exported(ids_BS, **ROUTER_OUTPUTS.get(exported.config.model_type, {}))
    decided_BS = _undecided(policy, output).view(ids_BS.shape).int().cumsum(dim=1) == 0
    own_BSV, other_BSV = trained(ids_BS, policy).float()[decided_BS], output.logits.float()[decided_BS]
    largest = float(own_BSV.abs().max()) if decided_BS.any() else 0.0
    difference = float((own_BSV - other_BSV).abs().max()) if decided_BS.any() else 0.0
    is_new = (torch.arange(ids_BS.shape[1], device=device) >= PROMPT_TOKENS - 1).expand_as(ids_BS)[decided_BS]
    chosen = own_BSV[is_new].gather(-1, next_BS[decided_BS][is_new, None])[:, 0]
    # two tokens within the tolerance of each other are both right
    equal = chosen >= own_BSV[is_new].max(dim=-1).values - TOLERANCE * largest
    return Comparison(
        _name(policy),
        ids_BS.numel(),
        int(decided_BS.sum()),
        difference,
        largest,
        len(equal),
        int(equal.sum()),
    )


def _undecided(policy: ExpertPolicy, output: Any) -> Tensor:
    """Tokens for which some router's choice hangs on rounding, bool, [T]."""
    tokens = output.logits.shape[0] * output.logits.shape[1]
    undecided_T = torch.zeros(tokens, dtype=torch.bool, device=output.logits.device)
    kinds: tuple[tuple[RouterKind, str], ...] = (("mlp", "router_logits"), ("attention", "attention_router_logits"))
    for kind, name in kinds:
        for layer, logits_TN in enumerate(getattr(output, name, None) or ()):
            scores_TN = logits_TN.float().softmax(dim=-1) * logits_TN.shape[-1]
            undecided_T |= _close(policy, scores_TN, layer, kind)
    return undecided_T


def _close(policy: ExpertPolicy, scores_TN: Tensor, layer: int, kind: RouterKind) -> Tensor:
    """Tokens with normalised scores within MARGIN of where they would be chosen otherwise, bool, [T]."""
    experts = scores_TN.shape[-1]
    ranked_TN = scores_TN.sort(dim=-1, descending=True).values
    if policy.expert_policy == "topk":
        top_k = policy.top_k(layer, kind, experts)
        if top_k == experts:
            return torch.zeros_like(ranked_TN[:, 0], dtype=torch.bool)
        return _is_close(ranked_TN[:, top_k - 1] - ranked_TN[:, top_k])
    if policy.expert_policy != "threshold" or experts == 1:
        return torch.zeros_like(ranked_TN[:, 0], dtype=torch.bool)
    threshold = policy.threshold(layer, kind)
    near_T = _is_close((scores_TN - threshold).abs()).any(dim=-1)
    best_alone_T = ranked_TN[:, 0] <= threshold
    return near_T | (best_alone_T & _is_close(ranked_TN[:, 0] - ranked_TN[:, 1]))


def _is_close(distance: Tensor) -> Tensor:
    """Exactly equal scores, as routers of zeros give, are told apart by their index, by both models alike."""
    return (distance > 0) & (distance < MARGIN)
