"""The training run: what it writes, that it resumes exactly, and what it refuses."""

import json
import math
import pickle
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from dsmoe_megatron.checkpoint_metadata import read_metadata
from dsmoe_megatron.config import Config, DatasetSource
from dsmoe_megatron.config_parsing import load_config
from tests.pretrain_job import SmallData, pretrain_job, read_lines, refused_job, run_config, training_lines
from tests.worker_pool import WorkerPool

LINE_KEYS = {
    *("step", "tokens", "lm_loss", "mi_loss_attention", "mi_loss_mlp", "grad_norm", "learning_rate"),
    *("step_time_s", "tokens_per_s"),
}


@pytest.fixture(scope="module")
def whole_run(worker_pool: WorkerPool, small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six steps on one process, with dropout, checkpoints after three and six."""
    run_dir = tmp_path_factory.mktemp("run") / "whole"
    worker_pool.run(1, pretrain_job, run_config(small_data, run_dir))
    return run_dir


def test_writes_metrics_recipe_and_checkpoints(whole_run: Path) -> None:
    lines = training_lines(whole_run)
    validation = [line for line in read_lines(whole_run) if "validation_loss" in line]

    assert list(lines) == [1, 2, 3, 4, 5, 6]
    assert all(set(line) >= LINE_KEYS for line in read_lines(whole_run) if "lm_loss" in line)
    assert lines[6]["tokens"] == 6 * 8 * 32
    assert lines[6]["lm_loss"] < lines[1]["lm_loss"] - 0.2
    assert [line["step"] for line in validation] == [6]
    policies = validation[0]["policies"]
    assert set(policies) == {"dense", "topk 2", "threshold 1.0"}
    assert policies["dense"] == {"perplexity": math.exp(validation[0]["validation_loss"]), "active_share": 1.0}
    assert 0 < policies["threshold 1.0"]["active_share"] < 1
    assert load_config(whole_run / "config.yaml").model.vocab_size == 500
    assert (whole_run / "latest").read_text().strip() == "step_00000006"
    assert sorted(path.name for path in (whole_run / "checkpoints").iterdir()) == ["step_00000003", "step_00000006"]
    assert list((whole_run / "tensorboard").iterdir())


def test_expert_use_adds_up(whole_run: Path) -> None:
    routers = read_lines(whole_run, "expert_use.jsonl")[-1]["routers"]

    assert [(router["layer"], router["kind"]) for router in routers] == [
        (layer, kind) for layer in range(4) for kind in ("attention", "mlp")
    ]
    for router in routers:
        assert sum(router["share"]) == pytest.approx(1.0, abs=1e-5)
        # I(expert; token) is what the mutual-information loss rewards: it cannot be negative
        assert 0 <= router["conditional_entropy"] <= router["marginal_entropy"] + 1e-6
        assert router["marginal_entropy"] <= math.log(len(router["share"])) + 1e-6
        assert 1 <= router["active_experts"] <= len(router["share"])


@pytest.mark.parametrize(
    ("world_size", "parallel", "exact"),
    [
        (1, {}, True),
        (2, {}, False),
        (4, {"tensor": 2, "sequence": True, "expert": 2}, False),
        (2, {"pipeline": 2}, False),
    ],
    ids=["same layout", "DP2", "TP2+SP+EP2", "PP2"],
)
def test_resumes_as_if_uninterrupted(
    worker_pool: WorkerPool,
    small_data: SmallData,
    whole_run: Path,
    tmp_path: Path,
    world_size: int,
    parallel: dict[str, Any],
    exact: bool,
) -> None:
    load = str(whole_run / "checkpoints" / "step_00000003")
    config = run_config(small_data, tmp_path, parallel=parallel, checkpoint={"load": load})

    printed = worker_pool.run(world_size, pretrain_job, config)[0]

    assert "resumed from" in printed
    expected = {step: line for step, line in training_lines(whole_run).items() if step > 3}
    actual = training_lines(tmp_path)
    if exact:
        assert actual == expected
    else:
        assert list(actual) == list(expected)
        for step, line in expected.items():
            assert actual[step] == pytest.approx(line, rel=1e-5)


def test_a_checkpoint_of_a_layout_loads_on_one_process(
    worker_pool: WorkerPool, small_data: SmallData, whole_run: Path, tmp_path: Path
) -> None:
    parallel = {"tensor": 2, "pipeline": 2}
    worker_pool.run(4, pretrain_job, run_config(small_data, tmp_path / "four", parallel=parallel))
    load = str(tmp_path / "four" / "checkpoints" / "step_00000003")

    worker_pool.run(1, pretrain_job, run_config(small_data, tmp_path / "one", checkpoint={"load": load}))

    for step, line in training_lines(tmp_path / "one").items():
        assert line == pytest.approx(training_lines(whole_run)[step], rel=1e-5)


def test_resume_with_dropout_repeats_the_same_masks(
    worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path
) -> None:
    dropout = {"hidden_dropout": 0.2, "attention_dropout": 0.1}
    worker_pool.run(2, pretrain_job, run_config(small_data, tmp_path / "whole", model=dropout))
    load = {"load": str(tmp_path / "whole" / "checkpoints" / "step_00000003")}

    worker_pool.run(2, pretrain_job, run_config(small_data, tmp_path / "rest", model=dropout, checkpoint=load))

    whole = training_lines(tmp_path / "whole")
    assert training_lines(tmp_path / "rest") == {step: whole[step] for step in (4, 5, 6)}


def crashed_copy(whole_run: Path, tmp_path: Path) -> Path:
    """As after a crash at step 6: the newest whole checkpoint is that of step 3, the metrics are further."""
    run_dir = tmp_path / "crashed"
    shutil.copytree(whole_run, run_dir)
    shutil.rmtree(run_dir / "checkpoints" / "step_00000006")
    (run_dir / "latest").write_text("step_00000003\n")
    return run_dir


def test_run_dir_continues_and_takes_later_lines_back(
    worker_pool: WorkerPool, small_data: SmallData, whole_run: Path, tmp_path: Path
) -> None:
    run_dir = crashed_copy(whole_run, tmp_path)
    (run_dir / "checkpoints" / "step_00000006.unfinished").mkdir()
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "lm_lo')

    worker_pool.run(1, pretrain_job, run_config(small_data, run_dir))

    assert training_lines(run_dir) == training_lines(whole_run)
    assert len(read_lines(run_dir)) == len(read_lines(whole_run))


def test_damaged_lines_of_metrics_stop_no_resume(
    worker_pool: WorkerPool, small_data: SmallData, whole_run: Path, tmp_path: Path
) -> None:
    """As a file system leaves them after a crash: other bytes in the place of a line."""
    run_dir = crashed_copy(whole_run, tmp_path)
    first, *rest = (run_dir / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_bytes(b"".join([first, b"\xff\xfe\n", b"1\n", b'["step"]\n', *rest]))

    worker_pool.run(1, pretrain_job, run_config(small_data, run_dir))

    assert training_lines(run_dir) == training_lines(whole_run)
    assert len(read_lines(run_dir)) == len(read_lines(whole_run))


def test_a_run_can_be_made_longer(
    worker_pool: WorkerPool, small_data: SmallData, whole_run: Path, tmp_path: Path
) -> None:
    """The schedule is fixed by decay_steps, and no dataset is repeated, so the samples come in the same order."""
    worker_pool.run(1, pretrain_job, run_config(small_data, tmp_path, train={"steps": 3}, optimizer={"decay_steps": 6}))

    worker_pool.run(1, pretrain_job, run_config(small_data, tmp_path))

    assert training_lines(tmp_path) == training_lines(whole_run)


def test_refuses_to_lengthen_a_run_that_repeats_its_data(
    worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path
) -> None:
    """Two steps of 1024 samples of 32 tokens need more than the 65,000 tokens that there are."""
    data = {"train": [DatasetSource(small_data.validation)]}
    sizes = {"global_batch_size": 1024, "micro_batch_size": 256}
    evaluation = {"batches": 1}
    short = run_config(small_data, tmp_path, data=data, train={"steps": 2, **sizes}, evaluation=evaluation)
    worker_pool.run(1, pretrain_job, short)

    longer = run_config(small_data, tmp_path, data=data, train={"steps": 3, **sizes}, evaluation=evaluation)
    assert "a dataset is repeated, train.steps differ" in refusal(worker_pool, longer)


def test_a_finished_run_does_nothing(worker_pool: WorkerPool, small_data: SmallData, whole_run: Path) -> None:
    before = (whole_run / "metrics.jsonl").read_text()

    printed = worker_pool.run(1, pretrain_job, run_config(small_data, whole_run))[0]

    assert "nothing to do" in printed
    assert (whole_run / "metrics.jsonl").read_text() == before


def test_keeps_the_newest_checkpoints(worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path) -> None:
    config = run_config(small_data, tmp_path, train={"steps": 3}, checkpoint={"interval": 1, "keep_last": 2})

    worker_pool.run(1, pretrain_job, config)

    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000002", "step_00000003"]


def test_a_diverged_run_still_validates_and_saves(
    worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path
) -> None:
    """With such weights the loss is some thousands of nats."""
    config = run_config(small_data, tmp_path, model={"initializer_range": 100.0}, train={"steps": 1})

    (printed,) = worker_pool.run(1, pretrain_job, config)

    (validation,) = (line for line in read_lines(tmp_path) if "validation_loss" in line)
    assert validation["validation_loss"] > 709
    assert {figures["perplexity"] for figures in validation["policies"].values()} == {None}
    assert "dense: perplexity not finite at 100% active" in printed
    assert (tmp_path / "latest").read_text().strip() == "step_00000001"


def test_figures_that_are_no_numbers_are_null_in_every_file(
    worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path
) -> None:
    """A step so long that weights overflow: afterwards losses, scores and entropies are NaN."""
    optimizer = {"lr": 1e20, "clip_grad": 0.0, "warmup_steps": 0}
    worker_pool.run(1, pretrain_job, run_config(small_data, tmp_path, optimizer=optimizer, train={"steps": 3}))

    texts = [path.read_text() for path in tmp_path.glob("*.jsonl")]
    texts += [path.read_text() for path in tmp_path.glob("checkpoints/*/progress.json")]
    assert len(texts) >= 3
    for text in texts:
        assert not {"NaN", "Infinity"} & set(re.findall(r"\w+", text))
    assert any(line["mi_loss_mlp"] is None for line in training_lines(tmp_path).values())


def test_baselines_train_and_validate(worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path) -> None:
    gqa = {"attention_type": "gqa"}
    models: dict[str, dict[str, Any]] = {
        "dense": {**gqa, "num_experts": 1, "moe_intermediate_size": 96, "num_experts_per_tok": 1},
        "sparse": {**gqa, "num_experts": 6, "expert_training": "sparse", "num_experts_per_tok": 2},
    }
    policies = {}
    for name, model in models.items():
        config = run_config(small_data, tmp_path / name, model=model, evaluation={"policies": []})
        worker_pool.run(2, pretrain_job, config)
        lines = training_lines(tmp_path / name)
        assert lines[6]["lm_loss"] < lines[1]["lm_loss"] - 0.2
        [policies[name]] = [line["policies"] for line in read_lines(tmp_path / name) if "policies" in line]

    assert policies["dense"]["dense"]["active_share"] == 1.0
    assert 0.3 < policies["sparse"]["topk 2"]["active_share"] < 1.0


def test_bf16_follows_float32(worker_pool: WorkerPool, small_data: SmallData, whole_run: Path, tmp_path: Path) -> None:
    config = run_config(small_data, tmp_path, train={"precision": "bf16"})

    worker_pool.run(2, pretrain_job, config)

    for step, line in training_lines(tmp_path).items():
        assert line["lm_loss"] == pytest.approx(training_lines(whole_run)[step]["lm_loss"], rel=0.01)


def refusal(worker_pool: WorkerPool, config: Config, world_size: int = 1) -> str:
    """The error that ends the run, on every rank, as `Name: message`."""
    texts = worker_pool.run(world_size, refused_job, config)
    messages = {text.split(": ", 1)[1] for text in texts}
    assert len(messages) == 1, "ranks say different things"
    assert "\n" not in texts[0]
    return str(texts[0])


def test_refuses_a_checkpoint_of_another_architecture(
    worker_pool: WorkerPool, small_data: SmallData, whole_run: Path, tmp_path: Path
) -> None:
    load = {"load": str(whole_run)}
    text = refusal(worker_pool, run_config(small_data, tmp_path, model={"num_experts": 12}, checkpoint=load), 2)

    assert "model.num_experts is 6 there and 12 here" in text
    assert not (tmp_path / "metrics.jsonl").exists()


def test_refuses_other_data_on_resume(
    worker_pool: WorkerPool, small_data: SmallData, whole_run: Path, tmp_path: Path
) -> None:
    load = {"load": str(whole_run / "checkpoints" / "step_00000003")}
    text = refusal(worker_pool, run_config(small_data, tmp_path, train={"seed": 7}, checkpoint=load))

    assert "was trained on other data" in text


class Touch:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("damage", ["missing shard", "truncated shard", "no progress", "hostile table"])
def test_refuses_a_damaged_checkpoint(
    worker_pool: WorkerPool, small_data: SmallData, whole_run: Path, tmp_path: Path, damage: str
) -> None:
    step = tmp_path / "checkpoints" / "step_00000003"
    shutil.copytree(whole_run / "checkpoints" / "step_00000003", step)
    (tmp_path / "latest").write_text("step_00000003\n")
    shard = sorted(step.glob("*.distcp"))[0]
    if damage == "missing shard":
        shard.unlink()
    elif damage == "truncated shard":
        shard.write_bytes(shard.read_bytes()[:1000])
    elif damage == "no progress":
        (step / "progress.json").unlink()
    else:
        (step / ".metadata").write_bytes(pickle.dumps(Touch(tmp_path / "run_by_the_pickle")))

    assert "CheckpointError: " in refusal(worker_pool, run_config(small_data, tmp_path))
    assert not (tmp_path / "run_by_the_pickle").exists()


def copied(small_data: SmallData, folder: Path) -> SmallData:
    """A copy of the training set that may be damaged."""
    for ending in ("bin", "idx", "manifest.json"):
        shutil.copy(f"{small_data.train}.{ending}", folder / f"train.{ending}")
    return SmallData(small_data.tokenizer, str(folder / "train"), small_data.validation)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("train.bin", "no such file"),
        ("train.idx", "no such file"),
        ("train.manifest.json", "the tokenizer is unknown"),
    ],
)
def test_refuses_missing_files(
    worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path, name: str, rule: str
) -> None:
    data = copied(small_data, tmp_path)
    (tmp_path / name).unlink()

    text = refusal(worker_pool, run_config(data, tmp_path / "run"), world_size=2)

    assert name in text
    assert rule in text


@pytest.mark.parametrize("name", ["train.bin", "train.idx"])
@pytest.mark.parametrize("size", [0, 20, -2])
def test_refuses_truncated_files(
    worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path, name: str, size: int
) -> None:
    data = copied(small_data, tmp_path)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[:size])

    text = refusal(worker_pool, run_config(data, tmp_path / "run"))

    assert f"DataError: {tmp_path / name}" in text


def test_refuses_an_empty_dataset(worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path) -> None:
    data = copied(small_data, tmp_path)
    header = (tmp_path / "train.idx").read_bytes()[:18]
    (tmp_path / "train.idx").write_bytes(header + struct.pack("<QQ", 0, 1) + bytes(8))

    assert "train.idx: the dataset is empty" in refusal(worker_pool, run_config(data, tmp_path / "run"))


def test_refuses_another_tokenizer(worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path) -> None:
    data = copied(small_data, tmp_path)
    manifest = json.loads((tmp_path / "train.manifest.json").read_text())
    manifest["tokenizer"]["fingerprint"] = "0" * 64
    (tmp_path / "train.manifest.json").write_text(json.dumps(manifest))

    text = refusal(worker_pool, run_config(data, tmp_path / "run"))

    assert "the data was made with tokenizer" in text


def test_refuses_a_vocabulary_that_is_not_the_tokenizers(
    worker_pool: WorkerPool, small_data: SmallData, tmp_path: Path
) -> None:
    text = refusal(worker_pool, run_config(small_data, tmp_path, model={"vocab_size": 512}))

    assert "model.vocab_size = 512: the tokenizer" in text
    assert "has 500 tokens" in text


def test_a_checkpoint_holds_no_objects_to_unpickle(whole_run: Path) -> None:
    """Tensors are read with weights_only; torch reads other entries of a distributed checkpoint without it."""
    table = read_metadata(whole_run / "checkpoints" / "step_00000006").state_dict_metadata

    assert [name for name, entry in table.items() if not isinstance(entry, TensorStorageMetadata)] == []
