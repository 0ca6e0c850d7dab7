"""Export of a large checkpoint: speed beside `cp` of the same bytes, and peak memory of the whole process.

    python -m benchmarks.export [--gigabytes 3.0] [--repeats 5] [--folder /tmp] [--json FILE]

A checkpoint of so many bytes is made up, layer by layer as megatron-core saves it, with nothing trained. Both write the
same bytes, synced, in turns: the export from the checkpoint, `cp` from an earlier export. Both find their input in the
page cache where memory suffices. Imports are done before the clock runs, and their memory counts: it is measured on the
command, in processes of its own.
"""

import json
import random
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from statistics import median
from typing import Any, Literal

import torch
import torch.distributed.checkpoint as dcp
from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import Path_drw, PositiveFloat, PositiveInt
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType

from benchmarks.measuring import (
    Run,
    benchmark_parser,
    run_benchmark,
    surroundings,
    surroundings_line,
    table,
)
from benchmarks.process_usage import CommandError, measured
from checkpoints_tools.export_hf import DTYPES, export
from dsmoe_megatron.config import Config, DataConfig, ModelConfig, TrainConfig
from dsmoe_megatron.config_parsing import save_config
from dsmoe_megatron.errors import EnvironmentNotSupportedError
from dsmoe_megatron.inference.tensor_mapping import TensorMapping
from dsmoe_megatron.planning.parameters import count_parameters

LIMIT_OF_SPEED = 0.5  # bytes per second, of cp's
LIMIT_OF_MEMORY = 500_000_000  # bytes above the largest shard
EXPORT, COPY = "export", "cp"


class MadeUp(dcp.DefaultSavePlanner):
    """Saves tensors that nobody holds: each piece, one layer of one tensor, is made when it is written."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], dtype: torch.dtype) -> None:
        super().__init__()
        self.shapes, self.dtype = shapes, dtype

    def create_local_plan(self) -> SavePlan:
        items = []
        for name, shape in self.shapes.items():
            layered = name.startswith("decoder.layers")
            for layer in range(shape[0] if layered else 1):
                offsets = torch.Size([layer] + [0] * (len(shape) - 1))
                chunk = ChunkStorageMetadata(offsets, torch.Size([1, *shape[1:]] if layered else shape))
                data = TensorWriteData(chunk, TensorProperties(dtype=self.dtype), torch.Size(shape))
                items.append(WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items, planner_data={})
        return self.plan

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        assert write_item.tensor_data is not None
        return torch.randn(write_item.tensor_data.chunk.sizes).mul_(0.02).to(self.dtype)


def model_of(gigabytes: float, hidden_size: int, dtype: torch.dtype) -> ModelConfig:
    """An architecture in the proportions of the 1B recipe, with as many layers as the bytes ask for."""
    model = ModelConfig(
        hidden_size=hidden_size,
        num_hidden_layers=1,
        num_attention_experts=16,
        num_attention_heads=32,
        head_dim=hidden_size // 32,
        num_experts=32,
        moe_intermediate_size=hidden_size // 8,
        router_type="mlp",
        router_hidden_size=hidden_size // 4,
        vocab_size=16 * hidden_size,
    )
    count = count_parameters(model)
    embeddings = count.embeddings or 0
    wanted = gigabytes * 1e9 / dtype.itemsize
    model.num_hidden_layers = max(1, round((wanted - embeddings) / count.total_without_embeddings))
    return model


def make_tokenizer(folder: Path, vocab_size: int) -> None:
    """As many tokens as the model has, none of them used."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    vocabulary = {f"token{number}": number for number in range(vocab_size - 1)}
    backend = Tokenizer(models.WordLevel(vocab=vocabulary, unk_token="token0"))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|endoftext|>").save_pretrained(folder)


def make_checkpoint(folder: Path, model: ModelConfig, precision: Literal["fp32", "bf16"]) -> None:
    """A step folder with random weights."""
    assert model.vocab_size is not None
    tokenizer = folder.with_name("tokenizer")
    if not tokenizer.exists():
        make_tokenizer(tokenizer, model.vocab_size)
    shapes = TensorMapping(model, model.vocab_size, model.padded_vocab_size).megatron_shapes()
    dcp.save({}, checkpoint_id=folder, planner=MadeUp(shapes, DTYPES[precision]), no_dist=True)
    config = Config(model=model, data=DataConfig(tokenizer=str(tokenizer)), train=TrainConfig(precision=precision))
    save_config(config, folder / "config.yaml")
    (folder / "progress.json").write_text(json.dumps({"step": 1}))


