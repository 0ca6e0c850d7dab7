"""The verb `evaluate`: perplexity under expert policies, their calibration, and lm-evaluation-harness tasks."""

import argparse
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dsmoe_megatron.errors import ConfigurationError
from dsmoe_megatron.evaluation.policies import PolicyOptions
from dsmoe_megatron.json_text import json_text
from dsmoe_megatron.output_file import check_output, write_output


def build_parser(program: str = "dsmoe-megatron evaluate") -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program,
        description="Evaluate a training checkpoint or an export under dense and sparse expert policies.",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--checkpoint", type=Path, required=True, help="run folder (its newest checkpoint), step, export"
    )
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of the weights; default: the run's or the export's")
    parser.add_argument("--json", action="store_true", help="print the result as JSON instead of a table")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the JSON to this file as well")
    _add_data_options(parser.add_argument_group("data, for the perplexity"))
    _add_policy_options(parser.add_argument_group("policies; without any, dense and the checkpoint's default"))
    _add_calibration_options(parser.add_argument_group("calibration, from the data"))
    _add_task_options(parser.add_argument_group("lm-evaluation-harness"))
    return parser


def _add_data_options(group: Any) -> None:
    group.add_argument(
        "--data",
        nargs="+",
        default=[],
        metavar="PREFIX",
        help="prefixes of indexed datasets; or .txt (one document), .jsonl, .jsonl.zst, .parquet, folders",
    )
    group.add_argument("--sequence-length", type=int, help="tokens of a window; default: as trained")
    group.add_argument("--stride", type=int, help="tokens from window to window; default: the window's length")
    group.add_argument("--max-tokens", type=int, help="score about so many tokens of each input, spread over it")
    group.add_argument("--batch-size", type=int, default=8, help="windows of one forward pass (default: 8)")


def _add_policy_options(group: Any) -> None:
    group.add_argument("--thresholds", type=float, nargs="+", default=[], metavar="EPS", help="threshold policies")
    group.add_argument("--attention-threshold", type=float, metavar="EPS", help="of the attention, in all of them")
    group.add_argument("--top-k", type=int, nargs="+", default=[], metavar="K", help="topk policies: MLP experts")
    group.add_argument("--attention-top-k", type=int, metavar="K", help="attention experts in all of them")
    group.add_argument(
        "--threshold-top-k", type=float, nargs="+", default=[], metavar="EPS", help="threshold_topk policies"
    )
    group.add_argument(
        "--policy-file", type=Path, nargs="+", default=[], metavar="FILE", help="policies that --calibrate found"
    )


def _add_calibration_options(group: Any) -> None:
    group.add_argument("--calibrate", choices=("threshold", "topk"), help="find limits of each layer: eps or K")
    group.add_argument("--target-share", type=float, metavar="SHARE", help="wanted active share of the parameters")
    group.add_argument(
        "--target-perplexity-loss", type=float, metavar="LOSS", help="wanted loss relative to dense: 0.02 is 2 %%"
    )
    group.add_argument("--save-policy", type=Path, metavar="FILE", help="policy file to write")


def _add_task_options(group: Any) -> None:
    group.add_argument("--tasks", nargs="+", default=[], metavar="TASK", help="names, or YAML files of own tasks")
    group.add_argument("--num-fewshot", type=int, help="examples before each question; default: the task's")
    group.add_argument("--limit", type=int, help="only so many questions of each task")


def evaluate(arguments: Sequence[str], program: str = "dsmoe-megatron evaluate") -> None:
    """Run the verb; prints the result.

    Raises:
        DSMoEError: see the message; no file is left half-written.
    """
    options = build_parser(program).parse_args(arguments)
    _check_options(options)

    import transformers

    from dsmoe_megatron.evaluation.loading import DTYPES, load_model

    transformers.logging.set_verbosity_error()  # what it warns of is checked here
    transformers.logging.disable_progress_bar()
    loaded = load_model(options.checkpoint, DTYPES.get(options.dtype))
    if options.calibrate:
        result, text = _calibrate(options, loaded)
    else:
        result, text = _measure(options, loaded)
    if options.output is not None:
        write_output(options.output, json_text(result, indent=1) + "\n", "--output")
    print(json_text(result, indent=1) if options.json else text)


