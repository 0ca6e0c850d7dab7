"""How fast a tokenizer library encodes by itself: no files, no JSON, no dataset; one process, one thread.

    python -m benchmarks.bare_encode --library tokenizers --tokenizer FOLDER --input FILE.jsonl --report REPORT.json

Only the library's own calls are timed, on texts that are in memory, about a megabyte at a time as a pipeline would.
"""

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from jsonargparse import ArgumentParser

BATCH_CHARACTERS = 1 << 20

Encode = Callable[[list[str]], object]


def encoder(library: str, tokenizer: str) -> Encode:
    """The library's own call for many texts.

    Args:
        library: sentencepiece or tokenizers.
        tokenizer: a .model file, or a folder with tokenizer.json.
    """
    if library == "sentencepiece":
        import sentencepiece

        processor = sentencepiece.SentencePieceProcessor(model_file=tokenizer)
        return lambda texts: processor.encode(texts, num_threads=1)
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(Path(tokenizer, "tokenizer.json")))
    return lambda texts: backend.encode_batch_fast(texts, add_special_tokens=False)


def batches(path: Path) -> Iterator[list[str]]:
    """The texts of a .jsonl file in batches."""
    texts: list[str] = []
    characters = 0
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            texts.append(json.loads(line)["text"])
            characters += len(texts[-1])
            if characters >= BATCH_CHARACTERS:
                yield texts
                texts, characters = [], 0
    if texts:
        yield texts


def timed(encode: Encode, all_texts: list[list[str]]) -> dict[str, float]:
    """Seconds of the encoding alone."""
    encode(["once, so that what is built on first use is there"])
    processor, wall = time.process_time(), time.perf_counter()
    for texts in all_texts:
        encode(texts)
    return {"processor": time.process_time() - processor, "wall": time.perf_counter() - wall}


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="python -m benchmarks.bare_encode", description="A tokenizer library by itself")
    parser.add_argument("--library", choices=["sentencepiece", "tokenizers"], required=True, help="library")
    parser.add_argument("--tokenizer", type=str, required=True, help="a .model file, or a folder with tokenizer.json")
    parser.add_argument("--input", type=str, required=True, metavar="FILE", help="a .jsonl file")
    parser.add_argument("--report", type=str, required=True, metavar="FILE", help="seconds are written here, as JSON")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    seconds = timed(encoder(arguments.library, arguments.tokenizer), list(batches(Path(arguments.input))))
    Path(arguments.report).write_text(json.dumps(seconds), encoding="utf-8")


if __name__ == "__main__":
    main()
