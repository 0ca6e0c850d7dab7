"""Tokenise raw text and code into a dataset that training reads.

    python data_tools/preprocess.py --input 'corpus/*.jsonl.zst' --output-prefix data/corpus --tokenizer tokenizer.model

Writes PREFIX.bin and PREFIX.idx (Megatron's indexed dataset, one sequence per document, the end-of-document token last)
and then PREFIX.manifest.json, which says what they were made of. A dataset without its manifest is not whole.
The documents keep the order of the input, and the files do not depend on the number of workers.
"""

import functools
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
from jsonargparse import ArgumentParser
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from tqdm import tqdm

from data_tools.documents import (
    DEFAULT_EXTENSIONS,
    Chunk,
    Source,
    extract_documents,
    find_sources,
    read_chunks,
)
from data_tools.indexed_dataset import IndexedDatasetWriter, token_dtype
from data_tools.manifest import existing_manifest, manifest_path, planned_manifest, write_manifest
from data_tools.parallel import ordered_map
from dsmoe_megatron.errors import DataError, DSMoEError, exit_with
from dsmoe_megatron.tokenizers import Tokenizer, load_tokenizer

SHOWN_MALFORMED = 3
LINES_BEFORE_VERDICT = 1000  # the malformed share is judged early only from here on


@dataclass(frozen=True)
class EncodedChunk:
    """What a worker made of a chunk: ids in the dataset's dtype, and ids per document."""

    source: int
    consumed: int
    ids: npt.NDArray[Any]
    lengths: npt.NDArray[np.int32]
    text_bytes: int
    skipped: Counter[str]
    invalid_utf8: int
    malformed: list[tuple[int, str]]


@dataclass
class Tally:
    """Counts of the run, and the judge of malformed lines.

    Args:
        sources: the inputs.
        max_malformed: share of the documents that may be malformed lines.
    """

    sources: list[Source]
    max_malformed: float
    documents: list[int] = field(init=False)
    skipped: list[Counter[str]] = field(init=False)
    tokens: int = 0
    text_bytes: int = 0
    invalid_utf8: int = 0
    shown: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.documents = [0] * len(self.sources)
        self.skipped = [Counter(source.left_out) for source in self.sources]

    @property
    def all_skipped(self) -> Counter[str]:
        return sum(self.skipped, Counter())

    def add(self, encoded: EncodedChunk) -> None:
        self.documents[encoded.source] += len(encoded.lengths)
        self.skipped[encoded.source] += encoded.skipped
        self.tokens += len(encoded.ids)
        self.text_bytes += encoded.text_bytes
        self.invalid_utf8 += encoded.invalid_utf8
        for line, complaint in encoded.malformed[: SHOWN_MALFORMED - len(self.shown)]:
            self.shown.append(f"{self.sources[encoded.source].path}:{line}: {complaint}")
            tqdm.write(f"malformed line skipped: {self.shown[-1]}", file=sys.stderr)

    def require_few_malformed(self, at_least: int) -> None:
        """Stop a run whose input is not what it was taken for.

        Args:
            at_least: documents to take the share of where fewer have been read so far.
        """
        malformed = self.all_skipped["malformed"]
        read = sum(self.documents) + malformed
        if malformed > self.max_malformed * max(read, at_least):
            raise DataError(
                f"{malformed} of {read} documents read are malformed lines, more than --max-malformed"
                f" {self.max_malformed}; the first: {self.shown[0]}"
            )

    def results(self) -> dict[str, Any]:
        """The counts, under the manifest's names."""
        return {
            "documents": sum(self.documents),
            "tokens": self.tokens,
            "text_bytes": self.text_bytes,
            "skipped": dict(self.all_skipped),
            "invalid_utf8_replaced": self.invalid_utf8,
            "sources": [
                {"documents": documents, "skipped": dict(skipped)}
                for documents, skipped in zip(self.documents, self.skipped, strict=True)
            ],
        }


def preprocess(
    inputs: list[str],
    output_prefix: str,
    tokenizer_spec: str,
    workers: int = 1,
    text_key: str = "text",
    extensions: tuple[str, ...] = DEFAULT_EXTENSIONS,
    special_tokens: str = "ordinary",
    max_malformed: float = 0.01,
    overwrite: bool = False,
) -> dict[str, Any]:
    """Make the dataset, unless it is there already. The arguments are those of the command line.

    Returns:
        The manifest.

    Raises:
        DataError: the input, or what is at the output already, cannot be used.
        TokenizerError: the tokenizer cannot be used.
    """
    sources = find_sources(inputs, extensions)
    tokenizer = load_tokenizer(tokenizer_spec, parse_special=special_tokens == "parse")
    options: dict[str, Any] = {"text_key": text_key, "special_tokens": special_tokens}
    if any(source.is_tree for source in sources):
        options["extensions"] = sorted(extensions)
    plan = planned_manifest(tokenizer, sources, options)
    if not overwrite and (existing := existing_manifest(output_prefix, plan)) is not None:
        print(f"{output_prefix}: made from this input already, nothing to do (--overwrite makes it again)")
        return existing

    dtype = token_dtype(tokenizer.vocab_size)
    encode = functools.partial(encode_chunk, tokenizer=tokenizer, dtype=dtype, text_key=text_key)
    tally = Tally(sources, max_malformed)
    start = time.perf_counter()
    try:
        with IndexedDatasetWriter(output_prefix, dtype) as writer:
            for encoded in _with_progress(ordered_map(encode, read_chunks(sources), workers), sources, tally):
                writer.add_documents(encoded.ids, encoded.lengths)
            tally.require_few_malformed(at_least=1)
            if not tally.tokens:
                raise DataError(f"no document in {', '.join(inputs)} (left out: {dict(tally.all_skipped)})")
            files = writer.seal()
            manifest_path(output_prefix).unlink(missing_ok=True)  # an old manifest must never vouch for new files
            writer.publish()
        manifest = write_manifest(output_prefix, plan, tally.results() | {"dtype": dtype.name, "files": files})
    except OSError as error:
        raise DataError(f"{error.filename or output_prefix}: {error.strerror or error}") from error
    _print_summary(output_prefix, manifest, time.perf_counter() - start)
    return manifest


