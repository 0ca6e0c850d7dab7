"""Every layout of a recipe on a number of GPUs: which run, which fit, which is fastest, and why the others lose.

Tried are tensor, sequence, pipeline, virtual pipeline, expert and context parallelism, micro-batches of powers of two,
and recomputation. Pipeline stages are even and `expert_tensor` is null; all else is the recipe's, batch and overlap
included. Whether a layout runs is for config_rules.check_config to say.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from dsmoe_megatron.config import Config
from dsmoe_megatron.config_rules import check_config, data_parallel_size
from dsmoe_megatron.errors import ConfigurationError
from dsmoe_megatron.planning.estimate import RECOMPUTE_MODES, require_vocabulary, with_recompute
from dsmoe_megatron.planning.hardware import Hardware
from dsmoe_megatron.planning.memory import rank_memory
from dsmoe_megatron.planning.step_time import StepTime, distinct_stages, step_time

GIB = 2**30
NO_DIFFERENCE = 0.001
"""Relative step time below which memory decides."""


@dataclass(frozen=True)
class Candidate:
    """One layout that runs.

    Attributes:
        config: the recipe in this layout.
        data: data-parallel size.
        memory: of the fullest rank [bytes].
        time: None where it does not fit, or needs no time to be known to lose.
        reason: why it loses; empty for the winner.
    """

    config: Config
    data: int
    memory: int
    time: StepTime | None
    reason: str = ""


@dataclass(frozen=True)
class SearchResult:
    """What a search found.

    Attributes:
        ranked: layouts that fit, fastest first.
        too_large: layouts that do not fit, the smallest first.
        invalid: key of the rule that is broken -> how many combinations of sizes break it first.
        needlessly_recomputed: variants left out, since the same layout fits while recomputing less, which is faster.
    """

    ranked: list[Candidate]
    too_large: list[Candidate]
    invalid: dict[str, int]
    needlessly_recomputed: int

    @property
    def tried(self) -> int:
        return len(self.ranked) + len(self.too_large) + self.needlessly_recomputed + sum(self.invalid.values())

    @property
    def reasons(self) -> dict[str, int]:
        """Why layouts lose, in a word -> how many."""
        counts: Counter[str] = Counter()
        counts.update(candidate.reason.split(",")[0].split(":")[0] for candidate in self.ranked[1:])
        if self.too_large:
            counts["does not fit"] = len(self.too_large)
        if self.needlessly_recomputed:
            counts["recomputes what fits"] = self.needlessly_recomputed
        return dict(counts.most_common())


def search(config: Config, world_size: int, hardware: Hardware) -> SearchResult:
    """Try every layout.

    Args:
        config: recipe; its own layout, micro-batch and recomputation do not matter.
        world_size: GPUs.
        hardware: their figures.

    Raises:
        ConfigurationError: the vocabulary is unknown, or the hardware has no peak for train.precision.
    """
    require_vocabulary(config)
    fitting: list[Candidate] = []
    too_large: list[Candidate] = []
    invalid: Counter[str] = Counter()
    needless = 0
    for layout in _layouts(config, world_size):
        try:
            check_config(layout, world_size)
        except ConfigurationError as error:
            invalid[error.key] += 1
            continue
        data = data_parallel_size(layout, world_size)
        for index, mode in enumerate(RECOMPUTE_MODES):
            variant = with_recompute(layout, mode)
            memory = _peak_memory(variant, world_size)
            if memory <= hardware.usable_memory:
                fitting.append(Candidate(variant, data, memory, step_time(variant, world_size, hardware)))
                needless += len(RECOMPUTE_MODES) - 1 - index
                break
            reason = f"does not fit: {memory / GIB:.1f} GiB > {hardware.usable_memory / GIB:.1f} GiB"
            too_large.append(Candidate(variant, data, memory, None, reason))
    return SearchResult(
        ranked=_ranked(fitting),
        too_large=sorted(too_large, key=lambda candidate: candidate.memory),
        invalid=dict(invalid.most_common()),
        needlessly_recomputed=needless,
    )


def _layouts(config: Config, world_size: int) -> Iterator[Config]:
    """Combinations of sizes; those that no rule could pass (larger than what they split) are not made."""
    model, train = config.model, config.train
    for tensor in _divisors(world_size):
        for pipeline in _divisors(world_size // tensor):
            if pipeline > model.num_hidden_layers:
                continue
            for context in _divisors(world_size // (tensor * pipeline)):
                data = world_size // (tensor * pipeline * context)
                for expert in _divisors(data * context) if model.has_mlp_router else [1]:
                    for chunks in _divisors(model.num_hidden_layers // pipeline) if pipeline > 1 else [1]:
                        for sequence in (False, True) if tensor > 1 else (False,):
                            parallel = replace(
                                config.parallel,
                                tensor=tensor,
                                sequence=sequence,
                                pipeline=pipeline,
                                virtual_pipeline=chunks,
                                first_stage_layers=None,
                                last_stage_layers=None,
                                expert=expert,
                                expert_tensor=None,
                                context=context,
                            )
                            for micro_batch in _powers_of_two(train.global_batch_size // data):
                                batch = replace(train, micro_batch_size=micro_batch)
                                yield replace(config, parallel=parallel, train=batch)


def _divisors(number: int) -> list[int]:
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _powers_of_two(largest: int) -> list[int]:
    return [2**exponent for exponent in range(largest.bit_length())]


def _peak_memory(config: Config, world_size: int) -> int:
    layers = config.parallel.layers_per_stage(config.model.num_hidden_layers)
    return max(rank_memory(config, world_size, rank).total for rank in distinct_stages(layers))


def _ranked(fitting: list[Candidate]) -> list[Candidate]:
    """Fastest first; each of the others with the term that costs it most against the winner."""
    if not fitting:
        return []
    fastest = min(_time(candidate).total for candidate in fitting)
    winner = min(
        (candidate for candidate in fitting if _time(candidate).total < fastest * (1 + NO_DIFFERENCE)),
        key=lambda candidate: candidate.memory,
    )
    rest = [candidate for candidate in fitting if candidate is not winner]
    in_order = [winner, *sorted(rest, key=lambda candidate: (_time(candidate).total, candidate.memory))]
    best = _time(winner)
    return [in_order[0], *(replace(each, reason=_why_slower(_time(each), best)) for each in in_order[1:])]


def _why_slower(time: StepTime, best: StepTime) -> str:
    if time.total < best.total * (1 + NO_DIFFERENCE):
        return "as fast, needs more memory"
    more = {name: seconds - best.terms.get(name, 0.0) for name, seconds in time.terms.items()}
    term = max(more, key=lambda name: more[name])
    return f"slower by {term}: +{more[term]:.2f} s, +{time.total / best.total - 1:.1%} in all"


def _time(candidate: Candidate) -> StepTime:
    assert candidate.time is not None  # of layouts that fit
    return candidate.time
