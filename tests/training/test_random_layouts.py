"""Random small models under random layouts: what the rules accept matches the single process, the rest is one line."""

from dataclasses import replace
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from dsmoe_megatron.config import Config, ParallelConfig
from dsmoe_megatron.config_rules import check_config
from dsmoe_megatron.errors import ConfigurationError
from tests.layout_cases import TOLERANCE, differences
from tests.training_jobs import Trace, run_layout, tiny_config
from tests.worker_pool import WorkerPool

STEPS = 2
SIZES = st.sampled_from([1, 1, 1, 2, 4])
MODELS = st.fixed_dictionaries(
    {
        "num_hidden_layers": st.integers(1, 4),
        "num_key_value_heads": st.sampled_from([1, 2, 3]),
        "num_attention_experts": st.integers(2, 4),
        "attention_type": st.sampled_from(["moa", "moa", "gqa"]),
        "head_dim": st.sampled_from([8, 16]),
        "num_experts": st.sampled_from([1, 3, 4, 6]),
        "moe_intermediate_size": st.sampled_from([8, 12, 20]),
        "hidden_act": st.sampled_from(["gelu", "silu"]),
        "gated_mlp": st.booleans(),
        "router_type": st.sampled_from(["linear", "mlp"]),
        "norm_type": st.sampled_from(["rmsnorm", "layernorm"]),
        "tie_word_embeddings": st.booleans(),
        "vocab_size": st.sampled_from([256, 250]),
    }
)
LAYOUTS = st.fixed_dictionaries(
    {
        "tensor": SIZES,
        "sequence": st.booleans(),
        "pipeline": SIZES,
        "virtual_pipeline": st.sampled_from([1, 1, 2]),
        "first_stage_layers": st.sampled_from([None, None, None, 1]),
        "expert": SIZES,
        "expert_tensor": st.sampled_from([None, None, 1, 2]),
        "context": SIZES,
        "overlap": st.booleans(),
    }
)
PROCESSES = st.sampled_from([1, 2, 4])


def random_config(model: dict[str, Any], parallel: dict[str, Any], separate_documents: bool) -> Config:
    heads = model["num_key_value_heads"] * model["num_attention_experts"]
    return tiny_config({**model, "num_attention_heads": heads}, parallel, {"separate_documents": separate_documents})


def refusal(config: Config, processes: int) -> ConfigurationError | None:
    try:
        check_config(config, processes)
    except ConfigurationError as error:
        return error
    return None


class Tried:
    """How many random layouts were trained, so that a run which trains none is noticed."""

    count = 0


@pytest.fixture(scope="module")
def tried() -> Tried:
    return Tried()


@settings(
    max_examples=400,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate],
    suppress_health_check=list(HealthCheck),
)
@given(model=MODELS, parallel=LAYOUTS, separate_documents=st.booleans(), processes=PROCESSES)
def test_a_random_layout_matches_or_is_refused_in_one_line(
    worker_pool: WorkerPool,
    tried: Tried,
    model: dict[str, Any],
    parallel: dict[str, Any],
    separate_documents: bool,
    processes: int,
) -> None:
    config = random_config(model, parallel, separate_documents)
    error = refusal(config, processes)
    if error is not None:
        assert "\n" not in str(error)
        assert error.key in str(error)
        return
    if processes == 1 or tried.count == 12:
        return
    tried.count += 1

    expected: Trace = run_layout(worker_pool, replace(config, parallel=ParallelConfig()), 1, STEPS)
    found = differences(run_layout(worker_pool, config, processes, STEPS), expected)

    assert {name: value for name, value in found if not value <= TOLERANCE} == {}, found


def test_enough_of_them_were_trained(tried: Tried) -> None:
    assert tried.count == 12
