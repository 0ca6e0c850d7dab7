"""DeepSpeed's ZeRO trains to the numbers of megatron-core's engine: losses, gradient norms, gradients."""

import pytest

from tests.deepspeed_cases import CASES, BothEngines, Case
from tests.layout_cases import differences
from tests.worker_pool import WorkerPool

pytestmark = pytest.mark.usefixtures("with_deepspeed")


@pytest.fixture(scope="module")
def engines(worker_pool: WorkerPool, tmp_path_factory: pytest.TempPathFactory) -> BothEngines:
    return BothEngines(worker_pool, tmp_path_factory.mktemp("settings"))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_the_engine_of_megatron_core(engines: BothEngines, case: Case) -> None:
    expected, limits = engines.megatron(case), engines.limits(case)

    actual = engines.zero(case)

    found = differences(actual, expected)
    assert {name: value for name, value in found if not value <= limits[name]} == {}, found
    initial = expected.initial_weights
    assert [key for key, weight in initial.items() if not actual.initial_weights[key].equal(weight)] == []
