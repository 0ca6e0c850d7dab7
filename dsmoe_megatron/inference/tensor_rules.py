"""What becomes of each Megatron tensor in an export, and back: rules that only reorder, cut or pad.

So the same rules carry weights, gradients and optimizer moments. Megatron's names and shapes are those of the
distributed checkpoint, where homogeneous layers are stacked along axis 0; the rules' functions see ONE layer.
Megatron's layouts:
- linear_qkv rows are [key/value head, (its query heads in order, key, value), D]; linear_proj columns are
  [key/value head, head in group, D]. In a mixture of attention heads the head's index in the group is the expert.
- linear_fc1 rows are the hidden units in expert order; gated: all gate units, then all up units. linear_fc2 columns
  are the units in expert order.
- The sparse-trained baseline (megatron-core's MoELayer) has an expert axis after the layer axis instead.

Shape suffixes: N experts, G key/value heads, P query heads per key/value head, D head width, F units of one expert,
H hidden size, V vocabulary.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from dsmoe_megatron.errors import CheckpointError

Shape = tuple[int, ...]
SHARED_EXPERT_UNITS = 64
"""Hidden units of the shared expert that every Qwen2-MoE has: small, and whole under any usual tensor parallelism."""


class Architecture(Protocol):
    """What the table reads of a configuration; the recipe's model section and the exported config both have it."""

    @property
    def hidden_size(self) -> int: ...
    @property
    def num_hidden_layers(self) -> int: ...
    @property
    def num_attention_heads(self) -> int: ...
    @property
    def num_key_value_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...
    @property
    def attention_type(self) -> str: ...
    @property
    def num_attention_experts(self) -> int: ...
    @property
    def num_experts(self) -> int: ...
    @property
    def moe_intermediate_size(self) -> int: ...
    @property
    def gated_mlp(self) -> bool: ...
    @property
    def router_type(self) -> str: ...
    @property
    def router_hidden_size(self) -> int: ...
    @property
    def norm_type(self) -> str: ...
    @property
    def tie_word_embeddings(self) -> bool: ...


@dataclass(frozen=True)
class TensorRule:
    """One Megatron tensor and the exported tensors that it becomes.

    Attributes:
        megatron: name in the distributed checkpoint.
        megatron_shape: of one layer.
        exported: names in the export and their shapes; `{layer}` stands for the layer's index.
        forward: the Megatron tensor -> the exported ones, in the order of their names.
        backward: the inverse.
        stacked: whether the Megatron tensor has a layer axis in front.
    """

    megatron: str
    megatron_shape: Shape
    exported: Mapping[str, Shape]
    forward: Callable[[Tensor], Sequence[Tensor]]
    backward: Callable[[Sequence[Tensor]], Tensor]
    stacked: bool = True

    def exported_shapes(self, layer: int | None) -> dict[str, Shape]:
        """Names and shapes of the exported tensors of one layer (None: outside the layers)."""
        return {name.format(layer=layer): shape for name, shape in self.exported.items()}

    def to_exported(self, tensor: Tensor, layer: int | None) -> dict[str, Tensor]:
        """The exported tensors of one layer's Megatron tensor, contiguous.

        Raises:
            CheckpointError: the tensor has not the model's shape.
        """
        check_shape(self.megatron, tensor, self.megatron_shape)
        parts = self.forward(tensor)
        return {name: part.contiguous() for name, part in zip(self.exported_shapes(layer), parts, strict=True)}

    def to_megatron(self, tensors: Mapping[str, Tensor], layer: int | None) -> Tensor:
        """One layer's Megatron tensor.

        Raises:
            CheckpointError: an exported tensor has not the model's shape.
        """
        shapes = self.exported_shapes(layer)
        for name, shape in shapes.items():
            check_shape(name, tensors[name], shape)
        return self.backward([tensors[name] for name in shapes])


def check_shape(name: str, tensor: Tensor, shape: Shape) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}, but the configuration makes it {shape}")


