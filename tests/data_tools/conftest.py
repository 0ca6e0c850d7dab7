"""A tokenizer and documents that the tests of the data tools share."""

import random
import sysconfig
from pathlib import Path

import pytest

from data_tools.train_tokenizer import train_tokenizer

STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="session")
def tokenizer_spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sentencepiece model of the standard library's json package."""
    output = tmp_path_factory.mktemp("tokenizer") / "small"
    return str(train_tokenizer([str(STANDARD_LIBRARY / "json")], str(output), vocab_size=600))


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """3.3 MB of documents of all lengths, in an order of their own: more than three chunks."""
    sources = [path.read_text(errors="replace") for path in sorted(STANDARD_LIBRARY.glob("*.py"))[:100]]
    paragraphs = [part for source in sources for part in source.split("\n\n") if part.strip()]
    random.Random(0).shuffle(paragraphs)
    documents = [text for text in sources if text.strip()] + paragraphs
    special = ["ends with </s>", "\u2028 \ue000 emoji 😀 中文", "  spaces  ", "\ttab\r\n"]
    return special + documents
