"""Requests per second of vLLM: the sparse model beside the same model under the dense policy, and a Llama of its size.

    .venv-vllm/bin/python -m benchmarks.serving [--activation swiglu] [--threads 2] [--json FILE]

Random weights; the routers are scaled so that the threshold of the paper, 0.48, activates about 30 % of the experts.
Every model has an engine of its own in a process of its own; they take turns in changing order, and a ratio is the
median over the turns: by the clock, and in processor time, which a busy machine disturbs less. Requests of random
tokens are given all at once; `--concurrency` of them run together. The limit is the ratio of the products' FLOPs.
"""

import json
import math
import multiprocessing
import os
import random
import statistics
import sys
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import PositiveInt

VOCABULARY, LAYERS, HIDDEN, EXPERTS, UNITS = 4096, 12, 768, 32, 256
ATTENTION_EXPERTS, KEY_VALUE_HEADS, HEAD_DIM = 6, 2, 64
THRESHOLD, ACTIVE_SHARE = 0.48, 0.30
POLICIES: dict[str, dict[str, Any]] = {
    "dense": {"expert_policy": "dense"},
    "topk": {"expert_policy": "topk", "num_experts_per_tok": 8},
    "threshold": {"expert_policy": "threshold", "expert_threshold": THRESHOLD, "attention_expert_threshold": THRESHOLD},
}
LLAMA = "Llama"
Seconds = tuple[float, float]
"""Of one turn: by the clock, and of processor time summed over the process's threads."""


def logit_deviation(threshold: float, share: float) -> float:
    """Standard deviation of normal logits at which `share` of many experts is above the threshold.

    The mean of exp(l) is exp(d^2 / 2), so expert l is above it where l > d^2 / 2 + log(threshold).
    """
    quantile = statistics.NormalDist().inv_cdf(1 - share)
    return quantile + math.sqrt(quantile**2 - 2 * math.log(threshold))


def write_model(folder: Path, gated: bool, layers: int) -> None:
    """A random DS-MoE in the form of an export."""
    import torch

    from dsmoe_megatron.inference.configuration_dsmoe import DSMoEConfig
    from dsmoe_megatron.inference.modeling_dsmoe import DSMoEForCausalLM

    torch.manual_seed(1234)
    config = DSMoEConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=ATTENTION_EXPERTS * KEY_VALUE_HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        head_dim=HEAD_DIM,
        num_attention_experts=ATTENTION_EXPERTS,
        num_experts=EXPERTS,
        moe_intermediate_size=UNITS,
        hidden_act="silu" if gated else "gelu",
        gated_mlp=gated,
    )
    model = DSMoEForCausalLM(config)
    deviation = logit_deviation(THRESHOLD, ACTIVE_SHARE) / math.sqrt(HIDDEN)
    for name, parameter in model.named_parameters():
        if name.endswith(("gate.weight", "router.weight")):
            torch.nn.init.normal_(parameter, std=deviation)
    model.save_pretrained(folder)


def write_llama(folder: Path, layers: int) -> None:
    """A random Llama of the size of the gated DS-MoE."""
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=HIDDEN,
        num_hidden_layers=layers,
        num_attention_heads=ATTENTION_EXPERTS * KEY_VALUE_HEADS,
        num_key_value_heads=KEY_VALUE_HEADS,
        head_dim=HEAD_DIM,
        intermediate_size=EXPERTS * UNITS,
        max_position_embeddings=2048,
    )
    LlamaForCausalLM(config).save_pretrained(folder)


