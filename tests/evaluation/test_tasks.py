"""Tasks of lm-evaluation-harness over local files; and one clear line where the harness is not installed."""

import importlib.util
import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

from dsmoe_megatron.__main__ import main
from dsmoe_megatron.tokenizers import load_tokenizer
from tests import reference_model as reference
from tests.evaluation.conftest import ARCHITECTURE, END_OF_DOCUMENT, Export
from tests.requirements import lacks

QUESTIONS = (("ab", ["cd", "xy"], 0), ("import ", ["os", "zz"], 1), ("for x", [" in", "!!"], 0), ("a", ["b", "c"], 1))


@pytest.fixture
def harness() -> None:
    if importlib.util.find_spec("lm_eval") is None:
        lacks("lm-evaluation-harness is not installed (extra `eval`)")


@pytest.fixture
def task(tmp_path: Path) -> Path:
    lines = [json.dumps({"question": q, "choices": choices, "answer": answer}) for q, choices, answer in QUESTIONS]
    (tmp_path / "questions.jsonl").write_text("\n".join(lines) + "\n")
    path = tmp_path / "tiny.yaml"
    path.write_text(
        "task: tiny_questions\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'questions.jsonl'}}}}}\n"
        "test_split: test\noutput_type: multiple_choice\n"
        'doc_to_text: "{{question}}"\ndoc_to_choice: "{{choices}}"\ndoc_to_target: "{{answer}}"\n'
        'target_delimiter: ""\nmetric_list: [{metric: acc}]\n'
    )
    return path


@pytest.mark.usefixtures("harness")
def test_a_local_task_scores_as_by_the_equations(
    export: Export, task: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["evaluate", "--checkpoint", str(export.folder), "--tasks", str(task), "--top-k", "1", "--json"]) == 0

    output = capsys.readouterr().out
    scores = json.loads(output[output.index("{\n") :])["tasks"]
    for name, fields in {"dense": {}, "topk 1": {"expert_policy": "topk", "num_experts_per_tok": 1}}.items():
        policy = reference.ReferencePolicy(**fields)  # type: ignore[arg-type]
        assert scores[name]["tiny_questions"]["acc,none"] == accuracy(export, policy)


TEXTS = ("for x in y", "a", "import os, sys")  # each shorter than a window, so that it is scored in one pass


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    """A task that scores whole texts, from their first token on."""
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in TEXTS))
    path = tmp_path / "texts.yaml"
    path.write_text(
        "task: whole_texts\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {tmp_path / 'texts.jsonl'}}}}}\n"
        "test_split: test\noutput_type: loglikelihood_rolling\n"
        'doc_to_text: ""\ndoc_to_target: "{{text}}"\nmetric_list: [{metric: byte_perplexity}]\n'
    )
    return path


@pytest.mark.usefixtures("harness")
def test_texts_of_any_length_follow_the_end_of_a_document(
    export: Export, texts: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Under every policy, and whatever else the tokenizer calls the beginning of a text."""
    folder = tmp_path / "export"
    shutil.copytree(export.folder, folder)
    AutoTokenizer.from_pretrained(folder, bos_token="\u00ff").save_pretrained(folder)  # the byte 255: in no text
    options = ["--thresholds", "0.9", "--threshold-top-k", "0.9", "--json"]

    assert main(["evaluate", "--checkpoint", str(folder), "--tasks", str(texts), *options]) == 0

    output = capsys.readouterr().out
    scores = json.loads(output[output.index("{\n") :])["tasks"]
    names: dict[str, Any] = {"dense": "dense", "threshold 0.9": "threshold", "threshold_topk 0.9": "threshold_topk"}
    for name, policy in names.items():
        expected = byte_perplexity(export, reference.ReferencePolicy(policy, expert_threshold=0.9))
        assert scores[name]["whole_texts"]["byte_perplexity,none"] == pytest.approx(expected, rel=1e-4)


def byte_perplexity(export: Export, policy: reference.ReferencePolicy) -> float:
    """Of all texts, each by itself; the tests' tokenizer makes a token of each byte."""
    tokenizer = load_tokenizer(str(export.folder))
    losses = []
    for text in TEXTS:
        ids = torch.tensor([[END_OF_DOCUMENT, *tokenizer.encode(text)]])
        logits = reference.reference_forward(ARCHITECTURE, export.tensors, ids[:, :-1], policy).logits[0]
        losses += torch.nn.functional.cross_entropy(logits, ids[0, 1:], reduction="none").tolist()
    return math.exp(sum(losses) / len(losses))


def accuracy(export: Export, policy: reference.ReferencePolicy) -> float:
    """Share of the questions whose right answer has the largest log-likelihood."""
    tokenizer = load_tokenizer(str(export.folder))
    right = 0
    for question, choices, answer in QUESTIONS:
        scores = []
        for choice in choices:
            prompt, ids = tokenizer.encode(question), tokenizer.encode(question + choice)
            output = reference.reference_forward(ARCHITECTURE, export.tensors, torch.tensor([ids[:-1]]), policy)
            logits = output.logits[0].log_softmax(dim=-1)
            scores.append(sum(float(logits[place - 1, ids[place]]) for place in range(len(prompt), len(ids))))
        right += scores.index(max(scores)) == answer
    return right / len(QUESTIONS)


def test_without_the_harness_one_line_says_what_to_install(
    export: Export, task: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(SystemExit):
        main(["evaluate", "--checkpoint", str(export.folder), "--tasks", str(task)])

    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "--tasks needs lm-evaluation-harness" in error
    assert "pip install '.[eval]'" in error


@pytest.mark.usefixtures("harness")
@pytest.mark.parametrize(
    ("name", "message"), [("no_such_task_anywhere", "knows no such task"), ("missing.yaml", "no such file")]
)
def test_unknown_tasks(export: Export, capsys: pytest.CaptureFixture[str], name: str, message: str) -> None:
    with pytest.raises(SystemExit):
        main(["evaluate", "--checkpoint", str(export.folder), "--tasks", name])

    assert message in capsys.readouterr().err
