"""DeepSpeed's ZeRO as the engine, with tensor parallelism from megatron-core.

DeepSpeed reduces gradients over the data-parallel ranks and keeps optimizer state, gradients and weights in parts
there. Micro-batches, schedule, guards and checkpoints are ours: DeepSpeed counts no steps and writes no files.
"""

import math
import os
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.runtime.config import DeepSpeedConfig
from deepspeed.runtime.engine import ZERO_OPTIMIZATION
from deepspeed.runtime.utils import combine_grad_norm_groups
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler
from torch import Tensor, nn
from torch.utils.cpp_extension import _get_build_directory

from dsmoe_megatron.config import Config, OptimizerConfig
from dsmoe_megatron.deepspeed_settings import settings
from dsmoe_megatron.errors import EnvironmentNotSupportedError
from dsmoe_megatron.model.gpt import routers
from dsmoe_megatron.model.router import Router
from dsmoe_megatron.model.transformer_config import transformer_config
from dsmoe_megatron.runtime.compiler import nothing_compiled
from dsmoe_megatron.training.engines.passes import (
    forward,
    initial_chunks,
    loss_share,
    mean_over_ranks,
    on_device,
    sharded_weights_of,
    tokens_per_micro_batch,
)
from dsmoe_megatron.training.engines.protocol import Batch, StepResult
from dsmoe_megatron.training.engines.zero_partitions import ZeroPartitions, optimizer_of_stage_3
from dsmoe_megatron.training.optimizer import build_schedule, set_schedule
from dsmoe_megatron.training.optimizer_shards import places_of, saved_step_count

LONGEST_BUILD_MINUTES = 10  # of DeepSpeed's Adam; one or two are usual
WITH_CONTEXT = {"with_context_parallel": True}


class DeepSpeedEngine:
    """Model, optimizer and schedule of this rank; what its methods promise is in protocol.py.

    Args:
        config: checked recipe with a known vocabulary size.
        device: of this rank.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.gradients_ready: Callable[[], None] = lambda: None
        (self.chunk,) = initial_chunks(config, transformer_config(config, device), device)
        _sum_partial_gradients(self.chunk)
        places = places_of(sharded_weights_of(self.chunk))  # later DeepSpeed takes the weights apart
        self.zero = _start_zero(self.chunk, config, device)
        self.partitions = ZeroPartitions(self.zero.optimizer, places)
        self.gate = _UpdateGate(self.zero.optimizer)
        self.schedule = build_schedule(config.optimizer, config.train.steps, self.zero.optimizer)
        self.has_optimizer_state = False

    @property
    def routers(self) -> list[Router]:
        """This rank's routers."""
        return list(routers([self.chunk]))

    def train_step(
        self, micro_batches: Sequence[Batch], accepts: Callable[[float, float], bool] | None = None
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches; a norm that is not finite changes nothing."""
        lm_loss = self.forward_backward(micro_batches)
        # before the step, so that the first step already moves and the last one is at the minimum
        self.schedule.step(increment=1)
        self.gate.accepts = lambda grad_norm: accepts is None or accepts(lm_loss, grad_norm)
        self.zero.step()
        applied: bool = self.zero.was_step_applied()
        self.has_optimizer_state |= applied
        return StepResult(lm_loss, self.gate.norm, self.zero.optimizer.param_groups[0]["lr"], applied)

    def forward_backward(self, micro_batches: Sequence[Batch]) -> float:
        """Accumulate the mean gradient over this rank's micro-batches; returns the mean loss over the global batch."""
        self.zero.train()
        # as megatron-core's schedule does: the mutual-information losses are attached to the scores, not added to the
        # loss, and context-parallel ranks hold shares of one loss where data-parallel ranks are averaged over
        scale = parallel_state.get_context_parallel_world_size() / len(micro_batches)
        MoEAuxLossAutoScaler.set_loss_scale(torch.full((1,), scale, device=self.device))
        tokens = tokens_per_micro_batch(micro_batches, self.config, self.device)
        losses = []
        for micro_batch in micro_batches:
            loss = self._loss(micro_batch, tokens)
            losses.append(loss.detach())
            self.zero.backward(loss * scale, scale_wrt_gas=False)
        self.gradients_ready()
        return mean_over_ranks(losses, self.device)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch]) -> float:
        """Mean cross-entropy over a global batch without training [nats per token]."""
        self.zero.eval()
        tokens = tokens_per_micro_batch(micro_batches, self.config, self.device)
        return mean_over_ranks([self._loss(micro_batch, tokens) for micro_batch in micro_batches], self.device)

    def _loss(self, micro_batch: Batch, tokens: Tensor) -> Tensor:
        batch = on_device(micro_batch, self.config, self.device)
        return loss_share(batch["loss_mask"], forward(self.zero, batch), tokens)

    def sharded_weights(self) -> dict[str, Any]:
        """Weights as megatron-core's sharded tensors, parts of one global tensor per parameter."""
        if self.partitions.weights_are_apart:
            return {"model": self.partitions.sharded_weights()}
        return {"model": sharded_weights_of(self.chunk)}

    def sharded_state(self, is_loading: bool = False) -> dict[str, Any]:
        """Weights and, after the first update, optimizer state as megatron-core's sharded tensors.

        They are the tensors that are trained, not copies.
        """
        state = self.sharded_weights()
        if not (self.has_optimizer_state or is_loading):
            return state
        if is_loading:
            self.partitions.make_moments()
        return {**state, "optimizer": self.partitions.sharded_optimizer_state()}

    def load_state(self, common: dict[str, Any], step: int) -> None:
        """Take over a checkpoint whose tensors have been read into those of `sharded_state`."""
        self.partitions.set_step_count(saved_step_count(common["optimizer"]) or step)
        self.partitions.weights_changed()
        self.has_optimizer_state = True
        set_schedule(self.schedule, step)

    def weights_loaded(self, step: int) -> None:
        """Take over weights that have been read into those of `sharded_weights`; the optimizer stays as new."""
        self.zero.optimizer.refresh_fp32_params()  # else the first update would bring the old ones back
        self.partitions.weights_changed()
        set_schedule(self.schedule, step)


