"""Check datasets against their manifests: every byte, every pointer, every id, and documents through the tokenizer.

    python data_tools/verify.py data/corpus data/code --sample 100

Nothing is taken from the files on trust. The manifest vouches for both files by size and SHA-256, and for itself by its
checksum. The index must lead from document to document without a gap, every id must be of the vocabulary, every
document must end with the end-of-document token and have no other, and sampled documents must come back from the
tokenizer as they are. The first fault of each kind is named with its place. Exit status 1 where there is one.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from jsonargparse import ArgumentParser
from jsonargparse.typing import NonNegativeInt
from tqdm import tqdm

from data_tools.dataset_reader import DatasetIndex, file_size, map_tokens, read_index
from data_tools.indexed_dataset import DTYPE_CODES, dataset_path
from data_tools.manifest import dataset_tokenizer, manifest_path, read_manifest
from dsmoe_megatron.errors import DataError, DSMoEError, exit_with
from dsmoe_megatron.tokenizers import Tokenizer

BLOCK_DOCUMENTS = 1 << 20  # checked at a time, so that memory does not grow with the dataset
BLOCK_TOKENS = 1 << 22
SEED = 0  # of the sample: the same documents every time
# what lossy tokenizers change: case, accents, compatibility characters, runs and kinds of white space
REVEALING_TEXT = (
    " Two  spaces,\tTAB\r\n\n\u00c9tude e\u0301 \ufb01 \uff21 \u00a0 \u4e2d\u6587 \U0001f600 \x01 x_1==2 ' s "
)


@dataclass
class Report:
    """What was found of one dataset.

    Args:
        prefix: its path.
        documents: as the manifest says.
        tokens: as the manifest says.
        sampled: documents that went through the tokenizer and back.
        compared: what had to come back the same: "ids", or "text" with a tokenizer that changes text.
        faults: one line each; none where the dataset is whole.
    """

    prefix: str
    documents: int = 0
    tokens: int = 0
    sampled: int = 0
    compared: str = "ids"
    faults: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        if self.faults:
            return "\n".join([f"{self.prefix}: DAMAGED", *(f"  {fault}" for fault in self.faults)])
        return (
            f"{self.prefix}: whole: {self.documents:,} documents, {self.tokens:,} tokens;"
            f" {self.sampled:,} documents through the tokenizer and back ({self.compared} compared)"
        )


@dataclass
class Offenders:
    """The documents, or tokens, that break one rule: how many, and the number of the first."""

    count: int = 0
    first: int = -1

    def note(self, wrong: npt.NDArray[np.bool_], offset: int) -> None:
        """Add those of a block.

        Args:
            wrong: which ones break the rule, [block].
            offset: number of the block's first.
        """
        found = np.flatnonzero(wrong)
        if len(found) and not self.count:
            self.first = offset + int(found[0])
        self.count += len(found)

    def faults(self, describe: Callable[[int], str]) -> Iterator[str]:
        """One line about the first one, if there is any."""
        if self.count:
            yield describe(self.first) + (f"; {self.count - 1:,} more like it" if self.count > 1 else "")


def verify(prefix: str, sample: int = 100, tokenizer_spec: str | None = None) -> Report:
    """Check one dataset.

    Args:
        prefix: path of the dataset without `.bin` and `.idx`.
        sample: documents to send through the tokenizer and back; 0 needs no tokenizer.
        tokenizer_spec: SPEC of the tokenizer where it is not the manifest's.
    """
    report = Report(prefix)
    try:
        for fault in _find_faults(report, sample, tokenizer_spec):
            report.faults.append(fault)
    except DSMoEError as error:
        report.faults.append(str(error))
    except OSError as error:
        report.faults.append(f"{error.filename or prefix}: {error.strerror or error}")
    return report


def _find_faults(report: Report, sample: int, tokenizer_spec: str | None) -> Iterator[str]:
    """All checks, in an order in which each can rely on those before."""
    manifest = read_manifest(report.prefix)
    report.documents, report.tokens = manifest["documents"], manifest["tokens"]
    yield from _manifest_faults(report.prefix, manifest)
    yield from _size_faults(report.prefix, manifest)
    if report.faults:
        return

    yield from _checksum_faults(report.prefix, manifest)
    index = read_index(report.prefix)
    index_faults = list(_index_faults(index, report.prefix, manifest))
    yield from index_faults
    if not index_faults:  # else nobody knows where documents end
        yield from _token_faults(index, report.prefix, manifest)
    if not report.faults and sample:
        yield from _round_trip_faults(index, report, manifest, sample, tokenizer_spec)


def _manifest_faults(prefix: str, manifest: dict[str, Any]) -> Iterator[str]:
    path, dtype = manifest_path(prefix), manifest["dtype"]
    if dtype not in DTYPE_CODES:
        yield f"{path}: dtype {dtype!r} is none of {', '.join(DTYPE_CODES)}"
    elif manifest["files"]["bin"]["bytes"] != manifest["tokens"] * np.dtype(dtype).itemsize:
        yield f"{path}: {manifest['files']['bin']['bytes']} bytes are not {manifest['tokens']} tokens of {dtype}"
    of_sources = sum(source["documents"] for source in manifest["sources"])
    if of_sources != manifest["documents"]:
        yield f"{path}: {manifest['documents']} documents, but its sources gave {of_sources}"


def _size_faults(prefix: str, manifest: dict[str, Any]) -> Iterator[str]:
    for suffix, expected in manifest["files"].items():
        path = dataset_path(prefix, suffix)
        if (size := file_size(path)) != expected["bytes"]:
            cause = "truncated, or of another dataset" if size < expected["bytes"] else "of another dataset"
            yield f"{path}: {size} bytes, where the manifest says {expected['bytes']}: {cause}"


def _checksum_faults(prefix: str, manifest: dict[str, Any]) -> Iterator[str]:
    for suffix, expected in manifest["files"].items():
        path = dataset_path(prefix, suffix)
        if (found := _sha256(path)) != expected["sha256"]:
            yield (
                f"{path}: its SHA-256 begins {found[:12]}, in the manifest {expected['sha256'][:12]}: damaged, or of"
                " another dataset"
            )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file, _bar(path.stat().st_size, f"{path.name} bytes", "B") as bar:
        while block := file.read(1 << 23):
            digest.update(block)
            bar.update(len(block))
    return digest.hexdigest()


def _index_faults(index: DatasetIndex, prefix: str, manifest: dict[str, Any]) -> Iterator[str]:
    """Each document must start where the one before ends, the last end with the .bin, and each be one sequence."""
    if index.dtype.name != manifest["dtype"]:
        yield f"{index.path}: dtype {index.dtype.name}, where the manifest says {manifest['dtype']}"
    if len(index) != manifest["documents"]:
        yield f"{index.path}: {len(index)} documents, where the manifest says {manifest['documents']}"
    if index.starts[0] != 0:
        yield f"{index.path}: document 0 starts at byte {index.starts[0]} of the .bin"
    if index.document_indices[-1] != len(index):
        yield f"{index.path}: the last document index is {index.document_indices[-1]}, not {len(index)}"

    bin_bytes = np.int64(file_size(dataset_path(prefix, "bin")))
    empty, apart, misnumbered = Offenders(), Offenders(), Offenders()
    for first in range(0, len(index), BLOCK_DOCUMENTS):
        block = slice(first, first + BLOCK_DOCUMENTS)
        empty.note(index.lengths[block] < 1, first)
        apart.note(index.ends(block) != _following_starts(index, block, bin_bytes), first)
        numbers = index.document_indices[:-1][block]
        misnumbered.note(numbers != np.arange(first, first + len(numbers)), first)

    def describe_gap(document: int) -> str:
        following = _following_starts(index, slice(document, document + 1), bin_bytes)[0]
        return (
            f"{index.path}: document {document} ({index.lengths[document]} tokens at byte {index.starts[document]})"
            f" does not end at byte {following}, where the next document starts or the .bin ends"
        )

    yield from empty.faults(lambda document: f"{index.path}: document {document} has {index.lengths[document]} tokens")
    yield from apart.faults(describe_gap)
    yield from misnumbered.faults(
        lambda document: f"{index.path}: document {document} has document index {index.document_indices[document]}"
    )


def _following_starts(index: DatasetIndex, block: slice, bin_bytes: np.int64) -> npt.NDArray[np.int64]:
    """Where the .bin goes on after each document of the block: the next one's start, or its own end."""
    following = index.starts[block.start + 1 : block.stop + 1]
    return np.append(following, bin_bytes) if block.stop >= len(index) else following


