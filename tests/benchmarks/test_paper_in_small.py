"""The study as a program: it makes what is missing, goes on after a stop, writes its document from the results."""

import dataclasses
import gzip
import io
import json
import math
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import yaml
import zstandard

from benchmarks.paper_in_small import copying, runner
from benchmarks.paper_in_small.claims import findings
from benchmarks.paper_in_small.corpus import Part, collect
from benchmarks.paper_in_small.document import document, picture_path, verdicts_table, write_document, write_report
from benchmarks.paper_in_small.pictures import PICTURES
from benchmarks.paper_in_small.result import Result, loss, read_results, with_best_learning_rates
from benchmarks.paper_in_small.runner import Runner
from benchmarks.paper_in_small.study import HERE, PlannedRun, Policies, Study, read_study
from dsmoe_megatron.errors import ConfigurationError, EnvironmentNotSupportedError
from tests.requirements import lacks

ROOT = Path(__file__).resolve().parents[2]


def start(study: Path, folder: Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "benchmarks.paper_in_small", "--study", str(study)]
    command += ["--folder", str(folder), "--results", str(folder / "results"), "--processes", "2"]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def steps_of(run_dir: Path) -> list[int]:
    """Whole lines of a run's metrics that a step has left."""
    path = run_dir / "metrics.jsonl"
    texts = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    lines = [json.loads(text) for text in texts if text.endswith("\n")]
    return [line["step"] for line in lines if "lm_loss" in line]


def test_the_study_is_made_whole_though_it_was_stopped(tmp_path: Path) -> None:
    content = yaml.safe_load((HERE / "smoke.yaml").read_text(encoding="utf-8"))
    steps = {"dense_4m": 80}  # long enough to be stopped in
    content["runs"][0]["overrides"] = {"train.steps": steps["dense_4m"], "checkpoint.interval": 1000}
    plan = tmp_path / "study.yaml"
    plan.write_text(yaml.safe_dump(content))
    stopped_run = tmp_path / "runs" / "dense_4m_seed_1"
    stopped_run.mkdir(parents=True)
    (stopped_run / "failure.txt").write_text("of an earlier try")  # whose results were removed
    first = start(plan, tmp_path)
    while len(steps_of(stopped_run)) < 2:
        assert first.poll() is None, first.communicate()[0]
        time.sleep(0.01)
    first.send_signal(signal.SIGTERM)
    left = first.communicate(timeout=120)[0]
    assert first.returncode == 1, left
    assert "the same command goes on" in left
    assert 2 <= len(steps_of(stopped_run)) < steps["dense_4m"]

    second = start(plan, tmp_path)
    output = second.communicate(timeout=400)[0]

    assert second.returncode == 0, output
    study = read_study(plan)
    results = read_results(tmp_path / "results", study)
    assert [result.run for result in results] == study.runs
    assert [result.failure for result in results] == [None] * len(results)
    for result in results:  # no step twice, none missing
        assert [line["step"] for line in result.training] == list(range(1, 1 + steps.get(result.run.entry, 4)))
    for result in results:
        assert result.evaluation is not None
        by_data = {Path(name).name: value for name, value in result.as_trained["loss_by_data"].items()}
        expected = 0.9 * by_data["text_validation"] + 0.1 * by_data["code_validation"]
        assert loss(result.as_trained) == pytest.approx(expected)
    copying.measure_runs(study, tmp_path, tmp_path / "results")
    results = read_results(tmp_path / "results", study)
    write_document(study, results, tmp_path / "results", tmp_path / "docs" / "study.md")
    text = (tmp_path / "docs" / "study.md").read_text(encoding="utf-8")
    for name in ("dense_4m", "dsmoe_4m_alpha_1e-2", "smoke", "Not made yet"):
        assert (f"| {name} " in text) == (name in ("dense_4m", "dsmoe_4m_alpha_1e-2"))
    assert "## Copying from the context" in text
    write_report(results, tmp_path / "report.html")
    report = (tmp_path / "report.html").read_text(encoding="utf-8")
    for name in ("dense_4m_seed_1", "dsmoe_4m_alpha_1e-2_seed_1", "dsmoe_4m_alpha_1e-2_seed_2"):
        assert (name in report) == name.endswith("seed_1")
    # no other model was trained on as many tokens as the dense one, no DS-MoE with other parts at all
    drawn = PICTURES.keys() - {"gap", "parts"}
    assert {picture_path(tmp_path / "docs", name) for name in drawn} == set((tmp_path / "docs" / "images").iterdir())


