"""Where tokens are masked, loss and gradient are means over the tokens that count, however a batch is cut."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F

from dsmoe_megatron.config import Config, PolicyConfig
from tests.layout_cases import TOLERANCE, differences
from tests.training_jobs import Trace, micro_batches, run_layout, tiny_config
from tests.worker_pool import WorkerPool

SAMPLES = 8
STEPS = 2


def config_of(micro_batch_size: int, parallel: dict[str, Any] | None = None) -> Config:
    """Without mutual-information losses, which are taken over micro-batches; each word of a sample is a document."""
    model = {"num_hidden_layers": 2, "mi_alpha_attention": 0.0, "mi_alpha_mlp": 0.0}
    return tiny_config(model, parallel, {"separate_documents": True}, micro_batch_size=micro_batch_size)


@pytest.fixture(scope="module")
def whole(worker_pool: WorkerPool) -> Trace:
    """One process, one micro-batch."""
    return run_layout(worker_pool, config_of(SAMPLES), 1, STEPS)


def check_equal(actual: Trace, expected: Trace) -> None:
    found = differences(actual, expected)
    assert {name: value for name, value in found if name != "mi_loss" and not value <= TOLERANCE} == {}, found


@pytest.mark.parametrize(
    ("micro_batch_size", "processes", "parallel"),
    [
        (1, 1, {}),
        (2, 1, {}),
        (4, 1, {}),
        (1, 2, {}),
        (4, 2, {}),
        (1, 2, {"pipeline": 2}),
        (1, 2, {"context": 2}),
        (2, 4, {"context": 2}),
    ],
    ids=["1", "2", "4", "1, DP2", "4, DP2", "1, PP2", "1, CP2", "2, CP2 x DP2"],
)
def test_no_cut_of_the_batch_changes_what_is_trained(
    worker_pool: WorkerPool, whole: Trace, micro_batch_size: int, processes: int, parallel: dict[str, Any]
) -> None:
    config = config_of(micro_batch_size, parallel)

    check_equal(run_layout(worker_pool, config, processes, STEPS), whole)


@pytest.mark.usefixtures("with_deepspeed")
@pytest.mark.parametrize(
    ("micro_batch_size", "stage", "parallel"),
    [(1, 1, {}), (4, 3, {}), (2, 2, {"context": 2})],
    ids=["1, ZeRO-1, DP2", "4, ZeRO-3, DP2", "2, ZeRO-2, CP2"],
)
def test_no_cut_of_the_batch_changes_what_zero_trains(
    worker_pool: WorkerPool, whole: Trace, micro_batch_size: int, stage: int, parallel: dict[str, Any]
) -> None:
    config = config_of(micro_batch_size, parallel)
    config.engine.name, config.engine.zero_stage = "deepspeed", stage

    check_equal(run_layout(worker_pool, config, 2, STEPS), whole)


def evaluated_job(config: Config) -> tuple[float, float]:
    """What the engine says of a global batch, and the mean over its tokens by torch's cross-entropy."""
    from dsmoe_megatron.model.core_attention import document_starts
    from dsmoe_megatron.runtime.distributed import model_parallel_groups
    from dsmoe_megatron.training.engines.megatron import MegatronEngine

    with model_parallel_groups(config.parallel, config.train.seed):
        engine = MegatronEngine(config, torch.device("cpu"))
        batches = micro_batches(config, 0, 0, 1)
        loss = engine.evaluate(batches)
        tokens_BS, labels_BS, mask_BS, positions_BS = (
            torch.cat([batch[name] for batch in batches]) for name in ("tokens", "labels", "loss_mask", "position_ids")
        )
        logits_BSV = engine.chunks[0](tokens_BS, positions_BS, document_starts(positions_BS, 0, 1)).detach()
        losses_T = F.cross_entropy(logits_BSV.flatten(0, 1).double(), labels_BS.flatten(), reduction="none")
        return loss, float(losses_T[mask_BS.flatten() == 1].mean())


@pytest.mark.parametrize("micro_batch_size", [1, 8])
def test_the_loss_is_the_mean_over_the_tokens_that_count(worker_pool: WorkerPool, micro_batch_size: int) -> None:
    ((loss, expected),) = worker_pool.run(1, evaluated_job, config_of(micro_batch_size))

    assert loss == pytest.approx(expected, rel=1e-6)


def validations_job(config: Config, sizes: list[int]) -> list[dict[str, Any]]:
    """Validate on the same samples, as global batches of so many micro-batches of each rank."""
    from megatron.core import parallel_state

    from dsmoe_megatron.runtime.distributed import model_parallel_groups
    from dsmoe_megatron.training.engines.megatron import MegatronEngine
    from dsmoe_megatron.training.validation import validate

    with model_parallel_groups(config.parallel, config.train.seed):
        engine = MegatronEngine(config, torch.device("cpu"))
        rank, ranks = parallel_state.get_data_parallel_rank(), parallel_state.get_data_parallel_world_size()
        whole = micro_batches(config, 0, rank, ranks)
        cuts = [[whole[first : first + size] for first in range(0, len(whole), size)] for size in sizes]
        return [validate(engine, batches, config, lambda: None) for batches in cuts]


@pytest.mark.parametrize("processes", [1, 2])
def test_validation_does_not_depend_on_how_its_samples_are_cut(worker_pool: WorkerPool, processes: int) -> None:
    one_batch, cut = config_of(SAMPLES), config_of(1)
    for config in (one_batch, cut):
        config.evaluation.policies = [PolicyConfig("topk", num_experts_per_tok=2)]
    [whole] = worker_pool.run(1, validations_job, one_batch, [1])[0]

    for other in worker_pool.run(processes, validations_job, cut, [SAMPLES // processes, 2, 1])[0]:
        assert other["validation_loss"] == pytest.approx(whole["validation_loss"], rel=TOLERANCE)
        for name, policy in whole["policies"].items():
            assert other["policies"][name] == pytest.approx(policy, rel=TOLERANCE)
