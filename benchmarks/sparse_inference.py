"""Sparse inference beside the dense policy of the same model, transformers' own kernels, and a Llama of the same size.

    python -m benchmarks.sparse_inference [--experts-of 256] [--dtypes fp32 bf16] [--json FILE]

12 layers of width 768 with 32 experts, random weights, one process, exported model. Prefill: one forward pass over a
prompt, logits of its last token alone. Decode: one token for each sample at a time, on a cache. The runs of a row take
turns, and ratios are taken within a repeat.

The ideal ratio of prefill is that of the operations, of decode that of the bytes of weights that a step must read; both
count the experts that the policy took in fact, decode the distinct ones that the batch touches. The random routers are
scaled until the threshold takes --active of the MLP experts, as trained ones do.
"""

import itertools
import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measuring import benchmark_parser, paired_seconds, run_benchmark, surroundings, surroundings_line, table
from dsmoe_megatron.inference.configuration_dsmoe import DSMoEConfig
from dsmoe_megatron.inference.expert_products import PER_EXPERT
from dsmoe_megatron.inference.modeling_dsmoe import DSMoEForCausalLM
from dsmoe_megatron.inference.policy import PolicyName, active_experts
from dsmoe_megatron.inference.routed_layers import DSMoEMLP

LAYERS, HIDDEN, EXPERTS, TOP_K, HEAD_DIM, KEY_VALUE_HEADS, ATTENTION_EXPERTS, VOCABULARY = (
    12,
    768,
    32,
    8,
    64,
    2,
    6,
    8192,
)
THRESHOLD = 0.48
LIMIT = 0.8
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
PROMPT = 64  # tokens in the cache before decoding
DENSE, TRANSFORMERS, LLAMA = "dense", "grouped_mm of transformers", "Llama of the same size"


@dataclass(frozen=True)
class Scenario:
    """What is timed.

    Args:
        batch: samples.
        tokens: of the prompt, or steps of decoding.
        decode: whether tokens come one at a time.
    """

    batch: int
    tokens: int
    decode: bool

    @property
    def name(self) -> str:
        return f"decode, batch {self.batch}" if self.decode else f"prefill, {self.tokens} tokens"


SCENARIOS = (Scenario(1, 16, True), Scenario(8, 16, True), Scenario(1, 512, False), Scenario(1, 2048, False))


def random_model(units: int, gated: bool, dtype: torch.dtype) -> DSMoEForCausalLM:
    """A model of the paper's kind.

    Args:
        units: of one MLP expert.
        gated: SwiGLU experts, else GeLU.
        dtype: of the weights.
    """
    config = DSMoEConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=ATTENTION_EXPERTS * KEY_VALUE_HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        num_attention_experts=ATTENTION_EXPERTS,
        head_dim=HEAD_DIM,
        num_experts=EXPERTS,
        moe_intermediate_size=units,
        hidden_act="silu" if gated else "gelu",
        gated_mlp=gated,
        num_experts_per_tok=TOP_K,
        expert_threshold=THRESHOLD,
    )
    torch.manual_seed(1234)
    return DSMoEForCausalLM(config).to(dtype).eval()


def llama_of_the_same_size(model: DSMoEForCausalLM) -> LlamaForCausalLM:
    """The dense model whose MLP is as wide as all experts together."""
    config = model.config
    shared = (
        "vocab_size",
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    )
    llama = LlamaConfig(
        **{name: getattr(config, name) for name in shared},
        intermediate_size=config.num_experts * config.moe_intermediate_size,
    )
    return LlamaForCausalLM(llama).to(model.dtype).eval()


def mlps(model: DSMoEForCausalLM) -> list[Any]:
    """The MLP of each layer."""
    return [layer.mlp for layer in cast(Any, model.model.layers)]


