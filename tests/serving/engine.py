"""Small exports, and what transformers and vLLM make of them."""

import dataclasses
import gc
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from checkpoints_tools.export_formats import exported_config
from checkpoints_tools.hf_architecture import model_section, read_config_json
from dsmoe_megatron.inference.configuration_dsmoe import DSMoEConfig
from dsmoe_megatron.inference.modeling_dsmoe import DSMoEForCausalLM
from dsmoe_megatron.inference.policy import ExpertPolicy
from dsmoe_megatron.inference.tensor_mapping import TensorMapping
from tests import reference_model as reference

# vLLM's attention on a CPU has heads of 32 units and more
BASE = reference.ReferenceConfig(
    hidden_size=64, head_dim=32, num_attention_experts=4, num_attention_heads=8, num_experts=8, moe_intermediate_size=16
)
GQA: dict[str, Any] = {"attention_type": "gqa", "num_attention_experts": 1}
ARCHITECTURES = {
    "gelu moa": BASE,
    # 32 units and more: vLLM's fused kernel; the other gated experts are computed one by one
    "swiglu moa": dataclasses.replace(BASE, hidden_act="silu", gated_mlp=True, moe_intermediate_size=32),
    "silu, mlp router, layernorm, tied": dataclasses.replace(
        BASE, hidden_act="silu", router_type="mlp", norm_type="layernorm", tie_word_embeddings=True
    ),
    "geglu gqa": dataclasses.replace(BASE, **GQA, gated_mlp=True),
    "fused geglu": dataclasses.replace(BASE, gated_mlp=True, moe_intermediate_size=64),
    "gelu gqa, mlp router": dataclasses.replace(BASE, **GQA, router_type="mlp"),
    "moa, plain MLP": dataclasses.replace(BASE, num_experts=1),
    "dense baseline": dataclasses.replace(BASE, **GQA, num_experts=1),
    "of Qwen2-MoE": dataclasses.replace(
        BASE, **{**GQA, "num_attention_heads": 2}, hidden_act="silu", gated_mlp=True, moe_intermediate_size=32
    ),
}
LAYERS = {
    "topk": [{"mlp": {"k": 1}, "attention": {"k": 3}}, {"mlp": {"k": 5}, "attention": {"k": 1}}],
    "threshold": [{"mlp": {"eps": 1.4}, "attention": {"eps": 0.6}}, {"mlp": {"eps": 0.5}, "attention": {"eps": 1.2}}],
}
POLICIES: dict[str, dict[str, Any]] = {
    "dense": {"expert_policy": "dense"},
    "topk": {"expert_policy": "topk", "num_experts_per_tok": 2},
    "topk, attention too": {"expert_policy": "topk", "num_experts_per_tok": 3, "attention_experts_per_tok": 2},
    "topk by layer": {"expert_policy": "topk", "expert_policy_layers": LAYERS["topk"]},
    "threshold": {"expert_policy": "threshold", "expert_threshold": 0.7, "attention_expert_threshold": 0.9},
    "threshold by layer": {"expert_policy": "threshold", "expert_policy_layers": LAYERS["threshold"]},
}
PROMPTS = [[5, 17, 3, 44, 8, 21, 9], [60, 1, 2], [30], list(range(1, 40))]
NEW_TOKENS = 12


@dataclasses.dataclass(frozen=True)
class Answer:
    """One prompt's greedy continuation.

    Attributes:
        tokens: the new tokens.
        log_probabilities: of these tokens, in nats.
    """

    tokens: list[int]
    log_probabilities: torch.Tensor


def write_export(folder: Path, architecture: reference.ReferenceConfig, policy: dict[str, Any]) -> Path:
    """An export as export_hf writes it, in float32, but without the code files that remote code would need."""
    names = {"rope_theta", "mi_alpha_attention", "mi_alpha_mlp"}
    shared = {name: value for name, value in vars(architecture).items() if name not in names}
    rope = {"rope_type": "default", "rope_theta": architecture.rope_theta}
    model = DSMoEForCausalLM(DSMoEConfig(**shared, **policy, rope_parameters=rope, eos_token_id=0))
    tensors = reference.random_tensors(architecture, dtype=torch.float32)
    if architecture.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    model.load_state_dict(tensors)
    model.save_pretrained(folder)
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["auto_map"] = {
        "AutoConfig": "configuration_dsmoe.DSMoEConfig",
        "AutoModel": "modeling_dsmoe.DSMoEModel",
        "AutoModelForCausalLM": "modeling_dsmoe.DSMoEForCausalLM",
    }
    path.write_text(json.dumps(config))
    return folder


def write_qwen2_moe_export(folder: Path, export: Path, num_experts_per_tok: int) -> Path:
    """The model of an export in the form that export_hf gives it for engines that know Qwen2-MoE."""
    content = read_config_json(export)
    model, _ = model_section(content, str(export))
    vocab_size = model.vocab_size = content["vocab_size"]
    megatron = TensorMapping(model, vocab_size, vocab_size).to_megatron(load_file(export / "model.safetensors"))
    tensors = TensorMapping(model, vocab_size, vocab_size, target="qwen2_moe").to_exported(megatron)
    policy = ExpertPolicy("topk", num_experts_per_tok=num_experts_per_tok)
    tokenizer: Any = SimpleNamespace(end_of_document_id=0, padding_id=0)
    folder.mkdir()
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors")
    config = exported_config(model, policy, tokenizer, torch.float32, "qwen2_moe")
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def transformers_answers(folder: Path, **options: Any) -> list[Answer]:
    """Greedy, prompt by prompt, each token from a full forward pass; options of from_pretrained, as a policy."""
    model = DSMoEForCausalLM.from_pretrained(folder, **options).eval()
    answers = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        log_probabilities = []
        for _ in range(NEW_TOKENS):
            best = model(ids, use_cache=False).logits[0, -1].float().log_softmax(-1).max(-1)
            log_probabilities.append(best.values)
            ids = torch.cat([ids, best.indices.view(1, 1)], dim=1)
        answers.append(Answer(ids[0, len(prompt) :].tolist(), torch.stack(log_probabilities)))
    return answers


def vllm_answers(
    folder: Path, eager: bool, ranks: int = 1, dtype: str = "float32", load_format: str = "auto", **overrides: Any
) -> list[Answer]:
    """Greedy, all prompts in one batch, on an engine of its own."""
    from vllm import LLM, SamplingParams
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    engine = LLM(
        str(folder),
        skip_tokenizer_init=True,
        dtype=dtype,
        load_format=load_format,
        max_model_len=128,
        enforce_eager=eager,
        hf_overrides=overrides,
        tensor_parallel_size=ranks,
        seed=0,
    )
    sampling = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True, logprobs=0, detokenize=False)
    requests: list[Any] = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = [output.outputs[0] for output in engine.generate(requests, sampling, use_tqdm=False)]
    del engine
    cleanup_dist_env_and_memory()
    gc.collect()
    return [
        Answer(
            list(output.token_ids),
            torch.tensor([each[token].logprob for each, token in zip(output.logprobs, output.token_ids, strict=True)]),
        )
        for output in outputs
    ]
