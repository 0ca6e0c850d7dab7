"""`preprocess.py --executor slurm` on a real cluster ends in the dataset that one machine makes."""

import json
import sys
from pathlib import Path

import pytest
import zstandard

from data_tools.preprocess import preprocess
from data_tools.train_tokenizer import train_tokenizer
from tests.slurm.cluster import SlurmCluster

ROOT = Path(__file__).resolve().parents[2]
SOURCES = Path(json.__file__).parent


@pytest.fixture
def corpus(tmp_path: Path) -> list[str]:
    """Four files, which are four tasks."""
    texts = [path.read_text() for path in sorted(SOURCES.parent.glob("*.py"))[:80]]
    paths = []
    for number in range(4):
        content = "".join(json.dumps({"text": text}) + "\n" for text in 8 * texts[number::4]).encode()
        paths.append(tmp_path / f"{number}.jsonl.zst")
        paths[-1].write_bytes(zstandard.ZstdCompressor(level=1).compress(content))
    return [str(path) for path in paths]


def test_a_job_array_makes_the_dataset_of_one_machine(
    corpus: list[str], tmp_path: Path, slurm_cluster: SlurmCluster
) -> None:
    tokenizer = str(train_tokenizer([str(SOURCES)], str(tmp_path / "tokenizer"), vocab_size=500))
    prefix = tmp_path / "data"
    command = [sys.executable, str(ROOT / "data_tools" / "preprocess.py"), "--input", *corpus, "--workers", "4"]
    command += ["--output-prefix", str(prefix), "--tokenizer", tokenizer]
    on_slurm = ["--executor", "slurm", "--slurm-partition", "all", "--slurm-time", "5", "--slurm-memory-gb", "1"]

    refused = slurm_cluster.run([*command, "--executor", "slurm"], cwd=tmp_path)
    submitted = slurm_cluster.run([*command, *on_slurm], cwd=tmp_path)
    again = slurm_cluster.run([*command, *on_slurm], cwd=tmp_path)
    # nor may another plan, or this machine, take the folder from under the jobs
    other = slurm_cluster.run([*command, "--overwrite", "--end-of-document", "none"], cwd=tmp_path)

    assert refused.returncode == 2
    assert "--slurm-partition" in refused.stderr
    assert submitted.returncode == 0, submitted.stderr
    _, last = submitted.stdout.split("submitted job ")[1].split(";")[0].split(" and ")
    for late in (again, other):
        assert late.returncode == 1
        assert "is in SLURM's queue" in late.stderr
    slurm_cluster.wait(int(last), timeout=180)
    preprocess(corpus, str(tmp_path / "local"), tokenizer)
    for suffix in ("bin", "idx"):
        assert Path(f"{prefix}.{suffix}").read_bytes() == Path(f"{tmp_path}/local.{suffix}").read_bytes()
    assert not Path(f"{prefix}.work").exists()
    done = slurm_cluster.run([*command, *on_slurm], cwd=tmp_path)
    assert "nothing to do" in done.stdout
