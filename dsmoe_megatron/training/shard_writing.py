"""This rank's shards of a checkpoint: planned with the other ranks, copied to host memory, written by threads.

The plan is megatron-core's (dist_checkpointing), the format torch's. The writing is ours: megatron-core forks processes
for it, which is not safe beside the threads of gloo and NCCL and starts a helper process of hundreds of megabytes per
rank. Threads suffice: copying, hashing and writing all release the interpreter's lock. They end with the process.
"""

import dataclasses
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, cast

import torch
import torch.distributed as dist
import xxhash
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.filesystem_async import _split_by_size_and_type
from megatron.core.dist_checkpointing.strategies.fully_parallel import FullyParallelSaveStrategyWrapper
from megatron.core.dist_checkpointing.strategies.state_dict_saver import save_state_dict_async_plan
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    TorchDistSaveShardedStrategy,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, SavePlan, SavePlanner
from torch.distributed.checkpoint.filesystem import _StorageInfo, _StoragePrefix
from torch.distributed.checkpoint.metadata import Metadata, MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult

from dsmoe_megatron.checkpoint_manifest import FileEntry
from dsmoe_megatron.runtime.distributed import largest_of_ranks

FILES_PER_RANK = 2  # each by a thread of its own: hashing, then, does not hold up writing
COMMON_FILE = "common.pt"
Part = tuple[MetadataIndex, Tensor]


@dataclass
class Written:
    """What a rank has written, synced.

    Attributes:
        results: where each tensor lies, for the table of contents.
        entries: file name to size and checksum.
    """

    results: list[WriteResult]
    entries: dict[str, FileEntry]


class HostCopies:
    """Host memory for the tensors of a rank, kept from save to save: fresh pages cost more than copying.

    On a GPU it is pinned, and the copies are made beside the computation.
    """

    def __init__(self) -> None:
        self._tensors: dict[MetadataIndex, Tensor] = {}

    def copy(self, index: MetadataIndex, tensor: Tensor) -> Tensor:
        """Begin to copy a tensor [any shape]; the current stream says when it is done."""
        kept = self._tensors.get(index)
        if kept is None or kept.shape != tensor.shape or kept.dtype != tensor.dtype:
            kept = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=tensor.is_cuda)
            self._tensors[index] = kept
        return kept.copy_(tensor, non_blocking=True)


