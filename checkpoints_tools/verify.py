"""Check exports and checkpoints.

    python checkpoints_tools/verify.py --hf EXPORT                          an export by itself: is it whole?
    python checkpoints_tools/verify.py --checkpoint RUN_OR_STEP             a run's checkpoints: as they were written?
    python checkpoints_tools/verify.py --checkpoint RUN_OR_STEP --hf EXPORT does it compute what was trained?
    python checkpoints_tools/verify.py --checkpoint A --other B             two checkpoints, bit by bit

Faults are printed one per line. Exit status 1 where there is one.
"""

import argparse
import sys
from pathlib import Path

from dsmoe_megatron.errors import CheckpointError, ConfigurationError, DSMoEError, PassingError, exit_with
from dsmoe_megatron.run_folder import find_checkpoint, is_step_folder, step_folders


def verify_export(folder: Path) -> None:
    """Check an export by its files alone.

    Raises:
        CheckpointError: it is not whole; the faults are printed.
    """
    from checkpoints_tools.export_integrity import find_faults

    _raise_if_any(list(find_faults(folder)), f"{folder} is not whole")
    print(f"{folder}: whole")


def verify_manifests(checkpoint: Path) -> None:
    """Check every file of a step folder, or of all step folders of a run, against its manifest.

    Raises:
        CheckpointError: there is none, or one is damaged; the faults are printed.
    """
    from dsmoe_megatron.checkpoint_manifest import find_faults, read_manifest
    from dsmoe_megatron.checkpoint_metadata import missing_or_short

    folders = [checkpoint] if is_step_folder(checkpoint) else step_folders(checkpoint)
    faults: list[str] = []
    for folder in folders:
        try:
            manifest = read_manifest(folder)
            found = find_faults(folder, manifest.files) if manifest else missing_or_short(folder)
        except (CheckpointError, PassingError) as error:
            found = [str(error)]
        faults += found
        if not found:
            how = f"{len(manifest.files)} files as they were written" if manifest else "no manifest; no file cut short"
            print(f"{folder}: {how}")
    if not is_step_folder(checkpoint):
        _step_folder(checkpoint)  # what `latest` names must be there
    _raise_if_any(faults, f"{checkpoint} is damaged")


def verify_logits(checkpoint: Path, folder: Path) -> None:
    """Check that checkpoint and export are whole and that the export computes what was trained; prints a table.

    Raises:
        CheckpointError: it does not.
    """
    from checkpoints_tools.distributed_checkpoint import check_files
    from checkpoints_tools.logits_comparison import TOLERANCE, compare_logits

    step_folder = _step_folder(checkpoint)
    check_files(step_folder)
    verify_export(folder)
    faults = []
    print(f"{'policy':<28} {'tokens':>10} {'largest difference':>20} {'of largest logit':>17} {'greedy equal':>13}")
    for row in compare_logits(step_folder, folder):
        print(
            f"{row.policy:<28} {f'{row.compared}/{row.tokens}':>10} {row.difference:>20.3g} {row.relative:>17.1e}"
            f" {f'{row.greedy_equal}/{row.greedy_tokens}':>13}",
            flush=True,
        )
        if row.fault:
            faults.append(f"policy {row.policy}: {row.fault}")
    _raise_if_any(faults, f"{folder} does not compute what {step_folder} does")
    print(f"{folder}: computes what {step_folder} does, within {TOLERANCE:.0e} of the largest logit")


def verify_equal(checkpoint: Path, other: Path) -> None:
    """Check that two checkpoints hold the same, bit by bit.

    Raises:
        CheckpointError: they do not; what differs is printed.
    """
    from checkpoints_tools.checkpoint_equality import compared_tensors, find_differences

    first, second = _step_folder(checkpoint), _step_folder(other)
    _raise_if_any(list(find_differences(first, second)), f"{second} does not equal {first}")
    print(f"{second}: equals {first}: {compared_tensors(first, second)} tensors, bit by bit")


def _step_folder(path: Path) -> Path:
    folder = find_checkpoint(path)
    if folder is None:
        raise CheckpointError(f"{path}: neither a run folder with a checkpoint nor a step folder")
    return folder


def _raise_if_any(faults: list[str], what: str) -> None:
    for fault in faults:
        print(f"  {fault}")
    if faults:
        count = f"{len(faults)} faults" if len(faults) > 1 else "1 fault"
        raise CheckpointError(f"{what}: {count}, the first: {faults[0]}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="verify", description="Check exports and checkpoints.")
    parser.add_argument(
        "--checkpoint", type=Path, help="run folder (its newest checkpoint) or step; alone: whether it is damaged"
    )
    parser.add_argument("--hf", type=Path, metavar="EXPORT", help="export; alone: whether it is whole")
    parser.add_argument("--other", type=Path, help="another run or step, to be equal to --checkpoint bit by bit")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    checkpoint, export, other = arguments.checkpoint, arguments.hf, arguments.other
    try:
        if checkpoint and export and not other:
            verify_logits(checkpoint, export)
        elif checkpoint and other and not export:
            verify_equal(checkpoint, other)
        elif checkpoint and not export and not other:
            verify_manifests(checkpoint)
        elif export and not checkpoint and not other:
            verify_export(export)
        else:
            rule = "give --hf alone, or --checkpoint, alone or with one of --hf and --other"
            raise ConfigurationError("--checkpoint", str(checkpoint), rule)
    except DSMoEError as error:
        exit_with(error, "verify")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
