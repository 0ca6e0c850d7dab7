"""Megatron tensors <-> exported (Hugging Face) tensors: the rules of tensor_rules.py as one table of a model."""

from collections.abc import Iterator, Mapping
from typing import Literal

import torch
from torch import Tensor

from dsmoe_megatron.errors import CheckpointError
from dsmoe_megatron.inference.tensor_rules import (
    Architecture,
    Shape,
    TensorRule,
    attention_rules,
    check_shape,
    dense_trained_mlp_rules,
    llama_mlp_rules,
    norm_rules,
    qwen2_moe_rules,
    sparse_trained_mlp_rules,
    vocabulary_rule,
)

Target = Literal["dsmoe", "llama", "qwen2_moe"]


class TensorMapping:
    """The table of one model: each tensor, Megatron's or exported, stands in exactly one rule.

    Args:
        config: architecture.
        vocab_size: rows of the exported embedding.
        padded_vocab_size: rows of Megatron's; those past vocab_size are cut, and zero on the way back.
        expert_training: `sparse` for the sparse-trained baseline, built of megatron-core's MoELayer.
        target: `dsmoe`; `llama` for a dense baseline that is one (grouped-query attention, one gated MLP); `qwen2_moe`
            for grouped-query attention and gated experts, in the layout of that architecture's files.
    """

    def __init__(
        self,
        config: Architecture,
        vocab_size: int,
        padded_vocab_size: int,
        expert_training: Literal["dense", "sparse"] = "dense",
        target: Target = "dsmoe",
    ) -> None:
        self.num_layers = config.num_hidden_layers
        of_attention = attention_rules(config)
        if target == "llama":
            of_mlp = llama_mlp_rules(config)
        elif expert_training == "sparse":
            of_mlp = sparse_trained_mlp_rules(config)
        else:
            of_mlp = dense_trained_mlp_rules(config)
        if target == "qwen2_moe":
            of_attention, of_mlp = qwen2_moe_rules(config, of_attention, of_mlp)
        vocabulary = (vocab_size, padded_vocab_size, config.hidden_size)
        self.first = [vocabulary_rule("embedding.word_embeddings.weight", "model.embed_tokens.weight", *vocabulary)]
        self.per_layer = [
            *norm_rules(config, "decoder.layers.input_layernorm", "model.layers.{layer}.input_layernorm"),
            *of_attention,
            *norm_rules(config, "decoder.layers.pre_mlp_layernorm", "model.layers.{layer}.post_attention_layernorm"),
            *of_mlp,
        ]
        self.last = norm_rules(config, "decoder.final_layernorm", "model.norm", stacked=False)
        if not config.tie_word_embeddings:
            self.last.append(vocabulary_rule("output_layer.weight", "lm_head.weight", *vocabulary))

    def __iter__(self) -> Iterator[tuple[TensorRule, int | None]]:
        """Each rule with each layer that it holds for (None outside the layers), in the order of the model."""
        yield from ((rule, None) for rule in self.first)
        for layer in range(self.num_layers):
            yield from ((rule, layer) for rule in self.per_layer)
        yield from ((rule, None) for rule in self.last)

    def megatron_shapes(self) -> dict[str, Shape]:
        """Names and shapes of the distributed checkpoint's model tensors, layer axis included."""
        shapes = {rule.megatron: (self.num_layers, *rule.megatron_shape) for rule in self.per_layer}
        return {**shapes, **{rule.megatron: rule.megatron_shape for rule in (*self.first, *self.last)}}

    def exported_shapes(self) -> dict[str, Shape]:
        """Names and shapes of the export's tensors, in the order of the model."""
        return {name: shape for rule, layer in self for name, shape in rule.exported_shapes(layer).items()}

    def to_exported(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All exported tensors of a model from its Megatron tensors, layers stacked.

        Raises:
            CheckpointError: a tensor is missing, left over, or has not the model's shape.
        """
        check_names(tensors, self.megatron_shapes(), "Megatron checkpoint")
        for name, shape in self.megatron_shapes().items():
            check_shape(name, tensors[name], shape)
        exported: dict[str, Tensor] = {}
        for rule, layer in self:
            source = tensors[rule.megatron]
            exported.update(rule.to_exported(source if layer is None else source[layer], layer))
        return exported

    def to_megatron(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """All Megatron tensors of a model, layers stacked, from its exported tensors.

        Raises:
            CheckpointError: a tensor is missing, left over, or has not the model's shape.
        """
        check_names(tensors, self.exported_shapes(), "exported checkpoint")
        megatron = {rule.megatron: rule.to_megatron(tensors, None) for rule in (*self.first, *self.last)}
        for rule in self.per_layer:
            layers = [rule.to_megatron(tensors, layer) for layer in range(self.num_layers)]
            megatron[rule.megatron] = torch.stack(layers)
        return megatron


def check_names(found: Mapping[str, object], expected: Mapping[str, object], where: str) -> None:
    """Every expected tensor is there, and no other.

    Raises:
        CheckpointError: names what is missing and what is left over.
    """
    missing, unknown = sorted(set(expected) - set(found)), sorted(set(found) - set(expected))
    faults = [f"{label} {', '.join(names)}" for label, names in (("lacks", missing), ("has unknown", unknown)) if names]
    if faults:
        raise CheckpointError(f"{where} {' and '.join(faults)}: it is not of the architecture in its configuration")