class _Zero(deepspeed.DeepSpeedEngine):
    """DeepSpeed's engine with one optimizer for all stages and precisions.

    DeepSpeed trains bf16 in stage 1 with an optimizer of another kind, which can leave out no update. Its ZeRO
    optimizer can do the same, with float32 gradients, and does so under offload.
    """

    def _do_optimizer_sanity_check(self, basic_optimizer: Any) -> str:
        super()._do_optimizer_sanity_check(basic_optimizer)
        return str(ZERO_OPTIMIZATION)


def _start_zero(module: nn.Module, config: Config, device: torch.device) -> _Zero:
    """What deepspeed.initialize does, on the process groups that there are.

    Args:
        module: on its device; DeepSpeed takes over its parameters.
        config: checked recipe.
        device: of this rank.
    """
    os.environ.setdefault("LOCAL_RANK", str(device.index or 0))  # DeepSpeed reads it to choose its device
    for parameter in module.parameters():
        # megatron-core's mark of what expert parallelism splits; DeepSpeed takes it for a parameter of its own experts
        parameter.allreduce = True  # type: ignore[attr-defined]
    with nothing_compiled():  # DeepSpeed asks whether the optimizer is Muon, whose module would compile its kernels
        import deepspeed.runtime.zero.muon.muon_optimizer
    if device.type == "cpu":
        # a helper for inference alone, which would be compiled for a minute and a half, and bind all ranks to one host
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        # devices of this machine: to count them itself it starts a program, in stage 3 for every reduction
        os.environ.setdefault("LOCAL_SIZE", os.environ.get("LOCAL_WORLD_SIZE", "1"))
    deepspeed.comm.init_distributed(dist_init_required=False, auto_mpi_discovery=False, verbose=False)
    groups = _ModelParallelUnit()
    parameters = sum(parameter.numel() for parameter in module.parameters())
    described = settings(config, parameters, on_cuda=device.type == "cuda")
    return _Zero(
        args=None,
        model=module,
        optimizer=_adam(config, module),
        mpu=groups,
        dist_init_required=False,
        config=described,
        config_class=DeepSpeedConfig(described, groups),
    )


