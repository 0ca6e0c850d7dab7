"""Read a torch distributed checkpoint, as megatron-core writes it, in one process: no process group, no megatron-core.

The table of contents (`.metadata`) is a pickle. It is read with an unpickler that knows only the classes such a table
is made of, so a checkpoint from elsewhere cannot run code; tensors are read with `weights_only`.
"""

import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader, LoadPlan, ReadItem
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from dsmoe_megatron.errors import CheckpointError

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


class DistributedCheckpoint:
    """The tensors of one checkpoint folder, read piece by piece.

    Args:
        folder: holds `.metadata` and `*.distcp`.

    Raises:
        CheckpointError: there is no readable table of contents.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._metadata = _read_metadata(folder / METADATA_FILE)
        self._reader = FileSystemReader(folder)
        self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)

    @property
    def tensor_shapes(self) -> dict[str, tuple[int, ...]]:
        """Global shape of every tensor."""
        entries = self._metadata.state_dict_metadata.items()
        return {name: tuple(entry.size) for name, entry in entries if isinstance(entry, TensorStorageMetadata)}

    @property
    def object_names(self) -> list[str]:
        """Names of the entries that are not tensors; they are never read."""
        entries = self._metadata.state_dict_metadata.items()
        return [name for name, entry in entries if not isinstance(entry, TensorStorageMetadata)]

    def read(self, name: str, layer: int | None = None) -> Tensor:
        """A whole tensor, or one entry of its first axis; nothing else of it is kept in memory.

        Raises:
            CheckpointError: a file is missing or damaged, or the pieces do not make up the tensor.
        """
        entry = self._metadata.state_dict_metadata[name]
        if not isinstance(entry, TensorStorageMetadata):
            raise CheckpointError(f"{self.folder}: {name} is not a tensor")
        offsets, sizes = [0] * len(entry.size), list(entry.size)
        if layer is not None:
            offsets[0], sizes[0] = layer, 1
        wanted = ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes))
        items = create_read_items_for_chunk_list(name, entry, [wanted])
        if sum(math.prod(item.lengths) for item in items) != math.prod(sizes):
            raise CheckpointError(f"{self.folder}: the saved pieces of {name} do not make up the whole tensor")
        target = torch.empty(sizes, dtype=entry.properties.dtype)
        try:
            self._reader.read_data(LoadPlan(items), _IntoTensor(target)).wait()
        except (OSError, RuntimeError, EOFError, KeyError, AssertionError, pickle.UnpicklingError) as error:
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            raise CheckpointError(f"{self.folder}: {name} cannot be read: {reason}") from error
        return target if layer is None else target[0]


class _IntoTensor(DefaultLoadPlanner):
    """Places every piece in one tensor, whatever global offset that tensor begins at."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, read_item: ReadItem) -> Tensor:
        view = self.target
        for axis, (offset, length) in enumerate(zip(read_item.dest_offsets, read_item.lengths, strict=True)):
            view = view.narrow(axis, offset, length)
        return view


class _MetadataUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        is_dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if is_dtype or name in ALLOWED_CLASSES.get(module, ()):
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no table of contents needs")


def _read_metadata(path: Path) -> Metadata:
    try:
        with path.open("rb") as file:
            metadata = _MetadataUnpickler(file).load()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error.strerror or error}") from None
    except Exception as error:  # a damaged pickle raises nearly anything
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise CheckpointError(f"{path}: not the table of contents of a distributed checkpoint: {reason}") from None
    if not isinstance(metadata, Metadata) or metadata.storage_data is None:
        raise CheckpointError(f"{path}: not the table of contents of a distributed checkpoint")
    return metadata