def _token_faults(index: DatasetIndex, prefix: str, manifest: dict[str, Any]) -> Iterator[str]:
    """Ids of the vocabulary only, and the end of document where the index says that one ends and nowhere else (where
    documents were given ends at all)."""
    path = dataset_path(prefix, "bin")
    vocab_size, end_id = manifest["tokenizer"]["vocab_size"], manifest["tokenizer"]["end_of_document_id"]
    tokens = map_tokens(prefix, index.dtype)
    foreign, endless, early = Offenders(), Offenders(), Offenders()
    with _bar(len(tokens), f"{path.name} tokens", "token") as bar:
        for first in range(0, len(tokens), BLOCK_TOKENS):
            block = tokens[first : first + BLOCK_TOKENS]
            is_last = np.zeros(len(block), np.bool_)
            is_last[_ends_within(index, first, first + len(block)) - first] = True
            is_end = block == end_id
            foreign.note((block < 0) | (block >= vocab_size), first)
            if _has_ends(manifest):
                endless.note(is_last & ~is_end, first)
            if _has_ends(manifest) and manifest["options"]["special_tokens"] == "ordinary":
                early.note(is_end & ~is_last, first)
            bar.update(len(block))

    def place(token: int) -> str:
        return f"{path}: document {index.document_at(token)}: id {tokens[token]} at token {token}"

    yield from foreign.faults(lambda token: f"{place(token)} is not below the vocabulary of {vocab_size}")
    yield from endless.faults(lambda token: f"{place(token)} is its last, but not the end of document {end_id}")
    yield from early.faults(lambda token: f"{place(token)} ends the document before its last token")