def _adam(config: Config, module: nn.Module) -> torch.optim.Optimizer:
    """AdamW with megatron-core's rule for weight decay: vectors are exempt.

    torch's own counts the steps of each tensor. Those of Transformer Engine and apex count them once per call, and ZeRO
    makes several calls for one step.
    """
    section: OptimizerConfig = config.optimizer
    parameters = list(module.parameters())
    groups = [
        {"params": [parameter for parameter in parameters if (parameter.dim() == 1) == is_vector], "wd_mult": factor}
        for is_vector, factor in ((False, 1.0), (True, 0.0))
    ]
    options: dict[str, Any] = {
        "lr": section.lr,
        "betas": (section.beta1, section.beta2),
        "eps": section.eps,
        "weight_decay": section.weight_decay,
    }
    if config.engine.offload_optimizer:
        _refuse_abandoned_build()
        optimizer: torch.optim.Optimizer = deepspeed.ops.adam.DeepSpeedCPUAdam(groups, adamw_mode=True, **options)
        return optimizer
    return torch.optim.AdamW(groups, fused=parameters[0].is_cuda or None, **options)


def _refuse_abandoned_build() -> None:
    """DeepSpeed compiles its Adam at its first use. torch waits without a word for another process that does so.

    Raises:
        EnvironmentNotSupportedError: the file that says so is of a build that was killed.
    """
    lock = Path(_get_build_directory("cpu_adam", verbose=False)) / "lock"
    try:
        minutes = (time.time() - lock.stat().st_mtime) / 60
    except FileNotFoundError:
        return
    if minutes > LONGEST_BUILD_MINUTES:
        raise EnvironmentNotSupportedError(
            f"{lock} is {minutes:.0f} minutes old: a build of DeepSpeed's Adam was killed, and every later one would "
            "wait for it; remove that file"
        )


def _sum_partial_gradients(module: nn.Module) -> None:
    """Where tensor-parallel ranks hold different tokens, sum the gradients of what they have in common.

    megatron-core does so when a step's gradients are complete (finalize_model_grads); DeepSpeed takes them away as they
    come.
    """
    group = parallel_state.get_tensor_model_parallel_group()

    def summed(gradient: Tensor) -> Tensor:
        whole = gradient.clone(memory_format=torch.contiguous_format)
        torch.distributed.all_reduce(whole, group=group)
        return whole

    for parameter in module.parameters():
        if group.size() > 1 and getattr(parameter, "sequence_parallel", False):
            parameter.register_hook(summed)


class _UpdateGate:
    """Stands where DeepSpeed's optimizer has the gradient norm, and asks whether the update may be made.

    DeepSpeed takes a negative norm for an overflow: it drops the gradients and leaves all else as it is.

    Args:
        optimizer: of ZeRO; one method of it is replaced.

    Attributes:
        accepts: is asked with the norm.
        norm: of the last step; infinite where any gradient was not finite.
    """

    def __init__(self, optimizer: Any) -> None:
        self.accepts: Callable[[float], bool] = lambda _: True
        self.norm = math.nan
        self._optimizer = optimizer
        if optimizer_of_stage_3(optimizer):
            norms = optimizer._get_norm_groups
            optimizer._get_norm_groups = lambda: [self._ask(combine_grad_norm_groups(norms()))]
        else:
            norm = optimizer.scaled_global_norm
            optimizer.scaled_global_norm = lambda: self._ask(norm())
            # in bf16 it heeds the norm only when told to look for overflows; the norm finds these by itself
            optimizer.check_grad_overflow, optimizer.check_overflow = True, lambda **_: None

    def _ask(self, norm: Tensor) -> Tensor:
        """The norm, or what stands for an overflow."""
        self.norm = float(norm)
        if self.accepts(self.norm) and math.isfinite(self.norm):
            return norm
        if not optimizer_of_stage_3(self._optimizer):
            # under offload DeepSpeed forgets to drop what it has accumulated in float32
            for gradients in (self._optimizer.averaged_gradients, self._optimizer.all_grad_tensors):
                gradients.update(dict.fromkeys(gradients))
        return torch.full_like(norm, -1.0)


class _ModelParallelUnit:
    """megatron-core's groups under the names that DeepSpeed asks for.

    Its model parallelism is tensor parallelism. Gradients are averaged and states cut over the context-parallel ranks
    too, which hold the same weights, as under megatron-core's distributed optimizer.
    """

    get_data_parallel_group = staticmethod(partial(parallel_state.get_data_parallel_group, **WITH_CONTEXT))
    get_data_parallel_rank = staticmethod(partial(parallel_state.get_data_parallel_rank, **WITH_CONTEXT))
    get_data_parallel_world_size = staticmethod(partial(parallel_state.get_data_parallel_world_size, **WITH_CONTEXT))
    get_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