def _renamed(megatron: str, exported: str, shape: Shape, stacked: bool = True) -> TensorRule:
    return TensorRule(megatron, shape, {exported: shape}, lambda tensor: [tensor], lambda parts: parts[0], stacked)


def _reshaped(megatron: str, megatron_shape: Shape, exported: str, exported_shape: Shape) -> TensorRule:
    return TensorRule(
        megatron,
        megatron_shape,
        {exported: exported_shape},
        lambda tensor: [tensor.reshape(exported_shape)],
        lambda parts: parts[0].reshape(megatron_shape),
    )


def vocabulary_rule(megatron: str, exported: str, vocab_size: int, padded_size: int, hidden_size: int) -> TensorRule:
    return TensorRule(
        megatron,
        (padded_size, hidden_size),
        {exported: (vocab_size, hidden_size)},
        lambda tensor_VH: [tensor_VH[:vocab_size]],
        lambda parts: F.pad(parts[0], (0, 0, 0, padded_size - vocab_size)),
        stacked=False,
    )


def norm_rules(config: Architecture, megatron: str, exported: str, stacked: bool = True) -> list[TensorRule]:
    names = ("weight", "bias") if config.norm_type == "layernorm" else ("weight",)
    return [_renamed(f"{megatron}.{name}", f"{exported}.{name}", (config.hidden_size,), stacked) for name in names]


def _router_rules(config: Architecture, megatron: str, exported: str, num_experts: int) -> list[TensorRule]:
    if config.router_type == "linear":
        return [_renamed(f"{megatron}.weight", f"{exported}.weight", (num_experts, config.hidden_size))]
    inner = config.router_hidden_size
    return [
        _renamed(f"{megatron}.fc1.weight", f"{exported}.fc1.weight", (inner, config.hidden_size)),
        _renamed(f"{megatron}.fc2.weight", f"{exported}.fc2.weight", (num_experts, inner)),
    ]


def attention_rules(config: Architecture) -> list[TensorRule]:
    megatron, exported = "decoder.layers.self_attention", "model.layers.{layer}.self_attn"
    rules = [_qkv_rule(config, megatron, exported)]
    if config.attention_type != "moa":
        shape = (config.hidden_size, config.num_attention_heads * config.head_dim)
        return [*rules, _renamed(f"{megatron}.linear_proj.weight", f"{exported}.o_proj.weight", shape)]
    num_experts = config.num_attention_experts
    rules += _router_rules(config, f"{megatron}.router", f"{exported}.router", num_experts)
    return [*rules, _attention_output_rule(config, megatron, exported)]


def _qkv_rule(config: Architecture, megatron: str, exported: str) -> TensorRule:
    groups, head_dim, hidden_size = config.num_key_value_heads, config.head_dim, config.hidden_size
    per_group = config.num_attention_heads // groups
    key_shape = (groups * head_dim, hidden_size)
    # the export has the experts in front, or else all query heads in Megatron's order
    query_name, query_shape = f"{exported}.q_proj.weight", Shape((groups * per_group * head_dim, hidden_size))
    if config.attention_type == "moa":
        query_name, query_shape = f"{exported}.q_experts", (per_group, groups * head_dim, hidden_size)

    def forward(qkv: Tensor) -> list[Tensor]:
        qkv_GPDH = qkv.reshape(groups, per_group + 2, head_dim, hidden_size)
        query_GPDH = qkv_GPDH[:, :per_group]
        if config.attention_type == "moa":
            query_GPDH = query_GPDH.transpose(0, 1)
        key_GDH, value_GDH = qkv_GPDH[:, per_group], qkv_GPDH[:, per_group + 1]
        return [query_GPDH.reshape(query_shape), key_GDH.reshape(key_shape), value_GDH.reshape(key_shape)]

    def backward(parts: Sequence[Tensor]) -> Tensor:
        query, key, value = parts
        if config.attention_type == "moa":
            query_GPDH = query.reshape(per_group, groups, head_dim, hidden_size).transpose(0, 1)
        else:
            query_GPDH = query.reshape(groups, per_group, head_dim, hidden_size)
        key_G1DH, value_G1DH = (part.reshape(groups, 1, head_dim, hidden_size) for part in (key, value))
        return torch.cat([query_GPDH, key_G1DH, value_G1DH], dim=1).reshape(-1, hidden_size)

    return TensorRule(
        f"{megatron}.linear_qkv.weight",
        (groups * (per_group + 2) * head_dim, hidden_size),
        {query_name: query_shape, f"{exported}.k_proj.weight": key_shape, f"{exported}.v_proj.weight": key_shape},
        forward,
        backward,
    )


