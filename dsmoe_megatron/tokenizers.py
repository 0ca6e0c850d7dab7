"""One SPEC, one tokenizer: a sentencepiece `.model` file, a Hugging Face tokenizer (folder or hub name), or `codegen`.

Text is only text: a special token spelled out in a document ("</s>" in a page about HTML) is encoded as the ordinary
characters it is, unless `parse_special` asks otherwise, and no BOS is ever added. So an end of document in the ids is
one that the data preparation put there. Nothing here imports torch; transformers is imported only for a Hugging Face
SPEC and in `save_huggingface`.
"""

import base64
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dsmoe_megatron.codegen_tokenizer import CODEGEN, build_codegen
from dsmoe_megatron.errors import TokenizerError
from dsmoe_megatron.sentencepiece_conversion import convert_sentencepiece

if TYPE_CHECKING:
    import tokenizers


class Tokenizer(ABC):
    """What data preparation, training and export need of a tokenizer. Instances can be pickled.

    Attributes:
        spec: the SPEC it was loaded from.
        kind: which library encodes.
        vocab_size: number of ids, added tokens included; every id is below it.
        end_of_document_id: the id that ends a document.
        fingerprint: SHA-256 over everything that decides the ids; equal on every machine.
        parse_special: whether special tokens spelled out in text become their ids.
    """

    spec: str
    kind: Literal["sentencepiece", "huggingface"]
    vocab_size: int
    end_of_document_id: int
    fingerprint: str
    parse_special: bool

    def encode(self, text: str) -> list[int]:
        """Ids of `text`, with nothing added at either end."""
        return self.encode_batch([text])[0]

    @abstractmethod
    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        """Ids of each text."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Text of the ids; special tokens are left out."""

    @abstractmethod
    def to_huggingface(self) -> tuple["tokenizers.Tokenizer", dict[str, Any]]:
        """An equal `tokenizers.Tokenizer`, and the named special tokens for PreTrainedTokenizerFast."""

    @property
    @abstractmethod
    def padding_id(self) -> int:
        """The id that fills up the shorter texts of a batch: the tokenizer's own, else the end of document."""

    @abstractmethod
    def token_id(self, token: str) -> int | None:
        """The id of a token; None if there is no such one."""

    @abstractmethod
    def to_state(self) -> dict[str, Any]:
        """What `tokenizer_from_state` makes an equal tokenizer of, in values that JSON has."""


def load_tokenizer(spec: str, parse_special: bool = False) -> Tokenizer:
    """Load the tokenizer that SPEC names.

    Args:
        spec: path of a sentencepiece `.model` file, a folder with a Hugging Face tokenizer, or its name on the hub;
            `codegen` for CodeGen's tokenizer without a hub, `codegen:FOLDER` for GPT-2's vocabulary from that folder.
        parse_special: read special tokens spelled out in text as special tokens.

    Raises:
        TokenizerError: it cannot be loaded, has no end-of-document token, or cannot keep special tokens in text apart.
    """
    if spec == CODEGEN or spec.startswith(f"{CODEGEN}:"):
        return HuggingFaceTokenizer(spec, build_codegen(spec), parse_special)
    if spec.endswith(".model"):
        return SentencePieceTokenizer(spec, parse_special)
    return HuggingFaceTokenizer(spec, _load_fast_tokenizer(spec), parse_special)


def tokenizer_from_state(state: dict[str, Any]) -> Tokenizer:
    """The tokenizer that `Tokenizer.to_state` told. Needs neither the file that it came from nor transformers."""
    if state["kind"] == "sentencepiece":
        content = base64.b64decode(state["model"])
        return SentencePieceTokenizer(state["spec"], state["parse_special"], content)
    return HuggingFaceTokenizer.from_state(state)


def save_huggingface(tokenizer: Tokenizer, folder: str | Path) -> None:
    """Write tokenizer files with which `AutoTokenizer.from_pretrained(folder)` gives the ids that `tokenizer` gives.

    The saved tokenizer treats special tokens in text as `tokenizer` does, except where it has a chat template: such a
    template writes special tokens as text, so it needs them parsed. Its BOS is the end of document, since that is what
    texts follow in training; it is not added. Batches are padded on the left, with `padding_id`, so that all texts end
    where generation goes on.

    Raises:
        TokenizerError: a setting of a sentencepiece model has no exact counterpart in a Hugging Face tokenizer.
    """
    from transformers import PreTrainedTokenizerFast

    backend, names = tokenizer.to_huggingface()
    names = {"pad_token": names["eos_token"], **names, "bos_token": names["eos_token"]}
    split_special_tokens = not tokenizer.parse_special and names.get("chat_template") is None
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        split_special_tokens=split_special_tokens,
        clean_up_tokenization_spaces=False,
        padding_side="left",
        **names,
    ).save_pretrained(folder)


