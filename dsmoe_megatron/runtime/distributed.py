"""Where the code meets the machine: device, process groups, seeds, and an end on every rank."""

import contextlib
import datetime
import hashlib
import logging
import os
import warnings
from collections.abc import Iterator

import torch
import torch.distributed as dist

from dsmoe_megatron.config import ParallelConfig
from dsmoe_megatron.errors import DSMoEError, PassingError, first_line
from dsmoe_megatron.runtime.processes import end_with_parent


def prepare_device() -> torch.device:
    """Choose this process's device, before anything of megatron.core is imported.

    Returns:
        The CUDA device of the local rank, or the CPU with megatron-core's CUDA assumptions answered.
    """
    # one line per layer and rank says nothing that a user can act on
    warnings.filterwarnings("ignore", message=".*Apex is not installed.*")
    for library in ("megatron", "torch.distributed"):
        warnings.filterwarnings("ignore", category=FutureWarning, module=library)
    warnings.filterwarnings("ignore", category=DeprecationWarning)
    warnings.filterwarnings("ignore", category=UserWarning, module="megatron")
    logging.getLogger("megatron.core.transformer.transformer_layer").setLevel(logging.ERROR)
    # megatron-core overlaps communication with computation in the order of their launch
    os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
        torch.cuda.set_device(device)
    else:
        from dsmoe_megatron.runtime.cpu import answer_cuda_assumptions

        device = torch.device("cpu")
        answer_cuda_assumptions()
    _name_missing_kernel()
    return device


def _name_missing_kernel() -> None:
    """megatron-core 0.16.1 asks whether its routers' kernel is None by a name that only Transformer Engine defines."""
    from megatron.core.transformer.moe import moe_utils

    if not hasattr(moe_utils, "te_general_gemm"):
        moe_utils.te_general_gemm = None


@contextlib.contextmanager
def process_group(device: torch.device, timeout_s: float) -> Iterator[None]:
    """torch.distributed for the time of the block; a process that was started alone is a group of one.

    Args:
        device: decides the backend: nccl for CUDA (gloo beside it for host tensors), gloo for the CPU.
        timeout_s: a collective that waits longer raises [s].
    """
    for name, alone in (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0")):
        os.environ.setdefault(name, alone)
    if "MASTER_ADDR" not in os.environ:
        store: dist.Store | None = dist.HashStore()
    else:
        store = None
        end_with_parent()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(
        backend,
        store=store,
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
        timeout=datetime.timedelta(seconds=timeout_s),
    )
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def deterministic_algorithms(wanted: bool) -> Iterator[None]:
    """For the time of the block torch computes only by algorithms that repeat bit for bit, and refuses others.

    cuBLAS, NCCL and Transformer Engine read their part from the environment, at their first use: enter before it.
    """
    if not wanted:
        yield
        return
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    os.environ.setdefault("NCCL_ALGO", "Ring")  # left to itself NCCL chooses by what it measures
    os.environ.setdefault("NVTE_ALLOW_NONDETERMINISTIC_ALGO", "0")
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def said_in_one_line() -> Iterator[None]:
    """Files that cannot be read or written, and ranks that are gone, become an error of ours."""
    try:
        yield
    except OSError as error:
        place = f"{error.filename}: " if error.filename else ""
        raise PassingError(f"{place}{error.strerror or error}") from error
    except RuntimeError as error:
        # gloo raises nothing more particular
        if not (isinstance(error, dist.DistError) or "gloo" in str(error)):
            raise
        cause = first_line(error)
        raise PassingError(
            f"lost another rank, whose own message, if it had time for one, says why ({cause})"
        ) from error


@contextlib.contextmanager
def group_of_one() -> Iterator[None]:
    """torch.distributed for the time of the block, on this process alone whatever a launcher has set."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


@contextlib.contextmanager
def model_parallel_groups(parallel: ParallelConfig, seed: int) -> Iterator[None]:
    """megatron-core's process groups and random states for the time of the block.

    Args:
        parallel: the layout; data parallelism takes what is left of the world.
        seed: of dropout: equal where tensors are replicated, different over tensor- and expert-parallel shards.
    """
    from megatron.core import parallel_state, tensor_parallel

    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None,
        context_parallel_size=parallel.context,
        expert_model_parallel_size=parallel.expert,
        expert_tensor_parallel_size=parallel.tensor_of_experts,
    )
    try:
        torch.manual_seed(seed)
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
        yield
    finally:
        parallel_state.destroy_model_parallel()


def seed_dropout(seed: int, step: int) -> None:
    """Set the random states for one step from the run's seed and the step alone, so that no state needs saving.

    Equal over tensor-parallel ranks where tensors are replicated; different over data-parallel and pipeline ranks.
    """
    from megatron.core import parallel_state, tensor_parallel

    place = (
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
        parallel_state.get_pipeline_model_parallel_rank(),
    )
    digest = hashlib.sha256(f"{seed}/{step}/{place}".encode()).digest()
    step_seed = int.from_bytes(digest[:4], "big") >> 1
    torch.manual_seed(step_seed)
    tensor_parallel.model_parallel_cuda_manual_seed(step_seed, force_reset_rng=True)


def largest_of_ranks(*values: int) -> list[int]:
    """The largest of each value over all ranks; a few bytes, over gloo on a machine with GPUs too."""
    largest = torch.tensor(values)
    dist.all_reduce(largest, op=dist.ReduceOp.MAX)
    return [int(value) for value in largest]


@contextlib.contextmanager
def raised_on_every_rank() -> Iterator[None]:
    """An error of ours that one rank meets inside the block ends the block with an error on all of them."""
    failure: DSMoEError | None = None
    try:
        yield
    except DSMoEError as error:
        failure = error
    failures: list[tuple[str, bool] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(failures, None if failure is None else (str(failure), isinstance(failure, PassingError)))
    first = next((other for other in failures if other is not None), None)
    if first is None:
        return
    message, may_be_over = first
    shared = failure or (PassingError if may_be_over else DSMoEError)(message)
    shared.on_every_rank = True
    raise shared
