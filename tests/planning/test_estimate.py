"""`python -m dsmoe_megatron estimate`, as users see it, and the page that is made of it."""

import json
import re
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest

from dsmoe_megatron.__main__ import main
from dsmoe_megatron.config_parsing import load_config
from dsmoe_megatron.planning.memory import rank_memory
from dsmoe_megatron.planning.parameters import count_parameters

ROOT = Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "launchers" / "recipes" / "dsmoe_6b.yaml")
COMMAND = ["estimate", "--config", RECIPE, "--gpus", "32"]


def refusal(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[object, str]:
    """Exit code, and the one line on standard error."""
    with pytest.raises(SystemExit) as exited:
        main(list(arguments))
    captured = capsys.readouterr()
    [line] = captured.err.splitlines()
    assert not captured.out
    return exited.value.code, line


def test_json_has_what_others_rely_on(capsys: pytest.CaptureFixture[str]) -> None:
    config = load_config(RECIPE)

    assert main([*COMMAND, "--json", "--gpu", "h200"]) == 0

    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["total_without_embeddings"] == count_parameters(config.model).total_without_embeddings
    assert found["world_size"] == 32
    assert found["hardware"]["memory"] == 141e9
    [stage] = found["stages"]
    assert stage["memory"]["none"]["total"] == rank_memory(config, 32, 0).total == found["peak_memory"]
    assert set(stage["traffic"]) == {"sequence", "data"}
    assert sum(found["time"]["terms"].values()) == pytest.approx(found["time"]["step"])
    assert found["policies"][0]["active_mlp_experts"] == 4


def test_text_says_what_is_assumed_and_whether_it_fits(capsys: pytest.CaptureFixture[str]) -> None:
    main([*COMMAND, "--parallel.tensor", "1", "--parallel.sequence", "false", "--train.micro_batch_size", "8"])

    text = capsys.readouterr().out
    assert "6,342.8M without embeddings" in text
    assert "DOES NOT FIT" in text
    assert "Assumed for h100: matmul efficiency 0.7" in text
    assert "estimated, not measured" in text


@pytest.mark.parametrize(("environment", "said"), [(None, "2 (the fewest"), ("16", "16 (WORLD_SIZE)")])
def test_the_number_of_gpus_has_a_default(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, environment: str | None, said: str
) -> None:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    if environment:
        monkeypatch.setenv("WORLD_SIZE", environment)

    main(COMMAND[:-2])

    assert capsys.readouterr().out.startswith(f"GPUs: {said}")


def test_without_a_vocabulary_parameters_are_known_and_the_flag_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    main([*COMMAND, "--model.vocab_size", "null", "--json"])

    found = json.loads(capsys.readouterr().out)
    assert found["parameters"]["total_without_embeddings"] == pytest.approx(6343e6, rel=1e-4)
    assert found["parameters"]["embeddings"] is None
    assert "--model.vocab_size" in found["missing"]


def test_a_search_prints_the_best_and_counts_the_reasons(capsys: pytest.CaptureFixture[str]) -> None:
    search = ["estimate", "--config", RECIPE, "--gpus", "4", "--search"]
    main([*search, "--top", "3"])
    text = capsys.readouterr().out
    main([*search, "--json"])
    found = json.loads(capsys.readouterr().out)

    assert [line[0] for line in text.splitlines() if re.match(r"\d +\w+[\w+ ]* +\d+ +(none|selective|full)", line)] == [
        *"123"
    ]
    assert "does not fit" in text
    assert "parallel.sequence" in text
    assert f"{found['tried']:,} layouts tried, {len(found['ranked']):,} fit" in text
    assert found["ranked"][0]["reason"] == ""


@pytest.mark.parametrize("ending", [".png", ".svg"])
def test_a_picture_is_written_whole(tmp_path: Path, ending: str) -> None:
    picture = tmp_path / f"memory{ending}"

    main([*COMMAND, "--parallel.pipeline", "4", "--picture", str(picture)])

    assert [path.name for path in tmp_path.iterdir()] == [picture.name]
    if ending == ".svg":
        words = "".join(ElementTree.parse(picture).getroot().itertext())
        assert all(word in words for word in ("TP2+SP x PP4 x DP4", "activations", "logits", "memory of the GPU"))
    else:
        assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--gpus", "0"], "gpus = 0: must be at least 1"),
        (["--gpus", "many"], "gpus = 'many': expected a whole number or null"),
        (["--gpus", "3"], "parallel.tensor = 2: tensor x pipeline x context = 2 x 1 x 1 must divide"),
        (["--gpu", "h1000"], "gpu = 'h1000': unknown; there is h100, h200, a100, cpu, and --hardware"),
        (["--hardware", "nowhere.yaml"], "hardware = 'nowhere.yaml': cannot be read: No such file"),
        (["--picture", "memory.jpg"], "picture = 'memory.jpg': must end in .png or .svg"),
        (["--picture", "nowhere/memory.png"], "picture = 'nowhere/memory.png': cannot be written: No such file"),
        (["--serach"], "serach = None: needs a value"),
        (["--serach", "yes"], "serach = 'yes': unknown key; did you mean search?"),
        (["--search", "--picture", "a.png"], "picture = 'a.png': is drawn of one layout"),
        (["--search", "--model.vocab_size", "null"], "model.vocab_size = None: "),
        (["--gpu", "cpu"], "train.precision = 'bf16': cpu has no peak for it"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    code, line = refusal(capsys, *COMMAND, *arguments)

    assert code == 2
    assert line.startswith(f"dsmoe-megatron: error: {message}")


def test_the_help_has_the_verbs_own_arguments(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exited:
        main(["estimate", "--help"])

    text = " ".join(capsys.readouterr().out.split())
    assert exited.value.code == 0
    assert "--gpu GPU Row of the hardware table" in text
    assert "--train.recompute" in text


def test_no_verb_is_said_and_not_a_traceback(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    said = capsys.readouterr().err
    assert said.startswith("dsmoe-megatron: error: unknown verb ''; there is ")
    assert all(verb in said for verb in ("pretrain", "evaluate", "report", "estimate"))
    assert said.count("\n") == 1


def test_an_estimate_needs_no_torch() -> None:
    program = (
        "import sys; from dsmoe_megatron.__main__ import main; "
        f"main({[*COMMAND, '--json']!r}); main({['estimate', '--config', RECIPE, '--gpus', '2', '--search']!r}); "
        "sys.exit(any(name in sys.modules for name in ('torch', 'numpy', 'matplotlib')))"
    )
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


def test_what_is_not_known_of_deepspeed_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    engine = ["--engine.name", "deepspeed", "--parallel.overlap", "false", "--parallel.pipeline", "1"]
    engine += ["--parallel.expert", "1"]

    assert main([*COMMAND, *engine, "--engine.zero_stage", "1"]) == 0
    assert capsys.readouterr().err == ""

    assert main([*COMMAND, *engine, "--engine.zero_stage", "3"]) == 0
    assert "are those of engine.name megatron" in capsys.readouterr().err


def test_the_estimates_page_is_current() -> None:
    script = ROOT / "docs" / "generate_estimates.py"
    printed = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, check=True).stdout
    assert (ROOT / "docs" / "estimate.md").read_text("utf-8") == printed, "run docs/generate_estimates.py again"