class SentencePieceTokenizer(Tokenizer):
    """A sentencepiece model. Its `</s>` ends documents.

    Args:
        spec: path of the .model file.
        parse_special: read special tokens spelled out in text as special tokens.
        content: of that file, where it has been read already.
    """

    kind = "sentencepiece"

    def __init__(self, spec: str, parse_special: bool = False, content: bytes | None = None) -> None:
        import sentencepiece

        self.spec, self.parse_special = spec, parse_special
        try:
            self.model_bytes = Path(spec).read_bytes() if content is None else content
        except OSError as error:
            raise TokenizerError(f"tokenizer {spec}: {error.strerror or error}") from error
        try:
            self._processor = sentencepiece.SentencePieceProcessor(model_proto=self.model_bytes)
        except RuntimeError as error:
            raise TokenizerError(f"tokenizer {spec} is not a sentencepiece model") from error

        self.vocab_size = self._processor.vocab_size()
        self.end_of_document_id = self._processor.eos_id()
        if self.end_of_document_id < 0:
            raise TokenizerError(f"tokenizer {spec} has no </s> to end documents with: train it with an eos_id")
        self.fingerprint = hashlib.sha256(self.model_bytes).hexdigest()

        is_special = [self._processor.is_control(i) or self._processor.is_unknown(i) for i in range(self.vocab_size)]
        self._special_tokens = {self._processor.id_to_piece(i): i for i, special in enumerate(is_special) if special}
        longest_first = sorted(self._special_tokens, key=len, reverse=True)
        self._special_pattern = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        if self.parse_special:
            return [self._encode_parsing_special_tokens(text) for text in texts]
        # one thread: the callers run one process per core
        ids: list[list[int]] = self._processor.encode(list(texts), num_threads=1)
        return ids

    def _encode_parsing_special_tokens(self, text: str) -> list[int]:
        """sentencepiece itself never reads a special token in text, so the text is cut at them first."""
        ids: list[int] = []
        for part in self._special_pattern.split(text):
            ids += [self._special_tokens[part]] if part in self._special_tokens else self._processor.encode(part)
        return ids

    def decode(self, ids: Sequence[int]) -> str:
        # sentencepiece itself leaves out all special tokens but <unk>
        text: str = self._processor.decode([int(i) for i in ids if i not in self._special_tokens.values()])
        return text

    def to_huggingface(self) -> tuple["tokenizers.Tokenizer", dict[str, Any]]:
        from sentencepiece import sentencepiece_model_pb2

        model = sentencepiece_model_pb2.ModelProto.FromString(self.model_bytes)
        return convert_sentencepiece(model, self.spec), _special_token_names(self._processor)

    @property
    def padding_id(self) -> int:
        own = int(self._processor.pad_id())
        return self.end_of_document_id if own < 0 else own

    def token_id(self, token: str) -> int | None:
        found = int(self._processor.piece_to_id(token))
        return found if self._processor.id_to_piece(found) == token else None  # an unknown one gets the id of <unk>

    def to_state(self) -> dict[str, Any]:
        model = base64.b64encode(self.model_bytes).decode("ascii")
        return {"kind": self.kind, "spec": self.spec, "parse_special": self.parse_special, "model": model}