def _check_options(options: argparse.Namespace) -> None:
    """What can be refused before anything is loaded."""
    if not options.data and not options.tasks:
        raise ConfigurationError("--data", None, "give datasets (or --tasks) to evaluate on")
    targets = [name for name in ("target_share", "target_perplexity_loss") if getattr(options, name) is not None]
    if options.calibrate is None:
        if targets or options.save_policy:
            raise ConfigurationError("--calibrate", None, "must be threshold or topk for a target to be met")
    elif len(targets) != 1:
        raise ConfigurationError("--calibrate", options.calibrate, "needs --target-share or --target-perplexity-loss")
    elif not options.data or options.tasks or policy_options(options):
        rule = "works on --data alone; evaluate the policy file that it saves with the other options"
        raise ConfigurationError("--calibrate", options.calibrate, rule)
    for option, value in (("--batch-size", options.batch_size), ("--limit", options.limit)):
        if value is not None and value < 1:
            raise ConfigurationError(option, value, "must be at least 1")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise ConfigurationError("--num-fewshot", options.num_fewshot, "must be at least 0")
    check_output(options.output, "--output")
    check_output(options.save_policy, "--save-policy")


def policy_options(options: argparse.Namespace) -> PolicyOptions:
    return PolicyOptions(
        options.thresholds,
        options.attention_threshold,
        options.top_k,
        options.attention_top_k,
        options.threshold_top_k,
        options.policy_file,
    )


def _measure(options: argparse.Namespace, loaded: Any) -> tuple[dict[str, Any], str]:
    """Perplexity on the data, and the tasks, under the same policies."""
    from dsmoe_megatron.evaluation.perplexity import sweep
    from dsmoe_megatron.evaluation.policies import sweep_policies
    from dsmoe_megatron.evaluation.presentation import as_dict, as_text

    policies = sweep_policies(
        policy_options(options), loaded.architecture, loaded.default_policy, loaded.reference_policy
    )
    result: dict[str, Any] = {}
    texts: list[str] = []
    if options.data:
        streams, windows, batches = _open_data(options, loaded)
        tokens = sum(window.length for batch in batches for window in batch.windows)
        with progress_bar(len(policies) * tokens, "tokens") as advance:
            measured = sweep(loaded, policies, batches, advance)
        result = as_dict(options.checkpoint, loaded, streams, windows, measured)
        texts.append(as_text(result))
    if options.tasks:
        from dsmoe_megatron.evaluation.tasks import evaluate_tasks, tasks_as_text

        scores = evaluate_tasks(loaded, policies, options.tasks, options.num_fewshot, options.limit, options.batch_size)
        result = {"checkpoint": str(options.checkpoint), "step": loaded.step, **result, "tasks": scores}
        texts.append(tasks_as_text(scores))
    return result, "\n\n".join(texts)


def _calibrate(options: argparse.Namespace, loaded: Any) -> tuple[dict[str, Any], str]:
    from dsmoe_megatron.evaluation.calibration import Target, calibrate
    from dsmoe_megatron.evaluation.policies import policy_values

    target = Target(options.target_share, options.target_perplexity_loss)
    target.check(loaded, options.calibrate)
    _, _, batches = _open_data(options, loaded)
    with progress_bar(None, "passes") as advance:
        found = calibrate(loaded, batches, options.calibrate, target, advance)
    if options.save_policy is not None:
        text = json_text(policy_values(found.policy), indent=1) + "\n"
        write_output(options.save_policy, text, "--save-policy")
    return {"checkpoint": str(options.checkpoint), "step": loaded.step, **found.as_dict()}, found.as_text()


def _open_data(options: argparse.Namespace, loaded: Any) -> tuple[Any, Any, Any]:
    from dsmoe_megatron.evaluation.windows import WindowOptions, make_batches, open_streams

    windows = WindowOptions(options.sequence_length, options.stride, options.max_tokens, options.batch_size).checked(
        loaded
    )
    streams = open_streams(options.data, loaded)
    return streams, windows, make_batches(streams, windows)


@contextmanager
def progress_bar(total: int | None, unit: str) -> Iterator[Callable[[int], object]]:
    """On a terminal, a bar on standard error; gives the function that advances it."""
    from tqdm import tqdm

    on_terminal = sys.stderr.isatty()
    with tqdm(total=total, unit=f" {unit}", unit_scale=True, disable=not on_terminal, leave=False) as bar:
        yield bar.update
