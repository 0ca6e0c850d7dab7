"""Turns texts into ids, by the fastest library whose ids are those of the tokenizer's own.

gigatoken is tens of times faster than the libraries that define the ids (tokenizers, sentencepiece), and a library of
its own. So it is taken only where both give the same ids for samples of this very input, taken throughout it: some
before the work, and some all along it.
"""

import functools
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import orjson

from dsmoe_megatron.errors import DataError
from dsmoe_megatron.tokenizers import Tokenizer, tokenizer_from_state

FAST, REFERENCE = "gigatoken", "reference"
# what tokenizers differ in: white space, line ends, digits, contractions, scripts, marks, controls, rare planes
PROBES = (
    "", " ", "  ", "\t", "\n", "\r\n", " \n\n  x", "a  b   c\t\td \n e\n\n\nf", "x" * 300, " " * 120 + "y", "\t" * 40,
    "it's we'll I'M they'RE 'tis", "1234567890 3.14 1,000 x86_64 0xFF", "\x00\x01\x1f\x7f\x85",
    "\u00c9tude e\u0301 \ufb01 \uff21 \u00a0\u2003\u3000.", "\u4e2d\u6587\uff0c\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4",
    "\u0627\u0644\u0639\u0631\u0628\u064a\u0629 \u0939\u093f\u0928\u094d\u0926\u0940 \u0e44\u0e17\u0e22",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 \u2028\u2029\ufeff\ufffd", "\ue000\U000f0000\U0010ffff",
    "if (a<=b && c!=d) { return x->y[0]++; } // </s> <s> <pad> <unk> <|endoftext|>",
)  # fmt: skip
SAMPLE_CHARACTERS = 2000  # of a document; long ones are compared in part
CHECKED_CHARACTERS = 500


class Encoder(Protocol):
    """Ids of many texts at once.

    Attributes:
        name: FAST or REFERENCE.
    """

    name: str

    def encode(self, texts: Sequence[str]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        """The ids of all texts, one after the other [ids], and how many of them each text has [texts]."""
        ...


class ReferenceEncoder:
    """The library that defines the tokenizer's ids."""

    name = REFERENCE

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        encoded = self._tokenizer.encode_batch(texts)
        counts = np.fromiter(map(len, encoded), np.int64, len(encoded))
        ids = np.empty(int(counts.sum()), np.int64)
        position = 0
        for each in encoded:
            ids[position : position + len(each)] = each
            position += len(each)
        return ids, counts


class FastEncoder:
    """gigatoken, on one thread: each worker is a process.

    Raises:
        FastEncoderError: it is not installed, or cannot express this tokenizer.
    """

    name = FAST

    def __init__(self, tokenizer: Tokenizer) -> None:
        try:
            import gigatoken
        except ImportError as error:
            raise FastEncoderError("gigatoken is not installed (pip install gigatoken)") from error
        try:
            pipeline = orjson.loads(tokenizer.to_huggingface()[0].to_str())
            if not tokenizer.parse_special:
                # what the library does not know it cannot find in a text
                pipeline["added_tokens"] = [token for token in pipeline["added_tokens"] if not token["special"]]
            self._tokenizer = gigatoken.Tokenizer.from_json(orjson.dumps(pipeline))
        except Exception as error:  # ours where the conversion is not exact; gigatoken's own are of several kinds
            reason = str(error).strip().split("\n")[0]
            raise FastEncoderError(f"gigatoken cannot express this tokenizer ({reason})") from error

    def encode(self, texts: Sequence[str]) -> tuple[npt.NDArray[Any], npt.NDArray[np.int64]]:
        # one by one: a batch costs up to 3 ms besides its texts, a text 1 microsecond
        encoded = [self._tokenizer.encode(text) for text in texts]
        ids = np.concatenate(encoded) if encoded else np.empty(0, np.uint32)
        return ids, np.fromiter(map(len, encoded), np.int64, len(encoded))


class FastEncoderError(Exception):
    """Why gigatoken cannot be used; one line."""


class EncodersDisagreeError(DataError):
    """A sample of the input has other ids under gigatoken than under the tokenizer's own library."""


def choose_encoder(tokenizer: Tokenizer, samples: Iterable[str]) -> tuple[str, str]:
    """The name of the encoder to use, and why it is not the fast one.

    Args:
        tokenizer: of the dataset.
        samples: texts of the input, taken throughout it.
    """
    try:
        fast = FastEncoder(tokenizer)
    except FastEncoderError as error:
        return REFERENCE, str(error)
    reference = ReferenceEncoder(tokenizer)
    for text in (*PROBES, *samples):
        if not _agree(fast, reference, text[:SAMPLE_CHARACTERS]):
            return REFERENCE, f"gigatoken gives other ids for {text[:SAMPLE_CHARACTERS]!r:.60}"
    return FAST, ""


def make_encoder(name: str, tokenizer: Tokenizer) -> Encoder:
    """The encoder of this name.

    Raises:
        DataError: gigatoken, which the run was begun with, cannot be used here.
    """
    if name == REFERENCE:
        return ReferenceEncoder(tokenizer)
    try:
        return FastEncoder(tokenizer)
    except FastEncoderError as error:
        raise DataError(f"{error}: install it on every machine, or give --encoder reference --overwrite") from error


def check_against_reference(encoder: Encoder, tokenizer: Tokenizer, text: str, number: int) -> None:
    """Hold a stretch of a text against the tokenizer's own library.

    Args:
        number: of the text; decides where in it the stretch lies.

    Raises:
        EncodersDisagreeError: the ids differ.
    """
    start = number * CHECKED_CHARACTERS % max(1, len(text) - CHECKED_CHARACTERS)
    stretch = text[start : start + CHECKED_CHARACTERS]
    if not _agree(encoder, ReferenceEncoder(tokenizer), stretch):
        raise EncodersDisagreeError(
            f"gigatoken gives other ids than {tokenizer.kind} for {stretch!r:.60}: give --encoder reference --overwrite"
        )


def _agree(one: Encoder, other: Encoder, text: str) -> bool:
    return bool(np.array_equal(one.encode([text])[0], other.encode([text])[0]))


@functools.lru_cache(maxsize=1)
def stored_tokenizer(path: str, fingerprint: str, special_tokens: str, encoder: str) -> tuple[Tokenizer, Encoder]:
    """The tokenizer that a file tells, and its encoder; made once per process, since it takes a tenth of a second.

    Args:
        path: of the file.
        fingerprint: of the tokenizer that is in it now; with the next, it tells one content of the file from another.
        special_tokens: whether they are parsed.
        encoder: name of the encoder.
    """
    tokenizer = tokenizer_from_state(json.loads(Path(path).read_bytes()))
    if (tokenizer.fingerprint, tokenizer.parse_special) != (fingerprint, special_tokens == "parse"):
        raise DataError(f"{path} is not the tokenizer of the run's plan: begin anew with --overwrite")
    return tokenizer, make_encoder(encoder, tokenizer)