class HuggingFaceTokenizer(Tokenizer):
    """A Hugging Face fast tokenizer. Its eos_token ends documents.

    Args:
        spec: the SPEC it was loaded from.
        source: transformers' own tokenizer.
        parse_special: read special tokens spelled out in text as special tokens.
    """

    kind = "huggingface"

    def __init__(self, spec: str, source: Any, parse_special: bool = False) -> None:
        self.spec, self.parse_special = spec, parse_special
        if source.eos_token_id is None:
            raise TokenizerError(
                f"tokenizer {spec} has no eos_token to end documents with: set it in tokenizer_config.json"
            )
        self.end_of_document_id = int(source.eos_token_id)

        # what the tokenizer adds around a text, cuts off or pads is no part of the text's ids
        pipeline = json.loads(source.backend_tokenizer.to_str())
        self._pipeline = json.dumps(pipeline | {"post_processor": None, "truncation": None, "padding": None})
        self.fingerprint = _pipeline_fingerprint(self._pipeline)
        names = ("bos_token", "eos_token", "unk_token", "pad_token", "chat_template")
        self._names = {name: value for name in names if (value := getattr(source, name, None)) is not None}

        self._build_backend()
        self.vocab_size = max(self._backend.get_vocab(with_added_tokens=True).values()) + 1
        if not parse_special:
            self._require_special_tokens_apart()

    def _build_backend(self) -> None:
        import tokenizers

        self._backend = tokenizers.Tokenizer.from_str(self._pipeline)
        # the one setting that the library leaves out of its serialised form
        self._backend.encode_special_tokens = not self.parse_special

    def __getstate__(self) -> dict[str, Any]:
        return {name: value for name, value in self.__dict__.items() if name != "_backend"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._build_backend()

    def to_state(self) -> dict[str, Any]:
        return {"kind": self.kind} | self.__getstate__()

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> "HuggingFaceTokenizer":
        """Undo `to_state`."""
        made = cls.__new__(cls)
        made.__setstate__({name: value for name, value in state.items() if name != "kind"})
        return made

    def _require_special_tokens_apart(self) -> None:
        """Some models (Unigram, those that look whole words up) find special tokens in text all by themselves."""
        unknown = self._names.get("unk_token")
        added = self._backend.get_added_tokens_decoder()
        special = {i: token.content for i, token in added.items() if token.special and token.content != unknown}
        special[self.end_of_document_id] = self._names["eos_token"]
        for token_id, content in special.items():
            if token_id in self.encode(content):
                raise TokenizerError(
                    f"tokenizer {self.spec} reads {content!r} in a text as the special token even when told not to:"
                    " use a tokenizer that keeps them apart, or parse special tokens"
                )

    def encode_batch(self, texts: Sequence[str]) -> list[list[int]]:
        encodings = self._backend.encode_batch_fast(list(texts), add_special_tokens=False)
        return [encoding.ids for encoding in encodings]

    def decode(self, ids: Sequence[int]) -> str:
        return self._backend.decode([int(i) for i in ids], skip_special_tokens=True)

    def to_huggingface(self) -> tuple["tokenizers.Tokenizer", dict[str, Any]]:
        return self._backend, self._names

    @property
    def padding_id(self) -> int:
        own = self._names.get("pad_token")
        found = None if own is None else self.token_id(own)
        return self.end_of_document_id if found is None else found

    def token_id(self, token: str) -> int | None:
        found = self._backend.token_to_id(token)
        return None if found is None else int(found)


def _load_fast_tokenizer(spec: str) -> Any:
    """AutoTokenizer's answer for a folder or a hub name, if it is a fast tokenizer."""
    from transformers import AutoTokenizer

    if Path(spec).is_file():
        raise TokenizerError(f"tokenizer {spec} is a file, but not a .model file: pass the folder that it is in")
    try:
        source = AutoTokenizer.from_pretrained(spec, trust_remote_code=False)  # and so without a question
    except Exception as error:  # transformers raises many kinds, its Rust half the bare class
        place = "the folder" if Path(spec).is_dir() else "no folder here, and the hub"
        reason = str(error).strip().split("\n")[0]
        raise TokenizerError(f"tokenizer {spec}: {place} gives no Hugging Face tokenizer ({reason})") from error
    if not getattr(source, "is_fast", False):
        raise TokenizerError(
            f"tokenizer {spec} has no fast version (tokenizer.json): convert it with transformers first"
        )
    return source


def _pipeline_fingerprint(pipeline: str) -> str:
    """SHA-256 of a serialised tokenizer. Nulls and falses are left out: later library releases add options so."""

    def without_defaults(value: Any) -> Any:
        # leaves are not asked for their own: a vocabulary has a hundred thousand
        if isinstance(value, dict):
            kept = {k: v for k, v in value.items() if v is not None and v is not False}
            return {k: without_defaults(v) if isinstance(v, dict | list) else v for k, v in kept.items()}
        return [without_defaults(v) if isinstance(v, dict | list) else v for v in value]

    content = without_defaults(json.loads(pipeline))
    content.pop("version", None)
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _special_token_names(processor: Any) -> dict[str, Any]:
    ids = {"bos_token": processor.bos_id(), "eos_token": processor.eos_id(), "pad_token": processor.pad_id()}
    ids["unk_token"] = processor.unk_id()
    return {name: processor.id_to_piece(i) for name, i in ids.items() if i >= 0}
