"""megatron-core as the engine: its pipeline schedules, gradient reduction and distributed optimizer."""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from dsmoe_megatron.config import Config
from dsmoe_megatron.model.gpt import routers
from dsmoe_megatron.model.router import Router
from dsmoe_megatron.model.transformer_config import transformer_config
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
from dsmoe_megatron.training.optimizer import (
    build_optimizer,
    build_schedule,
    clip_gradients,
    set_schedule,
    wrapped_optimizers,
)
from dsmoe_megatron.training.optimizer_shards import load_step_count, sharded_optimizer_state


class MegatronEngine:
    """Model, optimizer and schedule of this rank; what its methods promise is in protocol.py.

    Args:
        config: checked recipe with a known vocabulary size.
        device: of this rank.
    """

    def __init__(self, config: Config, device: torch.device) -> None:
        self.config, self.device = config, device
        self.gradients_ready: Callable[[], None] = lambda: None
        self.transformer = transformer_config(config, device)
        self.chunks = self._wrap(initial_chunks(config, self.transformer, device))
        self.optimizer = build_optimizer(config, self.chunks)
        self.schedule = build_schedule(config.optimizer, config.train.steps, self.optimizer)
        self._connect_schedule()
        self.has_optimizer_state = False

    def _wrap(self, chunks: Sequence[MegatronModule]) -> list[MegatronModule]:
        overlap = self.config.parallel.overlap
        ddp_config = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            use_distributed_optimizer=True,
            overlap_grad_reduce=overlap,
            overlap_param_gather=overlap,
        )
        # the first chunk's backward ends the step: only its buckets can overlap
        return [
            DistributedDataParallel(self.transformer, ddp_config, chunk, disable_bucketing=index > 0)
            for index, chunk in enumerate(chunks)
        ]

    def _connect_schedule(self) -> None:
        """Tell megatron-core's schedule, through its configuration, how gradients are scaled and synchronised."""
        transformer, chunks = self.transformer, self.chunks
        transformer.finalize_model_grads_func = self._finalize_gradients
        transformer.grad_scale_func = self.optimizer.scale_loss
        if self.config.parallel.overlap:
            several = len(chunks) > 1
            transformer.no_sync_func = [chunk.no_sync for chunk in chunks] if several else chunks[0].no_sync
            transformer.grad_sync_func = (
                [chunk.start_grad_sync for chunk in chunks] if several else chunks[0].start_grad_sync
            )
            transformer.param_sync_func = (
                [chunk.start_param_sync for chunk in chunks] if several else chunks[0].start_param_sync
            )

    def _finalize_gradients(self, *arguments: Any, **options: Any) -> None:
        self.gradients_ready()
        finalize_model_grads(*arguments, **options)

    @property
    def routers(self) -> list[Router]:
        """This rank's routers."""
        return list(routers(self.chunks))

    def train_step(
        self, micro_batches: Sequence[Batch], accepts: Callable[[float, float], bool] | None = None
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches."""
        lm_loss = self.forward_backward(micro_batches)
        # before the step, so that the first step already moves and the last one is at the minimum
        self.schedule.step(increment=1)
        self.optimizer.prepare_grads()
        grad_norm = float(self.optimizer.get_grad_norm())
        applied = accepts is None or accepts(lm_loss, grad_norm)
        if applied:
            if self.config.optimizer.clip_grad:
                clip_gradients(self.optimizer, self.config.optimizer.clip_grad, grad_norm)
            self.optimizer.step_with_ready_grads()
            self.has_optimizer_state = True
        return StepResult(lm_loss, grad_norm, self.optimizer.param_groups[0]["lr"], applied)

    def forward_backward(self, micro_batches: Sequence[Batch]) -> float:
        """Fill the gradient buffers with the mean gradient over the global batch; returns the mean loss."""
        for chunk in self.chunks:
            chunk.train()
            chunk.zero_grad_buffer()
        self.optimizer.zero_grad()
        return self._run(micro_batches, forward_only=False)

    @torch.no_grad()
    def evaluate(self, micro_batches: Sequence[Batch]) -> float:
        """Mean cross-entropy over a global batch without training [nats per token]."""
        for chunk in self.chunks:
            chunk.eval()
        with self._gathered_parameters():
            return self._run(micro_batches, forward_only=True)

    @contextlib.contextmanager
    def _gathered_parameters(self) -> Iterator[None]:
        """Whole parameters on every rank: when their gathering overlaps with the forward pass, it is still to come."""
        overlapping = [chunk for chunk in self.chunks if chunk.ddp_config.overlap_param_gather]
        for chunk in overlapping:
            chunk.disable_forward_pre_hook(param_sync=True)
        yield
        for chunk in overlapping:
            chunk.enable_forward_pre_hook()

    def _run(self, micro_batches: Sequence[Batch], forward_only: bool) -> float:
        tokens = tokens_per_micro_batch(micro_batches, self.config, self.device)
        batches = [on_device(batch, self.config, self.device) for batch in micro_batches]
        # every virtual stage walks the micro-batches by itself
        iterators = [iter(batches) for _ in self.chunks]
        reports = get_forward_backward_func()(
            forward_step_func=partial(self._forward_step, tokens),
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.chunks if len(self.chunks) > 1 else self.chunks[0],
            num_microbatches=len(batches),
            seq_length=self.config.train.sequence_length,
            micro_batch_size=self.config.train.micro_batch_size,
            forward_only=forward_only,
        )
        return mean_over_ranks([report["lm_loss"] for report in reports], self.device)

    def _forward_step(self, tokens: Tensor, batches: Iterator[Batch], chunk: MegatronModule) -> tuple[Tensor, Any]:
        batch = next(batches)
        return forward(chunk, batch), partial(_loss_and_report, batch["loss_mask"], tokens)

    def sharded_weights(self) -> dict[str, Any]:
        """Weights as megatron-core's sharded tensors, one global tensor per parameter, by chunk."""
        with self._gathered_parameters():
            return {name: sharded_weights_of(chunk) for name, chunk in self._named_chunks()}

    def _named_chunks(self) -> Iterator[tuple[str, MegatronModule]]:
        for index, chunk in enumerate(self.chunks):
            yield ("model" if len(self.chunks) == 1 else f"model{index}"), chunk

    def sharded_state(self, is_loading: bool = False) -> dict[str, Any]:
        """Weights and, after the first update, optimizer state as megatron-core's sharded tensors.

        They are the tensors that are trained, not copies.
        """
        model = self.sharded_weights()
        if not (self.has_optimizer_state or is_loading):
            return model
        if is_loading:
            for optimizer in wrapped_optimizers(self.optimizer):
                if not optimizer.optimizer.state:
                    optimizer._init_optimizer_states_with_dummy_values()
        return {**model, "optimizer": sharded_optimizer_state(self.optimizer, model)}

    def load_state(self, common: dict[str, Any], step: int) -> None:
        """Take over a checkpoint whose tensors have been read into those of `sharded_state`."""
        load_step_count(self.optimizer, common["optimizer"])
        self.has_optimizer_state = True
        set_schedule(self.schedule, step)

    def weights_loaded(self, step: int) -> None:
        """Take over weights that have been read into those of `sharded_weights`; the optimizer stays as new."""
        # the optimizer has master copies of bf16 weights: without this the first step would bring the old ones back
        self.optimizer.reload_model_params()
        set_schedule(self.schedule, step)


def _loss_and_report(loss_mask_BS: Tensor, tokens: Tensor, losses_BS: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
    """The share of the mean loss, for the schedule, and a copy of it to report.

    The schedule multiplies by the context-parallel size, divides by the number of micro-batches and, in place, scales
    what it is given: the report must not share its storage.
    """
    share = loss_share(loss_mask_BS, losses_BS, tokens)
    return share, {"lm_loss": share.detach().clone()}