def sharpen_routers(model: DSMoEForCausalLM, share: float) -> None:
    """Scale the MLP routers until the threshold takes this share of the experts."""
    model.set_policy("threshold")
    ids = torch.randint(VOCABULARY, (1, 256))
    low, high = 0.0, 8.0  # exponents of two
    weights = [mlp.gate.weight.data.clone() for mlp in mlps(model)]
    for _ in range(8):
        middle = (low + high) / 2
        for mlp, weight in zip(mlps(model), weights, strict=True):
            mlp.gate.weight.data.copy_(weight * 2**middle)
        with counted_experts(model) as counts:
            model(ids)
        active = statistics.fmean(count.pairs for count in counts) / ids.numel() / EXPERTS
        low, high = (middle, high) if active > share else (low, middle)


@dataclass(frozen=True)
class Count:
    """Experts that one MLP layer computed in one forward pass: (token, expert) pairs, and distinct experts."""

    pairs: int
    distinct: int


@contextmanager
def counted_experts(model: DSMoEForCausalLM) -> Iterator[list[Count]]:
    """What the policy takes in the forward passes of the context, by layer and pass."""
    counts: list[Count] = []

    def count(mlp: DSMoEMLP, arguments: tuple[Tensor, ...]) -> None:
        _, scores_TN = mlp.gate(arguments[0].flatten(0, -2))
        active_TN = active_experts(scores_TN, mlp.policy, mlp.layer_idx, "mlp")
        counts.append(Count(int(active_TN.sum()), int(active_TN.any(dim=0).sum())))

    hooks = [mlp.register_forward_pre_hook(count) for mlp in mlps(model)]
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()


def parameters_without_experts(model: DSMoEForCausalLM) -> int:
    """Of all that every token needs, the output layer too; the input embedding is only looked up."""
    embedding = model.model.embed_tokens.weight.numel()
    experts = sum(p.numel() for mlp in mlps(model) for p in mlp.experts.parameters())
    return sum(p.numel() for p in model.parameters()) - embedding - experts


def ideal_ratio(model: DSMoEForCausalLM, scenario: Scenario, counts: Sequence[Count]) -> float:
    """Cost of the dense policy / cost of the counted one: operations of prefill, bytes of decode.

    Args:
        model: gives the sizes.
        scenario: what is timed.
        counts: of every layer in every forward pass.
    """
    one_expert = sum(p[0].numel() for p in mlps(model)[0].experts.parameters())
    rest = parameters_without_experts(model)
    if scenario.decode:
        passes = len(counts) // LAYERS
        active = sum(count.distinct for count in counts) / passes * one_expert
        return (rest + LAYERS * EXPERTS * one_expert) / (rest + active)
    output_layer = model.lm_head.weight.numel()  # of one token
    attention = LAYERS * scenario.tokens * HEAD_DIM * ATTENTION_EXPERTS * KEY_VALUE_HEADS  # products per token, causal
    always = (rest - output_layer + attention) * scenario.tokens + output_layer
    active = sum(count.pairs for count in counts) * one_expert
    return (always + LAYERS * EXPERTS * one_expert * scenario.tokens) / (always + active)


def forward_passes(model: Any, scenario: Scenario) -> Callable[[], object]:
    """The work of a scenario, as often as it is called."""
    torch.manual_seed(1)
    vocabulary = model.config.vocab_size
    if not scenario.decode:
        ids = torch.randint(vocabulary, (scenario.batch, scenario.tokens))
        return lambda: model(ids, use_cache=False, logits_to_keep=1)
    prompt = torch.randint(vocabulary, (scenario.batch, PROMPT))
    steps = torch.randint(vocabulary, (scenario.tokens, scenario.batch, 1))
    cache = model(prompt, use_cache=True, logits_to_keep=1).past_key_values

    def decode() -> None:
        for ids in steps:
            model(ids, past_key_values=cache, use_cache=True)
        cache.crop(-len(steps))

    return decode


