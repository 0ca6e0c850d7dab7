"""Run folders with one made-up checkpoint, as a tensor-parallel run of megatron-core would have saved it."""

import io
import json
import pickle
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from dsmoe_megatron.config import Config, DataConfig, ModelConfig, RopeParameters, TrainConfig
from dsmoe_megatron.config_parsing import save_config
from dsmoe_megatron.inference.tensor_mapping import TensorMapping
from tests import reference_model as reference

VOCABULARY = 257  # of the tests' tokenizer
ARCHITECTURE = reference.ReferenceConfig(vocab_size=VOCABULARY, hidden_size=16, head_dim=8, moe_intermediate_size=8)
GQA = replace(ARCHITECTURE, attention_type="gqa", num_attention_experts=1, num_attention_heads=2, num_key_value_heads=1)
LLAMA = replace(GQA, num_experts=1, hidden_act="silu", gated_mlp=True)
# hidden_size = heads x head_dim, and several query heads per key/value head
QWEN = replace(LLAMA, num_experts=5, head_dim=4, num_attention_heads=4, num_key_value_heads=2)


class InPieces(dcp.DefaultSavePlanner):
    """Saves as a tensor-parallel run of megatron-core: layer by layer, the next axis in halves; bytes as objects."""

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, tensor in self.state_dict.items():
            if not isinstance(tensor, Tensor):
                items.append(WriteItem(MetadataIndex(name), WriteItemType.BYTE_IO))
                continue
            axes = [[(0, 1)] if size < 2 else [(0, size // 2), (size // 2, size)] for size in tensor.shape[:2]]
            if name.startswith("decoder.layers"):
                axes[0] = [(layer, layer + 1) for layer in range(tensor.shape[0])]
            grid = torch.cartesian_prod(*[torch.arange(len(axis)) for axis in axes]).view(-1, len(axes)).tolist()
            for place in grid:
                spans = [axis[index] for axis, index in zip(axes, place, strict=True)]
                offsets = [start for start, _ in spans] + [0] * (tensor.dim() - len(spans))
                sizes = [end - start for start, end in spans] + list(tensor.shape[len(spans) :])
                chunk = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
                data = TensorWriteData(chunk, TensorProperties.create_from_tensor(tensor), tensor.size())
                items.append(WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items, planner_data={})
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor | io.BytesIO:
        tensor: Tensor | io.BytesIO = self.state_dict[write_item.index.fqn]
        if isinstance(tensor, io.BytesIO):
            return tensor
        assert write_item.tensor_data is not None
        chunk = write_item.tensor_data.chunk
        for axis, (offset, size) in enumerate(zip(chunk.offsets, chunk.sizes, strict=True)):
            tensor = tensor.narrow(axis, offset, size)
        return tensor.clone()


@dataclass
class Run:
    """A run folder with one checkpoint, and the tensors that its export must have."""

    folder: Path
    step_folder: Path
    architecture: reference.ReferenceConfig
    tensors: dict[str, Tensor]

    def logits(self, ids: Tensor, policy: str, **limits: Any) -> Tensor:
        rules = reference.ReferencePolicy(policy, **limits)
        return reference.reference_forward(self.architecture, self.tensors, ids, rules).logits


def make_run(
    folder: Path,
    tokenizer: Path,
    architecture: reference.ReferenceConfig,
    extra: dict[str, Any] | None = None,
    spoil: Callable[[dict[str, Tensor]], None] = lambda _: None,
    **model: Any,
) -> Run:
    names = {"rope_theta", "vocab_size"}
    section = ModelConfig(
        **{name: value for name, value in vars(architecture).items() if name not in names},
        vocab_size=VOCABULARY,
        rope_parameters=RopeParameters(architecture.rope_theta),
        **model,
    )
    config = Config(
        model=section,
        data=DataConfig(tokenizer=str(tokenizer)),
        train=TrainConfig(run_dir=str(folder), precision="fp32"),
    )
    tensors = reference.random_tensors(architecture, dtype=torch.float32)
    mapping = TensorMapping(section, VOCABULARY, section.padded_vocab_size, section.expert_training)
    megatron = mapping.to_megatron(tensors)
    spoil(megatron)
    megatron["optimizer.state.exp_avg.decoder.final_layernorm.weight"] = torch.zeros(16)

    step_folder = folder / "checkpoints" / "step_00000007"
    layer_object = {"decoder.layers.mlp.linear_fc1._extra_state/shard_0_2": io.BytesIO(b"scales")}
    planner = InPieces()
    dcp.save({**megatron, **layer_object, **(extra or {})}, checkpoint_id=step_folder, planner=planner, no_dist=True)
    contents = pickle.loads((step_folder / ".metadata").read_bytes())
    contents.all_local_plans = [planner.plan]  # as megatron-core adds it
    (step_folder / ".metadata").write_bytes(pickle.dumps(contents))
    save_config(config, step_folder / "config.yaml")
    policies = {
        "dense": {"perplexity": 10.44, "active_share": 1.0},
        "topk": {"perplexity": 12.3456, "active_share": 0.512},
        "threshold": {"perplexity": None, "active_share": 0.25},
    }
    validation = {"step": 7, "validation_loss": 2.3456789, "policies": policies}
    progress = {"step": 7, "consumed_samples": 56, "tokens": 1792, "last_validation": validation}
    (step_folder / "progress.json").write_text(json.dumps(progress))
    (folder / "latest").write_text("step_00000007\n")
    return Run(folder, step_folder, architecture, tensors)


def token_ids() -> Tensor:
    return torch.randint(0, VOCABULARY, (2, 9), generator=torch.Generator().manual_seed(5))
