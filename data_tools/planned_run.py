"""What a run is going to make, held against what is there: a finished dataset, or a run that was stopped."""

import glob
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from filelock import FileLock, Timeout

from data_tools.documents import DocumentRules, extract_documents
from data_tools.encoding import REFERENCE, choose_encoder
from data_tools.indexed_dataset import token_dtype
from data_tools.manifest import (
    MANIFEST_ENDING,
    different_parts,
    existing_manifest,
    planned_manifest,
    read_manifest,
    require_sizes,
    sizes_of,
)
from data_tools.opening import UnreadableInputError
from data_tools.reading import read_piece
from data_tools.sources import Piece, cut_tasks, find_sources
from data_tools.work_folder import WorkFolder
from dsmoe_megatron.errors import ConfigurationError, DataError
from dsmoe_megatron.tokenizers import load_tokenizer

SAMPLED_PIECES = 64
SAMPLES_PER_PIECE = 8
LEAST_MAX_DOCUMENT_BYTES = 4  # the longest character


class PlannedRun:
    """A run before it begins.

    Args:
        inputs: patterns of the sources.
        prefix: of the dataset.
        tokenizer_spec: SPEC of the tokenizer.
        rules: how records become documents.

    Raises:
        ConfigurationError: two rules contradict each other.
        DataError: an input cannot be found.
        TokenizerError: the tokenizer cannot be loaded.
    """

    def __init__(self, inputs: list[str], prefix: str, tokenizer_spec: str, rules: DocumentRules) -> None:
        check_rules(rules)
        self.prefix, self.rules = prefix, rules
        self.sources = find_sources(inputs, rules.extensions, rules.max_file_bytes)
        self.tokenizer = load_tokenizer(tokenizer_spec, parse_special=rules.special_tokens == "parse")
        self.end_of_document_id = self._end_of_document_id()
        self.manifest = planned_manifest(self.tokenizer, self.end_of_document_id, self.sources, rules.as_options())
        self.folder = WorkFolder(prefix)

    def _end_of_document_id(self) -> int | None:
        asked = self.rules.end_of_document
        if asked in ("append", "none"):
            return self.tokenizer.end_of_document_id if asked == "append" else None
        if (found := self.tokenizer.token_id(asked)) is None:
            raise ConfigurationError(
                "--end-of-document", asked, f"append, none, or a token of {self.tokenizer.spec}; it has no such token"
            )
        return found

    def existing(self) -> list[dict[str, Any]]:
        """The manifests of the datasets that an earlier run made of the same input by the same rules; none where there
        are none, or not all.

        Raises:
            DataError: something else is there, which may be somebody's only copy.
        """
        if self.rules.one_dataset_per_set:
            if self.folder.plan_path.exists():
                return []
            return self._existing_sets()
        manifest = existing_manifest(self.prefix, self.manifest)
        if manifest is None:
            return []
        self._remove_leftovers()
        return [manifest]

    def _existing_sets(self) -> list[dict[str, Any]]:
        paths = sorted(glob.glob(f"{glob.escape(self.prefix)}_*{MANIFEST_ENDING}"))  # noqa: PTH207  # prefix and pattern
        prefixes = [path.removesuffix(MANIFEST_ENDING) for path in paths]
        manifests = {prefix: read_manifest(prefix) for prefix in prefixes}
        found = {prefix: each for prefix, each in manifests.items() if not different_parts(self.manifest, each)}
        for prefix, manifest in found.items():
            require_sizes(prefix, sizes_of(manifest))
        sets = {manifest["set"] for manifest in found.values()}
        # manifests of before do not tell all sets: what is there is made again, the same
        is_whole = all(sets == set(manifest.get("all_sets", ())) for manifest in found.values())
        return list(found.values()) if is_whole else []

    def _remove_leftovers(self) -> None:
        """Remove what a run of this plan left that was stopped after its last file, unless it is another's work."""
        if self.folder.plan_path.exists() and not different_parts(self.manifest, self.folder.plan()["manifest"]):
            with suppress(DataError), self._locked():
                self.folder.remove()

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Be the only process that works in the folder.

        Raises:
            DataError: another one does.
        """
        lock = FileLock(self.folder.lock_path)
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise DataError(f"{self.folder.path}: another process is making this dataset") from error
        try:
            yield
        finally:
            lock.release()

    @contextmanager
    def begun(self, workers: int, max_malformed: float, encoder: str, overwrite: bool) -> Iterator[WorkFolder]:
        """The work folder, of this run alone: begun, or as an earlier run of the same plan left it.

        Args:
            workers: to cut the input for.
            max_malformed: share of the documents that may be malformed.
            encoder: auto or reference.
            overwrite: replace what another plan left or made.

        Raises:
            DataError: another process works there, or an unfinished run of another plan is there.
        """
        self.folder.path.mkdir(parents=True, exist_ok=True)
        with self._locked():
            if not self._continues(encoder, overwrite):
                self._begin(workers, encoder)
            # neither decides what is in the dataset
            self.folder.update_plan(max_malformed=max_malformed, overwrite=overwrite)
            yield self.folder

    def _continues(self, encoder: str, overwrite: bool) -> bool:
        """Whether the folder holds an unfinished run of this plan."""
        if not self.folder.plan_path.exists():
            return False
        plan = self.folder.plan()
        differences = different_parts(self.manifest, plan["manifest"])
        if encoder == REFERENCE and plan["encoder"] != REFERENCE:
            differences.append("encoder")
        if not differences:
            print(f"{self.prefix}: going on with the run that was stopped", file=sys.stderr)
            return True
        if self.folder.has_segments() and not overwrite:
            raise DataError(
                f"{self.folder.path} holds an unfinished run with other {' and '.join(differences)}: give that run's"
                " command to go on with it, or begin anew with --overwrite"
            )
        return False

    def _begin(self, workers: int, encoder: str) -> None:
        tasks = cut_tasks(self.sources, workers)
        reason = "--encoder reference"
        if encoder == "auto":
            encoder, reason = choose_encoder(self.tokenizer, sample_texts(tasks, self.rules))
            if encoder == REFERENCE:
                print(f"{self.prefix}: encoding with {self.tokenizer.kind}, which is slower: {reason}", file=sys.stderr)
        plan = {
            "manifest": self.manifest,
            "end_of_document_id": self.end_of_document_id,
            "dtype": token_dtype(self.tokenizer.vocab_size).name,
            "encoder": encoder,
            "with_paths": any(source.kind == "tree" for source in self.sources),
        }
        self.folder.create(plan, self.tokenizer.to_state(), tasks)


def check_rules(rules: DocumentRules) -> None:
    """Refuse rules that contradict each other."""
    limit = rules.max_document_bytes
    if limit is not None and limit < LEAST_MAX_DOCUMENT_BYTES:
        raise ConfigurationError("--max-document-bytes", limit, f"at least {LEAST_MAX_DOCUMENT_BYTES}")
    if rules.empty_documents == "keep" and rules.end_of_document == "none":
        raise ConfigurationError(
            "--empty-documents", "keep", "needs an end of document: a document without any token cannot be stored"
        )


def sample_texts(tasks: list[list[Piece]], rules: DocumentRules) -> Iterator[str]:
    """Some documents from throughout the input: a few of the first chunk of pieces at equal distances."""
    # the later parts of a compressed file can only be reached through the earlier ones
    pieces = [piece for task in tasks for piece in task if piece.kind != "compressed" or piece.start == 0]
    step = max(1, len(pieces) // SAMPLED_PIECES)
    for piece in pieces[::step]:
        try:
            chunk = next(read_piece(piece, rules.columns), None)
        except UnreadableInputError:
            continue  # the run itself will come to it
        if chunk is not None:
            texts = extract_documents(chunk, rules).texts
            yield from texts[:: max(1, len(texts) // SAMPLES_PER_PIECE)]
