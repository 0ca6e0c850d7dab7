"""The command line: `python -m dsmoe_megatron VERB ...`. Heavy imports wait until a verb needs them."""

import os
import sys
from collections.abc import Sequence

from dsmoe_megatron.config_parsing import parse_config
from dsmoe_megatron.config_rules import check_config
from dsmoe_megatron.errors import DSMoEError, exit_with

PROGRAM = "dsmoe-megatron"
VERBS = {"pretrain": "train a model from a recipe; continues a run found in train.run_dir"}
USAGE = f"usage: {PROGRAM} VERB --help\n\n" + "\n".join(f"  {verb:<10} {text}" for verb, text in VERBS.items())


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one verb; a fault that the user can mend ends the process with one line and its exit code."""
    verb, *rest = sys.argv[1:] if arguments is None else arguments or [""]
    if verb in ("-h", "--help"):
        print(USAGE)
        return 0
    if verb not in VERBS:
        print(f"{PROGRAM}: error: unknown verb {verb!r}; there is {', '.join(VERBS)}", file=sys.stderr)
        return 2
    try:
        _pretrain(rest)
    except DSMoEError as error:
        rank = int(os.environ.get("RANK", "0"))
        if rank == 0:
            exit_with(error, PROGRAM)
        if error.on_every_rank:
            return error.exit_code
        exit_with(error, f"{PROGRAM}: rank {rank}")
    return 0


def _pretrain(arguments: Sequence[str]) -> None:
    config = parse_config(arguments, f"{PROGRAM} pretrain")
    check_config(config, int(os.environ.get("WORLD_SIZE", "1")))

    from dsmoe_megatron.runtime.distributed import prepare_device

    device = prepare_device()

    from dsmoe_megatron.training.loop import pretrain  # imports megatron.core: only after the device is prepared

    pretrain(config, device)


if __name__ == "__main__":
    sys.exit(main())
