"""The study's data: corpus, tokenizer, datasets, and the data section that all recipes share."""

import shlex
import subprocess
import sys
from pathlib import Path

from benchmarks.paper_in_small.corpus import PACKAGES, collect, read_parts
from benchmarks.paper_in_small.study import Study
from data_tools.indexed_dataset import write_whole
from dsmoe_megatron.errors import DataError
from dsmoe_megatron.recipe_text import recipe_text

KINDS = {"text": 0.9, "code": 0.1}  # share of the tokens that models are trained on; the Pile weighs code alike
VOCABULARY = 4096
RECIPE = "data.yaml"


def make_data(folder: Path, study: Study) -> Path:
    """Make what is not there yet; returns the recipe that names the datasets.

    Args:
        folder: of the study; gets `corpus` and `data`.
        study: says where the text is from.

    Raises:
        DataError: a step failed, whose own message says why.
    """
    corpus, data = folder / "corpus", folder / "data"
    tokenizer = data / "tokenizer.model"
    data.mkdir(parents=True, exist_ok=True)
    if study.corpus == "debian_packages":
        collect(corpus, read_parts(PACKAGES))
    else:
        size = ["--text-megabytes", 1, "--code-megabytes", 0.5]
        _call("data_tools/collect_local_corpus.py", "--output", corpus, *size)
    if not tokenizer.is_file():
        text = [corpus / kind / "train.jsonl.zst" for kind in KINDS]
        output = tokenizer.with_suffix("")
        _call("data_tools/train_tokenizer.py", "--input", *text, "--output", output, "--vocab-size", VOCABULARY)
    for kind in KINDS:
        for split in ("train", "validation"):
            source, prefix = corpus / kind / f"{split}.jsonl.zst", data / f"{kind}_{split}"
            arguments = ["--input", source, "--output-prefix", prefix, "--tokenizer", tokenizer]
            _call("data_tools/preprocess.py", *arguments)
    recipe = data / RECIPE
    write_whole(recipe, recipe_text({"data": _section(data, tokenizer)}).encode())
    return recipe


def _section(data: Path, tokenizer: Path) -> dict[str, object]:
    def blend(split: str) -> list[dict[str, object]]:
        return [{"prefix": str(data / f"{kind}_{split}"), "weight": weight} for kind, weight in KINDS.items()]

    return {
        "train": blend("train"),
        "validation": blend("validation"),
        "tokenizer": str(tokenizer),
        "cache_dir": str(data / "cache"),
    }


def _call(*arguments: object) -> None:
    words = [str(argument) for argument in arguments]
    print(f"$ python {shlex.join(words)}", flush=True)
    step = subprocess.run([sys.executable, *words], check=False)
    if step.returncode != 0:
        raise DataError(f"{words[0]} failed with exit status {step.returncode}; its message is above")