def active_shares(folder: Path, policy: dict[str, Any]) -> dict[str, float]:
    """Active share of the MLP and of the attention experts over 256 random tokens, mean over layers."""
    import torch

    from dsmoe_megatron.inference.modeling_dsmoe import DSMoEForCausalLM
    from dsmoe_megatron.inference.policy import ExpertPolicy, RouterKind, active_experts

    model = DSMoEForCausalLM.from_pretrained(folder, **policy).eval()
    rule = ExpertPolicy.from_config(model.config)
    ids = torch.randint(VOCABULARY, (1, 256), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        output = model(ids, output_router_logits=True, output_attention_router_logits=True)
    logits: dict[RouterKind, Any] = {"mlp": output.router_logits, "attention": output.attention_router_logits}
    return {
        kind: statistics.fmean(
            active_experts(each.softmax(-1), rule, layer, kind).float().mean().item()
            for layer, each in enumerate(by_layer)
        )
        for kind, by_layer in logits.items()
    }


def limit(gated: bool, mlp_share: float, context: int) -> float:
    """By how much a layer's FLOPs for one token fall with the active share of the MLP experts."""
    heads = ATTENTION_EXPERTS * KEY_VALUE_HEADS * HEAD_DIM
    attention = 2 * HIDDEN * (heads + KEY_VALUE_HEADS * HEAD_DIM) + 2 * heads * context
    rest = attention + HIDDEN * (EXPERTS + ATTENTION_EXPERTS)
    experts = (3 if gated else 2) * HIDDEN * EXPERTS * UNITS
    return (rest + experts) / (rest + experts * mlp_share)


def serve(folder: str, overrides: dict[str, Any], arguments: Namespace, pipe: Connection) -> None:
    """One engine: a request file's worth of work for each message, the seconds as the answer."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1", "VLLM_LOGGING_LEVEL": "ERROR"}
    os.environ |= {"VLLM_CPU_KVCACHE_SPACE": "1", "OMP_NUM_THREADS": str(arguments.threads)}
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"  # else vLLM takes every processor, whatever OMP_NUM_THREADS says
    from vllm import LLM, SamplingParams

    engine = LLM(
        folder,
        skip_tokenizer_init=True,
        dtype=arguments.dtype,
        max_model_len=2048,
        max_num_seqs=arguments.concurrency,
        enforce_eager=arguments.eager,
        enable_prefix_caching=False,
        hf_overrides=overrides,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=arguments.output, ignore_eos=True, detokenize=False)
    pipe.send("ready")
    while (seed := pipe.recv()) is not None:
        generator = random.Random(seed)
        prompts: list[Any] = [
            {"prompt_token_ids": [generator.randrange(1, VOCABULARY) for _ in range(arguments.input)]}
            for _ in range(arguments.requests)
        ]
        wall, processor = time.perf_counter(), time.process_time()
        outputs = engine.generate(prompts, sampling, use_tqdm=False)
        seconds = (time.perf_counter() - wall, time.process_time() - processor)
        assert all(len(output.outputs[0].token_ids) == arguments.output for output in outputs)
        pipe.send(seconds)


class Server:
    """An engine in a process of its own, which sleeps between its turns."""

    def __init__(self, folder: Path, overrides: dict[str, Any], arguments: Namespace) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        self.process = context.Process(target=serve, args=(str(folder), overrides, arguments, other), daemon=False)
        self.process.start()
        other.close()
        self.pipe.recv()

    def seconds(self, seed: int) -> Seconds:
        self.pipe.send(seed)
        seconds: Seconds = self.pipe.recv()
        return seconds

    def close(self) -> None:
        self.pipe.send(None)
        self.process.join()


def measure(arguments: Namespace) -> dict[str, Any]:
    gated = arguments.activation == "swiglu"
    with tempfile.TemporaryDirectory() as scratch:
        model, llama = Path(scratch, "dsmoe"), Path(scratch, "llama")
        write_model(model, gated, arguments.layers)
        contestants = {name: (model, policy) for name, policy in POLICIES.items()}
        shares = {name: active_shares(model, policy) for name, policy in POLICIES.items()}
        if gated:
            write_llama(llama, arguments.layers)
            contestants[LLAMA] = (llama, {})
        servers: dict[str, Server] = {}
        try:
            for name, (folder, policy) in contestants.items():
                print(f"starting {name} ...", file=sys.stderr, flush=True)
                servers[name] = Server(folder, policy, arguments)
            seconds = take_turns(servers, arguments.repeats)
        finally:
            for server in servers.values():
                server.close()
    context = arguments.input + arguments.output // 2
    rows = {
        name: {
            "requests_per_s": arguments.requests / statistics.median(wall for wall, _ in times),
            "seconds": times,
            "over_dense": [dense[0] / each[0] for dense, each in zip(seconds["dense"], times, strict=True)],
            "over_dense_in_processor_time": [
                dense[1] / each[1] for dense, each in zip(seconds["dense"], times, strict=True)
            ],
            **({"shares": shares[name], "limit": limit(gated, shares[name]["mlp"], context)} if name in shares else {}),
        }
        for name, times in seconds.items()
    }
    return {"arguments": vars(arguments) | {"json": None, "config": None}, "models": rows}


def take_turns(servers: dict[str, Server], repeats: int) -> dict[str, list[Seconds]]:
    order = random.Random(1234)
    for server in servers.values():
        server.seconds(0)  # the first one warms up
    seconds: dict[str, list[Seconds]] = {name: [] for name in servers}
    for repeat in range(1, repeats + 1):
        for name in order.sample(list(servers), len(servers)):
            seconds[name].append(servers[name].seconds(repeat))
    return seconds


def as_markdown(report: dict[str, Any]) -> str:
    header = ("Model", "Requests/s", "Over dense", "In processor time", "Active MLP experts", "Limit by FLOPs")
    lines = [f"| {' | '.join(header)} |", "|---" * len(header) + "|"]
    for name, row in report["models"].items():
        ratios = [spread(row[key]) for key in ("over_dense", "over_dense_in_processor_time")]
        limits = (f"{row['shares']['mlp']:.0%}", f"{row['limit']:.2f}") if "shares" in row else ("", "")
        lines.append(f"| {' | '.join((name, format(row['requests_per_s'], '.3f'), *ratios, *limits))} |")
    return "\n".join(lines)


def spread(ratios: list[float]) -> str:
    return f"{statistics.median(ratios):.2f} [{min(ratios):.2f}, {max(ratios):.2f}]"


def build_parser() -> ArgumentParser:
    parser = ArgumentParser(prog="python -m benchmarks.serving", description="Requests per second of vLLM on a CPU.")
    parser.add_argument("--activation", choices=("swiglu", "gelu"), default="swiglu", help="of the experts")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--eager", action="store_true", help="without torch.compile")
    parser.add_argument("--input", type=PositiveInt, default=256, help="tokens of a prompt")
    parser.add_argument("--output", type=PositiveInt, default=64, help="new tokens of a request")
    parser.add_argument("--requests", type=PositiveInt, default=16, help="in one turn")
    parser.add_argument("--concurrency", type=PositiveInt, default=8, help="requests that run together")
    parser.add_argument("--layers", type=PositiveInt, default=LAYERS, help="of the model")
    parser.add_argument("--repeats", type=PositiveInt, default=3, help="turns of each model")
    parser.add_argument("--threads", type=PositiveInt, default=os.cpu_count() or 1, help="of each engine")
    parser.add_argument("--json", type=str, default=None, metavar="FILE", help="write the report here as well")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    report = measure(arguments)
    print(as_markdown(report))
    if arguments.json is not None:
        Path(arguments.json).write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
