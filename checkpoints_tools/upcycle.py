"""Make a DS-MoE of a dense Llama: the same function under the dense policy, to go on training with routers.

In Megatron's layout a densely trained mixture IS the dense layer with a gate: each block of MLP hidden units is an
expert, and so is each query head of a key/value group (arXiv 2404.05567, equations 3 and 7). So the weights stay where
they are. Only the routers are new: their last layer is zero, every score is 1 / N for every token, and the output
projections are multiplied by N, which the gate takes out again.
"""

import argparse
import dataclasses
import hashlib
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from checkpoints_tools.distributed_checkpoint import MegatronTensors
from checkpoints_tools.export_formats import exported_config
from checkpoints_tools.export_hf import DTYPES, MAX_SHARD_BYTES, write_export
from checkpoints_tools.hf_architecture import (
    check_model,
    dense_model_section,
    matching_vocabulary,
    model_section,
    read_config_json,
)
from checkpoints_tools.model_card import upcycled_model_card
from checkpoints_tools.safetensors_folder import AsMegatron, ExportedTensors, SafetensorsFolder, check_finite
from checkpoints_tools.whole_folder import whole_folder
from dsmoe_megatron.config import ModelConfig
from dsmoe_megatron.errors import (
    CheckpointError,
    ConfigurationError,
    DSMoEError,
    EnvironmentNotSupportedError,
    exit_with,
    first_line,
)
from dsmoe_megatron.inference.policy import ExpertPolicy
from dsmoe_megatron.inference.tensor_mapping import TensorMapping
from dsmoe_megatron.inference.tensor_rules import Shape
from dsmoe_megatron.tokenizers import HuggingFaceTokenizer, Tokenizer, load_tokenizer

ATTENTION_OUTPUT = "decoder.layers.self_attention.linear_proj.weight"
MLP_OUTPUT = "decoder.layers.mlp.linear_fc2.weight"
# what a gguf file of a model that can be carried has
GGUF_TENSORS = re.compile(
    r"(token_embd|output_norm|output|blk\.\d+\.(attn_(q|k|v|output|norm)|ffn_(norm|gate|up|down)))\.weight"
)


@dataclasses.dataclass(frozen=True)
class Mixture:
    """What a dense model is cut into.

    Attributes:
        num_experts: blocks of the MLP's hidden units; must divide them.
        attention_type: `moa` makes each query head of a key/value group an expert; `gqa` leaves the attention alone.
        router_type: `linear`, or `mlp` with a random first layer.
        router_hidden_size: width of the mlp router [units].
        seed: of the mlp routers' first layers.
    """

    num_experts: int
    attention_type: Literal["moa", "gqa"] = "moa"
    router_type: Literal["linear", "mlp"] = "linear"
    router_hidden_size: int = 512
    seed: int = 1234


@dataclasses.dataclass(frozen=True)
class DenseModel:
    """A dense model of the Llama family, not yet read."""

    section: ModelConfig
    tensors: ExportedTensors
    tokenizer: Tokenizer
    name: str


