"""The data section of a mixture: what a real blend draws of it, and what is refused."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from data_tools.blend import blend, parse_tokens
from data_tools.manifest import manifest_checksum
from data_tools.preprocess import preprocess
from data_tools.train_tokenizer import train_tokenizer
from dsmoe_megatron.config import Config, DatasetSource
from dsmoe_megatron.config_parsing import load_config, parse_config
from dsmoe_megatron.errors import ConfigurationError, DataError
from tests.worker_pool import WorkerPool

SCRIPT = Path(__file__).resolve().parents[2] / "data_tools" / "blend.py"
SEQUENCE_LENGTH = 16
BATCH = 8


@pytest.fixture(scope="module")
def data(texts: list[str], tokenizer_spec: str, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Datasets of several sizes: pile_0, pile_1, pile_2 and code."""
    folder = tmp_path_factory.mktemp("data")
    for name, part in {"pile_0": (0, 60), "pile_1": (60, 200), "pile_2": (200, 210), "code": (210, 300)}.items():
        (folder / f"{name}.jsonl").write_text(
            "".join(json.dumps({"text": text}) + "\n" for text in texts[slice(*part)])
        )
        preprocess([str(folder / f"{name}.jsonl")], str(folder / name), tokenizer_spec)
    return folder


def tokens_of(prefix: str | Path) -> int:
    return int(json.loads(Path(f"{prefix}.manifest.json").read_text())["tokens"])


def sources_of(recipe: str, folder: Path) -> list[DatasetSource]:
    (folder / "blend.yaml").write_text(recipe)
    return load_config(folder / "blend.yaml").data.train


def weights_of(recipe: str, folder: Path) -> dict[str, float]:
    return {Path(source.prefix).name: source.weight for source in sources_of(recipe, folder)}


def count_draws_job(config: Config) -> list[int]:
    """Samples that a training run draws from each dataset."""
    import numpy as np

    from dsmoe_megatron.tokenizers import load_tokenizer
    from dsmoe_megatron.training.data import build_datasets, check_datasets

    assert config.data.tokenizer is not None
    tokenizer = load_tokenizer(config.data.tokenizer)
    check_datasets(config.data.train, tokenizer)
    train, _ = build_datasets(config, tokenizer, Path(config.train.run_dir) / "cache")
    samples = config.train.steps * config.train.global_batch_size  # megatron-core makes a few more
    return np.bincount(train.dataset_index[:samples], minlength=len(config.data.train)).tolist()


def drawn(recipe: str, budget: int, folder: Path, worker_pool: WorkerPool) -> dict[str, int]:
    """Tokens that training on the recipe reads of each dataset."""
    (folder / "blend.yaml").write_text(recipe)
    steps = budget // (BATCH * SEQUENCE_LENGTH)
    sizes = {"steps": steps, "global_batch_size": BATCH, "sequence_length": SEQUENCE_LENGTH}
    arguments = [f"--train.{key}={value}" for key, value in sizes.items()]
    config = parse_config(["--config", str(folder / "blend.yaml"), *arguments, f"--train.run_dir={folder}"], "test")
    (counts,) = worker_pool.run(1, count_draws_job, config)
    assert sum(counts) == steps * BATCH  # which leaves out less than a batch of the budget
    names = [Path(source.prefix).name for source in config.data.train]
    return {name: count * SEQUENCE_LENGTH for name, count in zip(names, counts, strict=True)}


def assert_close(read: dict[str, int], wanted: dict[str, float]) -> None:
    """megatron-core keeps every dataset within a sample of its share of what is read."""
    scale = sum(read.values()) / sum(wanted.values())
    assert scale == pytest.approx(1, abs=BATCH * SEQUENCE_LENGTH / sum(wanted.values()))
    assert all(abs(read[name] - scale * wanted[name]) <= SEQUENCE_LENGTH for name in wanted), (read, wanted)


def test_training_draws_the_shares_that_were_asked_for(
    data: Path, tokenizer_spec: str, tmp_path: Path, worker_pool: WorkerPool
) -> None:
    budget = tokens_of(data / "code") * 2
    sets = [f"pile={data}/pile_*", f"code={data}/code"]

    recipe = blend(sets, share=["code=0.15", "pile=0.85"], budget=str(budget), max_epochs=3)
    read = drawn(recipe, budget, tmp_path, worker_pool)

    pile = {name: tokens_of(data / name) for name in ("pile_0", "pile_1", "pile_2")}
    wanted = {name: 0.85 * budget * tokens / sum(pile.values()) for name, tokens in pile.items()}
    wanted["code"] = 0.15 * budget
    assert list(read) == ["pile_0", "pile_1", "pile_2", "code"]
    assert_close(read, wanted)
    assert load_config(tmp_path / "blend.yaml").data.tokenizer == tokenizer_spec