def test_runs_are_made_in_the_order_that_they_are_asked_for() -> None:
    study = read_study(HERE / "smoke.yaml")

    names = ["smoe_top4_4m_seed_1", "dsmoe_4m_alpha_1e-2_seed_2", "smoe_top4_4m_seed_1"]

    assert [run.name for run in study.only(names).runs] == names[:2]
    with pytest.raises(ConfigurationError, match=r"dense_seed_7.* is not one of dense_4m_seed_1, "):
        study.only(["dense_seed_7"])


def test_a_run_that_is_killed_again_and_again_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    starts = tmp_path / "starts"
    kill_me = f"import os; open({str(starts)!r}, 'a').write('x'); os.kill(os.getpid(), 9)"
    monkeypatch.setattr(runner, "training_command", lambda *_: [sys.executable, "-c", kill_me])
    run = PlannedRun("large", "dense_4m", 1, {})
    study = Study("this_machine", Policies(1, [], [], []), [run])

    assert Runner(study, tmp_path, tmp_path / "data.yaml", tmp_path / "results").make(1)

    assert starts.read_text() == "xxx"
    assert [result.failure for result in read_results(tmp_path / "results", study)] == [
        "training: killed 3 times in a row, by signal 9 the last time"
    ]


def test_the_document_is_that_of_the_results() -> None:
    study = read_study(HERE / "study.yaml")

    pictures = [name for name in PICTURES if picture_path(ROOT / "docs", name).is_file()]

    expected = list(document(study, read_results(HERE / "results", study), HERE / "results", pictures))

    assert (ROOT / "docs" / "paper_in_small.md").read_text(encoding="utf-8") == "\n".join(expected), (
        "run python -m benchmarks.paper_in_small.document"
    )


def a_result(
    entry: str,
    model: str,
    seed: int,
    losses: dict[tuple[str, Any], tuple[float, float]],
    overrides: dict[str, Any] | None = None,
    tokens: int = 1_000_000,
) -> Result:
    """A run with these losses: (rule, limit) -> (active share, loss)."""
    keys = {"threshold": "expert_threshold", "topk": "num_experts_per_tok", "threshold_topk": "expert_threshold"}
    policies: dict[str, Any] = {}
    for (rule, limit), (share, value) in losses.items():
        policy = {"expert_policy": rule} | ({keys[rule]: limit} if rule in keys else {})
        by_data = {"data/text_validation": value, "data/code_validation": value}
        policies[f"{rule} {limit}"] = {"policy": policy, "active_share": share, "loss_by_data": by_data}
    run = PlannedRun(entry, model, seed, overrides or {})
    evaluation = {"policies": policies, "parameters_without_embeddings": 1}
    return Result(run, {}, [{"tokens": tokens}], evaluation, [], None, Path())


def test_claims_are_judged_seed_by_seed() -> None:
    results = []
    for seed, dsmoe in ((1, 3.0), (2, 3.2)):
        results.append(a_result("plain", "dense_4m", seed, {("dense", 0): (1.0, 3.1)}))
        sparse = {
            ("dense", 0): (1.0, dsmoe),
            ("threshold", 0.5): (0.5, dsmoe + 0.02),
            ("threshold", 1.0): (0.3, dsmoe + 0.04),
            ("topk", 2): (0.3, dsmoe + 0.2),
        }
        results.append(a_result("ours", "dsmoe_4m", seed, sparse))
        results.append(a_result("theirs", "smoe_4m", seed, {("topk", 4): (0.4, 3.5)}))

    found = {(finding.group, finding.claim): finding for finding in findings(results)}

    equal = found["4m, 1M tokens", "as good as a dense model of its size"]
    assert equal.ratios.values == pytest.approx([math.exp(-0.1), math.exp(0.1)])
    assert equal.verdict == "not shown"  # one seed says yes, the other no
    within = found["4m, 1M tokens", "within 5 % with at most 40% active"]
    assert within.ratios.values == pytest.approx([math.exp(0.03)] * 2)  # half-way between 0.3 and 0.5
    assert within.seeds_needed == 3  # the limit is 2 % away
    assert within.verdict == "not shown"
    assert found["4m, 1M tokens", "better than sparse-trained of equal active share"].verdict == "yes"
    # topk at 40 %: between its own 30 % and the dense policy
    worse = 0.2 * (1.0 - 0.4) / (1.0 - 0.3)
    assert found["4m, 1M tokens", "threshold is better than topk"].ratios.values == pytest.approx(
        [math.exp(0.03 - worse)] * 2
    )
    assert found["4m, 1M tokens", "threshold is better than threshold_topk"].verdict == "not shown"  # never measured


