"""The exported DS-MoE model for vLLM, under the name that the export's config.json gives."""

from collections.abc import Container, Iterable
from functools import partial
from typing import Any, cast

from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from dsmoe_megatron.errors import CheckpointError
from dsmoe_megatron.inference.configuration_dsmoe import DSMoEConfig
from dsmoe_megatron.inference.tensor_mapping import TensorMapping, check_names
from dsmoe_megatron.inference.vllm_layers import ActiveExperts, DSMoEAttention, DSMoEMLP, EveryExpert, Loaders


def norm_layer(config: DSMoEConfig) -> nn.Module:
    if config.norm_type == "rmsnorm":
        return cast(nn.Module, RMSNorm(config.hidden_size, eps=config.rms_norm_eps))
    return nn.LayerNorm(config.hidden_size, eps=config.rms_norm_eps)


class DSMoEDecoderLayer(nn.Module):
    """Attention, then MLP, each on normalised input and with a residual connection."""

    def __init__(self, vllm_config: VllmConfig, config: DSMoEConfig, layer_index: int, prefix: str) -> None:
        super().__init__()
        self.self_attn = DSMoEAttention(vllm_config, config, layer_index, f"{prefix}.self_attn")
        self.mlp = DSMoEMLP(vllm_config, config, layer_index, f"{prefix}.mlp")
        self.input_layernorm = norm_layer(config)
        self.post_attention_layernorm = norm_layer(config)

    def forward(self, positions: Tensor, hidden_TH: Tensor) -> Tensor:
        hidden_TH = hidden_TH + self.self_attn(positions, self.input_layernorm(hidden_TH))
        return hidden_TH + cast(Tensor, self.mlp(self.post_attention_layernorm(hidden_TH)))


@support_torch_compile
class DSMoEModel(nn.Module):
    """The decoder without its output layer."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config = vllm_config.model_config.hf_config
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            DSMoEDecoderLayer(vllm_config, config, index, f"{prefix}.layers.{index}")
            for index in range(config.num_hidden_layers)
        )
        self.norm = norm_layer(config)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return cast(Tensor, self.embed_tokens(input_ids))

    # vLLM passes these names; torch.compile's marks of varying axes go by them
    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: object | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> Tensor:
        hidden_TH = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds
        for layer in self.layers:
            hidden_TH = layer(positions, hidden_TH)
        return cast(Tensor, self.norm(hidden_TH))


class DSMoEForCausalLM(nn.Module):
    """The decoder with its output layer. vllm_plugin.py has checked the configuration."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config: DSMoEConfig = vllm_config.model_config.hf_config
        self.model = DSMoEModel(vllm_config=vllm_config, prefix=f"{prefix}.model".lstrip("."))
        if self.config.tie_word_embeddings:
            self.lm_head = self.model.embed_tokens
        else:
            self.lm_head = ParallelLMHead(self.config.vocab_size, self.config.hidden_size)
        self.logits_processor = LogitsProcessor(self.config.vocab_size)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: Tensor | None,
        positions: Tensor,
        intermediate_tensors: object | None = None,
        inputs_embeds: Tensor | None = None,
        **_: Any,
    ) -> Tensor:
        return cast(Tensor, self.model(input_ids, positions, intermediate_tensors, inputs_embeds))

    def compute_logits(self, hidden_TH: Tensor) -> Tensor | None:
        return cast(Tensor | None, self.logits_processor(self.lm_head, hidden_TH))

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """Put the export's tensors in their places. vLLM passes them one by one; it is given all parameters' names.

        Raises:
            CheckpointError: a tensor is missing, left over, misshapen, or holds numbers that are not finite.
        """
        shapes = TensorMapping(self.config, self.config.vocab_size, self.config.vocab_size).exported_shapes()
        loaders = self._loaders(shapes)
        check_names(loaders, shapes, "the model in vLLM")
        found = set()
        for name, tensor in weights:
            found.add(name)
            if name in shapes:
                check_tensor(name, tensor, shapes[name])
                loaders[name](tensor)
        check_names(dict.fromkeys(found), shapes, "export")
        for module in self.modules():
            if isinstance(module, ActiveExperts):
                module.pack()
        return {name for name, _ in self.named_parameters()}

    def _loaders(self, exported: Container[str]) -> Loaders:
        """Parameters under their exported names, and the modules that rearrange what is exported."""
        loaders: Loaders = {
            name: partial(getattr(parameter, "weight_loader", default_weight_loader), parameter)
            for name, parameter in self.named_parameters()
            if name in exported
        }
        for prefix, module in self.named_modules():
            if isinstance(module, DSMoEAttention | EveryExpert | ActiveExperts):
                loaders |= {f"{prefix}.{name}": load for name, load in module.loaders().items()}
        return loaders


def check_tensor(name: str, tensor: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != shape:
        raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}, but config.json makes it {shape}")
    if not tensor.isfinite().all():
        raise CheckpointError(f"{name} holds numbers that are not finite: the export is damaged")
