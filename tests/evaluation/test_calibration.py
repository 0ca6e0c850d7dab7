"""Calibration: the effects are real differences, the target is met, and the result is what exports and sweeps take."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from checkpoints_tools.export_hf import main as export_main
from dsmoe_megatron.__main__ import main
from dsmoe_megatron.evaluation.calibration import Target
from dsmoe_megatron.evaluation.loading import LoadedModel, load_model
from dsmoe_megatron.evaluation.perplexity import Router, sweep
from dsmoe_megatron.evaluation.sensitivity import Rule, effects, policy_of
from dsmoe_megatron.evaluation.windows import Batch, WindowOptions, make_batches, open_streams
from tests.evaluation.conftest import TrainedRun


@pytest.fixture(scope="module")
def loaded(trained_run: TrainedRun) -> LoadedModel:
    return load_model(trained_run.folder)


@pytest.fixture(scope="module")
def batches(trained_run: TrainedRun, loaded: LoadedModel) -> list[Batch]:
    options = WindowOptions(batch_size=16).checked(loaded)
    return make_batches(open_streams([trained_run.data], loaded), options)


@pytest.mark.parametrize(("rule", "limit"), [("threshold", 0.9), ("topk", 3)])
def test_effects_are_the_differences_of_whole_evaluations(
    loaded: LoadedModel, batches: list[Batch], rule: Rule, limit: float
) -> None:
    """Although layers below the changed one are not computed again."""
    limits: dict[Router, float] = {(layer, kind): limit for layer in range(4) for kind in ("attention", "mlp")}

    found = effects(loaded, batches[:2], rule, limits, lambda _: None)

    assert set(found) == set(limits)
    for router in ((0, "mlp"), (2, "attention"), (3, "mlp")):
        options = found[router]
        assert options[0].limit == limit
        assert len(options) >= 3
        changed = options[-1]
        policies = {
            "before": policy_of(rule, limits, 4),
            "after": policy_of(rule, {**limits, router: changed.limit}, 4),
        }
        measured = sweep(loaded, policies, batches[:2])
        difference = measured["after"].loss - measured["before"].loss
        parameters = measured["after"].active(loaded)[0] - measured["before"].active(loaded)[0]
        assert changed.loss == pytest.approx(difference, abs=2e-7)
        assert changed.parameters == pytest.approx(parameters, abs=1e-6 * loaded.architecture.hidden_size**2)
        assert changed.parameters != 0


@pytest.mark.parametrize(
    ("rule", "target"),
    [
        ("threshold", ("--target-share", 0.6)),
        ("threshold", ("--target-perplexity-loss", 0.01)),
        ("topk", ("--target-share", 0.76)),
        ("topk", ("--target-perplexity-loss", 0.01)),
    ],
)
def test_meets_the_target_at_no_more_cost_than_the_uniform_policy(
    trained_run: TrainedRun, capsys: pytest.CaptureFixture[str], tmp_path: Path, rule: str, target: tuple[str, float]
) -> None:
    file = tmp_path / "policy.json"
    windows = ["--max-tokens", 1024, "--batch-size", 32]
    arguments = ["--checkpoint", trained_run.folder, "--data", trained_run.data, "--json", *windows]

    found = run(capsys, *arguments, "--calibrate", rule, *target, "--save-policy", file)
    result = run(capsys, *arguments, "--policy-file", file)

    policy = json.loads(file.read_text())
    assert found["policy"] == policy
    assert policy["expert_policy"] == rule
    # met in a real evaluation of all windows; closely where the limit is a number that can be any
    dense, calibrated = result["policies"]["dense"], result["policies"][str(file)]
    loss = calibrated["perplexity"] / dense["perplexity"] - 1
    value = calibrated["active_share"] if target[0] == "--target-share" else loss
    assert value <= target[1] + 1e-6
    assert rule == "topk" or value >= target[1] - 0.01
    # what is kept is not worse than the uniform policy where neither was fitted
    held_out = {row["policy"]: row for row in found["measured"] if row["windows"] == "held-out"}
    kept, uniform = held_out[found["kept"]], held_out["uniform"]
    cost = "perplexity" if target[0] == "--target-share" else "active_share"
    assert kept[cost] <= uniform[cost]
    assert kept["limits"] == policy
    # and where they were fitted, limits per layer are better
    seen = {row["policy"]: row for row in found["measured"] if row["windows"] == "calibration"}
    assert (
        seen["per layer"]["loss"] / seen["uniform"]["loss"] < 1
        or seen["per layer"]["active_share"] < seen["uniform"]["active_share"]
    )


@dataclass
class Measured:
    """What a comparison asks of a measurement."""

    perplexity: float
    share: float

    def active(self, _loaded: Any) -> tuple[float, float]:
        return 100 * self.share, self.share


@pytest.mark.parametrize(
    ("loss", "share", "is_better"),
    [
        (0.029, 0.4, True),
        (0.029, 0.6, False),
        (0.035, 0.4, False),  # it was fitted to windows that were few
        (0.035, 0.6, False),
    ],
)
def test_a_wanted_loss_must_hold_on_windows_that_were_not_fitted(loss: float, share: float, is_better: bool) -> None:
    dense, uniform, ours = Measured(10.0, 1.0), Measured(10.2, 0.5), Measured(10 + 10 * loss, share)
    target: Any = Target(None, 0.03)

    assert target.is_better(ours, uniform, dense, None) == is_better
    uniform_that_misses_too = Measured(10.4, 0.5)
    assert target.is_better(ours, uniform_that_misses_too, dense, None) == (share < 0.5)


def test_an_export_carries_the_calibrated_policy(
    trained_run: TrainedRun, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    layers = [{"mlp": {"eps": 0.5 + 0.1 * layer}, "attention": {"eps": 1.1}} for layer in range(4)]
    file = tmp_path / "policy.json"
    file.write_text(json.dumps({"expert_policy": "threshold", "expert_policy_layers": layers}))
    output = tmp_path / "export"
    common = ["export_hf", "--checkpoint", str(trained_run.folder), "--output", str(output)]

    monkeypatch.setattr("sys.argv", [*common, "--policy-file", str(file)])
    export_main()

    config = json.loads((output / "config.json").read_text())
    assert (config["expert_policy"], config["expert_policy_layers"]) == ("threshold", layers)
    ours = run(capsys, "--checkpoint", trained_run.folder, "--data", trained_run.data, "--policy-file", file, "--json")
    # an export does not know how long the samples of its training were
    theirs = run(capsys, "--checkpoint", output, "--data", trained_run.data, "--json", "--sequence-length", 32)
    assert list(theirs["policies"]) == ["dense", "threshold per layer"]
    for name in ("perplexity", "active_share"):
        assert theirs["policies"]["threshold per layer"][name] == pytest.approx(
            ours["policies"][str(file)][name], rel=1e-6
        )

    monkeypatch.setattr("sys.argv", [*common, "--overwrite", "--policy-file", str(file), "--top-k", "2"])
    with pytest.raises(SystemExit):
        export_main()
    assert "names the whole policy; leave the other policy options out" in capsys.readouterr().err


def run(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    capsys.readouterr()
    assert main(["evaluate", *map(str, arguments)]) == 0
    result: dict[str, Any] = json.loads(capsys.readouterr().out)
    return result
