"""Randomly initialised models as transformers writes them, to be imported."""

from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dsmoe_megatron.inference.configuration_dsmoe import DSMoEConfig
from dsmoe_megatron.inference.modeling_dsmoe import DSMoEForCausalLM
from dsmoe_megatron.tokenizers import load_tokenizer, save_huggingface

# as tests.training_jobs.tiny_config; the weights are large, so that a loss tells these from freshly initialised ones
ARCHITECTURE: dict[str, Any] = {
    "vocab_size": 500,
    "hidden_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "num_attention_experts": 4,
    "num_experts": 6,
    "moe_intermediate_size": 16,
    "router_hidden_size": 32,
    "initializer_range": 0.3,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "expert_policy": "threshold",
    "expert_threshold": 0.6,
}
VARIANTS: dict[str, dict[str, Any]] = {
    "moa": {},
    "swiglu_mlp_router_layernorm_tied": {
        "hidden_act": "silu",
        "gated_mlp": True,
        "router_type": "mlp",
        "norm_type": "layernorm",
        "tie_word_embeddings": True,
    },
    "gqa": {"attention_type": "gqa", "num_attention_experts": 1},
    "dense": {
        **{"attention_type": "gqa", "num_attention_experts": 1, "num_experts": 1},
        **{"expert_policy": "dense", "expert_threshold": None},
    },
}
LLAMA: dict[str, Any] = {
    **{key: ARCHITECTURE[key] for key in ("vocab_size", "hidden_size", "num_hidden_layers", "initializer_range")},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 96, "tie_word_embeddings": True},
}


def save_model(folder: Path, tokenizer: str, dtype: torch.dtype = torch.float32, **changes: Any) -> Path:
    """A randomly initialised model, written by transformers itself."""
    torch.manual_seed(3)
    if changes.get("model_type") == "llama":
        model = LlamaForCausalLM(LlamaConfig(**LLAMA))
    else:
        model = DSMoEForCausalLM(DSMoEConfig(**{**ARCHITECTURE, **changes}))
    model.to(dtype).save_pretrained(folder)
    save_huggingface(load_tokenizer(tokenizer), folder)
    return folder