def test_each_claim_has_one_line_over_all_groups() -> None:
    results = []
    for seed in (1, 2):
        results.append(a_result("plain", "dense_4m", seed, {("dense", 0): (1.0, 3.1)}))
        results.append(a_result("ours", "dsmoe_4m", seed, {("dense", 0): (1.0, 3.0), ("threshold", 1.0): (0.3, 3.0)}))
        large = {("dense", 0): (1.0, 2.0), ("threshold", 1.0): (0.3, 2.2)}
        results.append(a_result("large", "dsmoe_12m", seed, large))

    lines = verdicts_table(findings(results))

    assert lines[0] == "|  | 4m, 1M tokens | 12m, 1M tokens |"
    assert "| as good as a dense model of its size | yes: 0.905 ± 0.000 |  |" in lines  # exp(-0.1); no large dense one
    within = math.exp(0.2 * (1.0 - 0.4) / (1.0 - 0.3))
    assert f"| within 5 % with at most 40% active | yes: 1.000 ± 0.000 | no: {within:.3f} ± 0.000 |" in lines


def test_dense_and_sparse_training_are_compared_with_equal_attention_too() -> None:
    ours = {("dense", 0): (1.0, 3.0), ("threshold", 1.0): (0.3, 3.1)}
    plain = {("dense", 0): (1.0, 3.6), ("threshold", 1.0): (0.3, 3.7)}
    results = []
    for seed in (1, 2):
        results.append(a_result("ours", "dsmoe_4m", seed, ours))
        results.append(a_result("plain", "dsmoe_gqa_4m", seed, plain))
        results.append(a_result("theirs", "smoe_top4_4m", seed, {("topk", 4): (0.4, 3.5)}))
        results.append(a_result("with experts", "smoe_moa_top4_4m", seed, {("topk", 4): (0.4, 3.2)}))

    found = {(finding.group, finding.claim): finding for finding in findings(results)}

    better = found["4m, 1M tokens", "better than sparse-trained of equal total"]
    assert better.measure == "ours under the dense policy / with experts"
    assert better.ratios.values == pytest.approx([math.exp(-0.2)] * 2)
    assert better.verdict == "yes"
    as_in_paper = found["4m, 1M tokens", "better than sparse-trained with plain attention, as in the paper"]
    assert as_in_paper.measure == "ours under the dense policy / theirs"
    assert as_in_paper.ratios.values == pytest.approx([math.exp(-0.5)] * 2)
    equal = found["4m, 1M tokens", "better than sparse-trained, both with plain attention"]
    assert equal.measure == "plain under the dense policy / theirs"
    assert equal.ratios.values == pytest.approx([math.exp(0.1)] * 2)
    assert equal.verdict == "no"


def test_few_experts_are_compared_between_the_models_that_bear_them_best() -> None:
    results = []
    for seed in (1, 2):
        four = {("topk", 4): (0.4, 3.0), ("topk", 1): (0.2, 3.4)}  # 3.2 at 30 %
        results.append(a_result("four", "smoe_top4_4m", seed, four))
        two = {("topk", 2): (0.35, 3.05), ("topk", 1): (0.25, 3.25)}  # 3.15
        results.append(a_result("two", "smoe_top2_4m", seed, two))
        sharp = {("dense", 0): (1.0, 3.1), ("threshold", 1.0): (0.3, 3.12)}
        results.append(a_result("sharp", "dsmoe_4m", seed, sharp))
        blunt = {("dense", 0): (1.0, 3.0), ("threshold", 0.1): (0.4, 3.05), ("threshold", 1.0): (0.3, 3.3)}
        results.append(a_result("blunt", "dsmoe_4m", seed, blunt))

    found = {(finding.group, finding.claim): finding for finding in findings(results)}

    few = found["4m, 1M tokens", "better than sparse-trained with few experts active"]
    assert few.measure == "sharp / two, both with 30% active"
    assert few.ratios.values == pytest.approx([math.exp(3.12 - 3.15)] * 2)


