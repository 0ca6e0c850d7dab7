"""Answers to megatron-core's assumptions on CUDA, for a machine that has none.

megatron-core 0.16.1 asks CUDA for its device, its random state and its streams without checking that there is one.
`answer_cuda_assumptions` gives it the CPU's answers, so that the same model, schedule, optimizer and checkpoint code
runs here over gloo. Every answer names the place in megatron-core that asks. It must be called before megatron.core is
imported, refuses to load where CUDA is, and refuses a megatron-core it was not written for.
"""

import contextlib
import functools
import importlib.metadata
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._device import _device_constructors

from dsmoe_megatron.errors import EnvironmentNotSupportedError
from dsmoe_megatron.runtime.compiler import nothing_compiled

SUPPORTED_MEGATRON_CORE = "0.16.1"
CPU = torch.device("cpu")


def answer_cuda_assumptions() -> None:
    """Make torch.cuda and megatron-core answer for the CPU; a second call changes nothing.

    Raises:
        EnvironmentNotSupportedError: CUDA is available, megatron-core is of another version or was imported already.
    """
    if getattr(torch.cuda.current_device, "answers_for_cpu", False):
        return
    if torch.cuda.is_available():
        raise EnvironmentNotSupportedError("the CPU answers were asked for on a machine with CUDA: do not load them")
    version = importlib.metadata.version("megatron-core")
    if version != SUPPORTED_MEGATRON_CORE:
        raise EnvironmentNotSupportedError(
            f"megatron-core {version} on a CPU: only {SUPPORTED_MEGATRON_CORE} is supported; "
            f"pip install megatron-core=={SUPPORTED_MEGATRON_CORE}"
        )
    if "megatron.core" in sys.modules:
        raise EnvironmentNotSupportedError("megatron.core was imported first: call prepare_device before it")
    _answer_device()
    _answer_factories()
    _answer_tensor_methods()
    _answer_streams()
    _answer_random_state()
    with nothing_compiled(), _absent("wandb"):
        import megatron.core  # noqa: F401
    _answer_megatron_random()
    _answer_megatron_moe()
    _answer_uneven_collectives()


def _answer_device() -> None:
    """tensor_parallel/layers.py, param_and_grad_buffer.py and others allocate on torch.cuda.current_device()."""

    def current_device() -> torch.device:
        return CPU

    current_device.answers_for_cpu = True  # type: ignore[attr-defined]
    torch.cuda.current_device = current_device  # type: ignore[assignment]
    torch.cuda.set_device = lambda device: None
    # timers.py, schedules.py and the checkpoint writers wait for the device
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None


