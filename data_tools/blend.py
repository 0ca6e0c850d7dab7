"""Turn a wanted mixture of datasets into the data section of a recipe.

    python data_tools/blend.py --set pile='data/pile_*' code='data/code_*' --share pile=0.9 code=0.1 --budget 30B

A set is one or more datasets of preprocess.py; within a set each dataset weighs by its tokens, so that all of them are
read equally often. What the run is to read of each set is said as shares of a budget, as tokens, or as epochs (passes).
The result is a recipe file of its own, to be given after the model's: `--config dsmoe_1b.yaml --config blend.yaml`.
What the data cannot give is refused.
"""

import glob
import math
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveFloat

from data_tools.indexed_dataset import write_whole
from data_tools.manifest import MANIFEST_ENDING, manifest_path, read_manifest
from dsmoe_megatron.errors import ConfigurationError, DataError, DSMoEError, exit_with
from dsmoe_megatron.recipe_text import recipe_text

MAX_DATASETS = 32766  # megatron-core numbers them in 16 bits and leaves the last numbers out
UNITS = {"": 1, "k": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}
ROUNDING = 1e-6  # relative; shares and epochs are typed by hand


@dataclass(frozen=True)
class Dataset:
    """One dataset of a set: its prefix and manifest."""

    prefix: str
    manifest: dict[str, Any]

    @property
    def tokens(self) -> int:
        return int(self.manifest["tokens"])


@dataclass(frozen=True)
class MixtureSet:
    """A named set of datasets and what the run reads of it.

    Args:
        name: as on the command line.
        datasets: what it is made of.
        read: tokens that the run reads of it, repetitions counted.
    """

    name: str
    datasets: tuple[Dataset, ...]
    read: float

    @property
    def tokens(self) -> int:
        return sum(dataset.tokens for dataset in self.datasets)

    @property
    def epochs(self) -> float:
        return self.read / self.tokens


def blend(
    sets: Sequence[str],
    share: Sequence[str] = (),
    tokens: Sequence[str] = (),
    epochs: Sequence[str] = (),
    budget: str | None = None,
    max_epochs: float = 1.0,
    tokenizer_spec: str | None = None,
) -> str:
    """The recipe file of a mixture. The arguments are those of the command line.

    Returns:
        YAML with the section `data`, below a table of what is read of each dataset.

    Raises:
        ConfigurationError: the mixture is not said well: an unknown set, shares that are not 1 in all.
        DataError: the data cannot give it.
    """
    found = find_sets(sets)
    mixture = [
        MixtureSet(name, datasets, read)
        for (name, datasets), read in zip(
            found.items(), _tokens_to_read(found, share, tokens, epochs, budget), strict=True
        )
    ]
    _require_one_tokenizer(found)
    for each in mixture:
        if each.epochs > max_epochs * (1 + ROUNDING):
            raise DataError(
                f"set {each.name}: {each.read:,.0f} tokens are {each.epochs:.4g} epochs of its {each.tokens:,}, above"
                f" --max-epochs {max_epochs:g}: ask for less, add data, or allow more epochs"
            )
    spec = tokenizer_spec or next(iter(found.values()))[0].manifest["tokenizer"]["spec"]
    return "".join(f"# {line}".rstrip() + "\n" for line in table(mixture)) + recipe(mixture, spec)


def find_sets(definitions: Sequence[str]) -> dict[str, tuple[Dataset, ...]]:
    """The datasets of each set, in the order of the definitions.

    Args:
        definitions: NAME=PREFIX each, the prefix a path or a pattern; a name may stand several times.
    """
    prefixes: dict[str, list[str]] = {}
    for name, pattern in (_split_pair("--set", definition, "NAME=PREFIX") for definition in definitions):
        matching = _matching_prefixes(pattern)
        if not matching:
            raise DataError(f"--set {name}={pattern}: no dataset there: no {pattern}{MANIFEST_ENDING}")
        prefixes.setdefault(name, []).extend(matching)

    everywhere = [Path(prefix).resolve() for of_set in prefixes.values() for prefix in of_set]
    for of_set in prefixes.values():
        for prefix in of_set:
            if everywhere.count(Path(prefix).resolve()) > 1:
                raise DataError(f"--set: {prefix} is named more than once, so it would count twice")
    if len(everywhere) > MAX_DATASETS:
        raise DataError(f"--set: {len(everywhere)} datasets, of which megatron-core blends {MAX_DATASETS} at most")
    sets = {
        name: tuple(Dataset(prefix, read_manifest(prefix)) for prefix in of_set) for name, of_set in prefixes.items()
    }
    for name, datasets in sets.items():
        if not sum(dataset.tokens for dataset in datasets):
            raise DataError(f"set {name} has no tokens")
    return sets


