"""TensorBoard and Weights & Biases: what arrives there, once, and that a run never ends for their sake."""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsmoe_megatron.config import Config, LoggingConfig, WandbConfig
from dsmoe_megatron.training.trackers import Trackers, one_line
from tests.pretrain_job import SmallData, pretrain_job, read_lines, run_config, training_lines
from tests.worker_pool import WorkerPool

OFFLINE = {"wandb": WandbConfig(project="tests", offline=True)}
KEY = "0123456789abcdef" * 3


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    at, record = 7, b""
    while at + 7 <= len(content):
        left = 32768 - at % 32768
        if left < 7:  # a block ends with padding where no header fits
            at += left
            continue
        length, kind = int.from_bytes(content[at + 4 : at + 6], "little"), content[at + 6]
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last piece
            yield record
            record = b""


def wandb_history(run_dir: Path) -> dict[str, list[dict[str, Any]]]:
    """Run id -> points, in the order in which they were written, of W&B's own offline files."""
    from wandb.proto import wandb_internal_pb2

    runs: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb")):
        points = runs.setdefault(path.stem.removeprefix("run-"), [])
        for data in wandb_records(path.read_bytes()):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(data)
            if record.HasField("history"):
                items = record.history.item
                points.append({item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items})
    return runs


def tensorboard_steps(run_dir: Path, curve: str) -> list[int]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars(curve)]


def test_a_resumed_run_goes_on_in_its_curves(worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path) -> None:
    """As after a crash at step 6 whose newest checkpoint is that of step 3: steps 4 to 6 are taken twice."""
    config = run_config(small_data, tmp_path, logging=OFFLINE)
    worker_pool.run(1, pretrain_job, config)
    (run_id,) = wandb_history(tmp_path)
    shutil.rmtree(tmp_path / "checkpoints" / "step_00000006")
    (tmp_path / "latest").write_text("step_00000003\n")
    config.train.steps, config.optimizer.decay_steps = 8, 6

    worker_pool.run(1, pretrain_job, config)

    history = wandb_history(tmp_path)
    assert list(history) == [run_id]
    losses = {point["_step"]: point["train/lm_loss"] for point in history[run_id] if "train/lm_loss" in point}
    assert [point["_step"] for point in history[run_id]] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert losses == {step: line["lm_loss"] for step, line in training_lines(tmp_path).items()}
    assert "validation/loss" in history[run_id][7]
    assert tensorboard_steps(tmp_path, "train/lm_loss") == [1, 2, 3, 4, 5, 6, 7, 8]
    assert [line["step"] for line in read_lines(tmp_path) if "lm_loss" in line] == [1, 2, 3, 4, 5, 6, 7, 8]


def without_trackers_job(config: Config) -> str:
    """Train where W&B is not installed and TensorBoard has no place to write to."""
    import sys

    sys.modules["wandb"] = None  # type: ignore[assignment]
    Path(config.train.run_dir).mkdir()
    Path(config.train.run_dir, "tensorboard").write_text("a file, not a folder")
    return pretrain_job(config)


def test_a_run_goes_on_without_trackers(worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path) -> None:
    config = run_config(small_data, tmp_path / "run", logging=OFFLINE, train={"steps": 2})

    printed = worker_pool.run(1, without_trackers_job, config)[0]

    warnings = [line for line in printed.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert "TensorBoard is off, the run goes on without it: FileExistsError" in warnings[0]
    assert "Weights & Biases is off, the run goes on without it: ModuleNotFoundError" in warnings[1]
    assert list(training_lines(tmp_path / "run")) == [1, 2]


@pytest.fixture
def wandb_at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """W&B with nobody logged in, and no server where it looks for one."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("WANDB_INIT_TIMEOUT", "1")
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    yield tmp_path
    import wandb

    wandb.teardown()


def trackers(run_dir: Path, offline: bool, said: list[str]) -> Trackers:
    wandb = WandbConfig(project="tests", offline=offline)
    return Trackers(run_dir, Config(logging=LoggingConfig(tensorboard=False, wandb=wandb)), 0, 0, said.append)


def test_a_tracker_that_fails_later_is_switched_off(wandb_at_home: Path) -> None:
    import wandb

    said: list[str] = []
    running = trackers(wandb_at_home, True, said)
    running.points(1, {"loss": 3.0})
    assert said == []

    assert wandb.run is not None
    wandb.run.finish()  # behind its back
    for step in (2, 3):
        running.points(step, {"loss": 2.0})
    running.close()

    assert len(said) == 1
    assert said[0].startswith("warning: Weights & Biases is off, the run goes on without it: UsageError")


def test_a_save_that_is_reported_late_is_a_point_of_the_newest_step(wandb_at_home: Path) -> None:
    import wandb

    running = trackers(wandb_at_home, True, [])

    for step, values in ((3, {"loss": 3.0}), (4, {"loss": 2.0}), (3, {"save_s": 0.5}), (5, {"loss": 1.0})):
        running.points(step, values)
    running.close()
    wandb.teardown()  # writes what waits

    (points,) = wandb_history(wandb_at_home).values()
    assert [(point["_step"], point.get("loss"), point.get("save_s")) for point in points] == [
        (3, 3.0, None),
        (4, 2.0, 0.5),
        (5, 1.0, None),
    ]


@pytest.mark.parametrize("key", [None, KEY], ids=["no key", "no server"])
def test_a_key_is_never_told(
    wandb_at_home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], key: str | None
) -> None:
    if key is not None:
        monkeypatch.setenv("WANDB_API_KEY", key)
    said: list[str] = []

    trackers(wandb_at_home, False, said).close()

    assert len(said) == 1
    assert "\n" not in said[0]
    files = [path.read_bytes() for path in wandb_at_home.rglob("*") if path.is_file()]
    told = [*said, *capfd.readouterr(), *(content.decode(errors="replace") for content in files)]
    assert not any(KEY in text for text in told)


def test_a_key_in_an_error_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_API_KEY", KEY)

    assert one_line(ValueError(f"bad key\n{KEY}")) == "ValueError: bad key ***"
