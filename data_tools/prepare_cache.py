"""Build and check the sample indices of a recipe on one machine, before the cluster starts.

    python data_tools/prepare_cache.py --config RECIPE [--config RECIPE] [--section.key VALUE ...] [--check]

One process on the CPU, whatever layout the recipe has, with the code that training runs: training on the same recipe
finds everything there and builds nothing. `--check` builds nothing either: it reads every byte of what is there, and
the exit status is 1 where something is missing or damaged.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dsmoe_megatron.config import Config
from dsmoe_megatron.config_parsing import parse_verb
from dsmoe_megatron.errors import DataError, DSMoEError, exit_with
from dsmoe_megatron.planning.estimate import smallest_world_size

if TYPE_CHECKING:
    from dsmoe_megatron.training.blends import Blend

PROGRAM = "prepare_cache"


@dataclass(frozen=True)
class Options:
    """What is done with the indices."""

    check: bool = False
    """Read and check what is there, and build nothing."""


def prepare_cache(config: Config, check: bool = False) -> None:
    """Build the indices of a recipe, or only check them, and print what there is.

    Args:
        config: recipe.
        check: build nothing.

    Raises:
        ConfigurationError: the recipe can run on no number of processes, or names no data.
        DataError: data or, where nothing is to be built, indices are missing or damaged.
        TokenizerError: the tokenizer cannot be loaded.
    """
    world_size = smallest_world_size(config)

    from dsmoe_megatron.runtime.distributed import group_of_one, prepare_device

    prepare_device()  # before anything of megatron.core is imported

    from dsmoe_megatron.training.blends import blends_of, cache_dir_of
    from dsmoe_megatron.training.loop import open_data

    with group_of_one():
        tokenizer = open_data(config, world_size)
        blends = blends_of(config, tokenizer, cache_dir_of(config))
        for blend in blends:
            for line in _check(blend) if check else _make(blend):
                print(line, flush=True)


def _make(blend: "Blend") -> Iterator[str]:
    started = time.perf_counter()
    built = blend.make_indices(print)
    seconds = time.perf_counter() - started
    yield from _report(blend, "there and whole" if built is None else "built", seconds)


def _check(blend: "Blend") -> Iterator[str]:
    started = time.perf_counter()
    fault = blend.cache.fault()
    if fault is not None:
        raise DataError(f"{blend.cache.folder}: {fault}; without --check it is built")
    yield from _report(blend, "whole", time.perf_counter() - started)


def _report(blend: "Blend", state: str, seconds: float) -> Iterator[str]:
    files = blend.cache.files()
    size = f"{len(files)} files of {sum(files.values()) / 1e6:,.1f} MB"
    yield f"{blend.cache.folder}: {state}: {size}, {seconds:.1f} s, {blend.samples:,} samples"
    for use in blend.uses():
        yield f"  {use.prefix}: {use.samples:,} samples, {use.epochs:.4g} epochs"


def main(arguments: Sequence[str] | None = None) -> None:
    try:
        config, options = parse_verb(sys.argv[1:] if arguments is None else arguments, f"{PROGRAM}.py", Options)
        prepare_cache(config, options.check)
    except DSMoEError as error:
        exit_with(error, PROGRAM)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
