"""AdamW in megatron-core's distributed optimizer, and the schedules of its learning rate."""

from collections.abc import Sequence
from typing import Any

import torch
from megatron.core.optimizer import MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as MegatronOptimizerConfig
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.core.transformer.module import MegatronModule

from dsmoe_megatron.config import Config, OptimizerConfig
from dsmoe_megatron.config_rules import wsd_decay_steps


def minimum_lr(optimizer: OptimizerConfig) -> float:
    return optimizer.lr / 10 if optimizer.min_lr is None else optimizer.min_lr


def build_optimizer(config: Config, chunks: Sequence[MegatronModule]) -> MegatronOptimizer:
    """AdamW over this rank's chunks; sharded over the data-parallel ranks at every size, one included.

    Vectors (norms) are exempt from weight decay, which is megatron-core's rule.
    """
    section, bf16 = config.optimizer, config.train.precision == "bf16"
    return get_megatron_optimizer(
        MegatronOptimizerConfig(
            optimizer="adam",
            lr=section.lr,
            min_lr=minimum_lr(section),
            weight_decay=section.weight_decay,
            adam_beta1=section.beta1,
            adam_beta2=section.beta2,
            adam_eps=section.eps,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=True,
            overlap_param_gather=config.parallel.overlap,
        ),
        list(chunks),
    )


def build_schedule(section: OptimizerConfig, steps: int, optimizer: MegatronOptimizer) -> OptimizerParamScheduler:
    """Linear warm-up from 0, then the section's schedule to min_lr at decay_steps; the unit is optimizer steps."""
    return OptimizerParamScheduler(
        optimizer,
        init_lr=0.0,
        max_lr=section.lr,
        min_lr=minimum_lr(section),
        lr_warmup_steps=section.warmup_steps,
        lr_decay_steps=section.decay_steps or steps,
        lr_decay_style="WSD" if section.schedule == "wsd" else "cosine",
        wsd_decay_steps=wsd_decay_steps(section, steps),
        lr_wsd_decay_style=section.wsd_decay_shape,
        start_wd=section.weight_decay,
        end_wd=section.weight_decay,
        wd_incr_steps=0,
        wd_incr_style="constant",
    )


def set_schedule(schedule: OptimizerParamScheduler, step: int) -> None:
    """As it is after so many steps."""
    schedule.num_steps = 0
    schedule.step(increment=step)


def wrapped_optimizers(optimizer: MegatronOptimizer) -> list[Any]:
    """The distributed optimizers inside a chain (one for the experts' weights, one for the rest), or the only one."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def clip_gradients(optimizer: MegatronOptimizer, largest_norm: float, norm: float) -> None:
    """Scale the prepared gradients down to `largest_norm` where their global norm is above it."""
    for distributed in wrapped_optimizers(optimizer):
        parameters = distributed.get_parameters()
        if parameters:
            clip_grad_by_total_norm_fp32(parameters, largest_norm, norm)


def own_step_counts(optimizer: MegatronOptimizer) -> None:
    """Give every parameter its own AdamW step count after a load.

    megatron-core 0.16.1 loads ONE tensor for all of them (distrib_optimizer.py, load_state_dict, without apex or
    Transformer Engine): AdamW would then advance the shared count once per parameter, silently.
    """
    for distributed in wrapped_optimizers(optimizer):
        for state in distributed.optimizer.state.values():
            if torch.is_tensor(state.get("step")):
                state["step"] = state["step"].detach().clone()
