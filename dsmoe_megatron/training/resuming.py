"""Which checkpoint a run goes on from: the newest one that is as it was written. All ranks agree on it.

Files are hashed once, shared out over the ranks, before any tensor is loaded.
"""

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch.distributed as dist

from dsmoe_megatron.checkpoint_manifest import FileEntry, find_faults, read_manifest
from dsmoe_megatron.checkpoint_metadata import missing_or_short
from dsmoe_megatron.durable import write_durably
from dsmoe_megatron.errors import CheckpointError
from dsmoe_megatron.run_folder import CHECKPOINTS, LATEST, is_step_folder, saved_step, step_folders
from dsmoe_megatron.runtime.distributed import raised_on_every_rank
from dsmoe_megatron.training.retention import DAMAGED


@dataclass(frozen=True)
class Choice:
    """The checkpoint to load.

    Attributes:
        folder: its step folder.
        is_checked: by its manifest; older ones have none.
        faults: of the newer checkpoints that were passed over, a line each.
    """

    folder: Path
    is_checked: bool
    faults: list[str] = field(default_factory=list)


def choose_checkpoint(path: Path, strict: bool, is_own: bool) -> Choice | None:
    """The newest whole checkpoint of a run folder, or the step folder itself.

    Args:
        path: run folder or step folder.
        strict: refuse a damaged checkpoint where an older one could be taken; a step folder has no older one.
        is_own: damaged checkpoints are given another name, so that they are neither tried nor counted again.

    Returns:
        None if a run folder has no checkpoint yet.

    Raises:
        CheckpointError: none is whole, or the newest is not and `strict`; on every rank.
        PassingError: a file of the one to try cannot be read; on every rank.
    """
    faults: list[str] = []
    passed_over: list[Path] = []
    candidates = _from_rank_0(path)
    for folder in candidates:
        is_checked, found = _check(folder)
        if not found:
            if is_own and passed_over:
                _set_aside(path, passed_over, folder)
            return Choice(folder, is_checked, faults)
        faults += found
        passed_over.append(folder)
        if strict:
            break
    if not candidates:
        return None
    advice = "; set checkpoint.strict to false to go on from an older one" if strict and len(candidates) > 1 else ""
    with raised_on_every_rank():
        raise CheckpointError(f"{'; '.join(faults)}: no whole checkpoint to load{advice}")


def _from_rank_0(path: Path) -> list[Path]:
    """Step folders in the order in which they are to be tried, as rank 0 sees them."""
    found: list[Any] = [None]
    with raised_on_every_rank():
        if dist.get_rank() == 0:
            found = [_candidates(path)]
    dist.broadcast_object_list(found, src=0)
    return list(found[0])


def _candidates(path: Path) -> list[Path]:
    """The one that `latest` names and those before it, then what is newer."""
    if is_step_folder(path):
        return [path]
    folders = step_folders(path)
    pointer = path / LATEST
    if not pointer.is_file():
        return folders
    try:
        named = path / CHECKPOINTS / pointer.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{pointer}: cannot be read: {error}") from None
    step = saved_step(named)
    if step is None:  # damaged or edited
        return folders
    later = [folder for folder in folders if (saved_step(folder) or 0) > step]
    # one that is named and not there is a fault, not a new beginning
    return [named, *(folder for folder in folders if folder not in later and folder != named), *later]


def _check(folder: Path) -> tuple[bool, list[str]]:
    """Whether a manifest vouches for the folder, and what is wrong with it; the same on every rank."""
    plan: list[Any] = [None]
    # a file that cannot be read just now is no damage: the run ends, and the folder stays what it is
    with raised_on_every_rank():
        if dist.get_rank() == 0:
            plan = [_plan(folder)]
    dist.broadcast_object_list(plan, src=0)
    is_checked, faults, shares = plan[0]
    found: list[Any] = [None] * dist.get_world_size()
    own: list[str] = []
    with raised_on_every_rank():
        own = find_faults(folder, shares[dist.get_rank()])
    dist.all_gather_object(found, own)
    return is_checked, faults + [fault for of_rank in found for fault in of_rank]


def _plan(folder: Path) -> tuple[bool, list[str], list[dict[str, FileEntry]]]:
    """Whether there is a manifest, faults that are seen at once, and the files for each rank to hash."""
    shares: list[dict[str, FileEntry]] = [{} for _ in range(dist.get_world_size())]
    if not folder.is_dir():
        return False, [f"{folder}: missing"], shares
    try:
        manifest = read_manifest(folder)
        if manifest is None:
            return False, missing_or_short(folder), shares
    except CheckpointError as error:
        return False, [str(error)], shares
    sizes = [0] * len(shares)
    for name, entry in sorted(manifest.files.items(), key=lambda item: -item[1].bytes):
        rank = sizes.index(min(sizes))
        shares[rank][name] = entry
        sizes[rank] += entry.bytes
    return True, [], shares


def _set_aside(run_dir: Path, damaged: list[Path], whole: Path) -> None:
    """Give damaged checkpoints another name, and let `latest` name the whole one."""
    with contextlib.suppress(OSError):  # where it is not ours to change, they are found damaged again
        for folder in damaged if dist.get_rank() == 0 else []:
            if folder.is_dir():
                folder.rename(folder.with_name(folder.name + DAMAGED))
        if dist.get_rank() == 0:
            write_durably(run_dir / LATEST, whole.name + "\n")
    dist.barrier()
