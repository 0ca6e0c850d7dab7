"""Tasks of EleutherAI's lm-evaluation-harness, under each expert policy, on the model in memory.

Needs the extra `eval`. A task is a name that the harness knows (its data come from the hub) or the path of a YAML file
of one's own, which may lie over local files.
"""

import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsmoe_megatron.errors import ConfigurationError, DataError, EnvironmentNotSupportedError, first_line
from dsmoe_megatron.evaluation.loading import LoadedModel
from dsmoe_megatron.inference.policy import ExpertPolicy
from dsmoe_megatron.planning.presentation import table
from dsmoe_megatron.tokenizers import save_huggingface

YAML_ENDINGS = (".yaml", ".yml")


def evaluate_tasks(
    loaded: LoadedModel,
    policies: Mapping[str, ExpertPolicy],
    tasks: Sequence[str],
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 8,
) -> dict[str, dict[str, dict[str, float]]]:
    """Scores of each task under each policy.

    Args:
        loaded: the model.
        policies: by name.
        tasks: names, or paths of YAML files.
        num_fewshot: examples before each question; None is the task's own number.
        limit: questions of each task; None is all.
        batch_size: requests of one forward pass; under threshold_topk it is one.

    Returns:
        Policy -> task -> metric (with its filter, as `acc,none`) -> value.

    Raises:
        EnvironmentNotSupportedError: the harness is not installed.
        ConfigurationError: a task is unknown.
        DataError: a task's data cannot be loaded.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        message = f"--tasks needs lm-evaluation-harness ({error.name} is missing): pip install '.[eval]'"
        raise EnvironmentNotSupportedError(message) from None

    files = [Path(task) for task in tasks if task.endswith(YAML_ENDINGS)]
    for file in files:
        if not file.is_file():
            raise ConfigurationError("--tasks", str(file), "no such file")
    manager = TaskManager(include_path=sorted({str(file.parent.absolute()) for file in files}) or None)
    names = [_task_name(task) if task.endswith(YAML_ENDINGS) else task for task in tasks]
    if unknown := [name for name in names if name not in manager.all_tasks]:
        raise ConfigurationError("--tasks", ", ".join(unknown), "lm-evaluation-harness knows no such task")
    tokenizer, end_of_document = _huggingface_tokenizer(loaded), loaded.tokenizer().end_of_document_id
    scores = {}
    for policy_name, policy in policies.items():
        loaded.set_policy(policy)
        model = HFLM(
            pretrained=loaded.model,
            backend="causal",
            tokenizer=tokenizer,
            # the harness pads without telling the model, and this policy counts every token of a call
            batch_size=1 if policy.expert_policy == "threshold_topk" else batch_size,
            max_length=loaded.architecture.max_position_embeddings,
            prefix_token_id=end_of_document,  # as in training, where every text follows one
        )
        try:
            found: Any = lm_eval.simple_evaluate(
                model, tasks=names, num_fewshot=num_fewshot, limit=limit, task_manager=manager, bootstrap_iters=0
            )
        except (OSError, ValueError, KeyError, ConnectionError) as error:
            reason = first_line(error)
            raise DataError(f"--tasks {' '.join(tasks)}: {reason}") from error
        scores[policy_name] = {
            task: {name: value for name, value in metrics.items() if isinstance(value, int | float)}
            for task, metrics in found["results"].items()
        }
    return scores


def tasks_as_text(scores: Mapping[str, Mapping[str, Mapping[str, float]]]) -> str:
    """A row per policy, a column per task and metric, standard errors left out."""
    columns = [
        (task, metric)
        for task, metrics in next(iter(scores.values())).items()
        for metric in metrics
        if "," in metric and "_stderr" not in metric
    ]
    header = ["policy", *(f"{task} {metric.removesuffix(',none')}" for task, metric in columns)]
    rows = [[name, *(f"{tasks[task][metric]:.4f}" for task, metric in columns)] for name, tasks in scores.items()]
    return "\n".join(table(header, rows))


def _task_name(path: str) -> str:
    """The name that a task's YAML file gives it; other keys may have tags of the harness's own."""
    for line in Path(path).read_text(encoding="utf-8").splitlines():
        key, _, value = line.partition(":")
        if key in ("task", "group") and value.strip():
            return value.strip().strip("'\"")
    raise ConfigurationError("--tasks", path, "has no `task: NAME` line")


def _huggingface_tokenizer(loaded: LoadedModel) -> Any:
    """The tokenizer as transformers' own object."""
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as folder:
        save_huggingface(loaded.tokenizer(), folder)
        return AutoTokenizer.from_pretrained(folder)
