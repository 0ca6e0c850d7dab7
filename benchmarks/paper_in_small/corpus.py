"""The corpus of the study: real text and code out of Debian packages, which any machine with apt can fetch.

    python -m benchmarks.paper_in_small.corpus --output paper_in_small_run/corpus

packages.yaml says which files of which packages are taken. They are read out of the packages, nothing is installed or
unpacked. Writes DIR/{text,code}/{train,validation}.jsonl.zst with {"text", "source", "license"} per line, copies
dropped and no document in two of them, and DIR/corpus.json, which names the versions and checksums of the packages.
"""

import contextlib
import fnmatch
import gzip
import hashlib
import json
import shutil
import subprocess
import tarfile
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Literal

import yaml
from inscriptis import get_text
from jsonargparse import ArgumentParser
from tqdm import tqdm

from data_tools.collect_local_corpus import Collection, Document, document, uniform, write_splits
from data_tools.indexed_dataset import write_whole
from data_tools.sources import MAX_FILE_BYTES
from dsmoe_megatron.errors import DataError, DSMoEError, EnvironmentNotSupportedError, exit_with

PACKAGES = Path(__file__).with_name("packages.yaml")
COMPRESSED = (".gz", ".dz")


@dataclass(frozen=True)
class Part:
    """Documents of one kind out of a package; see packages.yaml.

    Attributes:
        package: its name.
        kind: that the documents count as.
        files: patterns of the names that are taken.
        without: patterns of names that are not, though they are among those.
        archive: name of the .tar.xz inside the package that the files are in; None for the package itself.
        share: of the files, or pieces of them, that is taken.
        paragraphs_per_document: where given, files of any length are cut into pieces of so many paragraphs.
    """

    package: str
    kind: Literal["text", "code"]
    files: tuple[str, ...]
    without: tuple[str, ...] = ()
    archive: str | None = None
    share: float = 1.0
    paragraphs_per_document: int | None = None

    def has(self, name: str) -> bool:
        """Whether a file belongs to it, before the share is taken."""
        return _matches(name, self.files) and not _matches(name, self.without)


def read_parts(path: Path = PACKAGES) -> list[Part]:
    """The parts that a file like packages.yaml lists."""
    entries: list[dict[str, Any]] = yaml.safe_load(path.read_text(encoding="utf-8"))
    for entry in entries:
        entry |= {key: tuple(entry[key]) for key in ("files", "without") if key in entry}
    return [Part(**entry) for entry in entries]


def collect(output: Path, parts: Sequence[Part]) -> None:
    """Fetch the packages, read them, and write the corpus, unless it is there already.

    Args:
        output: folder of the corpus; packages are kept in it, in `packages`.
        parts: what to take.

    Raises:
        DataError: a package cannot be fetched or read, or gives nothing.
        EnvironmentNotSupportedError: there is no apt.
    """
    if (output / "corpus.json").is_file():
        print(f"{output}: collected already, nothing to do")
        return
    by_package = defaultdict(list)
    for part in parts:
        by_package[part.package].append(part)
    packages = {name: fetch(name, output / "packages") for name in tqdm(by_package, "fetching packages", disable=None)}
    collections = {"text": Collection(float("inf")), "code": Collection(float("inf"))}
    for name, path in tqdm(packages.items(), "reading packages", disable=None):
        for part, texts in _texts(path, by_package[name]).items():
            if not texts:
                raise DataError(f"{path}: has no file for {part}")
            collections[part.kind].take(name, _documents(texts, part))
    corpus: dict[str, Any] = {
        "packages": {name: {"file": path.name, "sha256": _sha256(path)} for name, path in packages.items()},
        "groups": {kind: collection.groups for kind, collection in collections.items()},
        "duplicates": {kind: collection.duplicates for kind, collection in collections.items()},
        "files": write_splits(output, collections),
    }
    write_whole(output / "corpus.json", json.dumps(corpus, indent=1).encode() + b"\n")
    for name, file in corpus["files"].items():
        print(f"{output / name}: {file['documents']:,} documents, {file['text_bytes'] / 1e6:.1f} MB")