def _answer_factories() -> None:
    """clip_grads.py, optimizer.py, schedules.py, grad_scaler.py write device="cuda" literally; rope_utils.py pins."""

    def on_cpu(factory: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @functools.wraps(factory)
        def make(*args: Any, **kwargs: Any) -> Tensor:
            device = kwargs.get("device")
            if device is not None and not isinstance(device, int) and torch.device(device).type == "cuda":
                kwargs["device"] = CPU
            kwargs.pop("pin_memory", None)
            return factory(*args, **kwargs)

        return make

    # `with torch.device(...)` looks its factories up once, by identity: let it find the originals
    _device_constructors()
    for name in ("tensor", "zeros", "empty", "ones", "full", "arange", "empty_like", "zeros_like"):
        setattr(torch, name, on_cpu(getattr(torch, name)))


def _answer_tensor_methods() -> None:
    # language_module.py and distrib_optimizer.py move tensors with .cuda()
    torch.Tensor.cuda = lambda self, *args, **kwargs: self  # type: ignore[method-assign]

    # distrib_optimizer.py, optimizer.py and clip_grads.py compare .type() with "torch.cuda.FloatTensor"
    type_of = torch.Tensor.type

    def type_as_on_cuda(self: Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = type_of(self, *args, **kwargs)
        asked_by = sys._getframe(1).f_globals.get("__name__", "")
        if not args and not kwargs and asked_by.startswith("megatron.core"):
            answer = answer.replace("torch.", "torch.cuda.", 1)
        return answer

    torch.Tensor.type = type_as_on_cuda  # type: ignore[method-assign,assignment]


class _Event:
    """Stands for torch.cuda.Event where everything is already done when it is recorded."""

    def __init__(self, **options: object) -> None: ...

    def record(self, stream: object = None) -> None: ...

    def wait(self, stream: object = None) -> None: ...

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, end: object) -> float:
        return 0.0


class _Stream:
    """Stands for torch.cuda.Stream where work runs in the order of the program."""

    def __init__(self, **options: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: _Event | None = None) -> _Event:
        return event or _Event()


def _answer_streams() -> None:
    """param_and_grad_buffer.py, p2p_communication.py, timers.py and the checkpoint writers use streams and events."""
    # classes, not functions: other libraries name them in annotations
    torch.cuda.Stream, torch.cuda.Event = _Stream, _Event  # type: ignore[misc,assignment]
    stream = _Stream()
    torch.cuda.current_stream = torch.cuda.default_stream = lambda device=None: stream  # type: ignore[assignment,return-value]
    torch.cuda.stream = lambda stream: contextlib.nullcontext()  # type: ignore[assignment,return-value]
    torch.cuda.nvtx.range_push = lambda message: 0
    torch.cuda.nvtx.range_pop = lambda: 0


def _answer_random_state() -> None:
    """tensor_parallel/random.py seeds and reads the CUDA generator."""
    torch.cuda.get_rng_state = torch.cuda.random.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = torch.cuda.random.set_rng_state = lambda new_state, device=None: torch.set_rng_state(
        new_state
    )

    def manual_seed(seed: int) -> None:
        torch.default_generator.manual_seed(seed)

    torch.cuda.manual_seed = torch.cuda.random.manual_seed = manual_seed


@contextlib.contextmanager
def _absent(module: str) -> Iterator[None]:
    """inference/contexts/dynamic_context.py imports trackers, for a server that is not run here; half a second."""
    if module in sys.modules:
        yield
        return
    sys.modules[module] = None  # type: ignore[assignment]
    try:
        yield
    finally:
        del sys.modules[module]


def _answer_megatron_random() -> None:
    """tensor_parallel/random.py reaches into torch._C for the CUDA generator's state."""
    from megatron.core.tensor_parallel import random as megatron_random

    megatron_random._get_cuda_rng_state = lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    megatron_random._set_cuda_rng_state = lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)

    # upstream's fork warns when the CPU state moves inside it; here that is the state that must move
    @contextlib.contextmanager
    def fork(self: Any, name: str = megatron_random._MODEL_PARALLEL_RNG_TRACKER_NAME) -> Iterator[None]:
        if name not in self.states_:
            raise KeyError(f"random state {name} was not added to the tracker")
        outside = torch.get_rng_state()
        torch.set_rng_state(self.states_[name])
        try:
            yield
        finally:
            self.states_[name] = torch.get_rng_state()
            torch.set_rng_state(outside)

    megatron_random.CudaRNGStatesTracker.fork = fork


def _answer_megatron_moe() -> None:
    """The sparse-trained baseline's MoELayer."""
    from megatron.core.transformer.moe import token_dispatcher

    # token_dispatcher.py turns split sizes into numpy only if they are on CUDA; all_to_all_single wants numbers
    def to_host(tensor: Any, as_numpy: bool = False, record_stream: bool = False) -> Any:
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_host


def _answer_uneven_collectives() -> None:
    """tensor_parallel/mappings.py gathers and scatters unequal shares (experts over EP and TP); gloo cannot."""
    from megatron.core.tensor_parallel import mappings

    equal_gather, equal_reduce_scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    def gather(shard: Tensor, group: Any, output_split_sizes: Any = None, use_global_buffer: bool = False) -> Tensor:
        if output_split_sizes is None or group.size() == 1:
            return equal_gather(shard, group, output_split_sizes, use_global_buffer)
        sizes = [int(size) for size in output_split_sizes]
        padded = shard.new_zeros((max(sizes), *shard.shape[1:]))
        padded[: shard.shape[0]] = shard
        gathered = shard.new_empty((len(sizes) * max(sizes), *shard.shape[1:]))
        dist.all_gather_into_tensor(gathered, padded, group=group)
        return torch.cat([part[:size] for part, size in zip(gathered.split(max(sizes)), sizes, strict=True)])

    def reduce_scatter(
        whole: Tensor, group: Any, input_split_sizes: Any = None, use_global_buffer: bool = False
    ) -> Tensor:
        if input_split_sizes is None or group.size() == 1:
            return equal_reduce_scatter(whole, group, input_split_sizes, use_global_buffer)
        total = whole.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total.split([int(size) for size in input_split_sizes])[group.rank()].contiguous()

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gather, reduce_scatter
