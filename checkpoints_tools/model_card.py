"""The README.md of an export: what the model is, how it was trained, what it scored, how to use it."""

from collections.abc import Iterable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import yaml

from dsmoe_megatron.config import Config, ModelConfig
from dsmoe_megatron.config_parsing import to_dict
from dsmoe_megatron.inference.policy import ExpertPolicy
from dsmoe_megatron.perplexity import shown
from dsmoe_megatron.planning.parameters import active_parameters, count_parameters
from dsmoe_megatron.recipe_text import recipe_text
from dsmoe_megatron.run_folder import Progress

PAPER = "[Dense Training, Sparse Inference](https://arxiv.org/abs/2404.05567)"
USE = """\
```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(folder{trust})
model = AutoModelForCausalLM.from_pretrained(folder{trust})
{policy}print(tokenizer.decode(model.generate(**tokenizer("Once", return_tensors="pt"), max_new_tokens=40)[0]))
```"""
SET_POLICY = (
    'model.set_policy("topk", num_experts_per_tok={top_k})  # or "dense", or "threshold", expert_threshold=0.48\n'
)


def model_card(config: Config, progress: Progress, export: Mapping[str, Any]) -> str:
    """Markdown text.

    Args:
        config: resolved recipe of the run.
        progress: how far the run has come, with its newest validation.
        export: the export's config.json.
    """
    return "\n\n".join(
        [
            _front_matter(export),
            f"# {_kind(config.model)}",
            _introduction(config.model, export),
            "## Use",
            _usage(config.model, export),
            "## Training",
            _table(_training_rows(config, progress)),
            "## Validation",
            _validation(progress.last_validation),
            "## Architecture",
            _table(_architecture_rows(config.model, export)),
            "## Recipe",
            f"```yaml\n{recipe_text(to_dict(config))}```\n",
        ]
    )


def upcycled_model_card(model: ModelConfig, export: Mapping[str, Any], origin: str) -> str:
    """Markdown text of a model that was cut out of a dense one and not trained yet.

    Args:
        model: architecture.
        export: the export's config.json.
        origin: name of the dense model.
    """
    introduction = (
        f"Made of the dense model `{origin}`, whose function it computes: blocks of its MLP are experts, and the "
        "routers give every expert the same score. `topk` and `threshold` have no meaning before it has been trained "
        f"densely with the mutual-information loss ({PAPER})."
    )
    return "\n\n".join(
        [
            _front_matter(export),
            f"# {_kind(model)}, upcycled",
            introduction,
            "## Use",
            USE.format(trust=", trust_remote_code=True", policy=""),
            "## Architecture",
            _table(_architecture_rows(model, export)) + "\n",
        ]
    )


def _front_matter(export: Mapping[str, Any]) -> str:
    metadata = {"library_name": "transformers", "pipeline_tag": "text-generation", "tags": [export["model_type"]]}
    return f"---\n{yaml.safe_dump(metadata, sort_keys=False)}---"


def _kind(model: ModelConfig) -> str:
    if model.expert_training == "sparse":
        return "Sparse-trained mixture-of-experts language model"
    if model.has_mlp_router or model.has_attention_router:
        return "DS-MoE language model"
    return "Dense language model"


def _introduction(model: ModelConfig, export: Mapping[str, Any]) -> str:
    if model.expert_training == "sparse":
        return f"Trained with the {model.num_experts_per_tok} best of {model.num_experts} experts per token."
    if not (model.has_mlp_router or model.has_attention_router):
        return "A baseline without experts."
    return (
        f"Every expert was trained on every token; at inference only some of them compute ({PAPER}). "
        f"This export's {'default ' if 'expert_policy' in export else ''}policy is `{_policy(export)}`."
    )


def _policy(export: Mapping[str, Any]) -> str:
    # other architectures have experts per token, and no name for it
    return str(export.get("expert_policy", "topk" if "num_experts_per_tok" in export else "dense"))


def _usage(model: ModelConfig, export: Mapping[str, Any]) -> str:
    remote = "auto_map" in export
    switchable = remote and model.expert_training == "dense" and model.has_mlp_router
    return USE.format(
        trust=", trust_remote_code=True" if remote else "",
        policy=SET_POLICY.format(top_k=model.num_experts_per_tok) if switchable else "",
    )


def _training_rows(config: Config, progress: Progress) -> Iterator[tuple[str, str]]:
    yield "Steps", f"{progress.step:,}"
    yield "Tokens", f"{progress.tokens:,}"
    yield "Sequence length", f"{config.train.sequence_length:,}"
    yield "Batch", f"{config.train.global_batch_size:,} sequences"
    yield "Precision", config.train.precision
    for label, line in (("first", progress.first), ("last", progress.last)):
        if line is not None and "lm_loss" in line:
            yield f"Training loss, {label} report", f"{line['lm_loss']:.4f}"


def _validation(line: Mapping[str, Any] | None) -> str:
    if line is None:
        return "The run had no validation."
    rows = [("Step", f"{line['step']:,}"), ("Loss", shown(line["validation_loss"], ".4f"))]
    policies = "\n".join(
        f"| {name} | {shown(figures['perplexity'], '.3f')} | {100 * figures['active_share']:.1f} % |"
        for name, figures in line["policies"].items()
    )
    header = "| Policy | Perplexity | Active share of the parameters without embeddings |\n|---|---|---|"
    return f"{_table(rows)}\n\n{header}\n{policies}"


def _architecture_rows(model: ModelConfig, export: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    count = count_parameters(model)
    yield "Parameters without embeddings", f"{count.total_without_embeddings:,}"
    if count.total is not None:
        yield "Parameters in training, embeddings included", f"{count.total:,}"
    if _policy(export) == "topk":
        policy = ExpertPolicy.from_config(SimpleNamespace(**export))
        layers = range(model.num_hidden_layers)
        mlp = [policy.top_k(layer, "mlp", model.num_experts) for layer in layers]
        attention = [policy.top_k(layer, "attention", model.num_attention_experts) for layer in layers]
        active = active_parameters(model, mlp, attention)
        yield "Active per token under the default policy", f"{active:,.0f}"
    yield "Layers", f"{model.num_hidden_layers}"
    yield "Hidden size", f"{model.hidden_size:,}"
    yield "Query heads / key-value heads", f"{model.num_attention_heads} / {model.num_key_value_heads}"
    if model.has_attention_router:
        yield "Attention experts per layer", f"{model.num_attention_experts}"
    if model.has_mlp_router:
        yield "MLP experts per layer", f"{model.num_experts} of {model.moe_intermediate_size:,} units"
    else:
        yield "MLP units", f"{model.intermediate_size:,}"
    yield "Vocabulary", f"{export['vocab_size']:,}"


def _table(rows: Iterable[tuple[str, str]]) -> str:
    return "| | |\n|---|---|\n" + "\n".join(f"| {label} | {value} |" for label, value in rows)