def fetch(package: str, folder: Path) -> Path:
    """The package's file; one that lies in the folder already is taken as it is.

    Raises:
        EnvironmentNotSupportedError: it is not there, and there is no apt to fetch it with.
        DataError: apt cannot fetch it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    found = sorted(folder.glob(f"{package}_*.deb"))
    if not found:
        if shutil.which("apt-get") is None:
            raise EnvironmentNotSupportedError(f"the corpus needs Debian's apt-get, or {package}_*.deb in {folder}")
        fetched = subprocess.run(
            ["apt-get", "--quiet", "download", package], cwd=folder, capture_output=True, text=True, check=False
        )
        found = sorted(folder.glob(f"{package}_*.deb"))
        if fetched.returncode != 0 or not found:
            reason = (fetched.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise DataError(f"{package}: apt-get download: {reason}; try apt-get update, or edit {PACKAGES.name}")
    return found[-1]


def _texts(package: Path, parts: Sequence[Part]) -> dict[Part, dict[str, str]]:
    """Where a text is from -> the text, for each part of a package, which is read once."""
    texts: dict[Part, dict[str, str]] = {part: {} for part in parts}
    with _opened(package) as tree:
        for name, file in _members(tree):
            if within := [part for part in parts if part.archive == name]:
                with tarfile.open(fileobj=file, mode="r|xz") as archive:
                    for inner, content in _members(archive):
                        _take(inner, content, texts, within)
            _take(name, file, texts, [part for part in parts if part.archive is None])
    return texts


def _take(name: str, file: IO[bytes], texts: dict[Part, dict[str, str]], parts: Sequence[Part]) -> None:
    for part in parts:
        if part.has(name):
            texts[part].update(_pieces(name, file.read(), part))
            return  # a file is a document of one part


def _documents(texts: dict[str, str], part: Part) -> Iterator[Document]:
    """In an order that mixes files, the same every time."""
    for place in sorted(texts, key=_position):
        yield from document(texts[place], f"{part.package}/{place}", f"see Debian's package {part.package}")


@contextlib.contextmanager
def _opened(package: Path) -> Iterator[tarfile.TarFile]:
    """The files of a package, to be read once, from front to back."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", package], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            with tarfile.open(fileobj=process.stdout, mode="r|") as tree:
                yield tree
            process.stdout.read()  # what follows the archive's end
        except tarfile.TarError as error:
            raise DataError(f"{package}: cannot be read: {error}") from None
    if process.returncode != 0:
        raise DataError(f"{package}: dpkg-deb ended with exit status {process.returncode}")


def _members(archive: tarfile.TarFile) -> Iterator[tuple[str, IO[bytes]]]:
    for member in archive:
        if member.isfile():
            file = archive.extractfile(member)
            assert file is not None
            yield member.name.removeprefix("./"), file


def _pieces(name: str, content: bytes, part: Part) -> Iterator[tuple[str, str]]:
    """Where a text is from, and the text; none of what is left out by its share, is too long, or no UTF-8."""
    if name.endswith(COMPRESSED):
        content = gzip.decompress(content)
    count = part.paragraphs_per_document
    pieces = {name: content}
    if count is not None:
        paragraphs = content.split(b"\n\n")
        pieces = {
            f"{name}#{begin}": b"\n\n".join(paragraphs[begin : begin + count])
            for begin in range(0, len(paragraphs), count)
        }
    for place, piece in pieces.items():
        if _position(place) < part.share and len(piece) <= MAX_FILE_BYTES:
            with contextlib.suppress(UnicodeDecodeError):
                text = piece.decode()
                yield place, get_text(text) if name.endswith(".html") else text


def _position(name: str) -> float:
    """Uniform in [0, 1) by the name."""
    return uniform(hashlib.sha256(name.encode()).hexdigest())


def _matches(name: str, patterns: Sequence[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def main() -> None:
    parser = ArgumentParser(prog="python -m benchmarks.paper_in_small.corpus", description=__doc__)
    parser.add_argument("--output", type=Path, required=True, metavar="DIR", help="folder of the corpus")
    parser.add_argument("--packages", type=Path, default=PACKAGES, metavar="FILE", help="what to take")
    arguments = parser.parse_args()
    try:
        collect(arguments.output, read_parts(arguments.packages))
    except DSMoEError as error:
        exit_with(error, parser.prog)


if __name__ == "__main__":
    main()
