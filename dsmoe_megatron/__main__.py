"""The command line: `python -m dsmoe_megatron VERB ...`. Heavy imports wait until a verb needs them."""

import contextlib
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from dsmoe_megatron.config_parsing import parse_verb
from dsmoe_megatron.config_rules import check_config
from dsmoe_megatron.deepspeed_settings import require_deepspeed
from dsmoe_megatron.errors import CheckpointError, ConfigurationError, DSMoEError, PassingError, exit_with
from dsmoe_megatron.runtime.processes import end_with_parent

PROGRAM = "dsmoe-megatron"
# torchrun ends all ranks as soon as one of them has failed: rank 0, which speaks for all, must not be the second
SECONDS_FOR_RANK_0 = 10.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; a fault that the user can mend ends the process with one line and its exit code."""
    verb, *rest = (sys.argv[1:] if arguments is None else arguments) or [""]
    if verb in ("-h", "--help"):
        print(_usage())
        return 0
    if verb not in VERBS:
        print(f"{PROGRAM}: error: unknown verb {verb!r}; there is {', '.join(VERBS)}", file=sys.stderr)
        return 2
    try:
        return VERBS[verb].run(rest) or 0
    except DSMoEError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank and error.on_every_rank:
            time.sleep(SECONDS_FOR_RANK_0)
            return error.exit_code
        _leave_word(error)
        if rank == 0:
            exit_with(error, PROGRAM)
        exit_with(error, f"{PROGRAM}: rank {rank}")
    return 0


def _leave_word(error: DSMoEError) -> None:
    """Tell the launcher, to which torchrun does not hand exit codes on, that another start would end the same way."""
    if "DSMOE_FAULT_FILE" in os.environ and not isinstance(error, PassingError):
        with contextlib.suppress(OSError):
            Path(os.environ["DSMOE_FAULT_FILE"]).write_text(f"{error}\n", encoding="utf-8")


def _usage() -> str:
    lines = [f"  {name:<10} {verb.summary}" for name, verb in VERBS.items()]
    return "\n".join([f"usage: {PROGRAM} VERB --help", "", *lines])


@dataclass(frozen=True)
class PretrainOptions:
    """What is done with the recipe."""

    check: bool = False
    """Build the model, take two steps on made-up tokens, save and load, print what it took, and leave the run alone."""


def _pretrain(arguments: Sequence[str]) -> None:
    if "MASTER_ADDR" in os.environ:  # started by torchrun, which may die while libraries load
        end_with_parent()
    config, options = parse_verb(arguments, f"{PROGRAM} pretrain", PretrainOptions)
    check_config(config, int(os.environ.get("WORLD_SIZE", "1")))
    require_deepspeed(config)

    from dsmoe_megatron.runtime.distributed import prepare_device

    device = prepare_device()

    # these import megatron.core: only after the device is prepared
    if options.check:
        from dsmoe_megatron.training.check import check_run

        check_run(config, device)
    else:
        from dsmoe_megatron.training.loop import pretrain

        pretrain(config, device)


def _progress(arguments: Sequence[str]) -> None:
    from dsmoe_megatron.planning.estimate import smallest_world_size
    from dsmoe_megatron.run_folder import find_checkpoint, saved_step, step_folders

    config, _ = parse_verb(arguments, f"{PROGRAM} progress", PretrainOptions)
    smallest_world_size(config)  # a recipe that no number of processes can run is refused here, once
    run_dir = Path(config.train.run_dir)
    try:
        folder = find_checkpoint(run_dir)
    except CheckpointError:  # a resume looks for the one before
        folder = next(iter(step_folders(run_dir)), None)
    step = saved_step(folder) if folder is not None else 0
    print(f"step {step or 0} of {config.train.steps} in {run_dir}")


def _estimate(arguments: Sequence[str]) -> None:
    from dsmoe_megatron.planning import presentation
    from dsmoe_megatron.planning.estimate import (
        EstimateOptions,
        estimate,
        is_memory_known,
        require_vocabulary,
        smallest_world_size,
    )
    from dsmoe_megatron.planning.hardware import load_hardware
    from dsmoe_megatron.planning.search import search

    config, options = parse_verb(arguments, f"{PROGRAM} estimate", EstimateOptions)
    hardware = load_hardware(options.gpu, options.hardware)
    world_size, origin = options.gpus, "--gpus"
    if world_size is None and "WORLD_SIZE" in os.environ:
        world_size, origin = int(os.environ["WORLD_SIZE"]), "WORLD_SIZE"
    elif world_size is None:
        world_size, origin = smallest_world_size(config), "the fewest that the layout runs on; --gpus takes more"
    for key, value in (("gpus", world_size), ("top", options.top)):
        if value < 1:
            raise ConfigurationError(key, value, "must be at least 1")

    if not is_memory_known(config):
        print(
            f"{PROGRAM} estimate: memory, traffic and time are those of engine.name megatron; "
            "DeepSpeed's ZeRO-2, ZeRO-3 and offload need less memory and send more",
            file=sys.stderr,
        )
    if config.model.vocab_size is None and not options.search and options.picture is None:
        report = presentation.without_vocabulary(config)
    elif options.search:
        if options.picture is not None:
            raise ConfigurationError("picture", options.picture, "is drawn of one layout, not with --search")
        report = presentation.of_search(search(config, world_size, hardware), world_size, options.top)
    else:
        require_vocabulary(config)
        found = estimate(config, world_size, hardware)
        report = presentation.of_estimate(found)
        if options.picture is not None:
            presentation.draw(found, options.picture)
    print(report.json() if options.json else f"GPUs: {world_size} ({origin})\n{report.text}")


def _evaluate(arguments: Sequence[str]) -> None:
    from dsmoe_megatron.evaluation.command import evaluate

    evaluate(arguments, f"{PROGRAM} evaluate")


def _report(arguments: Sequence[str]) -> None:
    from dsmoe_megatron.reporting.command import report

    report(arguments, f"{PROGRAM} report")


def _doctor(arguments: Sequence[str]) -> int:
    from dsmoe_megatron.doctor.command import doctor

    return doctor(arguments, f"{PROGRAM} doctor")


class Verb(NamedTuple):
    """A verb; what it returns, if anything, is the exit code."""

    summary: str
    run: Callable[[Sequence[str]], int | None]


VERBS = {
    "pretrain": Verb("train a model from a recipe; continues a run found in train.run_dir", _pretrain),
    "progress": Verb("how far the newest checkpoint of a recipe's run has come", _progress),
    "evaluate": Verb(
        "perplexity, active parameters and tasks under expert policies; finds limits per layer", _evaluate
    ),
    "report": Verb("the pictures of one or several runs as one HTML page", _report),
    "estimate": Verb(
        "what a recipe costs on given GPUs: parameters, memory, traffic, time; or the best layout", _estimate
    ),
    "doctor": Verb("what this machine has, what recipes would use of it, and whether they can run here", _doctor),
}

if __name__ == "__main__":
    sys.exit(main())
