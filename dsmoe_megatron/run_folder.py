"""What lies in a run folder, readable without torch or megatron-core.

A run folder holds checkpoints/step_NNNNNNNN/ and `latest`, the name of the newest whole one, written last. A step
folder is a distributed checkpoint plus config.yaml (the resolved recipe) and progress.json.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dsmoe_megatron.errors import CheckpointError

LATEST = "latest"


@dataclass
class Progress:
    """How far a run has come; saved as progress.json.

    Attributes:
        step: optimizer steps done.
        consumed_samples: samples that they took, over all ranks.
        tokens: tokens that they took.
        data_identity: hash of what fixes the order of samples.
        guards: what the guards against bad updates remember.
        first: the first line of metrics; last: the newest one; last_validation: the newest validation line.
    """

    step: int = 0
    consumed_samples: int = 0
    tokens: int = 0
    data_identity: str = ""
    guards: dict[str, Any] = field(default_factory=dict)
    first: dict[str, Any] | None = None
    last: dict[str, Any] | None = None
    last_validation: dict[str, Any] | None = None


def step_folder_name(step: int) -> str:
    return f"step_{step:08d}"


def find_checkpoint(path: Path) -> Path | None:
    """The step folder that a run folder or a step folder stands for; None if a run folder has none yet.

    Raises:
        CheckpointError: `latest` names a folder that is not there or not whole.
    """
    if (path / "progress.json").is_file():
        return path
    latest = path / LATEST
    if not latest.is_file():
        return None
    folder = path / "checkpoints" / latest.read_text(encoding="utf-8").strip()
    if not (folder / "progress.json").is_file():
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
