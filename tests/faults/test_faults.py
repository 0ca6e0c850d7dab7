"""A short campaign of faults against a real training run; `make faults` runs a long one."""

from pathlib import Path

import pytest

from tests.faults.campaign import Campaign
from tests.pretrain_job import make_small_data

# mounts, and faults that take torchrun half a minute to end, are left to `make faults`
KINDS = ["SIGKILL during a save", "truncated .bin", "SIGTERM to torchrun, twice", "SIGKILL of torchrun"]
KINDS_UNDER_DEEPSPEED = ["SIGKILL of a rank", "SIGKILL during a save", "SIGTERM to torchrun, twice"]


def test_a_run_under_faults_is_the_run_without(tmp_path: Path) -> None:
    campaign = Campaign(tmp_path, make_small_data(tmp_path / "data"), seed=1, steps=30)

    outcomes = campaign.run(KINDS, "run")

    assert [outcome.kind for outcome in outcomes] == KINDS
    assert [outcome for outcome in outcomes if outcome.wrong or outcome.hung or outcome.survivors] == []


@pytest.mark.usefixtures("with_deepspeed")
def test_a_run_under_deepspeed_and_faults_is_the_run_without(tmp_path: Path) -> None:
    engine = {"name": "deepspeed", "zero_stage": 2}
    campaign = Campaign(tmp_path, make_small_data(tmp_path / "data"), seed=1, steps=25, engine=engine)

    outcomes = campaign.run(KINDS_UNDER_DEEPSPEED, "run")

    assert [outcome.kind for outcome in outcomes] == KINDS_UNDER_DEEPSPEED
    assert [outcome for outcome in outcomes if outcome.wrong or outcome.hung or outcome.survivors] == []
