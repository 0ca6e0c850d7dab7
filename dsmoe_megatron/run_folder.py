"""What lies in a run folder, readable without torch or megatron-core.

A run folder holds checkpoints/step_NNNNNNNN/ and `latest`, the name of the newest whole one, written last. A step
folder is a distributed checkpoint plus config.yaml (the resolved recipe), progress.json and manifest.json.
"""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsmoe_megatron.errors import CheckpointError

LATEST = "latest"
CHECKPOINTS = "checkpoints"
STEP_FOLDER = re.compile(r"step_(\d{8,})")


@dataclass
class Progress:
    """How far a run has come; saved as progress.json.

    Attributes:
        step: optimizer steps done.
        consumed_samples: samples that they took, over all ranks.
        tokens: tokens that they took.
        data_identity: hash of what fixes the order of samples.
        data_begin: consumed_samples when these data began; above 0 where a run went on with other data.
        guards: what the guards against bad updates remember.
        first: the first line of metrics; last: the newest one; last_validation: the newest validation line.
    """

    step: int = 0
    consumed_samples: int = 0
    tokens: int = 0
    data_identity: str = ""
    data_begin: int = 0
    guards: dict[str, Any] = field(default_factory=dict)
    first: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    last_validation: dict[str, Any] | None = None

    @property
    def data_position(self) -> int:
        """Samples of the present data that were taken: what comes next depends on it alone."""
        return self.consumed_samples - self.data_begin


def step_folder_name(step: int) -> str:
    return f"step_{step:08d}"


def saved_step(folder: Path) -> int | None:
    """The step in the name of a step folder; None if it has another name."""
    match = STEP_FOLDER.fullmatch(folder.name)
    return int(match[1]) if match else None


def step_folders(run_dir: Path) -> list[Path]:
    """The step folders of a run, newest first; unfinished ones have other names."""
    folders = run_dir / CHECKPOINTS
    found = [folder for folder in (folders.iterdir() if folders.is_dir() else ()) if saved_step(folder) is not None]
    return sorted(found, key=lambda folder: saved_step(folder) or 0, reverse=True)


def is_step_folder(path: Path) -> bool:
    return any((path / name).is_file() for name in ("progress.json", ".metadata"))


def find_checkpoint(path: Path) -> Path | None:
    """The step folder that a run folder or a step folder stands for; None if a run folder has none yet.

    Raises:
        CheckpointError: `latest` cannot be read, or names a folder that is not there or not whole.
    """
    if is_step_folder(path):
        return path
    latest = path / LATEST
    if not latest.is_file():
        return None
    try:
        folder = path / CHECKPOINTS / latest.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{latest}: cannot be read: {error}") from None
    if not is_step_folder(folder):
        raise CheckpointError(f"{latest}: names {folder.name}, which is not a whole checkpoint in {folder.parent}")
    return folder


def read_progress(folder: Path) -> Progress:
    """progress.json of a step folder.

    Raises:
        CheckpointError: it is missing or not of this form.
    """
    try:
        return Progress(**json.loads((folder / "progress.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(f"{folder / 'progress.json'}: cannot be read: {error}") from None