def test_the_gap_to_the_dense_model_is_drawn_over_tokens() -> None:
    losses = {"plain": [3.0, 2.0, 1.5], "ours": [3.1, 1.8, 1.2]}
    results = []
    for entry, model in (("plain", "dense_4m"), ("ours", "dsmoe_4m")):
        result = a_result(entry, model, 1, {("dense", 0): (1.0, losses[entry][-1])})
        lines = [{"tokens": 1_000_000 * (i + 1), "lm_loss": value} for i, value in enumerate(losses[entry])]
        results.append(dataclasses.replace(result, training=lines))

    figure = PICTURES["gap"].draw(results)

    assert figure is not None
    [axis] = figure.axes
    [ours] = [line for line in axis.lines if line.get_label() == "DS-MoE"]
    assert np.asarray(ours.get_xydata()) == pytest.approx(np.array([[2.0, (0.1 - 0.2 - 0.3) / 3]]))  # a mean of lines
    assert "plain" in axis.get_title()


def test_the_best_entry_of_an_architecture_is_drawn_strong() -> None:
    results = []
    for entry, model, value in (
        ("plain", "dense_4m", 3.0),
        ("worse", "dsmoe_4m", 2.9),
        ("better", "dsmoe_4m", 2.8),
        ("no heads", "dsmoe_gqa_4m", 3.2),
    ):
        by_share = {("dense", 0): (1.0, value), ("threshold", 1.0): (0.3, value + 0.1)}
        results.append(a_result(entry, model, 1, by_share))

    figure = PICTURES["share"].draw(results)

    assert figure is not None
    [axis] = figure.axes
    named = {str(line.get_label()): line for line in axis.lines if not str(line.get_label()).startswith("_")}
    assert sorted(named) == ["DS-MoE", "DS-MoE with plain attention", "dense"]
    strong = np.asarray(named["DS-MoE"].get_xydata())
    assert strong == pytest.approx(np.array([[30.0, math.exp(2.9)], [100.0, math.exp(2.8)]]))
    [faint] = [line for line in axis.lines if line not in named.values()]
    assert np.asarray(faint.get_xydata()) == pytest.approx(np.array([[30.0, math.exp(3.0)], [100.0, math.exp(2.9)]]))
    assert faint.get_color() == named["DS-MoE"].get_color()


def test_a_model_that_copies_gains_by_a_second_reading() -> None:
    passages = torch.randint(0, 50, (3, 40), generator=torch.Generator().manual_seed(1))

    def copies_what_stood_a_passage_before(ids: torch.Tensor) -> SimpleNamespace:
        logits = torch.zeros(*ids.shape, 50)
        logits[:, 39:].scatter_(-1, ids[:, : ids.shape[1] - 39, None], 100.0)
        return SimpleNamespace(logits=logits)

    loaded: Any = SimpleNamespace(
        model=copies_what_stood_a_passage_before,
        device="cpu",
        reference_policy=None,
        set_policy=lambda _policy: None,
    )

    figures = copying.read_twice(loaded, passages)

    assert figures["first_reading"] == pytest.approx(math.log(50))  # knows nothing
    assert figures["second_reading"] == pytest.approx(0.0, abs=1e-6)


def test_models_of_other_sizes_or_tokens_are_not_compared() -> None:
    dsmoe = {("dense", 0): (1.0, 3.0), ("threshold", 1.0): (0.3, 3.2)}
    results = [
        a_result("ours", "dsmoe_4m", 1, dsmoe),
        a_result("large", "dense_12m", 1, {("dense", 0): (1.0, 2.0)}),
        a_result("long", "dense_4m", 1, {("dense", 0): (1.0, 2.0)}, tokens=10_000_000),
    ]

    assert not [finding for finding in findings(results) if "dense model" in finding.claim]

    results.append(a_result("equal", "dense_4m", 1, {("dense", 0): (1.0, 3.1)}))
    [equal] = [finding for finding in findings(results) if "dense model" in finding.claim]
    assert equal.measure == "ours under the dense policy / equal"


def test_sizes_are_compared_where_they_were_trained_alike() -> None:
    alike, other = {"model.mi_alpha_mlp": 0.01}, {"model.mi_alpha_mlp": 0.1}
    results = []
    for name, model, overrides, cost in (
        ("small", "dsmoe_4m", alike, 0.3),
        ("better", "dsmoe_4m", other, 0.05),
        ("large", "dsmoe_12m", alike, 0.1),
    ):
        losses = {("dense", 0): (1.0, 3.0), ("threshold", 1.0): (0.3, 3.0 + cost)}
        results += [a_result(name, model, seed, losses, overrides) for seed in (1, 2)]

    [found] = [finding for finding in findings(results) if finding.claim == "larger models tolerate more sparsity"]

    assert found.measure == "cost of 30% active: large / small"
    assert found.ratios.values == pytest.approx([math.exp(0.1 - 0.3)] * 2)
    assert found.verdict == "yes"


