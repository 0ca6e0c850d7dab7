"""Exports appear whole or not at all: bad checkpoints, folders in the way, processes that were killed."""

import io
import pickle
import platform
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from checkpoints_tools.distributed_checkpoint import DistributedCheckpoint
from checkpoints_tools.export_hf import export
from dsmoe_megatron.checkpoint_manifest import entries_of, write_manifest
from dsmoe_megatron.checkpoint_metadata import read_metadata
from dsmoe_megatron.errors import CheckpointError, ConfigurationError
from tests.made_up_runs import ARCHITECTURE, Run, make_run

EXPORTED_NAMES = {
    "decoder.layers.mlp.linear_fc2.weight": "model.layers.1.mlp.experts.down_proj",
    "output_layer.weight": "lm_head.weight",
}

KILLED_WHILE_WRITING = """
import os, pathlib, signal, sys
from checkpoints_tools import export_hf, streamed_safetensors
add = streamed_safetensors.StreamedFile.add
def add_and_die(file, name, tensor):
    add(file, name, tensor)
    if "layers.1" in name:
        os.kill(os.getpid(), signal.SIGKILL)
streamed_safetensors.StreamedFile.add = add_and_die
export_hf.export(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, tokenizer_folder: Path) -> Run:
    return make_run(tmp_path_factory.mktemp("run"), tokenizer_folder, ARCHITECTURE)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("name", EXPORTED_NAMES)
def test_values_that_are_not_finite_are_refused(
    tmp_path: Path, tokenizer_folder: Path, name: str, value: float
) -> None:
    def spoil(tensors: dict[str, Tensor]) -> None:
        tensors[name].view(-1)[tensors[name].numel() // 2] = value

    run = make_run(tmp_path / "run", tokenizer_folder, ARCHITECTURE, spoil=spoil)

    with pytest.raises(CheckpointError, match=rf"{EXPORTED_NAMES[name]} .*NaN or infinite"):
        export(run.folder, tmp_path / "export", dtype=torch.bfloat16)

    assert [path.name for path in tmp_path.iterdir()] == ["run"]


@pytest.mark.parametrize(
    ("extra", "units", "message"),
    [
        (
            {"decoder.layers.mlp.linear_fc1.bias": torch.zeros(2, 40)},
            8,
            r"has unknown decoder\.layers\.mlp\.linear_fc1\.b",
        ),
        ({"replay_buffer": io.BytesIO(b"?")}, 8, r"has unknown replay_buffer"),
        ({}, 16, r"linear_fc1\.weight has shape \(2, 40, 16\), but its configuration makes it \(2, 80, 16\)"),
    ],
)
def test_what_does_not_fit_is_named_and_nothing_is_left(
    tmp_path: Path, tokenizer_folder: Path, extra: dict[str, Any], units: int, message: str
) -> None:
    run = make_run(tmp_path / "run", tokenizer_folder, ARCHITECTURE, extra)
    recipe = run.step_folder / "config.yaml"
    recipe.write_text(recipe.read_text().replace("moe_intermediate_size: 8", f"moe_intermediate_size: {units}"))

    with pytest.raises(CheckpointError, match=message):
        export(run.folder, tmp_path / "export")

    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_a_damaged_piece_is_named_and_nothing_is_left(tmp_path: Path, tokenizer_folder: Path) -> None:
    run = make_run(tmp_path / "run", tokenizer_folder, ARCHITECTURE)
    piece = next(run.step_folder.glob("*.distcp"))
    piece.write_bytes(piece.read_bytes()[: piece.stat().st_size // 2])

    with pytest.raises(CheckpointError, match=r"cannot be read: "):
        export(run.folder, tmp_path / "export")

    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def vouched_copy(run: Run, folder: Path) -> dict[str, set[str]]:
    """Save a run's checkpoint with each tensor in a file of its own, and a manifest; gives the files of each tensor."""
    saved = DistributedCheckpoint(run.step_folder)
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=False)
    dcp.save({name: saved.read(name) for name in saved.tensor_shapes}, storage_writer=writer, no_dist=True)
    for name in ("config.yaml", "progress.json"):
        shutil.copy(run.step_folder / name, folder / name)
    write_manifest(folder, entries_of(folder))
    places: dict[str, set[str]] = {}
    for index, place in read_metadata(folder).storage_data.items():
        places.setdefault(index.fqn, set()).add(place.relative_path)
    return places


