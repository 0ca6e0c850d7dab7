"""Take near duplicates and evaluation texts out of a corpus, with datatrove's blocks, before it is tokenised.

    python docs/examples/clean_corpus.py --input corpus --evaluation test.jsonl --output cleaned

Reads the .jsonl, .jsonl.gz and .jsonl.zst files of a folder and writes cleaned/NNNNN.jsonl.gz for preprocess.py.
MinHash finds documents that share most of their five-word runs (Lee et al. 2021, arXiv 2107.06499); a filter of our own
drops those that share a run of 13 words with an evaluation text (Brown et al. 2020, arXiv 2005.14165, appendix C):
datatrove's n-gram block takes its evaluations from lighteval's registry alone. Needs the extra `cleaning`.
"""

import json
import re
from pathlib import Path

from datatrove.data import Document
from datatrove.executor import LocalPipelineExecutor
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.dedup import (
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.dedup.minhash import MinhashConfig
from datatrove.pipeline.filters.base_filter import BaseFilter
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

RUN_WORDS = 13


class EvaluationFilter(BaseFilter):
    """Drops documents that share a run of RUN_WORDS words with an evaluation text.

    Args:
        texts: of the evaluation.
    """

    name = "runs of words of evaluation texts"

    def __init__(self, texts: list[str]) -> None:
        super().__init__()
        self._runs = {run for text in texts for run in runs_of_words(text)}

    def filter(self, document: Document) -> bool:
        """Whether to keep a document."""
        return self._runs.isdisjoint(runs_of_words(document.text))


def runs_of_words(text: str) -> set[str]:
    """The runs of RUN_WORDS words in a text, case and punctuation left out."""
    words = re.findall(r"\w+", text.lower())
    return {" ".join(words[start : start + RUN_WORDS]) for start in range(len(words) - RUN_WORDS + 1)}


def clean(corpus: str, evaluation: str, output: str, workers: int) -> dict[str, int]:
    """Write the documents that stay; return how many were read, dropped for what reason, and kept."""
    work = Path(output, "work")
    texts = [json.loads(line)["text"] for line in Path(evaluation).read_text(encoding="utf-8").splitlines()]
    config = MinhashConfig(hash_config=HashConfig(hash_fc="sha1", precision=64))

    def reader() -> JsonlReader:
        return JsonlReader(corpus, glob_pattern="**/*.jsonl*")

    def run(name: str, tasks: int, *steps: PipelineStep) -> None:
        LocalPipelineExecutor(list(steps), tasks=tasks, workers=workers, logging_dir=str(work / "logs" / name)).run()

    run("signatures", workers, reader(), MinhashDedupSignature(str(work / "signatures"), config))
    run(
        "buckets",
        config.num_buckets,
        MinhashDedupBuckets(str(work / "signatures"), str(work / "buckets"), config=config),
    )
    run("clusters", 1, MinhashDedupCluster(str(work / "buckets"), str(work / "duplicates"), config=config))
    run(
        "cleaned",
        workers,  # as many as made the signatures: a task drops what is named for its number
        reader(),
        MinhashDedupFilter(str(work / "duplicates")),
        EvaluationFilter(texts),
        JsonlWriter(output, output_filename="${rank}.jsonl.gz"),
    )
    steps = json.loads((work / "logs" / "cleaned" / "stats.json").read_text(encoding="utf-8"))
    read, duplicates, evaluations, written = [step["stats"] for step in steps]
    return {
        "read": read["documents"]["total"],
        "near duplicates": duplicates.get("dropped", 0),
        "evaluation texts": evaluations.get("dropped", 0),
        "kept": written["total"],
    }


def main() -> None:
    parser = ArgumentParser(prog="clean_corpus.py", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--input", type=str, required=True, help="folder of .jsonl files")
    parser.add_argument(
        "--evaluation", type=str, required=True, help=".jsonl file of texts that must not be trained on"
    )
    parser.add_argument("--output", type=str, required=True, help="folder to write to")
    parser.add_argument("--workers", type=PositiveInt, default=2, help="processes")
    arguments = parser.parse_args()
    counts = clean(arguments.input, arguments.evaluation, arguments.output, arguments.workers)
    print(", ".join(f"{name}: {count}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