def _has_ends(manifest: dict[str, Any]) -> bool:
    return bool(manifest["options"]["end_of_document"] != "none")


def _ends_within(index: DatasetIndex, first: int, stop: int) -> npt.NDArray[np.int64]:
    """Positions of the documents' last tokens among the tokens from `first` to before `stop`, of a sound index."""
    documents = slice(index.document_at(first), index.document_at(stop - 1) + 1)
    last_tokens = index.ends(documents) // index.dtype.itemsize - 1
    return last_tokens[last_tokens < stop]


def _round_trip_faults(
    index: DatasetIndex, report: Report, manifest: dict[str, Any], sample: int, tokenizer_spec: str | None
) -> Iterator[str]:
    tokenizer = dataset_tokenizer(manifest, tokenizer_spec)
    exact = manifest["options"]["special_tokens"] == "ordinary" and _keeps_text(tokenizer)
    report.sampled, report.compared = min(sample, len(index)), "ids" if exact else "text"
    numbers = np.sort(np.random.default_rng(SEED).choice(len(index), report.sampled, replace=False))
    tokens = map_tokens(report.prefix, index.dtype)
    changed = Offenders()
    with _bar(len(numbers), "documents through the tokenizer", "document") as bar:
        for number in numbers.tolist():
            ids = index.document(tokens, number)[: -1 if _has_ends(manifest) else None].tolist()
            again = tokenizer.encode(text := tokenizer.decode(ids))
            same = again == ids or (not exact and tokenizer.decode(again) == text)
            changed.note(np.array([not same]), number)
            bar.update()
    yield from changed.faults(
        lambda number: (
            f"{dataset_path(report.prefix, 'bin')}: document {number}: decoded and encoded again it has other"
            f" {report.compared}: not what the tokenizer made of a text"
        )
    )


def _keeps_text(tokenizer: Tokenizer) -> bool:
    """Whether any text comes back as it was, so that ids must too."""
    return tokenizer.decode(tokenizer.encode(REVEALING_TEXT)) == REVEALING_TEXT


def _bar(total: int, what: str, unit: str) -> "tqdm[Any]":
    # no bar where nobody watches it
    return tqdm(total=total, unit=unit, unit_scale=True, desc=what, leave=False, disable=not sys.stderr.isatty())


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(
        prog="verify.py", description="Check PREFIX.bin and PREFIX.idx against PREFIX.manifest.json"
    )
    parser.add_argument("prefix", nargs="+", metavar="PREFIX", help="path of a dataset without .bin and .idx")
    parser.add_argument(
        "--sample",
        type=NonNegativeInt,
        default=100,
        metavar="N",
        help="documents of each dataset to decode and encode again; 0 needs no tokenizer",
    )
    parser.add_argument(
        "--tokenizer", type=str, metavar="SPEC", help="the tokenizer, where it is not where the manifests say"
    )
    parser.add_argument("--json", action="store_true", help="print the findings as one JSON object")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    try:
        reports = []
        for prefix in arguments.prefix:
            reports.append(verify(prefix, arguments.sample, arguments.tokenizer))
            if not arguments.json:
                print(reports[-1], flush=True)
        damaged = [report for report in reports if report.faults]
        if arguments.json:
            print(json.dumps({"whole": not damaged, "datasets": [asdict(report) for report in reports]}, indent=1))
        if damaged:
            raise DataError(
                f"{len(damaged)} of {len(reports)} datasets failed; the first fault: {damaged[0].faults[0]}"
            )
    except DSMoEError as error:
        exit_with(error, "verify")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