def test_training_makes_the_passes_that_were_asked_for(data: Path, tmp_path: Path, worker_pool: WorkerPool) -> None:
    sets = [f"pile={data}/pile_*", f"code={data}/code"]
    sizes = {name: tokens_of(data / name) for name in ("pile_0", "pile_1", "pile_2", "code")}
    budget = int(0.5 * (sum(sizes.values()) - sizes["code"]) + 1.75 * sizes["code"])

    recipe = blend(sets, epochs=["pile=0.5", "code=1.75"], max_epochs=2)
    read = drawn(recipe, budget, tmp_path, worker_pool)

    assert_close(read, {name: tokens * (1.75 if name == "code" else 0.5) for name, tokens in sizes.items()})


def test_three_ways_to_say_one_mixture_agree(data: Path, tmp_path: Path) -> None:
    sets = [f"pile={data}/pile_0", f"code={data}/code"]
    pile, code = tokens_of(data / "pile_0") // 2, tokens_of(data / "code") // 4

    by_tokens = blend(sets, tokens=[f"pile={pile}", f"code={code}"])
    by_share = blend(
        sets, share=[f"pile={pile / (pile + code)}", f"code={code / (pile + code)}"], budget=str(pile + code)
    )
    by_epochs = blend(
        sets, epochs=[f"pile={pile / tokens_of(data / 'pile_0')}", f"code={code / tokens_of(data / 'code')}"]
    )

    weights = weights_of(by_tokens, tmp_path)
    assert weights == pytest.approx({"pile_0": pile / (pile + code), "code": code / (pile + code)}, rel=1e-8)
    assert weights_of(by_share, tmp_path) == pytest.approx(weights, rel=1e-8)
    assert weights_of(by_epochs, tmp_path) == pytest.approx(weights, rel=1e-8)


def test_the_table_tells_tokens_share_and_epochs(data: Path) -> None:
    tokens = {name: tokens_of(data / name) for name in ("pile_0", "pile_1", "pile_2", "code")}
    pile = tokens["pile_0"] + tokens["pile_1"] + tokens["pile_2"]

    recipe = blend([f"pile={data}/pile_*", f"code={data}/code"], tokens=["pile=5k", "code=2.5k"])

    rows = [re.split(r"\s{2,}", line) for line in recipe.splitlines() if re.match(r"# .*%", line)]
    assert rows[0] == ["# pile", "3 datasets", f"{pile:,}", "5,000", "66.6667%", f"{5000 / pile:.4g}"]
    assert [row[1:3] for row in rows[1:4]] == [[f"{data}/pile_{i}", f"{tokens[f'pile_{i}']:,}"] for i in range(3)]
    assert rows[4][1:] == [f"{data}/code", f"{tokens['code']:,}", "2,500", "33.3333%", f"{2500 / tokens['code']:.4g}"]
    assert rows[5][:4] == ["# total", f"{pile + tokens['code']:,}", "7,500", "100.0000%"]


def test_a_set_may_be_named_in_parts_and_stand_anywhere(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = tmp_path / "a folder: [1], {x} #2"
    odd.mkdir()
    monkeypatch.chdir(tmp_path)
    for file in data.glob("code.*"):
        shutil.copy(file, odd / file.name)
        shutil.copy(file, f"1e5{file.name.removeprefix('code')}")

    recipe = blend(
        [f"mixed={data}/pile_2", f"mixed={odd}/code"], epochs=["mixed=1"], tokenizer_spec="somewhere/else: #1.model"
    )
    like_numbers = blend(["mixed=1e5"], epochs=["mixed=1"], tokenizer_spec="3e-4")

    assert [source.prefix for source in sources_of(recipe, tmp_path)] == [f"{data}/pile_2", f"{odd}/code"]
    assert yaml.safe_load(recipe)["data"]["tokenizer"] == "somewhere/else: #1.model"
    assert [source.prefix for source in sources_of(like_numbers, tmp_path)] == ["1e5"]
    assert load_config(tmp_path / "blend.yaml").data.tokenizer == "3e-4"


@pytest.mark.parametrize(
    ("text", "tokens"),
    [("30B", 30e9), ("100B", 100e9), ("0.3T", 3e11), ("500M", 5e8), ("7k", 7000), ("3e6", 3e6), ("12", 12)],
)
def test_numbers_of_tokens(text: str, tokens: float) -> None:
    assert parse_tokens("--tokens", text) == tokens


@pytest.mark.parametrize("text", ["", "B", "-1", "0", "nan", "inf", "3G", "1e400", "1 B x"])
def test_what_is_no_number_of_tokens(text: str) -> None:
    with pytest.raises(ConfigurationError, match="a number above 0"):
        parse_tokens("--tokens", text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "expected one of --share, --tokens and --epochs"),
        ({"tokens": ["pile=1", "code=1"], "epochs": ["pile=1", "code=1"]}, "expected one of"),
        ({"share": ["pile=0.9", "code=0.1"]}, "--budget"),
        ({"tokens": ["pile=1", "code=1"], "budget": "2"}, "--budget"),
        ({"share": ["pile=0.9", "code=0.2"], "budget": "1k"}, "must be 1 in all, not 1.1"),
        ({"share": ["pile=0.9", "cod=0.1"], "budget": "1k"}, "no such set: --set names pile, code"),
        ({"share": ["pile=1"], "budget": "1k"}, "says nothing of code"),
        ({"tokens": ["pile=1", "pile=2", "code=1"]}, "pile has a value already"),
        ({"tokens": ["pile", "code=1"]}, "expected NAME=VALUE"),
        ({"epochs": ["pile=-1", "code=1"]}, "a number above 0"),
    ],
)
def test_a_mixture_that_is_not_said_well_is_refused(options: dict[str, Any], message: str, data: Path) -> None:
    with pytest.raises(ConfigurationError, match=message):
        blend([f"pile={data}/pile_*", f"code={data}/code"], **options)


