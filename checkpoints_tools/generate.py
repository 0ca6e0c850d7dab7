"""Generate text with an exported model under one or several policies, and say how fast.

    python checkpoints_tools/generate.py --model DIR --prompt "def main(" [--policies dense topk threshold]

The model's own code, which travels with the export, is what runs.
"""

import dataclasses
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jsonargparse import ArgumentParser

from dsmoe_megatron.errors import CheckpointError, ConfigurationError, DSMoEError, exit_with

if TYPE_CHECKING:
    from dsmoe_megatron.inference.policy import ExpertPolicy

POLICIES = ("dense", "topk", "threshold")
PREFILL_REPEATS, PREFILL_TOKENS = 3, 512
SHOWN_CHARACTERS = 60  # of a prompt that is refused


def generate(
    model_folder: str, prompt: str, policies: Sequence[str] | None, max_new_tokens: int, temperature: float, seed: int
) -> list[dict[str, Any]]:
    """Continue the prompt under each policy.

    Args:
        model_folder: an export.
        prompt: text.
        policies: names; their limits (K, eps) are those of the export's config.json, its limits per layer those of the
            policy that it names. None is those that the model was trained for.
        max_new_tokens: tokens to generate, at most.
        temperature: of sampling; 0 takes the most probable token.
        seed: of sampling.

    Returns:
        Per policy: policy, text, decode_tokens_per_s and prefill_tokens_per_s.

    Raises:
        CheckpointError: the folder is no export, or its weights do not fit its configuration.
        ConfigurationError: the prompt is empty or too long, or a policy does not fit the model.
    """
    import torch

    from dsmoe_megatron.inference.policy import ExpertPolicy

    tokenizer, model = _load(model_folder)
    policies = _fitting(policies, model)
    inputs = tokenizer(prompt, return_tensors="pt")
    _check_lengths(prompt, inputs.input_ids.shape[1], max_new_tokens, model.config.max_position_embeddings)
    length = min(PREFILL_TOKENS, model.config.max_position_embeddings)
    window = inputs.input_ids.repeat(1, length // inputs.input_ids.shape[1] + 1)[:, :length]
    own = ExpertPolicy.from_config(model.config)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    results = []
    for policy in policies:
        _set_policy(model, policy, own)
        with torch.no_grad():
            model(window, logits_to_keep=1)  # warm up
            started = time.perf_counter()
            for _ in range(PREFILL_REPEATS):
                model(window, logits_to_keep=1)
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


def _load(folder: str) -> tuple[Any, Any]:
    """Tokenizer and model."""
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():  # no bar where nobody watches it
        disable_progress_bar()
    if not Path(folder, "config.json").is_file():
        raise CheckpointError(f"{folder}: has no config.json: is it an export?")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
        return tokenizer, AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).eval()
    except Exception as error:  # transformers and safetensors have many
        raise CheckpointError(f"{folder}: cannot be loaded: {error}") from error


def _check_lengths(prompt: str, tokens: int, max_new_tokens: int, positions: int) -> None:
    shown = prompt if len(prompt) <= SHOWN_CHARACTERS else f"{prompt[:SHOWN_CHARACTERS]}..."
    if not tokens:
        raise ConfigurationError("--prompt", shown, "has no tokens: give a text to continue")
    if max_new_tokens < 1:
        raise ConfigurationError("--max-new-tokens", max_new_tokens, "must be at least 1")
    if tokens > positions:
        rule = (
            f"has {tokens:,} tokens, more than the {positions:,} (max_position_embeddings) that the model was made for"
        )
        raise ConfigurationError("--prompt", shown, rule)
    if tokens + max_new_tokens > positions:
        rule = f"with the prompt's {tokens:,} tokens more than the {positions:,} (max_position_embeddings): at most "
        raise ConfigurationError("--max-new-tokens", max_new_tokens, rule + f"{positions - tokens:,} are left")


def _fitting(policies: Sequence[str] | None, model: Any) -> Sequence[str]:
    """The policies asked for, or the default ones, if the model was trained for them."""
    from checkpoints_tools.export_formats import TRAINED_K

    if getattr(model.config, TRAINED_K, None) is None:
        return POLICIES if policies is None else policies
    for policy in policies or ():
        if policy != "topk":
            rule = "a sparse-trained model chooses experts as it was trained, by topk"
            raise ConfigurationError("--policies", policy, rule)
    return policies or ("topk",)


def _set_policy(model: Any, policy: str, own: "ExpertPolicy") -> None:
    """Every limit is given, since the model keeps those of the policy before, which may have dropped the export's.

    Models of other architectures have one way to compute, whatever the policy is called.
    """
    if not hasattr(model, "set_policy"):
        return
    if policy == "threshold_topk":
        raise ConfigurationError("--policies", policy, "depends on the whole batch and is for evaluation only")
    values = {name: value for name, value in dataclasses.asdict(own).items() if value is not None}
    if policy != own.expert_policy:
        values.pop("expert_policy_layers", None)  # they are limits of the policy that the export names
    try:
        model.set_policy(**values | {"expert_policy": policy})
    except ValueError as error:
        raise ConfigurationError("--policies", policy, str(error)) from None


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="generate.py", description="Generate text with an exported model")
    parser.add_argument("--model", type=str, required=True, help="folder of the export")
    parser.add_argument("--prompt", type=str, required=True, help="text to continue")
    parser.add_argument(
        "--policies",
        type=str,
        nargs="+",
        metavar="POLICY",
        help=f"in turn; default: {' '.join(POLICIES)}, or topk alone for a sparse-trained model",
    )
    parser.add_argument("--max-new-tokens", type=int, default=40, help="tokens to generate, at most")
    parser.add_argument("--temperature", type=float, default=0.0, help="0 takes the most probable token")
    parser.add_argument("--seed", type=int, default=1234, help="of sampling")
    parser.add_argument("--json", action="store_true", help="print one JSON object per policy instead of text")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    try:
        results = generate(
            arguments.model,
            arguments.prompt,
            arguments.policies,
            arguments.max_new_tokens,
            arguments.temperature,
            arguments.seed,
        )
    except DSMoEError as error:
        exit_with(error, "generate")
    for result in results:
        if arguments.json:
            print(json.dumps(result))
        else:
            print(f"--- {result['policy']} ({result['decode_tokens_per_s']:.1f} tokens/s)\n{result['text']}\n")


if __name__ == "__main__":
    main()
