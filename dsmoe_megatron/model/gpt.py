"""megatron-core's GPTModel built from a recipe."""

from collections.abc import Callable, Iterator, Sequence

from megatron.core import parallel_state
from megatron.core.models.backends import BackendSpecProvider
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_block import get_num_layers_to_build
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from dsmoe_megatron.config import Config
from dsmoe_megatron.model.initialization import initialize_weights
from dsmoe_megatron.model.router import Router
from dsmoe_megatron.model.specs import block_spec


def build_chunks(config: Config, transformer: TransformerConfig, backend: BackendSpecProvider) -> list[GPTModel]:
    """This rank's model chunks, one per virtual pipeline stage, with initial weights.

    Args:
        config: checked recipe with a known vocabulary size.
        transformer: its megatron-core form.
        backend: provider of linear layers and norms.
    """
    stages = range(config.parallel.virtual_pipeline) if config.parallel.virtual_pipeline > 1 else [None]
    chunks = [_build_chunk(config, transformer, backend, stage) for stage in stages]
    initialize_weights(chunks, config.model, config.train.seed)
    return chunks


def _build_chunk(
    config: Config, transformer: TransformerConfig, backend: BackendSpecProvider, stage: int | None
) -> GPTModel:
    model = config.model
    pipeline_rank = parallel_state.get_pipeline_model_parallel_rank()
    num_layers = get_num_layers_to_build(transformer, stage, pipeline_rank)
    first = parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage)
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage)
    chunk = GPTModel(
        config=transformer,
        transformer_layer_spec=block_spec(model, num_layers, backend),
        vocab_size=model.padded_vocab_size,
        max_sequence_length=model.max_position_embeddings,
        pre_process=first,
        post_process=last,
        share_embeddings_and_output_weights=model.tie_word_embeddings,
        position_embedding_type="rope",
        rotary_base=model.rope_parameters.rope_theta,
        vp_stage=stage,
    )
    if last and model.vocab_size is not None and model.vocab_size < model.padded_vocab_size:
        chunk.output_layer.register_forward_hook(_padded_logits_to_minus_infinity(model.vocab_size))
    return chunk


def _padded_logits_to_minus_infinity(vocab_size: int) -> Callable[[nn.Module, object, tuple[Tensor, object]], None]:
    """A hook for the output layer: rows that pad the vocabulary get no probability, in the loss and in generation."""

    def mask(layer: nn.Module, inputs: object, outputs: tuple[Tensor, object]) -> None:
        logits_SBV = outputs[0]
        rank = parallel_state.get_tensor_model_parallel_rank()
        whole = logits_SBV.shape[-1] == layer.output_size
        first_row = 0 if whole else rank * logits_SBV.shape[-1]
        # outside autograd: the gradient of a logit with probability zero is zero as it is
        logits_SBV.detach()[..., max(vocab_size - first_row, 0) :].fill_(float("-inf"))

    return mask


def routers(chunks: Sequence[nn.Module]) -> Iterator[Router]:
    """This rank's routers in layer order, the attention's before the MLP's."""
    for chunk in chunks:
        for module in chunk.modules():
            if isinstance(module, Router):
                yield module


def unwrap(module: MegatronModule) -> MegatronModule:
    """The GPTModel inside megatron-core's DDP and Float16Module."""
    while hasattr(module, "module"):
        module = module.module
    return module