def _attention_output_rule(config: Architecture, megatron: str, exported: str) -> TensorRule:
    hidden_size, groups, head_dim = config.hidden_size, config.num_key_value_heads, config.head_dim
    experts = config.num_attention_experts

    def forward(weight: Tensor) -> list[Tensor]:
        weight_HGND = weight.reshape(hidden_size, groups, experts, head_dim)
        return [weight_HGND.permute(2, 0, 1, 3).reshape(experts, hidden_size, groups * head_dim)]

    def backward(parts: Sequence[Tensor]) -> Tensor:
        weight_NHGD = parts[0].reshape(experts, hidden_size, groups, head_dim)
        return weight_NHGD.permute(1, 2, 0, 3).reshape(hidden_size, -1)

    return TensorRule(
        f"{megatron}.linear_proj.weight",
        (hidden_size, groups * experts * head_dim),
        {f"{exported}.o_experts": (experts, hidden_size, groups * head_dim)},
        forward,
        backward,
    )


def dense_trained_mlp_rules(config: Architecture) -> list[TensorRule]:
    megatron, exported = "decoder.layers.mlp", "model.layers.{layer}.mlp"
    experts, units, hidden_size = config.num_experts, config.moe_intermediate_size, config.hidden_size

    def experts_in_front(tensor_2NFH: Tensor) -> list[Tensor]:
        return [tensor_2NFH.reshape(2, experts, units, hidden_size).transpose(0, 1).reshape(experts, -1, hidden_size)]

    def halves_in_front(parts: Sequence[Tensor]) -> Tensor:
        return parts[0].reshape(experts, 2, units, hidden_size).transpose(0, 1).reshape(-1, hidden_size)

    rules = _router_rules(config, f"{megatron}.router", f"{exported}.gate", experts) if experts > 1 else []
    fc1, fc2 = f"{megatron}.linear_fc1.weight", f"{megatron}.linear_fc2.weight"
    if config.gated_mlp:
        shapes = {f"{exported}.experts.gate_up_proj": (experts, 2 * units, hidden_size)}
        rules.append(TensorRule(fc1, (2 * experts * units, hidden_size), shapes, experts_in_front, halves_in_front))
    else:
        name, in_experts = f"{exported}.experts.up_proj", (experts, units, hidden_size)
        rules.append(_reshaped(fc1, (experts * units, hidden_size), name, in_experts))
    rules.append(
        TensorRule(
            fc2,
            (hidden_size, experts * units),
            {f"{exported}.experts.down_proj": (experts, hidden_size, units)},
            lambda tensor: [tensor.reshape(hidden_size, experts, units).transpose(0, 1)],
            lambda parts: parts[0].transpose(0, 1).reshape(hidden_size, experts * units),
        )
    )
    return rules


def sparse_trained_mlp_rules(config: Architecture) -> list[TensorRule]:
    megatron, exported = "decoder.layers.mlp", "model.layers.{layer}.mlp"
    experts, units, hidden_size = config.num_experts, config.moe_intermediate_size, config.hidden_size
    up_name, rows = ("gate_up_proj", 2 * units) if config.gated_mlp else ("up_proj", units)
    up_shape, down_shape = (experts, rows, hidden_size), (experts, hidden_size, units)
    # megatron-core keeps the experts as a child called `experts` of the module called `experts`
    return [
        _renamed(f"{megatron}.router.weight", f"{exported}.gate.weight", (experts, hidden_size)),
        _renamed(f"{megatron}.experts.experts.linear_fc1.weight", f"{exported}.experts.{up_name}", up_shape),
        _renamed(f"{megatron}.experts.experts.linear_fc2.weight", f"{exported}.experts.down_proj", down_shape),
    ]


