"""A tokenizer and documents that the tests of the data tools share."""

import bisect
import itertools
import random
import subprocess
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_tools.reading import CHUNK_BYTES
from data_tools.train_tokenizer import train_tokenizer

STANDARD_LIBRARY = Path(sysconfig.get_path("stdlib"))


@pytest.fixture(scope="session")
def tokenizer_spec(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A sentencepiece model of the standard library's asyncio package."""
    output = tmp_path_factory.mktemp("tokenizer") / "small"
    return str(train_tokenizer([str(STANDARD_LIBRARY / "asyncio")], str(output), vocab_size=2000))


@pytest.fixture(scope="session")
def texts() -> list[str]:
    """Documents of all lengths, in an order of their own; more than three chunks."""
    sources = [path.read_text(errors="replace") for path in sorted(STANDARD_LIBRARY.glob("*.py"))]
    documents = [part for source in sources for part in (source, *source.split("\n\n")) if part.strip()]
    random.Random(0).shuffle(documents)
    total = list(itertools.accumulate(map(len, documents)))
    documents = documents[: bisect.bisect(total, 3.5 * CHUNK_BYTES)]
    special = ["ends with </s>", "\u2028 \ue000 emoji 😀 中文", "  spaces  ", "\ttab\r\n"]
    return special + documents


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 6 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(folder)], capture_output=True, text=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip(f"no file system can be mounted here: {mounted.stderr.strip()}")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
