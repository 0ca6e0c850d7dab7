"""What is inside a checkpoint: step, layout it was saved under, parameters by kind, sizes, manifest, recipe.

    python checkpoints_tools/inspect_checkpoint.py RUN_OR_STEP [--json]

No tensor is loaded and nothing is unpickled freely. Sizes are held against the manifest; contents are not read, which
is verify.py's work.
"""

import argparse
import dataclasses
import json
import math
import sys
from collections import Counter
from pathlib import Path
from typing import Any

from checkpoints_tools.distributed_checkpoint import OPTIMIZER, DistributedCheckpoint
from dsmoe_megatron.checkpoint_manifest import Manifest, read_manifest
from dsmoe_megatron.config import Config
from dsmoe_megatron.config_parsing import load_config
from dsmoe_megatron.errors import CheckpointError, DSMoEError, exit_with
from dsmoe_megatron.recipe_text import recipe_text
from dsmoe_megatron.run_folder import find_checkpoint, read_progress, saved_step, step_folders

# the first that is part of a tensor's name decides
KINDS = {
    "router": "routers",
    "norm": "norms",
    "embedding": "embeddings",
    "output_layer": "embeddings",
    "self_attention": "attention",
    "mlp": "MLP",
}


def inspect(path: Path) -> dict[str, Any]:
    """What a run folder's newest checkpoint, or a step folder, holds.

    Raises:
        CheckpointError: there is none, or it cannot be read.
    """
    folder = find_checkpoint(path)
    if folder is None:
        raise CheckpointError(f"{path}: neither a run folder with a checkpoint nor a step folder")
    config, progress = load_config(folder / "config.yaml"), read_progress(folder)
    checkpoint, manifest = DistributedCheckpoint(folder), read_manifest(folder)
    weights = [name for name in checkpoint.tensor_shapes if not name.startswith(OPTIMIZER)]
    state = [name for name in checkpoint.tensor_shapes if name.startswith(OPTIMIZER)]
    return {
        "folder": str(folder),
        "checkpoints": [each.name for each in step_folders(path)],
        "step": progress.step,
        "consumed_samples": progress.consumed_samples,
        "tokens": progress.tokens,
        "last": progress.last,
        "layout": _layout(config, manifest),
        "parameters": _parameters(checkpoint, weights),
        "dtype": ", ".join(sorted({str(checkpoint.tensor_dtypes[name])[len("torch.") :] for name in weights})),
        "has_optimizer_state": bool(state),
        "bytes": {
            "weights": _bytes(checkpoint, weights),
            "optimizer": _bytes(checkpoint, state),
            "files": sum(file.stat().st_size for file in folder.iterdir()),
        },
        "manifest": _manifest(folder, manifest),
        "config": dataclasses.asdict(config),
    }


def _layout(config: Config, manifest: Manifest | None) -> dict[str, Any]:
    """Sizes of the parallel dimensions; the data-parallel one is known where the manifest tells the processes."""
    parallel, processes = config.parallel, manifest.processes if manifest else None
    data = processes // (parallel.tensor * parallel.pipeline * parallel.context) if processes else None
    return {"processes": processes, "data": data, **dataclasses.asdict(parallel)}


def _parameters(checkpoint: DistributedCheckpoint, names: list[str]) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for name in names:
        kind = next((kind for part, kind in KINDS.items() if part in name), "other")
        counts[kind] += math.prod(checkpoint.tensor_shapes[name])
    return {**dict(sorted(counts.items())), "total": counts.total()}


def _bytes(checkpoint: DistributedCheckpoint, names: list[str]) -> int:
    return sum(math.prod(checkpoint.tensor_shapes[name]) * checkpoint.tensor_dtypes[name].itemsize for name in names)


def _manifest(folder: Path, manifest: Manifest | None) -> dict[str, Any] | None:
    if manifest is None:
        return None
    wrong = [name for name, entry in manifest.files.items() if not _has_size(folder / name, entry.bytes)]
    return {"files": len(manifest.files), "missing_or_of_another_size": wrong, "versions": manifest.versions}


def _has_size(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size == size


def as_text(found: dict[str, Any]) -> str:
    """Lines for the terminal; the recipe last."""
    layout, sizes, manifest = found["layout"], found["bytes"], found["manifest"]
    parallel = [f"{name} {layout[name]}" for name in ("tensor", "pipeline", "virtual_pipeline", "expert", "context")]
    if layout["processes"]:
        parallel = [f"{layout['processes']} processes", f"data {layout['data']}", *parallel]
    kinds = ", ".join(f"{kind} {count:,}" for kind, count in found["parameters"].items() if kind != "total")
    lines = [
        found["folder"],
        f"step {found['step']:,}, {found['tokens']:,} tokens, {found['consumed_samples']:,} samples",
        f"saved under: {', '.join(parallel)}",
        f"parameters: {found['parameters']['total']:,} in {found['dtype']}: {kinds}",
        f"optimizer state: {'yes' if found['has_optimizer_state'] else 'no, weights alone'}",
        f"bytes: weights {sizes['weights']:,}, optimizer {sizes['optimizer']:,}, all files {sizes['files']:,}",
    ]
    if manifest is None:
        lines.append("manifest: none (of an earlier version)")
    else:
        wrong = manifest["missing_or_of_another_size"]
        state = f"DAMAGED: missing or of another size: {', '.join(wrong)}" if wrong else "all there, in full size"
        lines.append(f"manifest: {manifest['files']} files, {state}")
    if found["checkpoints"]:
        steps = [str(saved_step(Path(name))) for name in reversed(found["checkpoints"])]
        lines.append(f"checkpoints of the run: {', '.join(steps)}")
    return "\n".join([*lines, "recipe:", recipe_text(found["config"]).rstrip()])


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="inspect_checkpoint", description="What is inside a checkpoint.")
    parser.add_argument(
        "checkpoint", type=Path, metavar="RUN_OR_STEP", help="run folder (its newest checkpoint) or step"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object instead of text")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    try:
        found = inspect(arguments.checkpoint)
    except DSMoEError as error:
        exit_with(error, "inspect_checkpoint")
    try:
        print(json.dumps(found) if arguments.json else as_text(found))
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)


if __name__ == "__main__":
    main()