def llama_mlp_rules(config: Architecture) -> list[TensorRule]:
    megatron, exported = "decoder.layers.mlp", "model.layers.{layer}.mlp"
    units, hidden_size = config.moe_intermediate_size, config.hidden_size
    half = (units, hidden_size)
    return [
        TensorRule(
            f"{megatron}.linear_fc1.weight",
            (2 * units, hidden_size),
            {f"{exported}.gate_proj.weight": half, f"{exported}.up_proj.weight": half},
            lambda tensor: tensor.chunk(2),
            lambda parts: torch.cat(list(parts)),
        ),
        _renamed(f"{megatron}.linear_fc2.weight", f"{exported}.down_proj.weight", (hidden_size, units)),
    ]


def qwen2_moe_rules(
    config: Architecture, attention_rules: list[TensorRule], mlp_rules: list[TensorRule]
) -> tuple[list[TensorRule], list[TensorRule]]:
    """One file entry per expert and projection, and zeros for what that architecture has besides: biases of query, key
    and value, and a shared expert with its gate."""
    attention, mlp = "model.layers.{layer}.self_attn", "model.layers.{layer}.mlp"
    query_width, key_width = (
        heads * config.head_dim for heads in (config.num_attention_heads, config.num_key_value_heads)
    )
    biases = {
        f"{attention}.q_proj.bias": (query_width,),
        f"{attention}.k_proj.bias": (key_width,),
        f"{attention}.v_proj.bias": (key_width,),
    }
    inner, hidden_size = SHARED_EXPERT_UNITS, config.hidden_size
    shared_expert = {
        f"{mlp}.shared_expert.gate_proj.weight": (inner, hidden_size),
        f"{mlp}.shared_expert.up_proj.weight": (inner, hidden_size),
        f"{mlp}.shared_expert.down_proj.weight": (hidden_size, inner),
        f"{mlp}.shared_expert_gate.weight": (1, hidden_size),
    }
    qkv, *others = attention_rules
    router, up, down = mlp_rules
    mlp_rules = [
        _with_zeros(router, shared_expert),
        _expert_by_expert(up, ("gate", "up")),
        _expert_by_expert(down, ("down",)),
    ]
    return [_with_zeros(qkv, biases), *others], mlp_rules


def _with_zeros(rule: TensorRule, zeros: Mapping[str, Shape]) -> TensorRule:
    """The rule, with tensors that stand for nothing of Megatron's."""
    count = len(rule.exported)

    def backward(parts: Sequence[Tensor]) -> Tensor:
        for name, part in zip(zeros, parts[count:], strict=True):
            if part.count_nonzero():
                raise CheckpointError(f"{name.split('{layer}.')[-1]} is not zero, and this system has nothing like it")
        return rule.backward(parts[:count])

    return TensorRule(
        rule.megatron,
        rule.megatron_shape,
        {**rule.exported, **zeros},
        lambda tensor: [*rule.forward(tensor), *(tensor.new_zeros(shape) for shape in zeros.values())],
        backward,
    )


def _expert_by_expert(rule: TensorRule, projections: Sequence[str]) -> TensorRule:
    """The rule of one tensor [N, projections x rows, columns], as a tensor per expert and projection."""
    ((name, (experts, rows, columns)),) = rule.exported.items()
    prefix, each = name.rsplit(".", 1)[0], (rows // len(projections), columns)
    shapes = {f"{prefix}.{expert}.{part}_proj.weight": each for expert in range(experts) for part in projections}
    return TensorRule(
        rule.megatron,
        rule.megatron_shape,
        shapes,
        lambda tensor: list(rule.forward(tensor)[0].reshape(-1, *each)),
        lambda parts: rule.backward([torch.stack(list(parts)).reshape(experts, rows, columns)]),
    )
