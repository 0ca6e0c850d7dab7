"""The main job on real input through its commands: torchrun, checkpoint, export, a fresh process, the same numbers."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dsmoe_megatron.config_parsing import save_config
from tests.pretrain_job import SmallData, read_lines, run_config
from tests.training_jobs import SEQUENCE_LENGTH
from tests.worker_pool import WorkerPool

ROOT = Path(__file__).resolve().parents[2]
# the export must not lean on this package: a fresh process in which it cannot be imported
FRESH_PROCESS = """
import json, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("dsmoe_megatron", "megatron"):
            raise ImportError(name)
sys.meta_path.insert(0, Absent())
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
folder, batches = sys.argv[1], torch.load(sys.argv[2])
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=torch.float32).eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
answer = {"losses": {}, "texts": {}}
policies = {"dense": {}, "topk": {"num_experts_per_tok": 2}, "threshold": {"expert_threshold": 1.0}}
for policy, limits in policies.items():
    model.set_policy(policy, **limits)
    with torch.no_grad():
        logits = model(batches["tokens"]).logits
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1).double(), batches["labels"].flatten())
        ids = model.generate(**tokenizer("def main(", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    answer["losses"][policy] = float(losses)
    answer["texts"][policy] = tokenizer.decode(ids[0])
    if policy == "dense":
        torch.save(logits, sys.argv[3])
print(json.dumps(answer))
"""


def run(*command: object, check: bool = True, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *map(str, command)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
        check=check,
        timeout=300,
    )


def torchrun(processes: int, *arguments: object, check: bool = True) -> subprocess.CompletedProcess[str]:
    launcher = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes, "-m", "dsmoe_megatron")
    return run(*launcher, "pretrain", *arguments, check=check)


def validation_samples_job(config: Any) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """The tokens that the run validated on, and the training model's logits of them, from its newest checkpoint."""
    from dsmoe_megatron.run_folder import find_checkpoint
    from dsmoe_megatron.runtime.distributed import model_parallel_groups
    from dsmoe_megatron.training.checkpoint import load_checkpoint
    from dsmoe_megatron.training.data import build_datasets, global_batches
    from dsmoe_megatron.training.engines.megatron import MegatronEngine
    from dsmoe_megatron.training.loop import open_data

    tokenizer = open_data(config)
    with model_parallel_groups(config.parallel, config.train.seed):
        engine = MegatronEngine(config, torch.device("cpu"))
        run_dir = Path(config.train.run_dir)
        folder = find_checkpoint(run_dir)
        assert folder is not None
        load_checkpoint(engine, config, folder)
        _, validation = build_datasets(config, tokenizer, run_dir / "cache")
        batches = global_batches(validation, config, 0, 1)
        micro_batches = [batch for _ in range(config.evaluation.batches) for batch in next(batches)]
        samples = {key: torch.cat([batch[key] for batch in micro_batches]) for key in ("tokens", "labels")}
        positions = torch.arange(SEQUENCE_LENGTH).expand_as(samples["tokens"])
        engine.chunks[0].eval()
        with torch.no_grad():
            return samples, engine.chunks[0](samples["tokens"], positions, None)


@pytest.fixture(scope="module")
def trained(small_data: SmallData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two torchrun processes under tensor, sequence and expert parallelism."""
    folder = tmp_path_factory.mktemp("trained")
    parallel = {"tensor": 2, "sequence": True, "expert_tensor": 1, "expert": 2}
    save_config(run_config(small_data, folder / "run", parallel=parallel), folder / "recipe.yaml")
    output = torchrun(2, "--config", folder / "recipe.yaml", "--train.steps", 8).stdout
    assert "step 8/8" in output
    run("checkpoints_tools/export_hf.py", "--checkpoint", folder / "run", "--output", folder / "export")
    return folder


def test_the_export_computes_what_was_trained(
    trained: Path, small_data: SmallData, worker_pool: WorkerPool, tmp_path: Path
) -> None:
    samples, expected_logits = worker_pool.run(1, validation_samples_job, run_config(small_data, trained / "run"))[0]
    torch.save(samples, tmp_path / "samples.pt")
    (tmp_path / "fresh_process.py").write_text(FRESH_PROCESS)

    files = (tmp_path / "samples.pt", tmp_path / "logits.pt")
    fresh = run(tmp_path / "fresh_process.py", trained / "export", *files)

    answer = json.loads(fresh.stdout.splitlines()[-1])
    logits = torch.load(tmp_path / "logits.pt")
    expected_logits = expected_logits[..., : logits.shape[-1]]
    assert float((logits - expected_logits).abs().max() / expected_logits.abs().max()) < 1e-5
    validation = [line for line in read_lines(trained / "run") if "validation_loss" in line][-1]
    assert answer["losses"]["dense"] == pytest.approx(validation["validation_loss"], abs=1e-4)
    for policy, name in (("topk", "topk 2"), ("threshold", "threshold 1.0")):
        perplexity = torch.tensor(answer["losses"][policy]).exp()
        assert float(perplexity) == pytest.approx(validation["policies"][name]["perplexity"], rel=1e-3)
    assert all(text.startswith("def main(") and len(text) > len("def main(") for text in answer["texts"].values())


def test_generate_command_names_text_and_speed_of_each_policy(trained: Path) -> None:
    arguments = ("--model", trained / "export", "--prompt", "import ", "--max-new-tokens", 4, "--json")
    lines = run("checkpoints_tools/generate.py", *arguments).stdout.splitlines()

    results = [json.loads(line) for line in lines]
    assert [result["policy"] for result in results] == ["dense", "topk", "threshold"]
    assert all(result["text"].startswith("import ") for result in results)
    assert all(result["decode_tokens_per_s"] > 0 and result["prefill_tokens_per_s"] > 0 for result in results)


@pytest.mark.parametrize("size", ["1b", "3b", "6b"])
def test_torchrun_trains_through_a_launcher(trained: Path, tmp_path: Path, size: str) -> None:
    """Literally `torchrun launchers/pretrain_6b.sh ...`, made small by overrides."""
    overrides = ("--config", trained / "recipe.yaml", "--train.run_dir", tmp_path, "--train.steps", 2)
    arguments = ("--standalone", "--nproc-per-node", 2, f"launchers/pretrain_{size}.sh", *overrides)

    output = run("-m", "torch.distributed.run", *arguments, "--checkpoint.interval", 2).stdout

    assert "step 2/2" in output
    assert (tmp_path / "latest").read_text().strip() == "step_00000002"


def error_lines(process: subprocess.CompletedProcess[str]) -> list[str]:
    assert process.returncode != 0
    return [line for line in process.stderr.splitlines() if line.startswith("dsmoe-megatron: error: ")]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (("--model.bogus", 3), "model.bogus = "),
        (("--train.steps", "many"), "train.steps = "),
        (("--parallel.tensor", 3), "parallel.tensor = 3"),
        (("--train.global_batch_size", 9), "train.global_batch_size = 9"),
        (("--data.tokenizer", "nowhere.model"), "nowhere.model"),
    ],
)
def test_a_mistake_is_one_line(trained: Path, tmp_path: Path, override: tuple[object, ...], message: str) -> None:
    """Before any process group where the recipe alone tells (exit 2)."""
    alone = ("--parallel.tensor", 1, "--parallel.sequence", "false", "--parallel.expert", 1)
    arguments = ("--config", trained / "recipe.yaml", *alone, "--train.run_dir", tmp_path / "run", *override)

    process = run("-m", "dsmoe_megatron", "pretrain", *arguments, check=False)

    assert len(error_lines(process)) == 1
    assert message in error_lines(process)[0]
    assert "Traceback" not in process.stderr
    assert process.returncode == (1 if "tokenizer" in str(override) else 2)


def test_a_world_that_the_layout_does_not_divide_ends_every_rank(trained: Path, tmp_path: Path) -> None:
    process = torchrun(3, "--config", trained / "recipe.yaml", "--train.run_dir", tmp_path, check=False)

    assert len(error_lines(process)) == 1, "rank 0 speaks for all"
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT) not in process.stderr
    assert not (tmp_path / "metrics.jsonl").exists()


@pytest.fixture
def small_disk(tmp_path: Path) -> Any:
    """A file system of 6 MB: one checkpoint of the tiny model fits, another does not."""
    folder = tmp_path / "small_disk"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], check=False)
    if mounted.returncode != 0:
        pytest.skip("mounting a tmpfs needs root")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_full_disk_is_said_and_leaves_the_last_checkpoint_whole(trained: Path, small_disk: Path) -> None:
    arguments = ("--config", trained / "recipe.yaml", "--train.run_dir", small_disk, "--checkpoint.interval", 1)

    process = torchrun(2, *arguments, "--checkpoint.keep_last", 0, "--logging.tensorboard", "false", check=False)

    assert len(error_lines(process)) == 1
    assert str(small_disk) in error_lines(process)[0]
    latest = (small_disk / "latest").read_text().strip()
    assert (small_disk / "checkpoints" / latest / "progress.json").is_file()
    whole = [path.name for path in (small_disk / "checkpoints").glob("step_????????")]
    assert max(whole) == latest


def test_too_little_disk_is_said_before_training(trained: Path, small_disk: Path) -> None:
    arguments = ("--config", trained / "recipe.yaml", "--train.run_dir", small_disk, "--model.hidden_size", 512)

    process = torchrun(2, *arguments, check=False)

    assert len(error_lines(process)) == 1
    assert "one checkpoint takes" in error_lines(process)[0]