def upcycle(
    model: Path,
    output: Path,
    mixture: Mixture,
    gguf_file: str | None = None,
    dtype: torch.dtype = torch.float32,
    overwrite: bool = False,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> int:
    """Write the DS-MoE in the layout of an export; it appears whole or not at all.

    Args:
        model: Hugging Face folder of a dense Llama, with its tokenizer.
        output: folder to make.
        mixture: what it is cut into.
        gguf_file: a file in that folder to read instead of safetensors; its quantized weights are dequantized.
        dtype: of the tensors; in bfloat16 the function is the same only up to its rounding.
        overwrite: replace an export that is already there.
        max_shard_bytes: largest safetensors file.

    Returns:
        Number of tensors written.

    Raises:
        DSMoEError: see the message; nothing is left at `output`.
    """
    dense = open_gguf(model, gguf_file) if gguf_file is not None else open_safetensors(model)
    vocab_size = matching_vocabulary(dense.section, dense.tokenizer, dense.name)
    section = mixture_section(dense.section, mixture)
    policy = ExpertPolicy.from_config(section)
    description = exported_config(section, policy, dense.tokenizer, dtype, "dsmoe")

    # nothing is padded: what is read is written again at once
    source = AsMegatron(dense.tensors, TensorMapping(dense.section, vocab_size, vocab_size, target="llama"), dense.name)
    mapping = TensorMapping(section, vocab_size, vocab_size)
    card = upcycled_model_card(section, description, dense.name)
    with whole_folder(output, overwrite) as folder:
        gated = WithUniformGates(source, mapping, section, mixture.seed)
        return write_export(folder, gated, mapping, description, dense.tokenizer, card, max_shard_bytes)


def mixture_section(dense: ModelConfig, mixture: Mixture) -> ModelConfig:
    """The model section of the DS-MoE.

    Args:
        dense: grouped-query attention and one gated MLP.

    Raises:
        ConfigurationError: the dense model cannot be cut so.
    """
    units, experts = dense.intermediate_size, mixture.num_experts
    if experts < 2 or units % experts:
        raise ConfigurationError("--num-experts", experts, f"must be at least 2 and divide the {units} hidden units")
    heads_per_group = dense.num_attention_heads // dense.num_key_value_heads
    if mixture.attention_type == "moa" and heads_per_group == 1:
        rule = "every query head has a key/value head of its own, so there are no heads to choose from; give gqa"
        raise ConfigurationError("--attention", mixture.attention_type, rule)
    section = dataclasses.replace(
        dense,
        num_experts=experts,
        moe_intermediate_size=units // experts,
        attention_type=mixture.attention_type,
        num_attention_experts=heads_per_group if mixture.attention_type == "moa" else 1,
        router_type=mixture.router_type,
        router_hidden_size=mixture.router_hidden_size,
        num_experts_per_tok=max(1, experts // 4),
        expert_policy="dense",  # the scores say nothing yet
    )
    check_model(section)
    return section


class WithUniformGates:
    """A dense model's tensors, its output projections scaled to undo a uniform gate, and routers that give that gate.

    Args:
        dense: the dense model's tensors.
        mapping: of the DS-MoE, which names the routers' tensors.
        section: of the DS-MoE.
        seed: of the mlp routers' first layers.
    """

    def __init__(self, dense: MegatronTensors, mapping: TensorMapping, section: ModelConfig, seed: int) -> None:
        self.dense, self.seed = dense, seed
        self.shapes: dict[str, Shape] = {rule.megatron: rule.megatron_shape for rule, _ in mapping}
        self.std = section.initializer_range
        self.factors = {ATTENTION_OUTPUT: section.num_attention_experts, MLP_OUTPUT: section.num_experts}

    def read(
        self,
        name: str,
        layer: int | None = None,
        dtype: torch.dtype | None = None,
        memory: Tensor | None = None,  # noqa: ARG002 (every tensor is made anew)
    ) -> Tensor:
        """As the dense model's; in float32, where no dtype is given."""
        if ".router." in name:
            tensor = self._router(name, layer)
        else:
            # scaled in float32: a factor that is no power of two would round a bfloat16 weight
            tensor = self.dense.read(name, layer).float() * self.factors.get(name, 1)
        return tensor if dtype is None else tensor.to(dtype)

    def _router(self, name: str, layer: int | None) -> Tensor:
        if not name.endswith("fc1.weight"):
            return torch.zeros(self.shapes[name])
        digest = hashlib.sha256(f"{self.seed}/{name}/{layer}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        return torch.randn(self.shapes[name], generator=generator) * self.std


def open_safetensors(folder: Path) -> DenseModel:
    """A dense model in safetensors.

    Raises:
        DSMoEError: not there, damaged, or not of the Llama family.
    """
    section, target = model_section(read_config_json(folder), str(folder / "config.json"))
    if target != "llama":
        raise CheckpointError(f"{folder}: is a DS-MoE already; import_hf.py takes it to training")
    return DenseModel(section, SafetensorsFolder(folder), load_tokenizer(str(folder)), folder.name)


def open_gguf(folder: Path, gguf_file: str) -> DenseModel:
    """A dense model of a gguf file, dequantized to float32 by transformers; all of it is in memory.

    Raises:
        DSMoEError: not there, unreadable, or not of the Llama family.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    if not sys.stderr.isatty():  # no bar where nobody watches it
        disable_progress_bar()
    path = folder / gguf_file
    if not path.is_file():
        raise ConfigurationError("--gguf-file", gguf_file, f"no such file in {folder}")
    options = {"gguf_file": gguf_file, "local_files_only": True}
    with _named_failures(path):
        _check_gguf(path)
        config = AutoConfig.from_pretrained(folder, **options)
        section = dense_model_section(config, str(path))
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, **options)
        tokenizer = HuggingFaceTokenizer(str(path), AutoTokenizer.from_pretrained(folder, **options))
    return DenseModel(section, LoadedTensors(model, str(path)), tokenizer, path.stem)


def _check_gguf(path: Path) -> None:
    """Refuse what transformers would leave out of a gguf file without a word: scaled rotary embeddings and biases."""
    from gguf import GGUFReader

    reader = GGUFReader(path)
    unknown = sorted(tensor.name for tensor in reader.tensors if not GGUF_TENSORS.fullmatch(tensor.name))
    if unknown:
        raise CheckpointError(f"{path}: has {', '.join(unknown[:5])}, which a DS-MoE has no place for")
    scaling = {name: field.contents() for name, field in reader.fields.items() if ".rope.scaling." in name}
    kinds = [value for name, value in scaling.items() if name.endswith(".type")]
    if scaling and kinds != ["none"]:
        raise CheckpointError(f"{path}: {scaling}: only unscaled rotary embeddings can be trained here")


@contextmanager
def _named_failures(path: Path) -> Iterator[None]:
    """What transformers raises of a file that it cannot read becomes one line."""
    try:
        yield
    except DSMoEError:
        raise
    except ImportError as error:
        raise EnvironmentNotSupportedError(f"{path}: reading it needs pip install gguf accelerate ({error})") from error
    except Exception as error:  # a damaged file, an unknown architecture: nearly anything
        reason = first_line(error)
        raise CheckpointError(f"{path}: cannot be loaded: {reason}") from error


class LoadedTensors:
    """The tensors of a model in memory."""

    def __init__(self, model: Any, where: str) -> None:
        tied = set(getattr(model, "_tied_weights_keys", None) or ()) if model.config.tie_word_embeddings else set()
        self.where = where
        self.tensors: dict[str, Tensor] = {
            name: parameter.detach() for name, parameter in model.state_dict().items() if name not in tied
        }

    @property
    def tensor_shapes(self) -> dict[str, Shape]:
        return {name: tuple(tensor.shape) for name, tensor in self.tensors.items()}

    @property
    def tensor_dtypes(self) -> dict[str, torch.dtype]:
        return {name: tensor.dtype for name, tensor in self.tensors.items()}

    def read(self, name: str) -> Tensor:
        check_finite(name, self.tensors[name], self.where)
        return self.tensors[name]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="upcycle", description="Make a DS-MoE of a dense Llama; the same function.")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder of the dense model")
    parser.add_argument("--gguf-file", metavar="NAME", help="file in that folder to read instead of safetensors")
    parser.add_argument("--output", type=Path, required=True, help="folder to make, as export_hf.py makes it")
    parser.add_argument("--num-experts", type=int, required=True, metavar="N", help="experts of each MLP")
    parser.add_argument("--attention", choices=("moa", "gqa"), default="moa", help="moa (default): heads are experts")
    parser.add_argument("--router", choices=("linear", "mlp"), default="linear", help="default: linear")
    parser.add_argument("--router-hidden-size", type=int, default=512, metavar="R", help="width of an mlp router")
    parser.add_argument("--seed", type=int, default=1234, help="of the mlp routers' first layers")
    parser.add_argument("--dtype", choices=tuple(DTYPES), default="fp32", help="of the tensors; default: fp32")
    parser.add_argument("--overwrite", action="store_true", help="replace an export that is already there")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    mixture = Mixture(
        num_experts=arguments.num_experts,
        attention_type=arguments.attention,
        router_type=arguments.router,
        router_hidden_size=arguments.router_hidden_size,
        seed=arguments.seed,
    )
    try:
        written = upcycle(
            arguments.model,
            arguments.output,
            mixture,
            arguments.gguf_file,
            DTYPES[arguments.dtype],
            arguments.overwrite,
        )
    except DSMoEError as error:
        exit_with(error, "upcycle")
    print(f"{arguments.output}: {written} tensors, whole", file=sys.stderr)


if __name__ == "__main__":
    main()
