"""The report: one page that stands alone, says what it could not read, and shows what the files hold."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsmoe_megatron.__main__ import main
from dsmoe_megatron.reporting.figures import active_per_layer, as_svg, losses, sparse_perplexity
from dsmoe_megatron.reporting.records import read_runs

STEPS = 40


class Reader(HTMLParser):
    """Collects what a browser would load, the text, and whether the tags fit together."""

    EMPTY = ("meta", "br", "link", "img")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.loaded: list[str] = []
        self.texts: list[str] = []
        self.headings: list[str] = []
        self.cells: list[str] = []
        self.open: list[str] = []
        self.pictures = 0
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.pictures += tag == "svg"
        self.loaded += [tag] if tag in ("script", "link", "iframe") else []
        self.loaded += [
            value or ""
            for name, value in attrs
            if name in ("src", "href", "xlink:href") and not (value or "").startswith(("#", "data:"))
        ]
        if tag not in self.EMPTY:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.EMPTY:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)
        if self.open and self.open[-1] == "h2":
            self.headings.append(data)
        if self.open and self.open[-1] in ("td", "th"):
            self.cells.append(data)


def write_run(folder: Path, loss: float = 3.0, experts: int = 8) -> Path:
    """A run of two layers, as the training loop writes it."""
    folder.mkdir(parents=True)
    metrics: list[dict[str, Any]] = []
    use: list[dict[str, Any]] = []
    for step in range(5, STEPS + 1, 5):
        numbers: dict[str, Any] = {
            "step": step,
            "tokens": step * 2048,
            "grad_norm": 1.0,
            "learning_rate": 1e-3,
            "step_time_s": 0.5,
        }
        metrics.append(
            {
                **numbers,
                "lm_loss": loss + 10 / step,
                "mi_loss_attention": -0.1,
                "mi_loss_mlp": -0.01 * step,
                "tokens_per_s": 4096.0,
            }
        )
        routers = [
            {
                "layer": layer,
                "kind": kind,
                "share": [1 / number] * number,
                "marginal_entropy": 1.0,
                "conditional_entropy": 0.5,
                "active_experts": number / 2,
            }
            for layer in range(2)
            for kind, number in (("attention", 4), ("mlp", experts))
        ]
        use.append({"step": step, "routers": routers})
        if step % 20 == 0:
            policies = {
                "dense": {"perplexity": 20.5, "active_share": 1.0},
                "topk 2": {"perplexity": 21.75, "active_share": 0.4},
                "threshold 0.48": {"perplexity": 20.9, "active_share": 0.55},
            }
            metrics.append({"step": step, "validation_loss": loss, "policies": policies})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metrics))
    (folder / "expert_use.jsonl").write_text("".join(json.dumps(line) + "\n" for line in use))
    (folder / "config.yaml").write_text(f"model: {{num_experts: {experts}, num_hidden_layers: 2, vocab_size: 128}}\n")
    return folder


def evaluation(checkpoint: Path) -> dict[str, Any]:
    routers = [
        {"layer": layer, "kind": kind, "active_experts": 2.0, "tokens_by_active_experts": [0, 0.5, 0.25, 0.25]}
        for layer in range(2)
        for kind in ("attention", "mlp")
    ]
    policies = {
        f"threshold {eps}": {
            "policy": {"expert_policy": "threshold", "expert_threshold": eps},
            "perplexity": 20 + eps,
            "active_share": 0.9 - 0.3 * eps,
            "routers": routers,
        }
        for eps in (0.3, 0.48, 1.0)
    }
    return {"checkpoint": str(checkpoint), "parameters_without_embeddings": 1_000_000, "policies": policies}


def report(output: Path, *arguments: object) -> Reader:
    assert main(["report", *map(str, arguments), "--output", str(output)]) == 0
    return Reader(output.read_text(encoding="utf-8"))


def test_one_page_shows_everything_and_loads_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine")
    (run / "evaluation.json").write_text(json.dumps(evaluation(run)))

    page = report(tmp_path / "report.html", run)

    assert page.loaded == []
    assert page.headings == [
        "Final figures",
        "Loss",
        "Mutual-information loss",
        "Perplexity against active parameters",
        "Cost of sparse policies during training",
        "Active experts per layer",
        "Active experts per token",
        "Active experts during training",
        "Specialisation of the experts",
        "Expert balance",
        "Throughput",
    ]
    assert page.pictures == len(page.headings) - 1
    for cell in ("3.2500", "3.0000", "-0.4000", "4,096", "40", "21.750", "40.0%", "threshold 0.48", "20.480"):
        assert cell in page.cells
    assert "mine, threshold 0.48" in page.texts


def test_several_runs_share_the_axes_and_their_names_are_text(tmp_path: Path) -> None:
    write_run(tmp_path / "a<i>&" / "run", loss=3.0)
    write_run(tmp_path / "b" / "run", loss=2.5, experts=16)
    (tmp_path / "elsewhere.json").write_text(json.dumps(evaluation(tmp_path / "no_run")))

    page = report(
        tmp_path / "report.html",
        tmp_path / "a<i>&",
        tmp_path / "b" / "run",
        "--evaluation",
        tmp_path / "elsewhere.json",
    )

    text = page.texts
    for name in ("a<i>&/run", "b/run", "elsewhere"):
        assert name in page.cells
        assert any(name in part for part in text)
    assert {"3.0000", "2.5000", "20.300"} <= set(page.cells)


def test_tokens_are_those_of_a_growing_batch(tmp_path: Path) -> None:
    lines = [{"step": step, "tokens": tokens, "lm_loss": 3.0} for step, tokens in ((50, 51_200), (100, 870_400))]
    folder = tmp_path / "ramp"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))

    (run,) = read_runs([folder], [])

    assert [run.tokens_at(step) for step in (0, 25, 50, 75, 100)] == [0, 25_600, 51_200, 460_800, 870_400]


def test_evaluations_on_other_data_are_other_curves_and_none_counts_twice(tmp_path: Path) -> None:
    run = write_run(tmp_path / "mine")
    for name, worse in (("evaluation_text", 0), ("evaluation_code", 30)):
        result = evaluation(run)
        for figures in result["policies"].values():
            figures["perplexity"] += worse
        (run / f"{name}.json").write_text(json.dumps(result))

    (found,) = read_runs([run], [run / "evaluation_text.json"])
    figure = sparse_perplexity([found])

    assert list(found.evaluations) == ["evaluation_code", "evaluation_text"]
    assert figure is not None
    curves = [ys for line in figure.axes[0].lines if len(ys := np.asarray(line.get_ydata())) > 1]
    np.testing.assert_allclose(curves, [[51.0, 50.48, 50.3], [21.0, 20.48, 20.3]])
    assert report(tmp_path / "page.html", run).cells.count("evaluation_code") == 3  # a row per policy


def test_many_runs_have_a_row_each(tmp_path: Path) -> None:
    names = [f"run_{number}_with_a_long_name" for number in range(4)]
    for name in names:
        write_run(tmp_path / name)

    page = report(tmp_path / "page.html", tmp_path)

    assert page.cells[:3] == ["parameters without embeddings", "steps", "tokens"]
    assert [cell for cell in page.cells if cell in names][:4] == names
    assert "Report of 4 runs" in page.texts
    assert [text for text in page.texts if "per run" in text or "each run" in text] == [
        "12 rows: each run under each policy",  # folded up, that the pictures are seen
        *["a panel per run"] * 2,
    ]


def test_pictures_of_many_runs_have_room_and_a_colour_each(tmp_path: Path) -> None:
    for number in range(40):
        run = write_run(tmp_path / f"run_{number}_with_a_long_name")
        result = evaluation(run)
        layers = [{"mlp": {"eps": 0.4}, "attention": {"eps": 0.4}}] * 2  # calibrated: no one eps for all
        policy = {"expert_policy": "threshold", "expert_policy_layers": layers}
        result["policies"] = {"mine": result["policies"]["threshold 1.0"] | {"policy": policy}, **result["policies"]}
        (run / "evaluation.json").write_text(json.dumps(result))
    runs = read_runs([tmp_path], [])

    figure = losses(runs)

    assert figure is not None
    assert as_svg(lambda _: figure, runs)  # lays it out
    assert figure.axes[0].get_window_extent().height / figure.dpi > 2.0  # inches, below fourteen rows of names
    lines = [line for line in figure.axes[0].lines if str(line.get_label()).startswith("run_")]
    assert len({line.get_color() for line in lines}) == 40
    per_layer = active_per_layer(runs)
    assert per_layer is not None
    for axis in per_layer.axes:
        assert [line.get_label() for line in axis.lines] == [f"{run.name}, threshold 0.48" for run in runs]


def test_a_line_that_is_cut_short_is_left_out_with_a_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "crashed")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 45, "lm_lo')
    lines = (run / "expert_use.jsonl").read_text().splitlines(keepends=True)
    (run / "expert_use.jsonl").write_text("".join([lines[0], "?\n", *lines[1:]]))

    page = report(tmp_path / "report.html", run)

    remarks = [
        "crashed: The last line of metrics.jsonl is cut short and left out.",
        "crashed: 1 lines of expert_use.jsonl cannot be read and are left out: 2.",
    ]
    printed = capsys.readouterr().out
    assert all(remark in page.texts and remark in printed for remark in remarks)
    assert "40" in page.cells


def test_a_validation_of_a_diverged_model_is_left_out(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        policies = {"dense": {"perplexity": None, "active_share": 1.0}}
        file.write(json.dumps({"step": STEPS, "validation_loss": 800.0, "policies": policies}) + "\n")

    page = report(tmp_path / "report.html", run)

    assert "3.0000" in page.cells


def test_a_run_without_expert_use_says_what_is_not_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    (run / "expert_use.jsonl").unlink()
    (run / "config.yaml").write_text("model: {hidden_size: many}\n")

    page = report(tmp_path / "report.html", run)

    assert "Expert balance" not in page.headings
    assert any("No data for: Active experts per layer, Active experts per token" in text for text in page.texts)
    assert any("config.yaml cannot be read" in text for text in page.texts)


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        (None, "it holds no run"),
        ("", "metrics.jsonl: has no whole line yet"),
        ('{"step": 5, "lm_l', "metrics.jsonl: has no whole line yet"),
    ],
)
def test_a_run_without_lines_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: str | None, message: str
) -> None:
    (tmp_path / "run").mkdir()
    if lines is not None:
        (tmp_path / "run" / "metrics.jsonl").write_text(lines)

    with pytest.raises(SystemExit) as end:
        main(["report", str(tmp_path / "run"), "--output", str(tmp_path / "report.html")])

    assert end.value.code == 1
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert not (tmp_path / "report.html").exists()


def test_places_and_results_that_do_not_exist(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = write_run(tmp_path / "run")
    (tmp_path / "other.json").write_text("{}")
    output = str(tmp_path / "report.html")
    for arguments, message in (
        ([str(tmp_path / "no")], "no such folder"),
        ([str(run), "--evaluation", str(tmp_path / "other.json")], "not a result of evaluate"),
        ([str(run), "--evaluation", str(tmp_path / "no.json")], "cannot be read"),
    ):
        with pytest.raises(SystemExit):
            main(["report", *arguments, "--output", output])
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["report", str(run), "--output", str(tmp_path / "no" / "report.html")])
    assert "its folder does not exist" in capsys.readouterr().err
