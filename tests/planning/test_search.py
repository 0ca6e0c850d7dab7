"""The search for a layout: complete, consistent with the estimate, and with a reason for every loser."""

from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from dsmoe_megatron.config import Config, ParallelConfig
from dsmoe_megatron.config_parsing import load_config
from dsmoe_megatron.config_rules import check_config
from dsmoe_megatron.errors import ConfigurationError
from dsmoe_megatron.planning.estimate import estimate
from dsmoe_megatron.planning.hardware import Hardware, load_hardware
from dsmoe_megatron.planning.search import Candidate, SearchResult, search
from tests.training_jobs import tiny_config

ROOT = Path(__file__).resolve().parents[2]
GPUS = 4  # few, of a model that is large for them


@pytest.fixture(scope="module")
def recipe() -> Config:
    return load_config(ROOT / "launchers" / "recipes" / "dsmoe_6b.yaml")


@pytest.fixture(scope="module")
def h100() -> Hardware:
    return load_hardware("h100")


@pytest.fixture(scope="module")
def result(recipe: Config, h100: Hardware) -> SearchResult:
    return search(recipe, GPUS, h100)


def identity(candidate: Candidate) -> tuple[object, ...]:
    return (*vars(candidate.config.parallel).values(), candidate.config.train.micro_batch_size)


def test_what_the_rules_allow_is_what_is_tried() -> None:
    """On a model small enough to try every combination of sizes here as well."""
    model = tiny_config()
    allowed = set()
    for tensor, pipeline, chunks, expert, context, micro_batch in product((1, 2, 4), repeat=6):
        for sequence in (False, True):
            parallel = ParallelConfig(
                tensor=tensor,
                sequence=sequence,
                pipeline=pipeline,
                virtual_pipeline=chunks,
                expert=expert,
                context=context,
            )
            layout = replace(model, parallel=parallel, train=replace(model.train, micro_batch_size=micro_batch))
            try:
                check_config(layout, 4)
            except ConfigurationError:
                continue
            allowed.add((*vars(parallel).values(), micro_batch))

    found = search(model, 4, load_hardware("h100"))

    tried = {identity(each) for each in found.ranked}
    assert {each for each in tried if each[-1] <= 4} == allowed  # type: ignore[operator]
    assert not found.too_large


def test_every_layout_that_fits_is_ranked_by_its_estimated_time(
    recipe: Config, h100: Hardware, result: SearchResult
) -> None:
    assert len(result.ranked) > 50
    seconds = [candidate.time.total for candidate in result.ranked if candidate.time is not None]
    assert seconds[1:] == sorted(seconds[1:])
    assert seconds[0] <= min(seconds) * 1.001
    for candidate in result.ranked[:: len(result.ranked) // 10]:
        whole = estimate(candidate.config, GPUS, h100)
        assert candidate.time == whole.time
        assert candidate.memory == whole.peak_memory
        assert whole.fits
        assert candidate.config.model == recipe.model


def test_every_loser_has_its_reason(h100: Hardware, result: SearchResult) -> None:
    winner, *losers = result.ranked
    assert winner.reason == ""
    assert all(each.reason.startswith(("slower by ", "as fast, needs more memory")) for each in losers)
    assert len(result.too_large) > 10
    for candidate in result.too_large[::20]:
        assert candidate.memory > h100.usable_memory
        assert candidate.reason == f"does not fit: {candidate.memory / 2**30:.1f} GiB > 70.8 GiB"
        assert not estimate(candidate.config, GPUS, h100).fits
    assert sum(result.reasons.values()) + sum(result.invalid.values()) + 1 == result.tried
    assert result.invalid["parallel.sequence"] > 0


def test_a_layout_that_fits_as_it_is_is_not_recomputed(result: SearchResult) -> None:
    by_layout: dict[tuple[object, ...], list[str]] = {}
    for candidate in (*result.too_large, *result.ranked):
        by_layout.setdefault(identity(candidate), []).append(candidate.config.train.recompute)
    for candidate in result.ranked:
        modes = ["none", "selective", "full"]
        mode = candidate.config.train.recompute
        assert sorted(by_layout[identity(candidate)]) == sorted(modes[: modes.index(mode) + 1])


def test_less_memory_leaves_fewer_layouts_until_none_fits(recipe: Config, h100: Hardware, result: SearchResult) -> None:
    tight = search(recipe, GPUS, replace(h100, memory=h100.memory * 0.7))
    nothing = search(recipe, GPUS, replace(h100, memory=5e9))

    assert 0 < len(tight.ranked) < len(result.ranked)
    assert not nothing.ranked
    assert nothing.too_large[0].memory == min(each.memory for each in nothing.too_large)


def test_an_unknown_vocabulary_is_refused(recipe: Config, h100: Hardware) -> None:
    without = replace(recipe, model=replace(recipe.model, vocab_size=None))

    with pytest.raises(ConfigurationError, match=r"model.vocab_size = None: .* give --model.vocab_size"):
        search(without, GPUS, h100)