def _matching_prefixes(pattern: str) -> list[str]:
    if manifest_path(pattern).is_file():  # also where the path has a bracket in it
        return [pattern]
    paths = glob.glob(pattern + MANIFEST_ENDING, recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
    return sorted(path.removesuffix(MANIFEST_ENDING) for path in paths)


def _split_pair(option: str, text: str, form: str) -> tuple[str, str]:
    name, _, value = text.partition("=")
    if not name or not value:
        raise ConfigurationError(option, text, f"expected {form}")
    return name, value


def _tokens_to_read(
    sets: dict[str, tuple[Dataset, ...]],
    share: Sequence[str],
    tokens: Sequence[str],
    epochs: Sequence[str],
    budget: str | None,
) -> list[float]:
    """Tokens to read of each set, in the sets' order, from the one option that says them."""
    given = {
        option: pairs for option, pairs in {"--share": share, "--tokens": tokens, "--epochs": epochs}.items() if pairs
    }
    if len(given) != 1:
        raise ConfigurationError("mixture", ", ".join(given), "expected one of --share, --tokens and --epochs")
    ((option, pairs),) = given.items()
    if (option == "--share") != (budget is not None):
        raise ConfigurationError("--budget", budget, "goes with --share, and only there: the tokens that the run reads")

    amounts = _amounts(option, pairs, list(sets), parse_tokens if option == "--tokens" else _parse_number)
    if budget is not None:
        if not math.isclose(total := math.fsum(amounts.values()), 1, rel_tol=ROUNDING):
            raise ConfigurationError(option, " ".join(pairs), f"the shares must be 1 in all, not {total:g}")
        return [amounts[name] / total * parse_tokens("--budget", budget) for name in sets]
    if option == "--epochs":
        return [amounts[name] * sum(dataset.tokens for dataset in datasets) for name, datasets in sets.items()]
    return [amounts[name] for name in sets]


def _amounts(
    option: str, pairs: Sequence[str], names: Sequence[str], parse: Callable[[str, str], float]
) -> dict[str, float]:
    """NAME=VALUE of every set, once each."""
    amounts: dict[str, float] = {}
    for pair in pairs:
        name, text = _split_pair(option, pair, "NAME=VALUE")
        if name not in names:
            raise ConfigurationError(option, pair, f"no such set: --set names {', '.join(names)}")
        if name in amounts:
            raise ConfigurationError(option, pair, f"{name} has a value already")
        amounts[name] = parse(option, text)
    if missing := [name for name in names if name not in amounts]:
        raise ConfigurationError(option, " ".join(pairs), f"says nothing of {', '.join(missing)}")
    return amounts


def parse_tokens(option: str, text: str) -> float:
    """A number of tokens: 3000000, 3e6, 500M, 27B, 0.3T.

    Raises:
        ConfigurationError: it is none, or not above 0.
    """
    match = re.fullmatch(r"(.*?)([kMBT]?)", text, re.DOTALL)
    assert match is not None  # anything matches
    return _parse_number(option, match[1]) * UNITS[match[2]]


def _parse_number(option: str, text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 < number < math.inf:
        raise ConfigurationError(option, text, "expected a number above 0; tokens may end in k, M, B or T")
    return number


def _require_one_tokenizer(sets: dict[str, tuple[Dataset, ...]]) -> None:
    first, *others = [dataset for datasets in sets.values() for dataset in datasets]
    for other in others:
        for what, key in (("tokenizer", "fingerprint"), ("end of document", "end_of_document_id")):
            if other.manifest["tokenizer"][key] != first.manifest["tokenizer"][key]:
                specs = [dataset.manifest["tokenizer"]["spec"] for dataset in (first, other)]
                raise DataError(
                    f"{other.prefix} was made with another {what} ({specs[1]}) than {first.prefix} ({specs[0]}): one"
                    " model reads one tokenizer's ids: preprocess one of them again"
                )
        if other.manifest["dtype"] != first.manifest["dtype"]:
            raise DataError(
                f"{other.prefix} holds {other.manifest['dtype']} ids and {first.prefix} {first.manifest['dtype']}:"
                " preprocess one of them again"
            )


def table(mixture: Sequence[MixtureSet]) -> Iterator[str]:
    """Lines: of each set and dataset its tokens, what is read of them, their share of the run, and the epochs."""
    budget = math.fsum(each.read for each in mixture)
    rows = [["set", "prefix", "tokens", "read", "share", "epochs"]]
    for each in mixture:
        if len(each.datasets) > 1:
            rows.append([each.name, f"{len(each.datasets)} datasets", *_figures(each.tokens, each.read, budget)])
        for dataset in each.datasets:
            name = "" if len(each.datasets) > 1 else each.name
            rows.append([name, dataset.prefix, *_figures(dataset.tokens, dataset.tokens * each.epochs, budget)])
    rows.append(["total", "", *_figures(sum(each.tokens for each in mixture), budget, budget)])

    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    yield f"A run of {budget:,.0f} tokens (train.steps x train.global_batch_size x train.sequence_length) reads"
    for row in rows:
        words = [cell.ljust(width) for cell, width in zip(row[:2], widths[:2], strict=True)]
        figures = [cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)]
        yield "  ".join(words + figures)


def _figures(tokens: int, read: float, budget: float) -> list[str]:
    return [f"{tokens:,}", f"{read:,.0f}", f"{read / budget:.4%}", f"{read / tokens:.4g}" if tokens else "-"]


def recipe(mixture: Sequence[MixtureSet], tokenizer_spec: str) -> str:
    """The section `data`: a dataset's weight is its share of the run."""
    budget = math.fsum(each.read for each in mixture)
    lines = ["data:", "  train:"]
    for each in mixture:
        lines.append(f"    # {each.name}")
        for dataset in each.datasets:
            entry = {"prefix": dataset.prefix, "weight": float(f"{dataset.tokens * each.epochs / budget:.9g}")}
            lines.append(f"    - {recipe_text(entry, one_line=True).strip()}")
    return "\n".join([*lines, f"  {recipe_text({'tokenizer': tokenizer_spec})}"])


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        prog="blend.py", description="Datasets and a wanted mixture -> the data section of a recipe"
    )
    parser.add_argument(
        "--set",
        nargs="+",
        required=True,
        metavar="NAME=PREFIX",
        help="sets of the mixture, each a dataset or a pattern of several; a name may stand several times",
    )
    parser.add_argument(
        "--share", nargs="+", default=[], metavar="NAME=SHARE", help="each set's share of the --budget, 1 in all"
    )
    parser.add_argument(
        "--tokens", nargs="+", default=[], metavar="NAME=TOKENS", help="tokens to read of each set: 27B"
    )
    parser.add_argument("--epochs", nargs="+", default=[], metavar="NAME=EPOCHS", help="passes over each set")
    parser.add_argument("--budget", type=str, metavar="TOKENS", help="tokens that the run reads, with --share: 30B")
    parser.add_argument(
        "--max-epochs", type=PositiveFloat, default=1.0, metavar="EPOCHS", help="passes over a set that are allowed"
    )
    parser.add_argument(
        "--tokenizer", type=str, metavar="SPEC", help="the tokenizer's SPEC in the recipe; default: the manifests'"
    )
    parser.add_argument("--output", type=str, metavar="FILE", help="recipe file to write; default: standard output")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    try:
        text = blend(
            sets=arguments.set,
            share=arguments.share,
            tokens=arguments.tokens,
            epochs=arguments.epochs,
            budget=arguments.budget,
            max_epochs=arguments.max_epochs,
            tokenizer_spec=arguments.tokenizer,
        )
        if arguments.output is None:
            print(text, end="")
            return
        try:
            write_whole(Path(arguments.output), text.encode())
        except OSError as error:
            raise DataError(f"{error.filename or arguments.output}: {error.strerror or error}") from error
        print("\n".join(line[2:] for line in text.splitlines() if line.startswith("#")))
    except DSMoEError as error:
        exit_with(error, "blend")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
