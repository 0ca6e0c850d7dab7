"""Damage to the gradients and losses of chosen steps, as broken hardware or a bad batch does it.

Run as a program it is `python -m dsmoe_megatron pretrain` with the damage of the environment's DSMOE_TEST_DAMAGE, JSON
of step to kind; the engine is wrapped here, the product knows nothing of it.
"""

import json
import os
import sys
from typing import Any

DAMAGE = "DSMOE_TEST_DAMAGE"
LAST_RANK_ONLY = ("nan gradient", "infinite gradient")


def damage_steps(engine_class: Any, damages: dict[int, str]) -> None:
    """Wrap the engine's forward and backward pass.

    Args:
        engine_class: MegatronEngine.
        damages: step from 1 to `nan gradient` or `infinite gradient` (one value on the last rank), `nan loss`, `large
            gradient` or `large loss` (a hundred times as large).
    """
    import torch.distributed as dist

    original = engine_class.forward_backward

    def damaged(engine: Any, micro_batches: Any) -> float:
        loss: float = original(engine, micro_batches)
        kind = damages.get(engine.schedule.num_steps + 1)
        gradients = [buffer.grad_data for chunk in engine.chunks for buffer in chunk.buffers]
        if kind in LAST_RANK_ONLY and dist.get_rank() == dist.get_world_size() - 1:
            # its own shard of the reduced gradient: what lies elsewhere is not looked at any more
            gradients[0][-1000:] = float("nan" if kind == "nan gradient" else "inf")
        elif kind == "large gradient":
            for gradient in gradients:
                gradient *= 100
        return {"nan loss": float("nan"), "large loss": 100 * loss}.get(kind or "", loss)

    engine_class.forward_backward = damaged


def main() -> int:
    from dsmoe_megatron.__main__ import main as dsmoe_megatron
    from dsmoe_megatron.runtime.processes import end_with_parent

    end_with_parent()  # before libraries are loaded, as the verb does

    from dsmoe_megatron.runtime.distributed import prepare_device

    prepare_device()

    from dsmoe_megatron.training.engines.megatron import MegatronEngine

    damage_steps(MegatronEngine, {int(step): kind for step, kind in json.loads(os.environ[DAMAGE]).items()})
    return dsmoe_megatron(["pretrain", *sys.argv[1:]])


if __name__ == "__main__":
    sys.exit(main())
