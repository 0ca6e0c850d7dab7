"""Evaluation data: streams of tokens, cut into windows in which every token is predicted once.

A stream is all documents of one dataset or text input in order, each followed by its end-of-document token, as training
reads them. Window k feeds the tokens from k x stride on, at most sequence_length of them, and scores the predictions
that no earlier window has scored. So with stride = sequence_length windows stand side by side, as training cuts its
samples; a smaller stride gives each scored token at least sequence_length - stride tokens of context, for
sequence_length / stride times the work.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from data_tools.dataset_reader import map_tokens, read_index
from data_tools.documents import DocumentRules, read_documents
from data_tools.indexed_dataset import dataset_path
from data_tools.manifest import read_manifest
from data_tools.sources import find_sources
from dsmoe_megatron.errors import ConfigurationError, DataError
from dsmoe_megatron.evaluation.loading import LoadedModel

NOT_SCORED = -100  # the label that cross_entropy leaves out
TEXT_ENDING = ".txt"


@dataclass(frozen=True)
class Stream:
    """Tokens of one input.

    Attributes:
        name: prefix or path.
        ids: [tokens].
        end_of_document_id: that ends each document.
    """

    name: str
    ids: npt.NDArray[Any]
    end_of_document_id: int


@dataclass(frozen=True)
class Window:
    """`length` tokens from `start` on are fed; the last `scored` of their predictions count."""

    start: int
    length: int
    scored: int


@dataclass(frozen=True)
class BatchTensors:
    """What a forward pass takes.

    Attributes:
        input_ids: [B, S].
        labels: the tokens that follow, NOT_SCORED where they do not count, [B, S].
        position_ids: in the window, or in their documents where these are separate, [B, S].
    """

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor


@dataclass(frozen=True)
class Batch:
    """Windows of one stream and one length, so that nothing is padded."""

    stream: Stream
    windows: Sequence[Window]

    def read(self, loaded: LoadedModel) -> BatchTensors:
        """Read the tokens, and check them against the vocabulary.

        Raises:
            DataError: an id is not in the model's vocabulary.
        """
        rows = [self.stream.ids[window.start : window.start + window.length + 1] for window in self.windows]
        ids = torch.from_numpy(np.stack(rows).astype(np.int64))
        if int(ids.min()) < 0 or int(ids.max()) >= loaded.vocab_size:
            found = int(ids.max()) if int(ids.min()) >= 0 else int(ids.min())
            raise DataError(f"{self.stream.name}: has token {found}, not one of the model's {loaded.vocab_size}")
        input_ids, labels = ids[:, :-1], ids[:, 1:].clone()
        for row, window in enumerate(self.windows):
            labels[row, : window.length - window.scored] = NOT_SCORED
        position_ids = torch.arange(input_ids.shape[1]).expand_as(input_ids)
        if loaded.separate_documents:
            ends = input_ids == self.stream.end_of_document_id
            labels[ends] = NOT_SCORED  # what follows a document says nothing of it
            begins = torch.nn.functional.pad(ends[:, :-1], (1, 0), value=True)
            position_ids = position_ids - torch.where(begins, position_ids, 0).cummax(dim=1).values
        return BatchTensors(*(tensor.to(loaded.device) for tensor in (input_ids, labels, position_ids)))


@dataclass(frozen=True)
class WindowOptions:
    """How streams are cut.

    Attributes:
        sequence_length: tokens of a window; None takes the model's.
        stride: tokens from window to window; None is sequence_length.
        max_tokens: of each stream at most so many predictions are scored, in windows at equal distances; None is all.
        batch_size: windows of one forward pass.
    """

    sequence_length: int | None = None
    stride: int | None = None
    max_tokens: int | None = None
    batch_size: int = 8

    def checked(self, loaded: LoadedModel) -> "WindowOptions":
        """With the defaults that the model gives.

        Raises:
            ConfigurationError: a value breaks a rule.
        """
        longest = loaded.architecture.max_position_embeddings
        length = loaded.sequence_length if self.sequence_length is None else self.sequence_length
        stride = length if self.stride is None else self.stride
        for option, value, most in (
            ("--sequence-length", length, longest),
            ("--stride", stride, length),
            ("--max-tokens", self.max_tokens, None),
            ("--batch-size", self.batch_size, None),
        ):
            if value is not None and value < 1:
                raise ConfigurationError(option, value, "must be at least 1")
            if value is not None and most is not None and value > most:
                what = "max_position_embeddings" if option == "--sequence-length" else "the sequence length"
                raise ConfigurationError(option, value, f"must not be above {what}, {most}")
        return WindowOptions(length, stride, self.max_tokens, self.batch_size)


def open_streams(names: Sequence[str], loaded: LoadedModel) -> list[Stream]:
    """The streams that the command line names, each of at least two tokens of the model's vocabulary.

    Args:
        names: prefixes of indexed datasets; or paths, globs and folders of text as preprocess.py takes them, and .txt
            files, of which each is one document.
        loaded: the model to evaluate.

    Raises:
        DataError: an input is missing, empty, damaged, or made with another tokenizer.
    """
    streams = []
    for name in dict.fromkeys(names):
        stream = _open_dataset(name, loaded) if dataset_path(name, "idx").exists() else _read_text(name, loaded)
        if len(stream.ids) < 2:
            raise DataError(f"{name}: holds {len(stream.ids)} tokens, so there is nothing to predict")
        streams.append(stream)
    return streams


def _open_dataset(prefix: str, loaded: LoadedModel) -> Stream:
    index, manifest = read_index(prefix), read_manifest(prefix)
    tokens = map_tokens(prefix, index.dtype)
    if tokens.nbytes != manifest["files"]["bin"]["bytes"]:
        path, expected = dataset_path(prefix, "bin"), manifest["files"]["bin"]["bytes"]
        raise DataError(f"{path}: {tokens.nbytes} bytes where its manifest says {expected}: truncated or damaged")
    made_with = manifest["tokenizer"]
    if loaded.fingerprint_counts:
        own, same = loaded.tokenizer(), made_with["fingerprint"] == loaded.tokenizer().fingerprint
        described = f"{own.spec} ({own.fingerprint[:12]})"
    else:
        ends = np.atleast_1d(loaded.model.config.eos_token_id)
        same = made_with["vocab_size"] == loaded.vocab_size and made_with["end_of_document_id"] in ends
        described = f"that of the model ({loaded.vocab_size} tokens)"
    if not same:
        raise DataError(
            f"{prefix}: was made with tokenizer {made_with['spec']} ({made_with['fingerprint'][:12]}, "
            f"{made_with['vocab_size']} tokens), not with {described}: preprocess the text with the model's tokenizer"
        )
    return Stream(prefix, tokens, made_with["end_of_document_id"])


def _read_text(name: str, loaded: LoadedModel) -> Stream:
    """Every text tokenised, in memory: evaluation sets are small."""
    if name.endswith(TEXT_ENDING):
        try:
            texts = [Path(name).read_text(encoding="utf-8")]
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(f"{name}: cannot be read as text: {error}") from None
    else:
        texts = []
        for documents in read_documents(find_sources([name]), DocumentRules()):
            if documents.complaints:
                raise DataError(documents.complaints[0])
            texts += documents.texts
    texts = [text for text in texts if text]
    if not texts:
        raise DataError(f"{name}: holds no text")
    tokenizer = loaded.tokenizer()
    end = tokenizer.end_of_document_id
    ids = [[*document, end] for document in tokenizer.encode_batch(texts)]
    return Stream(name, np.concatenate(ids), end)


def windows_of(tokens: int, sequence_length: int, stride: int, max_tokens: int | None = None) -> list[Window]:
    """The windows of a stream; with max_tokens, as many at equal distances as score about that number."""
    predictions = tokens - 1
    windows, scored = [], 0
    for start in range(0, predictions, stride):
        end = min(start + sequence_length, predictions)
        windows.append(Window(start, end - start, end - scored))
        scored = end
        if end == predictions:
            break
    if max_tokens is None or max_tokens >= predictions:
        return windows
    kept = max(1, max_tokens // stride)
    places = np.linspace(0, len(windows) - 1, min(kept, len(windows))).round().astype(int)
    return [windows[place] for place in places]


def make_batches(streams: Sequence[Stream], options: WindowOptions) -> list[Batch]:
    """All windows of the streams, in order, at most batch_size together.

    Args:
        streams: of open_streams.
        options: checked.
    """
    assert options.sequence_length is not None
    assert options.stride is not None
    batches = []
    for stream in streams:
        windows = windows_of(len(stream.ids), options.sequence_length, options.stride, options.max_tokens)
        for _, same_length in itertools.groupby(windows, key=lambda window: window.length):
            group = list(same_length)
            starts = range(0, len(group), options.batch_size)
            batches += [Batch(stream, group[start : start + options.batch_size]) for start in starts]
    return batches