def test_a_trial_of_learning_rates_leaves_its_best() -> None:
    def at(name: str, lr: float, alpha: float, value: float) -> Result:
        overrides = {"optimizer.lr": lr, "model.mi_alpha_mlp": alpha}
        return a_result(name, "dsmoe_4m", 1, {("dense", 0): (1.0, value)}, overrides)

    results = [at("slow", 1e-3, 0.1, 3.1), at("fast", 2e-3, 0.1, 3.0), at("other", 1e-3, 0.2, 3.2)]

    assert [result.run.entry for result in with_best_learning_rates(results)] == ["fast", "other"]


def make_package(folder: Path, files: dict[str, bytes]) -> None:
    """A Debian package of these files."""
    root = folder / "root"
    (root / "DEBIAN").mkdir(parents=True)
    (root / "DEBIAN" / "control").write_text(
        "Package: tale\nVersion: 1\nArchitecture: all\nMaintainer: a\nDescription: b\n"
    )
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    subprocess.run(["dpkg-deb", "--build", root, folder / "tale_1_all.deb"], check=True, capture_output=True)


def test_the_corpus_is_read_out_of_packages(tmp_path: Path) -> None:
    if shutil.which("dpkg-deb") is None:
        lacks("there is no dpkg-deb: not a Debian system")
    prose = {number: f"Chapter {number}. " + f"It was night number {number}. " * 20 for number in range(40)}
    files = {f"usr/share/doc/tale/{number}.txt": text.encode() for number, text in prose.items()}
    files["usr/share/doc/tale/copy.txt"] = prose[3].encode()
    files["usr/share/doc/tale/left_out/41.txt"] = b"not wanted " * 50
    files["usr/share/doc/tale/latin.txt"] = "naïve ".encode("latin-1") * 50
    files["usr/share/doc/tale/page.html"] = f"<html><p>{prose[5]}</p><p>An <b>end</b>.</p></html>".encode()
    code = {f"tale/{number}.py": f"def chapter_{number}():\n    return {number}\n" * 10 for number in range(30)}
    archive = io.BytesIO()
    with tarfile.open(fileobj=archive, mode="w:xz") as tar:
        for name, text in code.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(text)
            tar.addfile(entry, io.BytesIO(text.encode()))
    files["usr/src/tale.tar.xz"] = archive.getvalue()
    files["usr/share/tale/poem.gz"] = gzip.compress("\n\n".join(f"verse {n} " * 30 for n in range(6)).encode())
    packages = tmp_path / "corpus" / "packages"
    packages.mkdir(parents=True)
    make_package(packages, files)
    parts = [
        Part("tale", "text", ("*.txt", "*.html"), without=("*/left_out/*",)),
        Part("tale", "text", ("*/poem.gz",), paragraphs_per_document=2),
        Part("tale", "code", ("*.py",), archive="usr/src/tale.tar.xz"),
    ]

    collect(tmp_path / "corpus", parts)

    documents = {
        (kind, split): [
            json.loads(line)["text"] for line in read_lines(tmp_path / "corpus" / kind / f"{split}.jsonl.zst")
        ]
        for kind in ("text", "code")
        for split in ("train", "validation")
    }
    texts = documents["text", "train"] + documents["text", "validation"]
    assert len(texts) == len(set(texts)) == len(prose) + 1 + 3
    assert set(prose.values()) <= set(texts)
    page = next(text for text in texts if "An end." in text)
    assert "<" not in page
    assert prose[5].strip() in page.replace("\n", " ")
    assert sum(text.count("verse") == 60 for text in texts) == 3
    assert sorted(documents["code", "train"] + documents["code", "validation"]) == sorted(code.values())
    assert documents["text", "validation"]
    assert documents["code", "validation"]


def test_a_package_that_is_not_there_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))

    with pytest.raises(EnvironmentNotSupportedError, match=r"needs Debian's apt-get, or tale_\*\.deb in"):
        collect(tmp_path / "corpus", [Part("tale", "text", ("*",))])


def read_lines(path: Path) -> list[str]:
    with zstandard.open(path, "rt", encoding="utf-8") as file:
        return list(file)