class ShardWriter(FileSystemWriter):
    """Writes what the plan gives this rank.

    Args:
        folder: exists, empty.
        common: what is no shard, on rank 0; None elsewhere.

    Attributes:
        contents: the checkpoint's table of contents, on rank 0; still without places.
    """

    can_run_decentralized_global_plan = True

    def __init__(self, folder: Path, common: dict[str, Any] | None) -> None:
        super().__init__(folder, thread_count=FILES_PER_RANK)
        self.folder, self.common = folder, common
        self.contents: Metadata | None = None
        self._files: dict[str, list[Part]] = {}
        # copies wait for what the training stream was told before them
        self._stream = torch.cuda.Stream()
        self._stream.wait_stream(torch.cuda.current_stream())

    def prepare_decentralized_global_plan(self, local_plan: SavePlan) -> SavePlan:
        """Part of megatron-core's planning: file names begin with the rank."""
        return dataclasses.replace(local_plan, storage_data=_StoragePrefix(f"__{dist.get_rank()}_"))

    def prepare_write_data(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Part of megatron-core's planning: remember the tensors, without copying any."""
        for number, items in enumerate(_split_by_size_and_type(FILES_PER_RANK, plan.items)):
            if items:
                parts = [(item.index, cast(Tensor, planner.resolve_data(item))) for item in items]
                self._files[f"{plan.storage_data.prefix}{number}.distcp"] = parts

    def copy(self, memory: HostCopies) -> None:
        """Take the tensors' values as they are now: afterwards training may change them."""
        with torch.cuda.stream(self._stream):
            self._files = {
                name: [(index, memory.copy(index, tensor)) for index, tensor in parts]
                for name, parts in self._files.items()
            }
        self._stream.synchronize()

    def write(self) -> Written:
        """Write and sync this rank's files.

        Raises:
            OSError: the disk is full or the folder cannot be written.
        """
        # torch never checks these when it reads, and computing them takes three times as long as all else here
        checksums = torch.serialization.get_crc32_options()
        torch.serialization.set_crc32_options(False)
        try:
            with ThreadPoolExecutor(FILES_PER_RANK, "checkpoint file") as threads:
                written = list(threads.map(self._write_shards, self._files))
        finally:
            torch.serialization.set_crc32_options(checksums)
        if self.common is not None:
            with HashedFile(self.folder / COMMON_FILE) as file:
                torch.save(self.common, cast(IO[bytes], file))
            written.append(Written([], {COMMON_FILE: file.entry}))
        self._files = {}
        return Written(
            [result for each in written for result in each.results],
            {name: entry for each in written for name, entry in each.entries.items()},
        )

    def _write_shards(self, name: str) -> Written:
        """One file: the archives of torch.save, one after the other."""
        results = []
        with HashedFile(self.folder / name) as file:
            for index, tensor in self._files[name]:
                begin = file.tell()
                torch.save(_alone(tensor), cast(IO[bytes], file))
                length = file.tell() - begin
                results.append(WriteResult(index, length, _StorageInfo(name, begin, length)))
        return Written(results, {name: file.entry})


class ShardPlanner:
    """Decides which rank writes what; one for a run, so that what does not change is found out once."""

    def __init__(self) -> None:
        self._sharing: FullyParallelSaveStrategyWrapper | None = None
        self._parts: set[Any] = set()
        self._plans: tuple[SavePlan, SavePlan] | None = None
        self._contents: Metadata | None = None

    def plan(self, state: dict[str, Any], folder: Path) -> ShardWriter:
        """Agree with the other ranks on who writes what; replicas are shared out evenly.

        Args:
            state: by kind (model chunks, optimizer), sharded tensors and what is no shard.
            folder: exists, empty.
        """
        apply_factories(state)
        parts = {_place_of(shard) for shard in nested_values(state) if isinstance(shard, ShardedTensor)}
        (is_new,) = largest_of_ranks(int(parts != self._parts))  # the first save, and the first after an update
        if is_new:
            self._parts, self._sharing, self._plans = parts, _sharing_of_replicas(), None
        shards, common = save_preprocess(state, validate_access_integrity=bool(is_new))
        if self._sharing is not None:
            self._sharing.apply_saving_parallelization(shards)
        by_name, _, _ = _replace_state_dict_keys_with_sharded_keys(shards, keep_only_main_replica=True)
        writer = ShardWriter(folder, common if dist.get_rank() == 0 else None)
        planner = MCoreSavePlanner(dedup_replicated_tensors=False, flatten_state_dict=False)
        known = (*self._plans, True) if self._plans else None
        (_, contents, _), *plans, _, _ = save_state_dict_async_plan(
            mcore_to_pyt_state_dict(by_name), writer, planner=planner, cached_ckpt_structure=known
        )
        if not known:
            self._plans, self._contents = (plans[0], plans[1]), contents
        if self._contents is not None:
            writer.contents = dataclasses.replace(self._contents)  # without the plans of all ranks, not needed here
        return writer


def _place_of(shard: ShardedTensor) -> tuple[Any, ...]:
    """What its part in the plan depends on."""
    return shard.key, shard.global_offset, shard.local_shape, shard.global_shape, shard.dtype, shard.replica_id


def _sharing_of_replicas() -> FullyParallelSaveStrategyWrapper | None:
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    if group.size() == 1:
        return None
    shards = TorchDistSaveShardedStrategy("torch_dist", 1)
    return FullyParallelSaveStrategyWrapper(shards, group, do_cache_distribution=True)


class HashedFile:
    """A file to write from front to back; hashed on the way, synced at the end.

    torch.save writes through C++ destructors, in which an exception would end the process: a failure is kept and raised
    at the end of the block.

    Args:
        path: to make.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("wb", buffering=0)
        self._digest, self._size = xxhash.xxh3_128(), 0
        self._failure: OSError | None = None

    def write(self, data: bytes) -> int:
        view = memoryview(data).cast("B")
        size = len(view)
        try:
            while view and self._failure is None:
                count = self._file.write(view)
                self._digest.update(view[:count])
                view = view[count:]
        except OSError as error:
            self._failure = error
        self._size += size
        return size

    def flush(self) -> None:
        """Nothing is held back."""

    def tell(self) -> int:
        return self._size

    @property
    def entry(self) -> FileEntry:
        """What was written so far."""
        return FileEntry(self._size, self._digest.hexdigest())

    def __enter__(self) -> "HashedFile":
        return self

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        with self._file:
            if kind is None and self._failure is None:
                os.fsync(self._file.fileno())
        if kind is None and self._failure is not None:
            raise self._failure


def _alone(tensor: Tensor) -> Tensor:
    """The same values on the host in a storage that holds nothing else: torch.save writes whole storages."""
    tensor = tensor.detach().cpu().contiguous()
    if tensor.untyped_storage().nbytes() == tensor.nbytes:
        return tensor
    # numpy gives the memory of a view a storage of its own without copying it
    values = torch.from_numpy(tensor.reshape(-1).view(torch.uint8).numpy())
    return values.view(tensor.dtype).view(tensor.shape)