def measure_scenario(
    model: DSMoEForCausalLM, llama: LlamaForCausalLM | None, policy: PolicyName, scenario: Scenario, repeats: int
) -> dict[str, Any]:
    """One row: the sparse policy beside the others."""

    def under(name: PolicyName, implementation: str) -> Callable[[], object]:
        passes = forward_passes(model, scenario)

        def run() -> object:
            model.set_policy(name)
            model.set_experts_implementation(implementation)
            return passes()

        return run

    runs = {
        policy: under(policy, PER_EXPERT),
        DENSE: under("dense", PER_EXPERT),
        TRANSFORMERS: under(policy, "grouped_mm"),
    }
    if llama is not None:
        runs[LLAMA] = forward_passes(llama, scenario)
    with counted_experts(model) as counts:
        runs[policy]()
    seconds = paired_seconds(runs, repeats, torch.device("cpu"))
    tokens = scenario.batch * scenario.tokens
    ratios = {
        name: statistics.median(
            other.wall / own.wall for own, other in zip(seconds[policy], seconds[name], strict=True)
        )
        for name in runs
        if name != policy
    }
    ideal = ideal_ratio(model, scenario, counts)
    return {
        "scenario": scenario.name,
        "policy": policy,
        "active_share": sum(count.pairs for count in counts) / (tokens * LAYERS * EXPERTS),
        "tokens_per_s": {name: tokens / statistics.median(run.wall for run in own) for name, own in seconds.items()},
        "ratio_to": ratios,
        "ideal": ideal,
        "share_of_ideal": ratios[DENSE] / ideal,
    }


@torch.inference_mode()
def measure(arguments: Namespace) -> dict[str, Any]:
    report: dict[str, Any] = {"surroundings": surroundings(torch.device("cpu")), "models": []}
    for dtype in arguments.dtypes:
        for gated in (False, True):
            for units in arguments.experts_of:
                model = random_model(units, gated, DTYPES[dtype])
                sharpen_routers(model, arguments.active)
                llama = llama_of_the_same_size(model) if gated else None
                rows = []
                policies: tuple[PolicyName, ...] = ("topk", "threshold")
                for policy, scenario in itertools.product(policies, SCENARIOS):
                    if scenario.name in arguments.scenarios:
                        rows.append(measure_scenario(model, llama, policy, scenario, arguments.repeats))
                        print(f"{dtype}, {units} units, gated: {gated}, {rows[-1]}", file=sys.stderr)
                report["models"].append({"dtype": dtype, "gated": gated, "units": units, "rows": rows})
    return report


def as_markdown(report: dict[str, Any]) -> str:
    lines = [surroundings_line(report["surroundings"])]
    for model in report["models"]:
        kind = "SwiGLU" if model["gated"] else "GeLU"
        lines += ["", f"{model['dtype']}, {kind} experts of {model['units']} units", ""]
        header = (
            "Policy",
            "Scenario",
            "Active",
            "Tokens/s",
            "/ dense",
            "Ideal",
            "Share of the ideal",
            "/ grouped_mm",
            "/ Llama",
        )
        rows = [
            (
                row["policy"],
                row["scenario"],
                f"{row['active_share']:.0%}",
                f"{row['tokens_per_s'][row['policy']]:.1f}",
                f"{row['ratio_to'][DENSE]:.2f}",
                f"{row['ideal']:.2f}",
                f"{row['share_of_ideal']:.2f}: {'met' if row['share_of_ideal'] >= LIMIT else 'missed'}",
                f"{row['ratio_to'][TRANSFORMERS]:.2f}",
                f"{row['ratio_to'][LLAMA]:.2f}" if LLAMA in row["ratio_to"] else "",
            )
            for row in model["rows"]
        ]
        lines += table(header, rows)
    return "\n".join([*lines, "", f"Goal: {LIMIT} of the ideal ratio to the dense policy."])


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = benchmark_parser("sparse_inference", "Sparse inference beside dense")
    parser.add_argument("--experts-of", nargs="+", type=PositiveInt, default=[96, 256], help="units of one expert")
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=list(DTYPES), help="of the weights")
    parser.add_argument("--active", type=ClosedUnitInterval, default=0.3, help="share of experts over the threshold")
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--scenarios", nargs="+", choices=names, default=names, help="to time")
    parser.add_argument("--repeats", type=PositiveInt, default=7, help="runs of each contestant")
    return parser


def main() -> None:
    run_benchmark(build_parser(), measure, as_markdown)


if __name__ == "__main__":
    main()
