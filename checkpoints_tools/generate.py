"""Generate text with an exported model under one or several policies, and say how fast.

    python checkpoints_tools/generate.py --model DIR --prompt "def main(" [--policies dense topk threshold]

Needs transformers only: the model's code travels with the export.
"""

import json
import time
from typing import Any

from jsonargparse import ArgumentParser

PREFILL_REPEATS = 3


def generate(
    model_folder: str, prompt: str, policies: list[str], max_new_tokens: int, temperature: float, seed: int
) -> list[dict[str, Any]]:
    """Continue the prompt under each policy.

    Args:
        model_folder: an export.
        prompt: text.
        policies: names; their limits (K, eps) are those of the export's config.json.
        max_new_tokens: tokens to generate, at most.
        temperature: of sampling; 0 takes the most probable token.
        seed: of sampling.

    Returns:
        Per policy: policy, text, decode_tokens_per_s and prefill_tokens_per_s.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(model_folder, trust_remote_code=True).eval()
    inputs = tokenizer(prompt, return_tensors="pt")
    length = model.config.max_position_embeddings
    window = inputs.input_ids.repeat(1, length // inputs.input_ids.shape[1] + 1)[:, :length]
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    results = []
    for policy in policies:
        if hasattr(model, "set_policy"):
            model.set_policy(policy)
        with torch.no_grad():
            model(window)  # warm up
            started = time.perf_counter()
            for _ in range(PREFILL_REPEATS):
                model(window)
            prefill = PREFILL_REPEATS * length / (time.perf_counter() - started)
            started = time.perf_counter()
            torch.manual_seed(seed)
            ids = model.generate(**inputs, max_new_tokens=max_new_tokens, **sampling)[0]
        new_tokens = ids.shape[0] - inputs.input_ids.shape[1]
        results.append(
            {
                "policy": policy,
                "text": tokenizer.decode(ids),
                "decode_tokens_per_s": new_tokens / (time.perf_counter() - started),
                "prefill_tokens_per_s": prefill,
            }
        )
    return results


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="generate.py", description="Generate text with an exported model")
    parser.add_argument("--model", type=str, required=True, help="folder of the export")
    parser.add_argument("--prompt", type=str, required=True, help="text to continue")
    parser.add_argument("--policies", type=str, nargs="+", default=["dense", "topk", "threshold"], help="in turn")
    parser.add_argument("--max-new-tokens", type=int, default=40, help="tokens to generate, at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most probable token")
    parser.add_argument("--seed", type=int, default=1234, help="of sampling")
    parser.add_argument("--json", action="store_true", help="print one JSON object per policy instead of text")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    results = generate(
        arguments.model,
        arguments.prompt,
        arguments.policies,
        arguments.max_new_tokens,
        arguments.temperature,
        arguments.seed,
    )
    for result in results:
        if arguments.json:
            print(json.dumps(result))
        else:
            print(f"--- {result['policy']} ({result['decode_tokens_per_s']:.1f} tokens/s)\n{result['text']}\n")


if __name__ == "__main__":
    main()
