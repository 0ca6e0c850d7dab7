"""Perplexity against the active share of an export, policy by policy, on the first samples of an indexed dataset.

    python docs/examples/policy_curve.py --model EXPORT --data PREFIX --threshold 0.48 0.8 --top-k 4 8

A token's active experts are counted in the very pass that predicts it: what an earlier layer leaves out changes what a
later router sees.
"""

import argparse
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from checkpoints_tools.hf_architecture import model_section, read_config_json
from data_tools.dataset_reader import map_tokens, read_index
from dsmoe_megatron.inference.modeling_dsmoe import DSMoEForCausalLM
from dsmoe_megatron.inference.policy import ExpertPolicy, RouterKind, active_experts
from dsmoe_megatron.planning.parameters import active_share


def samples(prefix: str, number: int, length: int) -> Tensor:
    """The first tokens of a dataset, documents one after the other, [number, length + 1]."""
    tokens = map_tokens(prefix, read_index(prefix).dtype)[: number * length + 1]
    return torch.from_numpy(tokens.astype("int64")).unfold(0, length + 1, length)


@torch.no_grad()
def measure(model: DSMoEForCausalLM, tokens_BS: Tensor) -> tuple[float, dict[RouterKind, list[float]]]:
    """Mean cross-entropy [nats per token] and mean active experts per layer of each kind, under the model's policy."""
    policy, layers = ExpertPolicy.from_config(model.config), model.config.num_hidden_layers
    losses: list[float] = []
    counts: dict[RouterKind, list[float]] = {"mlp": [0.0] * layers, "attention": [0.0] * layers}
    for sample_S in tqdm(tokens_BS, disable=None, leave=False):
        output = model(sample_S[None, :-1], output_router_logits=True, output_attention_router_logits=True)
        losses.append(float(F.cross_entropy(output.logits[0].double(), sample_S[1:])))
        router_logits = {"mlp": output.router_logits, "attention": output.attention_router_logits}
        for kind, means in counts.items():
            for layer, logits_TE in enumerate(router_logits[kind] or ()):
                active_TE = active_experts(logits_TE.softmax(dim=-1), policy, layer, kind)
                means[layer] += float(active_TE.sum(dim=-1).double().mean()) / len(tokens_BS)
    return math.fsum(losses) / len(losses), counts


def policies(arguments: argparse.Namespace) -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and arguments of `set_policy`."""
    yield "dense", {"expert_policy": "dense"}
    for threshold in arguments.threshold:
        yield f"threshold {threshold:g}", {"expert_policy": "threshold", "expert_threshold": threshold}
    for top_k in arguments.top_k:
        yield f"topk {top_k}", {"expert_policy": "topk", "num_experts_per_tok": top_k}


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="policy_curve", description="Perplexity against active share of an export.")
    parser.add_argument("--model", type=Path, required=True, help="export with routers of both kinds or of one")
    parser.add_argument("--data", required=True, metavar="PREFIX", help="indexed dataset of the model's tokenizer")
    parser.add_argument("--samples", type=int, default=16, help="default: 16")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sample; default: 512")
    parser.add_argument("--threshold", type=float, nargs="*", default=[], metavar="EPS", help="eps of both kinds")
    parser.add_argument("--top-k", type=int, nargs="*", default=[], metavar="K", help="MLP experts; all attention ones")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    section, _ = model_section(read_config_json(arguments.model), str(arguments.model))
    model = DSMoEForCausalLM.from_pretrained(arguments.model, dtype=torch.float32).eval()
    tokens_BS = samples(arguments.data, arguments.samples, arguments.length)
    print(
        "| Policy | Perplexity | Active MLP experts | Active attention experts | Active share |\n|---|---|---|---|---|"
    )
    for name, policy in policies(arguments):
        model.set_policy(**policy)
        loss, counts = measure(model, tokens_BS)
        mlp, attention = counts["mlp"], counts["attention"] if section.has_attention_router else 1.0
        of_attention = math.fsum(attention) / len(attention) if isinstance(attention, list) else attention
        share = 100 * active_share(section, mlp, attention)
        mean = math.fsum(mlp) / len(mlp)
        print(f"| {name} | {math.exp(loss):.3f} | {mean:.2f} | {of_attention:.2f} | {share:.1f} % |", flush=True)


if __name__ == "__main__":
    main()
