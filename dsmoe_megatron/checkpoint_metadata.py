"""The table of contents of a torch distributed checkpoint, read without trusting it.

`.metadata` is a pickle. It is read with an unpickler that knows only the classes such a table is made of, so a
checkpoint from elsewhere cannot run code. The tensors themselves are read with `weights_only` everywhere.
"""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.metadata import Metadata

from dsmoe_megatron.errors import CheckpointError, first_line

METADATA_FILE = ".metadata"

# what a table of contents is made of, by module
ALLOWED_CLASSES = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    # megatron-core adds every rank's plan of what it wrote
    "torch.distributed.checkpoint.planner": {"SavePlan", "TensorWriteData", "WriteItem", "WriteItemType"},
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo", "_StoragePrefix"},
    "torch.serialization": {"_get_layout"},
    "torch": {"Size"},
    "collections": {"OrderedDict"},
    "pathlib": {"Path", "PosixPath", "PurePosixPath"},
    "pathlib._local": {"Path", "PosixPath", "PurePosixPath"},  # where Python 3.13 keeps them
}


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in ALLOWED_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no table of contents needs")


def read_metadata(folder: Path) -> Metadata:
    """The table of contents of a step folder.

    Raises:
        CheckpointError: it is missing, damaged, or refers to anything that no table of contents needs.
    """
    path = folder / METADATA_FILE
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = first_line(error)
        raise CheckpointError(f"{path}: not the table of contents of a distributed checkpoint: {reason}") from None
    if not isinstance(metadata, Metadata) or metadata.storage_data is None:
        raise CheckpointError(f"{path}: not the table of contents of a distributed checkpoint")
    return metadata


def missing_or_short(folder: Path) -> list[str]:
    """What can be seen to be wrong with a step folder that has no manifest, without reading its values; a line each."""
    try:
        metadata = read_metadata(folder)
    except CheckpointError as error:
        return [str(error)]
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
    faults = [f"{folder / name}: missing" for name in ("config.yaml", "progress.json") if not (folder / name).is_file()]
    for name, end in sorted(ends.items()):
        path = folder / name
        if not path.is_file():
            faults.append(f"{path}: missing")
        elif path.stat().st_size < end:
            faults.append(f"{path}: truncated: {path.stat().st_size:,} bytes where .metadata promises {end:,}")
    return faults
