"""Which checkpoints of a run stay, and what an interrupted run has left beside them.

Only `step_NNNNNNNN` is a checkpoint. One that is being written, or removed, has an ending to its name.
"""

import shutil
import sys
from pathlib import Path

from dsmoe_megatron.durable import sync
from dsmoe_megatron.run_folder import CHECKPOINTS, saved_step, step_folders

UNFINISHED, REPLACED, DAMAGED = ".unfinished", ".replaced", ".damaged"


def put_in_place(unfinished: Path, final: Path) -> None:
    """Give a folder its name; an older one of that name stands aside until the new one is there."""
    replaced = final.with_name(final.name + REPLACED)
    if final.exists():
        final.rename(replaced)
    unfinished.rename(final)
    sync(final.parent)
    sync(final.parent.parent)
    shutil.rmtree(replaced, ignore_errors=True)


def forget_old(run_dir: Path, step: int, keep_last: int, keep_every: int) -> None:
    """Remove all but the newest checkpoints and those of every so many steps.

    One that cannot be removed is said in one line and left to `clean_up`: what was saved is whole all the same.

    Args:
        run_dir: of the run.
        step: that the run is at; later ones, of before it went back, are left alone.
        keep_last: newest checkpoints to keep; 0 keeps all.
        keep_every: multiples of this step are kept for good; 0 keeps none of them.
    """
    folders = [folder for folder in step_folders(run_dir) if (saved_step(folder) or 0) <= step]
    for folder in folders[keep_last:] if keep_last else []:
        if not keep_every or (saved_step(folder) or 0) % keep_every:
            # under its own name a half removed one would be taken for a checkpoint
            doomed = folder.with_name(folder.name + UNFINISHED)
            try:
                folder.rename(doomed)
                shutil.rmtree(doomed)
            except OSError as error:  # over NFS a folder stays while another process holds a file of it open
                reason = error.strerror or error
                print(
                    f"WARNING: {folder}: an old checkpoint cannot be removed ({reason}); the next start tries it again",
                    file=sys.stderr,
                    flush=True,
                )


def clean_up(run_dir: Path) -> None:
    """Remove what a killed run has left unfinished; nobody may be saving there.

    Raises:
        OSError: the folder cannot be changed.
    """
    folders = run_dir / CHECKPOINTS
    for folder in sorted(folders.iterdir()) if folders.is_dir() else []:
        final = folder.with_name(folder.name.removesuffix(REPLACED))
        if folder.name.endswith(UNFINISHED) or (folder.name.endswith(REPLACED) and final.exists()):
            shutil.rmtree(folder)
        elif folder.name.endswith(REPLACED):  # killed between the two renames: nothing has taken its place
            folder.rename(final)
