"""gigatoken is taken where its ids are those of the tokenizer's own library, and only there."""

import gzip
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data_tools import encoding
from data_tools.dataset_reader import map_tokens, read_index
from data_tools.documents import DocumentRules
from data_tools.encoding import FAST, PROBES, REFERENCE, FastEncoder, ReferenceEncoder, choose_encoder
from data_tools.preprocess import preprocess
from data_tools.train_tokenizer import train_tokenizer
from dsmoe_megatron.errors import ConfigurationError, DataError
from dsmoe_megatron.tokenizers import load_tokenizer, tokenizer_from_state

SPECIAL = "<|endoftext|> <s> </s> <unk> <pad> a</s>b<|endoftext|>c"


@pytest.fixture(scope="module", params=["sentencepiece", "huggingface", "codegen"])
def spec(request: pytest.FixtureRequest, tokenizer_spec: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    if request.param == "huggingface":
        output = tmp_path_factory.mktemp("tokenizer") / "bytes"
        source = str(Path(json.__file__).parent)
        return str(train_tokenizer([source], str(output), vocab_size=600, kind="huggingface"))
    return tokenizer_spec if request.param == "sentencepiece" else "codegen"


def ids_of(encoder: Any, texts: list[str]) -> list[list[int]]:
    ids, counts = encoder.encode(texts)
    return [part.tolist() for part in np.split(ids, np.cumsum(counts)[:-1])]


@pytest.mark.parametrize("parse_special", [False, True])
def test_both_encoders_give_the_ids_of_the_tokenizer(spec: str, parse_special: bool, texts: list[str]) -> None:
    tokenizer = load_tokenizer(spec, parse_special)
    some = [*PROBES, SPECIAL, *texts[:300]]
    expected = [tokenizer.encode(text) for text in some]

    assert ids_of(ReferenceEncoder(tokenizer), some) == expected
    fast = ids_of(FastEncoder(tokenizer), some)
    different = [text for text, found, wanted in zip(some, fast, expected, strict=True) if found != wanted]

    assert choose_encoder(tokenizer, [SPECIAL])[0] == (REFERENCE if different else FAST)
    if not parse_special:
        assert different == []


def test_no_texts_have_no_ids(spec: str) -> None:
    for make in (FastEncoder, ReferenceEncoder):
        ids, counts = make(load_tokenizer(spec)).encode([])
        assert (len(ids), len(counts)) == (0, 0)


def test_a_tokenizer_that_travelled_as_json_is_the_same(spec: str, texts: list[str]) -> None:
    tokenizer = load_tokenizer(spec)

    again = tokenizer_from_state(json.loads(json.dumps(tokenizer.to_state())))

    assert (again.fingerprint, again.vocab_size, again.end_of_document_id, again.spec) == (
        tokenizer.fingerprint,
        tokenizer.vocab_size,
        tokenizer.end_of_document_id,
        tokenizer.spec,
    )
    assert again.encode_batch(texts[:50]) == tokenizer.encode_batch(texts[:50])


class Wrong(FastEncoder):
    """An encoder that is wrong where a text holds a certain word."""

    def encode(self, texts: Any) -> Any:
        return super().encode([text.replace("needle", "nail") for text in texts])


def write(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def test_ids_that_differ_on_a_sample_of_this_input_are_never_used(
    tokenizer_spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(encoding, "FastEncoder", Wrong)
    with_needle = write(tmp_path / "in.jsonl", ["hay", "a needle"])

    (manifest,) = preprocess([with_needle], str(tmp_path / "data"), tokenizer_spec)

    assert manifest["encoder"] == REFERENCE
    assert "gigatoken gives other ids for 'a needle'" in capsys.readouterr().err
    (other,) = preprocess([write(tmp_path / "hay.jsonl", ["hay"])], str(tmp_path / "hay"), tokenizer_spec)
    assert other["encoder"] == FAST


def test_ids_that_differ_later_in_the_input_stop_the_run(
    tokenizer_spec: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(encoding, "FastEncoder", Wrong)
    generator = random.Random(0)
    hay = [generator.randbytes(2000).hex() for _ in range(2000)]
    haystack = hay[:1000] + [f"{text[:2000]} {'needle ' * 400}" for text in hay[1000:]]  # several chunks of each
    plain = write(tmp_path / "in.jsonl", haystack)
    # a compressed file is one piece, of which the first chunk alone is sampled before the work
    source = f"{plain}.gz"
    Path(source).write_bytes(gzip.compress(Path(plain).read_bytes(), 1))

    with pytest.raises(DataError, match=r"gigatoken gives other ids than sentencepiece for .*--encoder reference"):
        preprocess([source], str(tmp_path / "data"), tokenizer_spec)

    preprocess([source], str(tmp_path / "data"), tokenizer_spec, encoder="reference", overwrite=True)
    monkeypatch.undo()
    preprocess([source], str(tmp_path / "right"), tokenizer_spec)
    assert (tmp_path / "data.bin").read_bytes() == (tmp_path / "right.bin").read_bytes()


def documents_of(prefix: Path) -> list[list[int]]:
    index = read_index(str(prefix))
    tokens = map_tokens(str(prefix), index.dtype)
    return [index.document(tokens, number).tolist() for number in range(len(index))]


def test_what_ends_a_document_is_the_users_choice(tokenizer_spec: str, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(tokenizer_spec)
    ids = tokenizer.encode("one two")
    source = write(tmp_path / "in.jsonl", ["one two", ""])
    pad = tokenizer.token_id("<pad>")
    expected: dict[str, list[list[int]]] = {
        "append": [[*ids, tokenizer.end_of_document_id], [tokenizer.end_of_document_id]],
        "<pad>": [[*ids, pad or 0], [pad or 0]],
    }
    for end, documents in expected.items():
        rules = DocumentRules(end_of_document=end, empty_documents="keep")
        preprocess([source], str(tmp_path / end), tokenizer_spec, rules=rules)
        assert documents_of(tmp_path / end) == documents
    preprocess([source], str(tmp_path / "none"), tokenizer_spec, rules=DocumentRules(end_of_document="none"))
    assert documents_of(tmp_path / "none") == [ids]

    for rules, message in [
        (DocumentRules(end_of_document="<nothing>"), "has no such token"),
        (DocumentRules(end_of_document="none", empty_documents="keep"), "without any token"),
    ]:
        with pytest.raises(ConfigurationError, match=message):
            preprocess([source], str(tmp_path / "no"), tokenizer_spec, rules=rules)
