"""How long a run takes to its first step, by part; benchmarks/training_loop.py starts this in a fresh process.

    python -m benchmarks.training_startup RECIPE SECONDS_SINCE_THE_EPOCH

Nothing heavy is imported at the top, so that imports can be timed.
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Parts:
    """Seconds by part; each `ends` closes the part that began with the one before."""

    def __init__(self, begun: float) -> None:
        self.seconds: dict[str, float] = {}
        self.last = begun

    def ends(self, part: str) -> None:
        now = time.time()
        self.seconds[part] = self.seconds.get(part, 0.0) + now - self.last
        self.last = now

    def around(self, call: Callable[..., Any], before: str, part: str) -> Callable[..., Any]:
        """`call` as a part of its own; what was before it belongs to `before`."""

        def timed(*arguments: Any, **options: Any) -> Any:
            self.ends(before)
            result = call(*arguments, **options)
            self.ends(part)
            return result

        return timed


def main(recipe: str, begun: str) -> None:
    """One step of the recipe; prints the seconds of each part as JSON on the last line."""
    parts = Parts(float(begun))
    parts.ends("interpreter")
    import torch

    parts.ends("import of torch")
    from dsmoe_megatron.config_parsing import load_config

    config = load_config(recipe)
    parts.ends("recipe")
    from dsmoe_megatron.runtime.distributed import model_parallel_groups, prepare_device, process_group
    from dsmoe_megatron.runtime.processes import StopSignals

    device = prepare_device()
    from dsmoe_megatron.training import beginning, loop

    parts.ends("import of megatron-core and the loop")
    torch.set_num_threads(1)
    run_dir = Path(config.train.run_dir)
    with process_group(device, config.train.timeout_minutes):
        parts.ends("process groups")
        tokenizer = loop.open_data(config)
        run_dir.mkdir(parents=True, exist_ok=True)
        parts.ends("tokenizer, checks of the data")
        with model_parallel_groups(config.parallel, config.train.seed):
            parts.ends("process groups")
            loop.build_engine = parts.around(loop.build_engine, "the rest", "model")
            beginning.build_datasets = parts.around(beginning.build_datasets, "the rest", "sample indices")
            run = loop.TrainingRun(config, device, tokenizer, run_dir, StopSignals())
            run.engine.train_step = parts.around(  # type: ignore[method-assign]
                run.engine.train_step, "the rest", "first step"
            )
            run.train()
    print(json.dumps(parts.seconds))


if __name__ == "__main__":
    main(*sys.argv[1:])
