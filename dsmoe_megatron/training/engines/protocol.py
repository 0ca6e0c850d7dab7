"""What the loop, the saver, validation and the check ask of an engine: model, optimizer and schedule of one rank."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from dsmoe_megatron.config import Config
from dsmoe_megatron.model.router import Router

# one micro-batch: tokens, labels, loss_mask, position_ids (in their documents where these are separate), each [B, S]
Batch = dict[str, Tensor]


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step saw.

    Attributes:
        lm_loss: mean cross-entropy over the tokens of the global batch that count, without the mutual-information loss
            [nats per token].
        grad_norm: global gradient norm before clipping.
        learning_rate: of this step.
        applied: whether the weights were changed.
    """

    lm_loss: float
    grad_norm: float
    learning_rate: float
    applied: bool = True


class Engine(Protocol):
    """Every rank calls each method at the same point.

    Attributes:
        config: checked recipe with a known vocabulary size.
        device: of this rank.
        gradients_ready: called in every step when the backward passes are done, before this rank waits for others.
        has_optimizer_state: whether a weight was changed, or an optimizer's state loaded.
    """

    config: Config
    device: torch.device
    gradients_ready: Callable[[], None]
    has_optimizer_state: bool

    @property
    def routers(self) -> list[Router]:
        """This rank's routers."""

    def train_step(
        self, micro_batches: Sequence[Batch], accepts: Callable[[float, float], bool] | None = None
    ) -> StepResult:
        """One optimizer step over this rank's micro-batches.

        Args:
            micro_batches: of this rank.
            accepts: called when the gradients are there and weights and optimizer state are still as they were; is
                given the loss and the gradient norm, and answers alike on every rank. False leaves weights and
                optimizer as they are, while the schedule moves on. None accepts all.
        """

    def evaluate(self, micro_batches: Sequence[Batch]) -> float:
        """Mean cross-entropy over the tokens of a global batch that count, without training [nats per token]."""

    def sharded_weights(self) -> dict[str, Any]:
        """Weights as megatron-core's sharded tensors, parts of one global tensor per parameter, by chunk."""

    def sharded_state(self, is_loading: bool = False) -> dict[str, Any]:
        """Weights and, after the first update, optimizer state as megatron-core's sharded tensors.

        They are the tensors that are trained, not copies.
        """

    def load_state(self, common: dict[str, Any], step: int) -> None:
        """Take over a checkpoint whose tensors have been read into those of `sharded_state`.

        Args:
            common: what is no tensor in it.
            step: to set the schedule to.
        """

    def weights_loaded(self, step: int) -> None:
        """Take over weights that have been read into those of `sharded_weights`; the optimizer stays as new.

        Args:
            step: to set the schedule to.
        """
