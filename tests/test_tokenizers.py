"""Tokenizers: what is saved for Hugging Face gives sentencepiece's ids, and special tokens in text stay text."""

import io
import pickle
import random
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dsmoe_megatron.errors import TokenizerError
from dsmoe_megatron.tokenizers import Tokenizer, load_tokenizer, save_huggingface

TEXTS = [
    "",
    " ",
    "The quick brown fox jumps over the lazy dog, as it has since 1885.",
    "  two spaces first, two last  ",
    "def f(x):\n\tif x:\n\t\treturn x\n        # eight\r\n\n\n\nclass A:\n    pass\n",
    "emoji 😀 👩‍👩‍👧‍👦 and flags 🇫🇷",
    "中文字符 and 日本語 and العربية and naïve café",
    "rare: \u2028 \ue000 \ufeff \x00 \x7f \U0001d518\U0001d52b",
    "tags </s><s> <unk> <pad> <0x0A> <|endoftext|> and </s>",
    "a" * 50 + " " * 50 + "ab" * 50,
]
TRAINING_TEXT = Path(textwrap.__file__).read_text() + Path(random.__file__).read_text() + "s> /s> x0A>\n" * 300
EXACT_SETTINGS: dict[str, Any] = {
    "model_type": "bpe",
    "vocab_size": 900,
    "byte_fallback": True,
    "split_digits": True,
    "normalization_rule_name": "identity",
    "add_dummy_prefix": False,
    "remove_extra_whitespaces": False,
    "allow_whitespace_only_pieces": True,
    "pad_id": 3,
    "minloglevel": 2,
}


def sentencepiece_model(path: Path, **settings: Any) -> str:
    model = io.BytesIO()
    lines = iter(TRAINING_TEXT.splitlines(keepends=True))
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=model, **(EXACT_SETTINGS | settings))
    path.write_bytes(model.getvalue())
    return str(path)


def byte_level_folder(folder: Path, add_bos: bool = False) -> str:
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    specials = ["<|endoftext|>", "<s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=specials, initial_alphabet=alphabet, show_progress=False
    )
    backend.train_from_iterator([TRAINING_TEXT], trainer)
    if add_bos:
        backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="<|endoftext|>")
    tokenizer.add_tokens(["returns_nothing"])
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def specs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("tokenizers")
    return {
        "sentencepiece": sentencepiece_model(folder / "plain.model"),
        "sentencepiece with a dummy prefix": sentencepiece_model(folder / "prefix.model", add_dummy_prefix=True),
        "sentencepiece with symbols": sentencepiece_model(
            folder / "symbols.model", user_defined_symbols=["<mask>", "returnx", "turn", "ab", "bab"]
        ),
        "sentencepiece across scripts": sentencepiece_model(folder / "across.model", split_by_unicode_script=False),
        "huggingface": byte_level_folder(folder / "byte_level"),
        "huggingface with BOS": byte_level_folder(folder / "byte_level_bos", add_bos=True),
    }


def random_texts(count: int) -> list[str]:
    parts = [*"abx<>/s0A_=()é中😀\u2581 \n\t", "  ", "</", "s>", "<0x", "the", "self", "turn", "re", "<mask>", "bab"]
    generator = random.Random(0)
    return ["".join(generator.choices(parts, k=generator.randint(0, 40))) for _ in range(count)]


KINDS = [
    "sentencepiece",
    "sentencepiece with a dummy prefix",
    "sentencepiece with symbols",
    "sentencepiece across scripts",  # has pieces like "s>", which could be joined to "<s>"
    "huggingface",
    "huggingface with BOS",
]