def test_more_than_the_data_gives_is_refused(data: Path) -> None:
    sets = [f"pile={data}/pile_*", f"code={data}/code"]
    code = tokens_of(data / "code")

    blend(sets, tokens=["pile=100", f"code={code}"])  # all of it
    with pytest.raises(DataError, match=rf"set code: {code + 1:,} tokens are .* epochs .* --max-epochs 1:"):
        blend(sets, tokens=["pile=100", f"code={code + 1}"])
    blend(sets, epochs=["pile=1", "code=4"], max_epochs=4)
    with pytest.raises(DataError, match=r"set code: .* --max-epochs 4"):
        blend(sets, epochs=["pile=1", "code=4.1"], max_epochs=4)


def test_datasets_that_cannot_stand_together_are_refused(
    data: Path, texts: list[str], tokenizer_spec: str, tmp_path: Path
) -> None:
    (tmp_path / "in.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts[:50]))
    other = train_tokenizer([str(tmp_path / "in.jsonl")], str(tmp_path / "other"), vocab_size=400)
    preprocess([str(tmp_path / "in.jsonl")], str(tmp_path / "of_other"), str(other))

    with pytest.raises(DataError, match="of_other was made with another tokenizer"):
        blend([f"a={data}/pile_0", f"b={tmp_path}/of_other"], epochs=["a=1", "b=1"])
    with pytest.raises(DataError, match="pile_0 is named more than once"):
        blend([f"a={data}/pile_0", f"b={data}/pile_*"], epochs=["a=1", "b=1"])
    with pytest.raises(DataError, match=r"--set a=nowhere\*: no dataset there"):
        blend(["a=nowhere*"], epochs=["a=1"])

    preprocess([str(tmp_path / "in.jsonl")], str(tmp_path / "changed"), tokenizer_spec)
    path = tmp_path / "changed.manifest.json"
    manifest = json.loads(path.read_text())
    for change, message in [({"dtype": "int32"}, "holds int32 ids"), ({"tokens": 0}, "set b has no tokens")]:
        changed = manifest | change
        path.write_text(json.dumps(changed | {"checksum": manifest_checksum(changed)}))
        with pytest.raises(DataError, match=message):
            blend([f"a={data}/pile_0", f"b={tmp_path}/changed"], epochs=["a=1", "b=1"])
    path.write_text(json.dumps(manifest | {"tokens": 10**12}))
    with pytest.raises(DataError, match="has been changed since it was written"):
        blend([f"b={tmp_path}/changed"], tokens=["b=1B"])


def test_command_line_writes_the_recipe_and_shows_the_table(data: Path, tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPT), "--set", f"pile={data}/pile_*", f"code={data}/code"]

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        return subprocess.run([*command, *arguments], capture_output=True, text=True, check=False)

    printed = run("--epochs", "pile=1", "code=1")
    written = run("--epochs", "pile=1", "code=1", "--output", str(tmp_path / "blend.yaml"))
    refused = run("--epochs", "pile=1", "code=3")

    assert (tmp_path / "blend.yaml").read_text() == printed.stdout
    assert len(load_config(tmp_path / "blend.yaml").data.train) == 4
    assert "100.0000%" in written.stdout
    assert "prefix:" not in written.stdout
    assert refused.returncode == 1
    assert refused.stderr.startswith("blend: error: set code: ")
    assert refused.stderr.count("\n") == 1
    assert run("--epochs", "pile=1", "cod=3").returncode == 2
