"""Checkpoints that survive: saved beside the training, checked before they are loaded, kept as long as asked for."""

import errno
import functools
import json
import os
import resource
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools.checkpoint_equality import find_differences
from checkpoints_tools.distributed_checkpoint import DistributedCheckpoint
from dsmoe_megatron.checkpoint_manifest import read_manifest
from dsmoe_megatron.config import Config
from dsmoe_megatron.errors import CheckpointError
from dsmoe_megatron.run_folder import find_checkpoint
from dsmoe_megatron.training.retention import clean_up, forget_old
from tests.pretrain_job import SmallData, pretrain_job, read_lines, refused_job, run_config, training_lines
from tests.training_jobs import checkpoint_job, micro_batches, tiny_config
from tests.worker_pool import WorkerPool

DROPOUT = {"hidden_dropout": 0.2, "attention_dropout": 0.1}
EVERY_STEP = {"interval": 1, "keep_last": 0}


@pytest.fixture(scope="module")
def run_dir(worker_pool: WorkerPool, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on two processes with dropout, each saved while the next one runs."""
    folder = tmp_path_factory.mktemp("saving") / "run"
    worker_pool.run(2, pretrain_job, run_config(small_data, folder, model=DROPOUT, checkpoint=EVERY_STEP))
    return folder


def copy_until(run_dir: Path, step: int, copy: Path, first: int = 1) -> Path:
    """As if the run had been killed after it had saved that step."""
    for number in range(first, step + 1):
        name = f"step_{number:08d}"
        shutil.copytree(run_dir / "checkpoints" / name, copy / "checkpoints" / name)
    (copy / "latest").write_text(f"step_{step:08d}\n")
    return copy


@pytest.mark.parametrize("step", [1, 4])
def test_a_run_interrupted_anywhere_goes_on_with_equal_losses(
    worker_pool: WorkerPool, small_data: SmallData, run_dir: Path, tmp_path: Path, step: int
) -> None:
    copy_until(run_dir, step, tmp_path, first=step)

    worker_pool.run(2, pretrain_job, run_config(small_data, tmp_path, model=DROPOUT, checkpoint=EVERY_STEP))

    whole = training_lines(run_dir)
    assert training_lines(tmp_path) == {later: whole[later] for later in range(step + 1, 7)}


def test_saving_beside_the_training_saves_what_waiting_for_it_does(
    worker_pool: WorkerPool, small_data: SmallData, run_dir: Path, tmp_path: Path
) -> None:
    waiting = {**EVERY_STEP, "asynchronous": False}
    worker_pool.run(2, pretrain_job, run_config(small_data, tmp_path, model=DROPOUT, checkpoint=waiting))

    for step in (1, 3, 6):
        name = f"checkpoints/step_{step:08d}"
        assert list(find_differences(run_dir / name, tmp_path / name)) == []


def slow_copy_job(config: Config, waiting: Path, beside: Path) -> None:
    """Save the same state twice, the second time beside a step, with copies that take longer than the step."""
    import torch
    from megatron.core import parallel_state

    from dsmoe_megatron.run_folder import Progress
    from dsmoe_megatron.runtime.distributed import model_parallel_groups
    from dsmoe_megatron.training.engines.megatron import MegatronEngine
    from dsmoe_megatron.training.saving import CheckpointSaver
    from dsmoe_megatron.training.shard_writing import HostCopies

    copy = HostCopies.copy

    def slow_copy(self: HostCopies, *arguments: Any) -> torch.Tensor:
        time.sleep(0.03)
        return copy(self, *arguments)

    HostCopies.copy = slow_copy  # type: ignore[assignment,method-assign]
    with model_parallel_groups(config.parallel, config.train.seed):
        engine = MegatronEngine(config, torch.device("cpu"))
        batch = micro_batches(config, 0, 0, parallel_state.get_data_parallel_world_size())
        engine.train_step(batch)
        config.checkpoint.asynchronous = False
        CheckpointSaver(engine, config, waiting, print).start(Progress(step=1))
        config.checkpoint.asynchronous = True
        saver = CheckpointSaver(engine, config, beside, print)

        def accepts(_lm_loss: float, _grad_norm: float) -> bool:
            saver.before_update()
            return True

        saver.start(Progress(step=1))
        engine.train_step(batch, accepts)
        saver.finish()


def test_an_update_waits_until_everything_is_copied(worker_pool: WorkerPool, tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("waiting", "beside")]
    for folder in folders:
        folder.mkdir()

    worker_pool.run(1, slow_copy_job, tiny_config(), *folders)

    first, second = (folder / "checkpoints" / "step_00000001" for folder in folders)
    assert list(find_differences(first, second)) == []


def first_saves_job(config: Config, one_saver: Path, a_saver_each: Path) -> None:
    """Save before the first update and after each of two, by one saver, and by a new one each time."""
    import torch
    from megatron.core import parallel_state

    from dsmoe_megatron.run_folder import Progress
    from dsmoe_megatron.runtime.distributed import model_parallel_groups
    from dsmoe_megatron.training.engines.megatron import MegatronEngine
    from dsmoe_megatron.training.saving import CheckpointSaver

    config.checkpoint.asynchronous, config.checkpoint.keep_last = False, 0
    with model_parallel_groups(config.parallel, config.train.seed):
        engine = MegatronEngine(config, torch.device("cpu"))
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        saver = CheckpointSaver(engine, config, one_saver, print)
        for step in range(3):
            if step:
                engine.train_step(micro_batches(config, step, rank, ranks))
            for each in (saver, CheckpointSaver(engine, config, a_saver_each, print)):
                each.start(Progress(step=step))
                each.finish()


def test_a_plan_that_serves_many_saves_is_made_anew_when_the_state_grows(
    worker_pool: WorkerPool, tmp_path: Path
) -> None:
    folders = [tmp_path / name for name in ("one_saver", "a_saver_each")]
    for folder in folders:
        folder.mkdir()

    worker_pool.run(2, first_saves_job, tiny_config(), *folders)

    for step in range(3):
        first, second = (folder / "checkpoints" / f"step_{step:08d}" for folder in folders)
        assert list(find_differences(first, second)) == []
    names = [
        set(DistributedCheckpoint(folders[0] / "checkpoints" / f"step_{step:08d}").tensor_shapes) for step in (0, 1)
    ]
    assert names[0] < names[1]  # the moments


def test_what_a_save_costs_is_told(run_dir: Path) -> None:
    lines = {line["step"]: line for line in read_lines(run_dir) if "save_s" in line}

    assert list(lines) == [1, 2, 3, 4, 5, 6]
    for step, line in lines.items():
        assert line["save_s"] > 0
        assert line["save_stall_s"] > 0
        files = (run_dir / "checkpoints" / f"step_{step:08d}").iterdir()
        assert line["save_bytes"] == sum(path.stat().st_size for path in files if path.name != "manifest.json")


def test_a_manifest_vouches_for_every_file(run_dir: Path) -> None:
    folder = run_dir / "checkpoints" / "step_00000006"
    manifest = read_manifest(folder)

    assert manifest is not None
    assert manifest.processes == 2
    assert set(manifest.files) == {path.name for path in folder.iterdir()} - {"manifest.json"}
    assert {"__0_0.distcp", "__1_0.distcp", ".metadata", "common.pt", "progress.json"} <= set(manifest.files)


GATED = {"hidden_act": "silu", "gated_mlp": True, "tie_word_embeddings": True}
SPARSE = {"attention_type": "gqa", "expert_training": "sparse", "num_experts_per_tok": 2}


@pytest.fixture(scope="module")
def saved_under_ep2(worker_pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Step folder of a model that was trained for a step under EP2 x DP2."""

    @functools.cache
    def save(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        model = {"gated": GATED, "sparse": SPARSE}[name]
        worker_pool.run(4, checkpoint_job, tiny_config(model, {"expert": 2}, run_dir=str(folder)), 1)
        return folder / "checkpoints" / "step_00000007"

    return save


@pytest.mark.parametrize(
    ("model", "world_size", "parallel"),
    [
        ("gated", 1, {}),
        ("gated", 4, {}),
        ("gated", 4, {"context": 2}),
        ("gated", 2, {"pipeline": 2, "virtual_pipeline": 2}),
        ("gated", 4, {"tensor": 4, "sequence": True}),
        ("sparse", 1, {}),
    ],
    ids=["1", "DP4", "CP2 x DP2", "PP2 with 2 chunks", "TP4+SP", "sparse-trained, 1"],
)
def test_every_layout_loads_and_saves_the_same_bits(
    worker_pool: WorkerPool,
    saved_under_ep2: Callable[..., Path],
    tmp_path: Path,
    model: str,
    world_size: int,
    parallel: dict[str, Any],
) -> None:
    """Weights, master copies and moments, all of them."""
    source = saved_under_ep2(model)
    config = tiny_config({"gated": GATED, "sparse": SPARSE}[model], parallel, run_dir=str(tmp_path))

    worker_pool.run(world_size, checkpoint_job, config, 0, source)

    copy = tmp_path / "checkpoints" / "step_00000007"
    assert list(find_differences(source, copy)) == []
    shares = [len(list(folder.glob("*.distcp"))) for folder in (source, copy)]
    assert shares == [4 * 2, world_size * 2]  # every rank has written


def choose_job(path: Path, strict: bool = False, is_own: bool = True) -> tuple[str | None, bool, list[str]] | str:
    from dsmoe_megatron.training.resuming import choose_checkpoint

    try:
        choice = choose_checkpoint(path, strict, is_own)
    except CheckpointError as error:
        return str(error)
    return (choice.folder.name, choice.is_checked, choice.faults) if choice else (None, False, [])


def flip_a_bit(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


DAMAGES: dict[str, tuple[str, Callable[[Path], Any], str]] = {
    "truncated shard": ("__1_0.distcp", truncate, "__1_0.distcp: truncated: "),
    "bit of a shard": ("__0_1.distcp", flip_a_bit, "__0_1.distcp: damaged: its checksum is not the manifest's"),
    "missing shard": ("__1_1.distcp", Path.unlink, "__1_1.distcp: missing"),
    "bit of the contents": (".metadata", flip_a_bit, ".metadata: damaged"),
    "missing progress": ("progress.json", Path.unlink, "progress.json: missing"),
    "bit of the manifest": ("manifest.json", flip_a_bit, "manifest.json: damaged"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_found_and_named_and_the_checkpoint_before_is_taken(
    worker_pool: WorkerPool, run_dir: Path, tmp_path: Path, damage: str
) -> None:
    name, damages, expected = DAMAGES[damage]
    copy_until(run_dir, 6, tmp_path, first=5)
    newest = tmp_path / "checkpoints" / "step_00000006"
    damages(newest / name)

    refused = worker_pool.run(2, choose_job, tmp_path, True)
    explicit = worker_pool.run(2, choose_job, newest)
    taken = worker_pool.run(2, choose_job, tmp_path)

    for answers in (refused, explicit):
        assert answers[0] == answers[1]
        assert isinstance(answers[0], str)
        assert expected in answers[0]
    assert "set checkpoint.strict to false" in refused[0]
    assert taken[0] == taken[1]
    folder, is_checked, faults = taken[0]
    assert (folder, is_checked) == ("step_00000005", True)
    assert len(faults) == 1
    assert expected in faults[0]
    # the tools, and the next start, find the whole one
    assert find_checkpoint(tmp_path) == tmp_path / "checkpoints" / "step_00000005"
    assert (tmp_path / "checkpoints" / "step_00000006.damaged").is_dir()


@pytest.mark.parametrize("name", ["__1_0.distcp", "manifest.json"])
def test_a_file_that_cannot_be_read_just_now_is_not_taken_for_damage(
    worker_pool: WorkerPool, small_data: SmallData, run_dir: Path, tmp_path: Path, name: str
) -> None:
    copy_until(run_dir, 6, tmp_path, first=5)
    path = tmp_path / "checkpoints" / "step_00000006" / name
    path.unlink()
    path.symlink_to(path)  # to be read it would have to be resolved without end

    answers = worker_pool.run(2, refused_job, run_config(small_data, tmp_path, model=DROPOUT))

    for answer in answers:  # of the kind that a batch job is requeued for
        assert answer.startswith(f"PassingError: {path}: cannot be read: Too many levels of symbolic links")
    assert path.parent.is_dir()
    assert (tmp_path / "latest").read_text() == "step_00000006\n"


def test_another_run_is_left_as_it_is(worker_pool: WorkerPool, run_dir: Path, tmp_path: Path) -> None:
    copy_until(run_dir, 6, tmp_path, first=5)
    truncate(tmp_path / "checkpoints" / "step_00000006" / "common.pt")

    assert worker_pool.run(1, choose_job, tmp_path, False, False)[0][0] == "step_00000005"
    assert (tmp_path / "latest").read_text() == "step_00000006\n"
    assert (tmp_path / "checkpoints" / "step_00000006").is_dir()


def test_where_nothing_is_whole_every_fault_is_named(worker_pool: WorkerPool, run_dir: Path, tmp_path: Path) -> None:
    copy_until(run_dir, 6, tmp_path, first=5)
    for step in (5, 6):
        truncate(tmp_path / "checkpoints" / f"step_{step:08d}" / "common.pt")

    [text] = worker_pool.run(1, choose_job, tmp_path)

    assert "step_00000005/common.pt: truncated" in text
    assert "step_00000006/common.pt: truncated" in text
    assert "no whole checkpoint" in text


def test_which_checkpoints_are_tried_in_which_order(worker_pool: WorkerPool, run_dir: Path, tmp_path: Path) -> None:
    """The one that `latest` names comes first; without it, or with nonsense in it, the newest."""
    copy_until(run_dir, 6, tmp_path, first=4)
    answers = []
    for text in ("step_00000005\n", None, "\x00?"):
        (tmp_path / "latest").unlink()
        if text is not None:
            (tmp_path / "latest").write_text(text)
        answers.append(worker_pool.run(1, choose_job, tmp_path)[0][0])
        (tmp_path / "latest").touch()
    (tmp_path / "latest").write_text("step_00000009\n")

    folder, _, faults = worker_pool.run(1, choose_job, tmp_path)[0]

    assert answers == ["step_00000005", "step_00000006", "step_00000006"]
    assert folder == "step_00000006"
    assert "step_00000009: missing" in faults[0]


@pytest.mark.parametrize("damages", [None, truncate, Path.unlink], ids=["whole", "truncated", "missing"])
def test_checkpoints_without_a_manifest_load_unless_a_file_is_cut_short(
    worker_pool: WorkerPool, run_dir: Path, tmp_path: Path, damages: Callable[[Path], Any] | None
) -> None:
    copy_until(run_dir, 6, tmp_path, first=6)
    folder = tmp_path / "checkpoints" / "step_00000006"
    (folder / "manifest.json").unlink()
    if damages is not None:
        damages(folder / "__1_1.distcp")

    answer = worker_pool.run(1, choose_job, tmp_path)[0]

    if damages is None:
        assert answer == ("step_00000006", False, [])
    else:
        assert "__1_1.distcp: " in answer


def test_a_run_says_that_it_passed_a_damaged_checkpoint_over(
    worker_pool: WorkerPool, small_data: SmallData, run_dir: Path, tmp_path: Path
) -> None:
    copy_until(run_dir, 6, tmp_path, first=5)
    flip_a_bit(tmp_path / "checkpoints" / "step_00000006" / "__0_0.distcp")
    (tmp_path / "checkpoints" / "step_00000007.unfinished").mkdir()

    printed = worker_pool.run(2, pretrain_job, run_config(small_data, tmp_path, model=DROPOUT))[0]

    assert f"resumed from {tmp_path / 'checkpoints' / 'step_00000005'}\n" in printed
    [event] = [line for line in read_lines(tmp_path) if "damaged_checkpoints" in line]
    assert event["step"] == 5
    assert "__0_0.distcp: damaged" in event["damaged_checkpoints"][0]
    assert training_lines(tmp_path)[6] == training_lines(run_dir)[6]
    assert not (tmp_path / "checkpoints" / "step_00000007.unfinished").exists()


def failing_job(config: Config, rank: int | None) -> tuple[str, list[dict[str, Any]]]:
    """Train where one rank (None: all) cannot write files of more than 300 kB, as if its disk were full."""
    import torch.distributed as dist

    if rank in (None, dist.get_rank()):
        resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))
    return refused_job(config), read_lines(Path(config.train.run_dir))


def test_training_goes_on_without_a_checkpoint_that_cannot_be_written_and_ends_with_an_error(
    worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path
) -> None:
    answers = worker_pool.run(2, failing_job, run_config(small_data, tmp_path), 1)

    assert answers[0][0].split(": ", 1)[1] == answers[1][0].split(": ", 1)[1]
    text, lines = answers[0]
    assert text.startswith(f"TrainingError: cannot save {tmp_path}/checkpoints/step_00000006: File too large (rank 1)")
    assert "the newest whole checkpoint is none" in text
    assert [line["step"] for line in lines if "lm_loss" in line] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "File too large" in line.get("save_failure", "")] == [3, 6]
    assert list((tmp_path / "checkpoints").iterdir()) == []
    assert not (tmp_path / "latest").exists()


def test_a_folder_that_cannot_be_made_is_an_error_at_the_end(
    worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path
) -> None:
    (tmp_path / "checkpoints").write_text("not a folder")

    [text] = worker_pool.run(1, refused_job, run_config(small_data, tmp_path, train={"steps": 2}))

    assert "cannot save" in text
    assert "Not a directory" in text


def make_steps(run_dir: Path, *steps: int) -> None:
    for step in steps:
        (run_dir / "checkpoints" / f"step_{step:08d}").mkdir(parents=True)


def names(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "kept"),
    [(2, 0, [500, 600]), (2, 300, [300, 500, 600]), (0, 0, [100, 200, 300, 400, 500, 600]), (1, 200, [200, 400, 600])],
)
def test_which_checkpoints_stay(tmp_path: Path, keep_last: int, keep_every: int, kept: list[int]) -> None:
    make_steps(tmp_path, 100, 200, 300, 400, 500, 600, 900)
    (tmp_path / "checkpoints" / "step_00000100.damaged").mkdir()

    forget_old(tmp_path, 600, keep_last, keep_every)

    # 900 is of before the run went back, which is not for the saving to judge
    steps = [f"step_{step:08d}" for step in (*kept, 900)]
    assert names(tmp_path) == sorted([*steps, "step_00000100.damaged"])


def test_an_old_checkpoint_that_stays_is_said_and_removed_by_the_next_start(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_steps(tmp_path, 100, 200, 300)
    remove = shutil.rmtree

    def as_on_nfs(folder: Path) -> None:
        """While somebody reads a checkpoint there; a file server cannot be made here: its answer is."""
        if "step_00000200" in folder.name:
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(folder))
        remove(folder)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "rmtree", as_on_nfs)
        forget_old(tmp_path, 300, keep_last=1, keep_every=0)

    assert names(tmp_path) == ["step_00000200.unfinished", "step_00000300"]
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"WARNING: {tmp_path}/checkpoints/step_00000200: an old checkpoint cannot be removed (Dir")

    clean_up(tmp_path)

    assert names(tmp_path) == ["step_00000300"]


def test_remains_of_a_killed_run_are_removed_and_a_checkpoint_that_stood_aside_comes_back(tmp_path: Path) -> None:
    make_steps(tmp_path, 1, 2)
    for name in ("step_00000003.unfinished", "step_00000002.replaced", "step_00000004.replaced"):
        (tmp_path / "checkpoints" / name).mkdir()
    (tmp_path / "checkpoints" / "step_00000004.replaced" / "progress.json").write_text(json.dumps({"step": 4}))

    clean_up(tmp_path)

    assert names(tmp_path) == ["step_00000001", "step_00000002", "step_00000004"]