@pytest.mark.parametrize("parse_special", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_saved_folder_gives_the_same_ids_and_text(
    specs: dict[str, str], kind: str, parse_special: bool, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(specs[kind], parse_special)
    save_huggingface(tokenizer, tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)

    texts = TEXTS + random_texts(1500)
    ids = tokenizer.encode_batch(texts)

    assert saved(texts).input_ids == ids
    assert saved.eos_token_id == saved.bos_token_id == tokenizer.end_of_document_id
    assert len(saved) == tokenizer.vocab_size
    decoded = [saved.decode(i, skip_special_tokens=True) for i in ids]
    assert decoded == [tokenizer.decode(i) for i in ids]


@pytest.mark.parametrize(
    ("kind", "padding"), [("sentencepiece", "<pad>"), ("sentencepiece without padding", "</s>"), ("huggingface", None)]
)
def test_batches_are_padded_on_the_left(specs: dict[str, str], kind: str, padding: str | None, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(specs.get(kind) or sentencepiece_model(tmp_path / "unpadded.model", pad_id=-1))
    save_huggingface(tokenizer, tmp_path)
    saved = AutoTokenizer.from_pretrained(tmp_path)
    short, long = tokenizer.encode_batch(["return", "return self.turn"])

    batch = saved(["return", "return self.turn"], padding=True)

    missing = len(long) - len(short)
    assert missing
    assert batch.input_ids == [[tokenizer.padding_id] * missing + short, long]
    assert batch.attention_mask == [[0] * missing + [1] * len(short), [1] * len(long)]
    assert tokenizer.padding_id == tokenizer.token_id(padding or "<|endoftext|>")


@pytest.mark.parametrize("kind", KINDS)
def test_text_comes_back_exactly(specs: dict[str, str], kind: str) -> None:
    tokenizer = load_tokenizer(specs[kind])

    for text in [text for text in TEXTS + random_texts(500) if "\u2581" not in text]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(("kind", "special"), [("sentencepiece", "</s>"), ("huggingface", "<|endoftext|>")])
def test_special_tokens_in_text_are_text_unless_parsed(specs: dict[str, str], kind: str, special: str) -> None:
    ordinary, parsing = load_tokenizer(specs[kind]), load_tokenizer(specs[kind], parse_special=True)
    text = f"closes with {special}, he wrote"

    assert ordinary.end_of_document_id not in ordinary.encode(text)
    assert ordinary.decode(ordinary.encode(text)) == text
    assert parsing.encode(text).count(parsing.end_of_document_id) == 1
    assert parsing.encode("no tag") == ordinary.encode("no tag")


@pytest.mark.parametrize("kind", ["sentencepiece", "huggingface"])
def test_pickled_tokenizer_is_the_same(specs: dict[str, str], kind: str) -> None:
    tokenizer = load_tokenizer(specs[kind])
    copy: Tokenizer = pickle.loads(pickle.dumps(tokenizer))

    assert copy.encode_batch(TEXTS) == tokenizer.encode_batch(TEXTS)
    assert copy.fingerprint == tokenizer.fingerprint


def test_no_bos_is_added(specs: dict[str, str]) -> None:
    text = "return self"

    assert load_tokenizer(specs["huggingface with BOS"]).encode(text) == load_tokenizer(specs["huggingface"]).encode(
        text
    )


def test_added_tokens_count(specs: dict[str, str]) -> None:
    tokenizer = load_tokenizer(specs["huggingface"])

    assert tokenizer.vocab_size == 701
    assert tokenizer.encode("returns_nothing") == [700]


def test_fingerprint_follows_the_ids_not_the_place(specs: dict[str, str], tmp_path: Path) -> None:
    fingerprints = {kind: load_tokenizer(spec).fingerprint for kind, spec in specs.items()}
    # BOS is never added, so these two give the same ids
    assert fingerprints["huggingface"] == fingerprints["huggingface with BOS"]
    assert len(set(fingerprints.values())) == len(specs) - 1

    shutil.copy(specs["sentencepiece"], tmp_path / "copy.model")
    shutil.copytree(specs["huggingface"], tmp_path / "copy")
    assert load_tokenizer(str(tmp_path / "copy.model")).fingerprint == fingerprints["sentencepiece"]
    assert load_tokenizer(str(tmp_path / "copy")).fingerprint == fingerprints["huggingface"]

    grown = AutoTokenizer.from_pretrained(specs["huggingface"])
    grown.add_tokens(["one_more"])
    grown.save_pretrained(tmp_path / "grown")
    assert load_tokenizer(str(tmp_path / "grown")).fingerprint != fingerprints["huggingface"]


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"model_type": "unigram"}, "model_type UNIGRAM"),
        ({"byte_fallback": False}, "byte_fallback false"),
        ({"normalization_rule_name": "nfkc"}, "normalization nfkc"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces true"),
        ({"user_defined_symbols": ["a b"]}, "user_defined_symbols with a space"),
        ({"user_defined_symbols": ["\u2581a"]}, "user_defined_symbols with a space"),
        ({"user_defined_symbols": ["<x>"], "add_dummy_prefix": True}, "user_defined_symbols with add_dummy_prefix"),
    ],
)
def test_settings_that_cannot_be_carried_are_refused_by_name(
    settings: dict[str, Any], named: str, tmp_path: Path
) -> None:
    tokenizer = load_tokenizer(sentencepiece_model(tmp_path / "other.model", **settings))

    with pytest.raises(TokenizerError, match=named):
        save_huggingface(tokenizer, tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


def test_tokenizer_that_cannot_keep_special_tokens_apart_is_refused(tmp_path: Path) -> None:
    backend = Backend(models.Unigram([("<unk>", 0.0), ("</s>", 0.0), *[(c, -3.0) for c in "</s>ab"]], unk_id=0))
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>").save_pretrained(tmp_path)

    with pytest.raises(TokenizerError, match="</s>"):
        load_tokenizer(str(tmp_path))
    assert load_tokenizer(str(tmp_path), parse_special=True).encode("ab</s>")[-1] == 1


def test_what_is_no_usable_tokenizer_is_one_clear_error(specs: dict[str, str], tmp_path: Path) -> None:
    (tmp_path / "text.model").write_text("not a model")
    (tmp_path / "empty").mkdir()
    without_end = AutoTokenizer.from_pretrained(specs["huggingface"])
    without_end.eos_token = None
    without_end.save_pretrained(tmp_path / "without_end")
    cases = {
        tmp_path / "missing.model": "No such file",
        tmp_path / "text.model": "not a sentencepiece model",
        tmp_path / "empty": "the folder gives no Hugging Face tokenizer",
        tmp_path / "without_end": "no eos_token",
        Path(sentencepiece_model(tmp_path / "endless.model", eos_id=-1)): "no </s>",
        Path(specs["huggingface"]) / "tokenizer.json": "pass the folder",
    }
    for spec, message in cases.items():
        with pytest.raises(TokenizerError, match=message):
            load_tokenizer(str(spec))


def test_sentencepiece_path_needs_neither_torch_nor_transformers(specs: dict[str, str]) -> None:
    program = (
        "import sys; from dsmoe_megatron.tokenizers import load_tokenizer;"
        "load_tokenizer(sys.argv[1]).encode('text'); print({'torch', 'transformers'} & set(sys.modules))"
    )
    command = [sys.executable, "-c", program, specs["sentencepiece"]]

    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip() == "set()"
