"""Look into a dataset: how many documents and tokens, how long they are, and some documents decoded.

    python data_tools/inspect_dataset.py data/corpus --documents 3 --start 1000

Any Megatron dataset of one sequence per document can be looked at. What only the manifest knows (bytes of text, the
tokenizer) is left out where there is none, and without a tokenizer documents are shown as ids.
"""

import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt

from data_tools.dataset_reader import DatasetIndex, map_tokens, read_index
from data_tools.manifest import dataset_tokenizer, manifest_path, read_manifest
from dsmoe_megatron.errors import DataError, DSMoEError, TokenizerError, exit_with
from dsmoe_megatron.tokenizers import Tokenizer, load_tokenizer

QUANTILES = {"shortest": 0.0, "5 %": 0.05, "25 %": 0.25, "median": 0.5, "75 %": 0.75, "95 %": 0.95, "longest": 1.0}
LONGEST_SHOWN = 5
BAR_WIDTH = 40
SHOWN_CHARACTERS = 2000  # of a document, its beginning and its end
SHOWN_IDS = 200


def inspect_dataset(
    prefix: str, documents: int = 3, start: int = 0, tokenizer_spec: str | None = None
) -> Iterator[str]:
    """Lines about a dataset, and some of its documents.

    Args:
        prefix: path of the dataset without `.bin` and `.idx`.
        documents: how many to show.
        start: number of the first one to show.
        tokenizer_spec: SPEC of the tokenizer where it is not the manifest's.

    Raises:
        DataError: the files are missing or damaged, or there is no document `start`.
        TokenizerError: the tokenizer that was named cannot be loaded.
    """
    index = read_index(prefix)
    tokens = map_tokens(prefix, index.dtype)
    manifest = read_manifest(prefix) if manifest_path(prefix).exists() else None
    if documents and start >= len(index):
        raise DataError(f"--start {start}: {prefix} has documents 0 to {len(index) - 1}")

    yield from statistics(prefix, index, manifest)
    if not documents:
        return
    tokenizer, remark = _find_tokenizer(manifest, tokenizer_spec)
    if remark:
        yield f"\n{remark}"
    for number in range(start, min(start + documents, len(index))):
        ids = index.document(tokens, number).tolist()
        if not ids:
            raise DataError(f"{index.path}: document {number} is damaged: it has no tokens in the .bin; see verify.py")
        yield f"\n--- document {number}: {len(ids):,} tokens"
        if tokenizer is None:
            yield shown_ids(ids)
        elif not 0 <= min(ids) <= max(ids) < tokenizer.vocab_size:
            yield f"damaged: ids that the tokenizer does not have, see verify.py\n{shown_ids(ids)}"
        else:
            yield shown_text(tokenizer.decode(ids))


def statistics(prefix: str, index: DatasetIndex, manifest: dict[str, Any] | None) -> Iterator[str]:
    """Counts, quantiles, the longest documents, and a histogram of the lengths."""
    tokens = int(index.lengths.sum(dtype=np.int64))
    yield f"{prefix}: {len(index):,} documents, {tokens:,} tokens of {index.dtype.name}"
    if manifest is None:
        yield f"no {manifest_path(prefix).name}: tokenizer and bytes of text are unknown"
    else:
        spec, vocab_size = manifest["tokenizer"]["spec"], manifest["tokenizer"]["vocab_size"]
        end = (
            "nothing"
            if manifest["options"]["end_of_document"] == "none"
            else manifest["tokenizer"]["end_of_document_id"]
        )
        yield f"{manifest['text_bytes']:,} bytes of text, {manifest['text_bytes'] / tokens:.2f} per token"
        yield f"tokenizer {spec}: {vocab_size:,} ids, {end} ends a document"

    yield f"\ntokens per document: mean {tokens / len(index):,.1f}"
    # of the documents that are there, not between two of them
    quantiles = np.quantile(index.lengths, list(QUANTILES.values()), method="inverted_cdf")
    yield "  ".join(f"{name} {length:,}" for name, length in zip(QUANTILES, quantiles.tolist(), strict=True))
    longest = np.argsort(index.lengths, kind="stable")[::-1][:LONGEST_SHOWN]
    yield "longest: " + ", ".join(f"document {number} ({index.lengths[number]:,})" for number in longest.tolist())
    yield ""
    yield from histogram(index)


def histogram(index: DatasetIndex) -> Iterator[str]:
    """Documents by length, each row twice as long as the one before."""
    powers = np.frexp(index.lengths)[1]  # 1 for a length of 1, 2 for 2 and 3, 3 for 4 to 7
    counts = np.bincount(np.maximum(powers, 0))
    rows = range(int(np.flatnonzero(counts)[0]), len(counts))
    labels = {power: f"{2**power // 2:,} to {2**power - 1:,}" for power in rows}
    width = max(map(len, labels.values()))
    for power in rows:
        bar = "#" * -(-BAR_WIDTH * int(counts[power]) // int(counts.max()))  # rounded up: one document is seen
        yield f"{labels[power]:>{width}}  {bar:<{BAR_WIDTH}}  {counts[power]:,}"


def _find_tokenizer(manifest: dict[str, Any] | None, spec: str | None) -> tuple[Tokenizer | None, str]:
    """The tokenizer, or None and why there is none. One that was asked for has to be there."""
    if manifest is None:
        return (
            (load_tokenizer(spec), "") if spec else (None, "no manifest, so only ids are shown (or name a --tokenizer)")
        )
    try:
        return dataset_tokenizer(manifest, spec), ""
    except (TokenizerError, DataError) as error:
        if spec:
            raise
        return None, f"only ids are shown, or name a --tokenizer: {error}"


def shown_text(text: str) -> str:
    """A text for the terminal: what could steer it is escaped, and the middle of a long one left out."""
    left_out = len(text) - SHOWN_CHARACTERS
    if left_out > 0:
        half = SHOWN_CHARACTERS // 2
        text = f"{text[:half]}\n[... {left_out:,} characters ...]\n{text[-half:]}"
    return "".join(
        character if character.isprintable() or character in "\n\t" else ascii(character)[1:-1] for character in text
    )


def shown_ids(ids: list[int]) -> str:
    left_out = len(ids) - SHOWN_IDS
    shown = ids if left_out <= 0 else [*ids[: SHOWN_IDS // 2], f"[... {left_out:,} ids ...]", *ids[-SHOWN_IDS // 2 :]]
    return " ".join(map(str, shown))


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="inspect_dataset.py", description="Statistics and documents of a dataset")
    parser.add_argument("prefix", metavar="PREFIX", help="path of the dataset without .bin and .idx")
    parser.add_argument("--documents", type=NonNegativeInt, default=3, help="how many documents to show")
    parser.add_argument("--start", type=NonNegativeInt, default=0, help="number of the first document to show")
    parser.add_argument(
        "--tokenizer", type=str, metavar="SPEC", help="the tokenizer, where it is not where the manifest says"
    )
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    try:
        for line in inspect_dataset(arguments.prefix, arguments.documents, arguments.start, arguments.tokenizer):
            print(line)
    except DSMoEError as error:
        exit_with(error, "inspect_dataset")
    except (KeyboardInterrupt, BrokenPipeError):
        sys.exit(130)


if __name__ == "__main__":
    main()