def contestants(checkpoint: Path, scratch: Path, dtype: torch.dtype) -> dict[str, Run]:
    """Each removes what it wrote as soon as it is done; that is little beside the writing."""
    original, copied = scratch / "original", scratch / "copied"
    export(checkpoint, original, dtype=dtype)

    def copy() -> None:
        command = 'cp -r "$1" "$2" && sync "$2"/*'
        subprocess.run(["bash", "-c", command, "bash", str(original), str(copied)], check=True)
        shutil.rmtree(copied)

    def export_again() -> None:
        export(checkpoint, scratch / "exported", dtype=dtype)
        shutil.rmtree(scratch / "exported")

    return {EXPORT: export_again, COPY: copy}


def in_turns(runs: dict[str, Run], repeats: int) -> dict[str, list[float]]:
    """Seconds by the clock of every run in every repeat, in changing order. No warm-up: the original was one."""
    order = random.Random(1234)
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(repeats):
        for name in order.sample(list(runs), len(runs)):
            started = time.perf_counter()
            runs[name]()
            seconds[name].append(time.perf_counter() - started)
    return seconds


def measure_case(scratch: Path, arguments: Namespace, saved: Literal["fp32", "bf16"], exported: str) -> dict[str, Any]:
    """One pair of types."""
    folder = scratch / saved
    if not folder.exists():
        model = model_of(arguments.gigabytes, int(arguments.hidden_size), DTYPES[saved])
        make_checkpoint(folder, model, saved)
    seconds = in_turns(contestants(folder, scratch, DTYPES[exported]), arguments.repeats)
    ratios = [copy / own for own, copy in zip(seconds[EXPORT], seconds[COPY], strict=True)]
    sizes = [file.stat().st_size for file in (scratch / "original").glob("*.safetensors")]
    command = [sys.executable, "-m", "checkpoints_tools.export_hf", "--checkpoint", str(folder), "--dtype", exported]
    try:
        usage = measured([*command, "--output", str(scratch / "alone")], {}, Path.cwd(), scratch / "usage.json")
    except CommandError as error:
        raise EnvironmentNotSupportedError(f"the export ended with an error: {error}") from error
    for name in ("original", "alone"):
        shutil.rmtree(scratch / name)
    return {
        "saved": saved,
        "exported": exported,
        "bytes": sum(sizes),
        "largest_shard": max(sizes),
        "seconds": seconds,
        "ratio": median(ratios),
        "process": asdict(usage),
    }


def measure(arguments: Namespace) -> dict[str, Any]:
    around = surroundings(torch.device("cpu"))
    with tempfile.TemporaryDirectory(dir=arguments.folder) as scratch:
        cases = [
            measure_case(Path(scratch), arguments, "bf16", "bf16"),
            measure_case(Path(scratch), arguments, "fp32", "fp32"),
            measure_case(Path(scratch), arguments, "fp32", "bf16"),
        ]
    return {"surroundings": around, "gigabytes": arguments.gigabytes, "cases": cases}


def as_markdown(report: dict[str, Any]) -> str:
    header = ["checkpoint -> export", "GB", "export GB/s", "cp GB/s", "ratio", "peak MB", "largest shard MB", "limits"]
    rows = []
    for case in report["cases"]:
        gigabytes = case["bytes"] / 1e9
        speeds = {name: gigabytes / median(own) for name, own in case["seconds"].items()}
        peak, shard = case["process"]["peak_bytes"], case["largest_shard"]
        kept = case["ratio"] >= LIMIT_OF_SPEED and peak <= shard + LIMIT_OF_MEMORY
        rows.append(
            [
                f"{case['saved']} -> {case['exported']}",
                f"{gigabytes:.2f}",
                f"{speeds[EXPORT]:.2f}",
                f"{speeds[COPY]:.2f}",
                f"{case['ratio']:.2f}",
                f"{peak / 1e6:,.0f}",
                f"{shard / 1e6:,.0f}",
                "kept" if kept else "MISSED",
            ]
        )
    limits = (
        f"Limits: ratio at least {LIMIT_OF_SPEED}; peak at most the largest shard + {LIMIT_OF_MEMORY / 1e6:.0f} MB."
    )
    return "\n".join([surroundings_line(report["surroundings"]), "", *table(header, rows), "", limits])


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = benchmark_parser("export", "Speed and memory of the export of a large checkpoint.")
    parser.add_argument("--gigabytes", type=PositiveFloat, default=3.0, help="of the made-up checkpoint")
    parser.add_argument("--hidden-size", type=PositiveInt, default=2048, help="of its model; a multiple of 64")
    parser.add_argument("--repeats", type=PositiveInt, default=5, help="turns of each")
    parser.add_argument("--folder", type=Path_drw, default=None, help="scratch space of four times the size")
    return parser


if __name__ == "__main__":
    run_benchmark(build_parser(), measure, as_markdown)