def encode_chunk(chunk: Chunk, tokenizer: Tokenizer, dtype: np.dtype[Any], text_key: str) -> EncodedChunk:
    """Tokenise the documents of a chunk; the work of a worker."""
    documents = extract_documents(chunk, text_key)
    encoded = tokenizer.encode_batch(documents.texts)
    lengths = np.fromiter((len(ids) + 1 for ids in encoded), np.int32, len(encoded))
    ends = np.cumsum(lengths, dtype=np.int64)
    # arrays travel between processes ten times faster than lists
    all_ids = np.empty(int(ends[-1]) if len(ends) else 0, dtype)
    for ids, end in zip(encoded, ends, strict=True):
        all_ids[end - len(ids) - 1 : end - 1] = ids
    all_ids[ends - 1] = tokenizer.end_of_document_id
    return EncodedChunk(
        chunk.source,
        chunk.consumed,
        all_ids,
        lengths,
        sum(len(text.encode()) for text in documents.texts),
        documents.skipped,
        documents.invalid_utf8,
        documents.malformed,
    )


def _with_progress(encoded: Iterator[EncodedChunk], sources: list[Source], tally: Tally) -> Iterator[EncodedChunk]:
    """Pass the chunks on, count them, show how far they are, and stop when too much is malformed."""
    total = sum(source.bytes for source in sources)
    # no bar where nobody watches it
    with tqdm(total=total, unit="B", unit_scale=True, desc="input", disable=not sys.stderr.isatty()) as bar:
        for chunk in encoded:
            tally.add(chunk)
            tally.require_few_malformed(at_least=LINES_BEFORE_VERDICT)
            yield chunk
            bar.update(chunk.consumed)
            bar.set_postfix_str(f"{tally.tokens:,} tokens", refresh=False)


def _print_summary(prefix: str, manifest: dict[str, Any], seconds: float) -> None:
    megabytes, tokens = manifest["text_bytes"] / 1e6, manifest["tokens"]
    print(
        f"{prefix}: {manifest['documents']:,} documents, {megabytes:.1f} MB of text, {tokens:,} tokens"
        f" ({manifest['text_bytes'] / tokens:.2f} bytes per token), {seconds:.1f} s, {megabytes / seconds:.1f} MB/s"
    )
    counts = manifest["skipped"] | {"invalid UTF-8 replaced": manifest["invalid_utf8_replaced"]}
    for reason, count in counts.items():
        if count:
            print(f"  {reason.replace('_', ' ')}: {count:,}")


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="preprocess.py", description="Raw text and code -> PREFIX.bin, .idx, .manifest.json")
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="GLOB",
        help=".jsonl, .jsonl.gz, .jsonl.zst files and folders of source files; their order is the dataset's",
    )
    parser.add_argument("--output-prefix", type=str, required=True, metavar="PREFIX", help="path of the dataset")
    parser.add_argument(
        "--tokenizer",
        type=str,
        required=True,
        metavar="SPEC",
        help="a sentencepiece .model file, a folder with a Hugging Face tokenizer, its name on the hub, or `codegen`",
    )
    parser.add_argument("--workers", type=PositiveInt, default=1, help="processes that tokenise")
    parser.add_argument("--text-key", type=str, default="text", help="key of the text in a .jsonl line")
    parser.add_argument(
        "--extensions", nargs="+", default=list(DEFAULT_EXTENSIONS), metavar=".EXT", help="files taken from folders"
    )
    parser.add_argument(
        "--special-tokens",
        choices=["ordinary", "parse"],
        default="ordinary",
        help="special tokens spelled out in a text are ordinary text, or parsed",
    )
    parser.add_argument(
        "--max-malformed", type=ClosedUnitInterval, default=0.01, help="share of malformed lines above which to stop"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset that is there")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    try:
        preprocess(
            inputs=arguments.input,
            output_prefix=arguments.output_prefix,
            tokenizer_spec=arguments.tokenizer,
            workers=arguments.workers,
            text_key=arguments.text_key,
            extensions=tuple(arguments.extensions),
            special_tokens=arguments.special_tokens,
            max_malformed=arguments.max_malformed,
            overwrite=arguments.overwrite,
        )
    except DSMoEError as error:
        exit_with(error, "preprocess")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