def test_a_changed_byte_is_named_and_nothing_is_left(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    places = vouched_copy(run, tmp_path / "step")
    (file,) = places["embedding.word_embeddings.weight"]
    content = bytearray((tmp_path / "step" / file).read_bytes())
    content[len(content) // 2] ^= 1  # the value stays finite
    (tmp_path / "step" / file).write_bytes(content)

    with pytest.raises(CheckpointError, match=rf"{file}: damaged: its checksum is not the manifest's"):
        export(tmp_path / "step", tmp_path / "export")

    assert [path.name for path in tmp_path.iterdir()] == ["step"]
    assert capsys.readouterr().err == ""


def test_files_of_the_optimizer_alone_are_not_asked_for(run: Run, tmp_path: Path) -> None:
    places = vouched_copy(run, tmp_path / "step")
    for name, files in places.items():
        for file in files if name.startswith("optimizer.") else ():
            (tmp_path / "step" / file).unlink()

    assert export(tmp_path / "step", tmp_path / "export") == len(run.tensors)


def test_a_checkpoint_without_a_manifest_is_exported_with_a_word(
    run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    export(run.folder, tmp_path / "export")

    assert f"{run.step_folder}: of an earlier version, without a manifest" in capsys.readouterr().err


def test_a_table_of_contents_cannot_run_code(tmp_path: Path, tokenizer_folder: Path) -> None:
    run = make_run(tmp_path / "run", tokenizer_folder, ARCHITECTURE)
    trace = tmp_path / "trace"

    class Attack:
        def __reduce__(self) -> tuple[Any, tuple[str]]:
            import os

            return os.system, (f"touch {trace}",)

    (run.step_folder / ".metadata").write_bytes(pickle.dumps(Attack()))

    with pytest.raises(CheckpointError, match=r"refers to posix\.system"):
        export(run.folder, tmp_path / "export")
    assert not trace.exists()


def test_an_existing_folder_is_kept_unless_told(run: Run, tmp_path: Path) -> None:
    output = tmp_path / "export"
    export(run.folder, output)
    (output / "mark").touch()
    strange = tmp_path / "strange"
    strange.mkdir()
    (strange / "thesis.tex").touch()

    with pytest.raises(ConfigurationError, match="is already there"):
        export(run.folder, output)
    with pytest.raises(ConfigurationError, match="is not an export"):
        export(run.folder, strange, overwrite=True)
    assert (output / "mark").exists()
    export(run.folder, output, overwrite=True)

    assert not (output / "mark").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["export", "strange"]


def test_a_link_stays_a_link(run: Run, tmp_path: Path) -> None:
    for name in ("other_disk", "here"):
        (tmp_path / name).mkdir()
    output, target = tmp_path / "here" / "export", tmp_path / "other_disk" / "mine"
    output.symlink_to(target)

    export(run.folder, output)
    (target / "mark").touch()
    for _ in range(2):
        export(run.folder, output, overwrite=True)

    assert output.is_symlink()
    assert (target / "config.json").is_file()
    assert not (target / "mark").exists()
    assert sorted(path.name for path in tmp_path.glob("*/*")) == ["export", "mine"]


def dead_process() -> int:
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


def test_a_killed_export_leaves_nothing_that_the_next_one_keeps(run: Run, tmp_path: Path) -> None:
    """SIGKILL while the first shard is written, which is recognised by its folder; then the same command again."""
    output = tmp_path / "export"
    command = [sys.executable, "-c", KILLED_WHILE_WRITING, str(run.folder), str(output)]

    killed = subprocess.run(command, check=False)

    assert killed.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert left.name.startswith("export.tmp-")
    assert list(left.iterdir())
    export(run.folder, output)
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_an_export_moved_away_by_a_killed_process_comes_back(run: Run, tmp_path: Path) -> None:
    """Killed between the two renames of an overwrite: the older export is found where it was."""
    output = tmp_path / "export"
    export(run.folder, output)
    (output / "mark").touch()
    output.rename(tmp_path / f"export.old-{platform.node()}-{dead_process()}")

    with pytest.raises(ConfigurationError, match="is already there"):
        export(run.folder, output)

    assert (output / "mark").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["export"]


def test_what_a_living_process_or_another_machine_makes_is_left_alone(run: Run, tmp_path: Path) -> None:
    living = subprocess.Popen(["sleep", "60"])
    others = [f"export.tmp-{platform.node()}-{living.pid}", f"export.tmp-elsewhere-{dead_process()}", "export.tmp"]
    for name in others:
        (tmp_path / name).mkdir()

    try:
        export(run.folder, tmp_path / "export")
    finally:
        living.kill()
        living.wait()

    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(["export", *others])
