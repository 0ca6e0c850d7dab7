"""The paper's claims, each held against the runs: which figures decide, and what they say.

A figure is a ratio of perplexities of two models of one seed, which read the same samples in the same order, or of one
model under two policies. A claim holds where every one of enough seeds says so, does not where none does, and is not
shown otherwise.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from benchmarks.paper_in_small.result import Result, Spread, by_entry, by_group, loss, loss_as_trained
from benchmarks.paper_in_small.study import PlannedRun

EQUAL = 1.01  # as good as: up to one per cent above
WITHIN = 1.05
FAMILIES = ("dense", "dsmoe", "smoe")
ARCHITECTURES: dict[str, Callable[[PlannedRun], bool]] = {
    "dense": lambda run: run.family == "dense",
    "DS-MoE": lambda run: run.family == "dsmoe" and not run.has_plain_attention,
    "sparse-trained with attention experts": lambda run: run.family == "smoe" and not run.has_plain_attention,
    "attention experts, plain MLP": lambda run: run.family == "moa",
    "DS-MoE with plain attention": lambda run: run.family == "dsmoe" and run.has_plain_attention,
    "sparse-trained with plain attention": lambda run: run.family == "smoe" and run.has_plain_attention,
}
SEEDS, CLOSE_SEEDS = 2, 3  # fewer show nothing; more are needed where the mean ratio is close to the limit
CLOSE = 0.03
ACTIVE = 0.4  # the share of the parameters that the claims are about
SPARSE = 0.3  # and the one that shows how much sparsity a size tolerates
Loss = Callable[[Result], float | None]  # in nats per token, of a run that has it


@dataclass(frozen=True)
class Finding:
    """What the runs say of a claim.

    Attributes:
        group: of runs that it is about.
        claim: in a sentence.
        measure: which ratio decides.
        ratios: of each seed.
        limit: that the ratio must not be above.
    """

    group: str
    claim: str
    measure: str
    ratios: Spread
    limit: float

    @property
    def seeds_needed(self) -> int:
        """That the verdict wants."""
        is_close = bool(self.ratios.values) and abs(self.ratios.mean / self.limit - 1) < CLOSE
        return CLOSE_SEEDS if is_close else SEEDS

    @property
    def verdict(self) -> str:
        holds = [ratio <= self.limit for ratio in self.ratios.values]
        if len(holds) < self.seeds_needed or any(holds) != all(holds):
            return "not shown"
        return "yes" if all(holds) else "no"


def findings(results: Sequence[Result]) -> list[Finding]:
    """All claims, for each group of comparable runs that has the models that they are about."""
    results = [result for result in results if result.evaluation is not None]
    found: list[Finding] = []
    for name, runs in by_group(results).items():
        models = {family: best_of(runs, family) for family in FAMILIES}
        if models["dsmoe"]:
            found += _of_group(name, **models)
        found += _at_few_experts(name, runs)
        found += _with_plain_attention(name, runs, models["dsmoe"], models["smoe"])
    return [*found, *_sizes(results)]


def best_of(results: Sequence[Result], family: str) -> list[Result]:
    """The entry of a family with the least loss of its first seed under the policy that counts: the learning rate, the
    weight of the loss, the number of experts are chosen so.
    """
    return _with_least(_score, [result for result in results if result.run.family == family])


def best_of_architecture(results: Sequence[Result], name: str) -> list[Result]:
    """Its best entry among comparable runs; the first one, where none is as sparse as the claims ask."""
    runs = [result for result in results if ARCHITECTURES[name](result.run)]
    if not runs:
        return []
    return best_of(runs, runs[0].run.family) or next(iter(by_entry(runs).values()))


def _with_least(score: Loss, results: Sequence[Result]) -> list[Result]:
    """The entry whose first seed has the lowest; none where no run has one."""
    entries = by_entry([result for result in results if score(result) is not None])
    return min(entries.values(), key=lambda runs: score(runs[0]) or math.inf, default=[])


def _score(result: Result) -> float | None:
    """DS-MoE is judged by what it is for: its loss with few parameters active."""
    return result.loss_at_share(ACTIVE) if result.run.family == "dsmoe" else loss(result.as_trained)


def _at_low_share(result: Result) -> float | None:
    """A sparse-trained model has fewer experts active than it was trained with, if need be."""
    return result.loss_at_share(SPARSE, "topk" if result.run.family == "smoe" else "threshold")


def _of_group(group: str, dense: list[Result], dsmoe: list[Result], smoe: list[Result]) -> list[Finding]:
    name = dsmoe[0].run.entry
    found = []
    if dense:
        found.append(_as_trained(group, "as good as a dense model of its size", dsmoe, dense, EQUAL))
    sparse = paired(dsmoe, dsmoe, _at_share(ACTIVE), loss_as_trained)
    measure = f"{name} with {ACTIVE:.0%} active / under the dense policy"
    found.append(Finding(group, f"within 5 % with at most {ACTIVE:.0%} active", measure, sparse, WITHIN))
    if smoe:
        share = smoe[0].as_trained["active_share"]
        found.append(_as_trained(group, "better than sparse-trained of equal total", dsmoe, smoe, 1.0))
        measure = f"{name} / {smoe[0].run.entry}, both with {share:.0%} active"
        ratios = paired(dsmoe, smoe, _at_share(share), loss_as_trained)
        found.append(Finding(group, "better than sparse-trained of equal active share", measure, ratios, 1.0))
    for rule in ("topk", "threshold_topk"):
        other = paired(dsmoe, dsmoe, _at_share(ACTIVE), _at_share(ACTIVE, rule))
        measure = f"{name}: threshold / {rule}, {ACTIVE:.0%} active"
        found.append(Finding(group, f"threshold is better than {rule}", measure, other, 1.0))
    return found


def _at_few_experts(group: str, runs: Sequence[Result]) -> Iterator[Finding]:
    """The best DS-MoE and the best sparse-trained model at a share below that of most sparse-trained ones."""
    families = [[run for run in runs if run.run.family == family] for family in ("dsmoe", "smoe")]
    dsmoe, smoe = (_with_least(_at_low_share, of_family) for of_family in families)
    if dsmoe and smoe:
        measure = f"{dsmoe[0].run.entry} / {smoe[0].run.entry}, both with {SPARSE:.0%} active"
        ratios = paired(dsmoe, smoe, _at_low_share, _at_low_share)
        yield Finding(group, "better than sparse-trained with few experts active", measure, ratios, 1.0)


def _with_plain_attention(
    group: str, runs: Sequence[Result], best_dsmoe: list[Result], best_smoe: list[Result]
) -> Iterator[Finding]:
    """Beside sparse-trained models as the paper has them: the best DS-MoE, and that whose attention is plain too."""
    plain = [run for run in runs if run.run.has_plain_attention]
    smoe, plain_dsmoe = best_of(plain, "smoe"), best_of(plain, "dsmoe")
    if smoe and best_dsmoe and smoe != best_smoe:
        claim = "better than sparse-trained with plain attention, as in the paper"
        yield _as_trained(group, claim, best_dsmoe, smoe, 1.0)
    if smoe and plain_dsmoe:
        yield _as_trained(group, "better than sparse-trained, both with plain attention", plain_dsmoe, smoe, 1.0)


def _as_trained(group: str, claim: str, dsmoe: list[Result], others: list[Result], limit: float) -> Finding:
    """A DS-MoE model beside another, each under the policy that it was trained with."""
    measure = f"{dsmoe[0].run.entry} under the dense policy / {others[0].run.entry}"
    return Finding(group, claim, measure, paired(dsmoe, others, loss_as_trained, loss_as_trained), limit)


def _sizes(results: Sequence[Result]) -> Iterator[Finding]:
    """What sparsity costs a DS-MoE model, beside the small one that was trained in the same way."""

    def cost(result: Result) -> float | None:
        at_share = result.loss_at_share(SPARSE)
        return None if at_share is None else at_share - loss(result.as_trained)

    small_entries = by_entry([result for result in results if result.run.model == "dsmoe_4m"])
    for name, large in by_entry([result for result in results if result.run.model == "dsmoe_12m"]).items():
        for small_name, small in small_entries.items():
            if small[0].run.overrides == large[0].run.overrides:
                measure = f"cost of {SPARSE:.0%} active: {name} / {small_name}"
                ratios = paired(large, small, cost, cost)
                yield Finding(large[0].group, "larger models tolerate more sparsity", measure, ratios, 1.0)


def _at_share(share: float, rule: str = "threshold") -> Loss:
    return lambda result: result.loss_at_share(share, rule)


def paired(
    ours: Sequence[Result],
    theirs: Sequence[Result],
    our_loss: Loss,
    their_loss: Loss,
) -> Spread:
    """Ratio of perplexities, seed by seed."""
    by_seed = {result.run.seed: their_loss(result) for result in theirs}
    pairs = [(our_loss(result), by_seed.get(result.run.seed)) for result in ours]
    return Spread([math.exp(our - their) for our, their in pairs if our is not None and their is not None])
