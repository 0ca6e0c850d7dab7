"""Take near duplicates and evaluation texts out of a corpus, with datatrove's blocks, before it is tokenised.

    python docs/examples/clean_corpus.py --input 'corpus/*.jsonl.zst' --evaluation questions.jsonl --output cleaned

Reads .jsonl, .jsonl.gz and .jsonl.zst files. Writes cleaned/kept/NNNNN.jsonl.zst, one for each of them in their order,
which preprocess.py reads, and what was dropped to cleaned/duplicates and cleaned/contaminated.
MinHash finds documents that share most of their five-word runs (Lee et al. 2021, arXiv 2107.06499); then those go that
share a run of 13 words with an evaluation text (Brown et al. 2020, arXiv 2005.14165, appendix C).
"""

import json
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
from datatrove.pipeline.base import PipelineStep
from datatrove.pipeline.decont import NGramsDecontConfig, NGramsDecontFilter
from datatrove.pipeline.dedup import (
    MinhashConfig,
    MinhashDedupBuckets,
    MinhashDedupCluster,
    MinhashDedupFilter,
    MinhashDedupSignature,
)
from datatrove.pipeline.readers import JsonlReader
from datatrove.pipeline.writers import JsonlWriter
from datatrove.utils.hashing import HashConfig, create_hash_func
from datatrove.utils.text import ngrams, simplify_text
from datatrove.utils.word_tokenizers import WordTokenizer
from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt
from loguru import logger

from data_tools.documents import DocumentRules, read_documents
from data_tools.executors import QuietLocalExecutor
from data_tools.sources import find_sources
from dsmoe_megatron.errors import DataError, DSMoEError, exit_with


class SpacedWords(WordTokenizer):
    """Words between spaces, where datatrove would load spaCy: its blocks take case and punctuation away before."""

    def word_tokenize(self, text: str) -> list[str]:
        return text.split()

    def sent_tokenize(self, text: str) -> list[str]:
        return text.splitlines()

    def span_tokenize(self, text: str) -> list[tuple[int, int]]:
        return [(0, len(text))]


def clean(patterns: list[str], evaluation: str, output: str, workers: int = 1) -> dict[str, int]:
    """Write the documents that stay; return how many were read, dropped for what reason, and kept.

    Args:
        patterns: files or globs of the corpus.
        evaluation: .jsonl file with strings under `question` and `answer`.
        output: folder to make; it is there when all is done.
        workers: processes.

    Raises:
        DataError: a file is missing, damaged or of another kind, or the output is there already.
    """
    if Path(output).exists():
        raise DataError(f"{output}: exists already; remove it or name another folder")
    paths = corpus_files(patterns)
    Path(output).parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=Path(output).parent, prefix="cleaning_") as work:
        Path(work, "paths").write_text("".join(f"{path.relative_to('/')}\n" for path in paths), encoding="utf-8")
        write_index(evaluation, Path(work, "evaluations"))
        counts = run_stages(work, len(paths), workers)
        # datatrove reads a cut .zst file without complaint, and leaves a file at the first byte that is not UTF-8
        readable = sum(len(found.texts) for found in read_documents(find_sources(patterns), DocumentRules()))
        if counts["read"] != readable:
            raise DataError(f"{' '.join(patterns)}: datatrove read {counts['read']} of {readable} documents")
        Path(work, "result").rename(output)
    return counts


def corpus_files(patterns: list[str]) -> list[Path]:
    """The files, in the order in which preprocess.py reads them."""
    sources = find_sources(patterns)
    for source in sources:
        if source.kind not in ("jsonl", "compressed") or not Path(source.path).is_file():
            raise DataError(f"{source.path}: not a .jsonl, .jsonl.gz or .jsonl.zst file on this machine")
    return [Path(source.path).resolve() for source in sources]


def write_index(evaluation: str, folder: Path) -> None:
    """Write the evaluation's runs of words as NGramsDecontFilter reads them; datatrove's indexer needs lighteval."""
    config, hash_words = decontamination(), create_hash_func(hashing())
    hashes: set[int] = set()
    try:
        records = [json.loads(line) for line in Path(evaluation).read_text(encoding="utf-8").splitlines()]
        texts = [f"{record['question']} {record['answer']}" for record in records]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DataError(f"{evaluation}: not lines of JSON with question and answer ({error!r})") from error
    for text in texts:
        runs = [" ".join(run) for run in ngrams(simplify_text(text, config.norm_config).split(), config.n_grams)]
        if not runs:
            print(f"{evaluation}: shorter than {config.n_grams} words, cannot be found: {text}")
        hashes.update(map(hash_words, runs))
    folder.mkdir()
    np.array(sorted(hashes), dtype=config.hash_config.np_dtype).tofile(folder / "evaluation.index.hashes")


def hashing() -> HashConfig:
    return HashConfig(precision=64, hash_fc="sha1")  # xxhash, the default, is another package


def decontamination() -> NGramsDecontConfig:
    return NGramsDecontConfig(n_grams=13, hash_config=hashing())


def run_stages(work: str, files: int, workers: int) -> dict[str, int]:
    """MinHash in its four stages, and decontamination along with the last.

    Args:
        work: folder with the file `paths` and the folder `evaluations`; gets the folder `result`.
        files: number of the corpus's files, which is the number of tasks of the first and of the last stage.
        workers: processes.
    """
    config, words = MinhashConfig(hash_config=hashing()), SpacedWords()

    def reader() -> JsonlReader:
        return JsonlReader("/", paths_file=f"{work}/paths", add_file_path=False)

    def writer(name: str) -> JsonlWriter:  # the records keep their keys
        return JsonlWriter(f"{work}/result/{name}", "${rank}.jsonl", compression="zstd", expand_metadata=True)

    def run(name: str, tasks: int, steps: list[PipelineStep]) -> Any:
        return QuietLocalExecutor(steps, tasks, min(workers, tasks), logging_dir=f"{work}/logs/{name}").run()

    logger.disable("datatrove")
    run("signatures", files, [reader(), MinhashDedupSignature(f"{work}/signatures", config, words)])
    run("buckets", config.num_buckets, [MinhashDedupBuckets(f"{work}/signatures", f"{work}/buckets", config=config)])
    run("clusters", 1, [MinhashDedupCluster(f"{work}/buckets", f"{work}/clusters", config)])
    deduplicate = MinhashDedupFilter(f"{work}/clusters", writer("duplicates"))
    decontaminate = NGramsDecontFilter(f"{work}/evaluations", decontamination(), writer("contaminated"), words)
    done = run("filters", files, [reader(), deduplicate, decontaminate, writer("kept")])
    _, duplicates, contaminated, kept = [step.stats for step in done.stats]
    return {
        "read": int(duplicates["total"].total),
        "duplicates": int(duplicates["dropped"].total),
        "contaminated": int(contaminated["dropped"].total),
        "kept": int(kept["total"].total),
    }


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="clean_corpus.py", description="Take duplicates and evaluation texts out of a corpus")
    parser.add_argument("--input", nargs="+", required=True, metavar="GLOB", help=".jsonl, .jsonl.gz, .jsonl.zst files")
    parser.add_argument(
        "--evaluation", type=str, required=True, metavar="FILE", help=".jsonl file with `question` and `answer`"
    )
    parser.add_argument("--output", type=str, required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--workers", type=PositiveInt, default=1, help="processes")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    try:
        counts = clean(arguments.input, arguments.evaluation, arguments.output, arguments.workers)
    except DSMoEError as error:
        exit_with(error, "clean_corpus")
    print(", ".join(f"{name}: {count:,}" for name, count in counts.items()))


if __name__ == "__main__":
    main()
