"""A small export whose weights the reference model has, and a run trained on real code."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from data_tools.dataset_reader import map_tokens, read_index
from data_tools.preprocess import preprocess
from dsmoe_megatron.config import DatasetSource, PolicyConfig
from dsmoe_megatron.inference.configuration_dsmoe import DSMoEConfig
from dsmoe_megatron.inference.modeling_dsmoe import DSMoEForCausalLM
from dsmoe_megatron.tokenizers import load_tokenizer
from tests import reference_model as reference
from tests.pretrain_job import SmallData, pretrain_job, run_config
from tests.worker_pool import WorkerPool

ARCHITECTURE = reference.ReferenceConfig(vocab_size=257, hidden_size=16, head_dim=8, moe_intermediate_size=8)
END_OF_DOCUMENT = 256


@dataclass(frozen=True)
class Export:
    """An export, its weights in float64, and a dataset made with its tokenizer.

    Attributes:
        folder: of the export.
        tensors: its weights.
        data: prefix of a dataset of several documents.
        ids: of the dataset, [tokens].
        text: a .jsonl file with the same documents.
    """

    folder: Path
    tensors: dict[str, Tensor]
    data: str
    ids: Tensor
    text: Path


@pytest.fixture(scope="session")
def export(tmp_path_factory: pytest.TempPathFactory) -> Export:
    """256 bytes and an end-of-document token; four documents of 130 tokens in all."""
    folder = tmp_path_factory.mktemp("evaluation")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={byte: index for index, byte in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()

    tensors = reference.random_tensors(ARCHITECTURE)
    names = {"rope_theta", "mi_alpha_attention", "mi_alpha_mlp"}
    values: dict[str, Any] = {name: value for name, value in vars(ARCHITECTURE).items() if name not in names}
    limits = {"expert_policy": "threshold", "expert_threshold": 0.9, "num_experts_per_tok": 3}
    config = DSMoEConfig(**values, **limits, max_position_embeddings=32, eos_token_id=END_OF_DOCUMENT)
    model = DSMoEForCausalLM.from_pretrained(
        None, config=config, state_dict={name: tensor.float() for name, tensor in tensors.items()}
    )
    model.save_pretrained(folder / "export")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|endoftext|>").save_pretrained(folder / "export")

    text = folder / "text.jsonl"
    documents = ("for x in range(9): pass" * 2, "import os\n", "y = [z**2 for z in a]", "return None # " * 3 + "abcdef")
    text.write_text("".join(json.dumps({"text": document}) + "\n" for document in documents))
    prefix = str(folder / "data")
    preprocess([str(text)], prefix, str(folder / "export"))
    ids = torch.from_numpy(map_tokens(prefix, read_index(prefix).dtype).astype("int64"))
    return Export(folder / "export", tensors, prefix, ids, text)


@dataclass(frozen=True)
class TrainedRun:
    """A run, and its validation data: one document whose tokens fill whole samples.

    Attributes:
        folder: of the run.
        data: prefix of the validation data.
        tokenizer: SPEC.
    """

    folder: Path
    data: str
    tokenizer: str


@pytest.fixture(scope="session")
def trained_run(worker_pool: WorkerPool, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> TrainedRun:
    """Trained until its experts differ; its validation has seen all of the data, under four policies."""
    folder = tmp_path_factory.mktemp("trained")
    samples, length = 64, 32
    prefix = str(folder / "validation")
    _write_document(prefix, small_data, samples * length + 1, folder / "document.jsonl")
    policies = [
        PolicyConfig("topk", num_experts_per_tok=2),
        PolicyConfig("topk", num_experts_per_tok=3, attention_experts_per_tok=2),
        PolicyConfig("threshold", expert_threshold=1.0),
        PolicyConfig("threshold", expert_threshold=0.7, attention_expert_threshold=0.5),
    ]
    config = run_config(
        small_data,
        folder / "run",
        data={"validation": [DatasetSource(prefix)]},
        evaluation={"batches": samples // 8, "policies": policies},
        # a weak mutual-information loss, so that leaving experts out still costs something
        model={"mi_alpha_attention": 0.003, "mi_alpha_mlp": 0.003},
        train={"steps": 60},
        optimizer={"lr": 1e-2},
        logging={"interval": 5},
        checkpoint={"interval": 60},
    )
    worker_pool.run(1, pretrain_job, config)
    return TrainedRun(folder / "run", prefix, small_data.tokenizer)


def _write_document(prefix: str, small_data: SmallData, tokens: int, path: Path) -> None:
    """A dataset of one document of that many tokens, its end included."""
    tokenizer = load_tokenizer(small_data.tokenizer)
    index = read_index(small_data.validation)
    text = tokenizer.decode(index.document(map_tokens(small_data.validation, index.dtype), 0).tolist())
    ends = (end for end in range(tokens, len(text)) if len(tokenizer.encode(text[:end])) == tokens - 1)
    path.write_text(json.dumps({"text": text[: next(ends)]}) + "\n")
    preprocess([str(path)], prefix, small_data.tokenizer)
    assert len(map_tokens(prefix, index.dtype)) == tokens
