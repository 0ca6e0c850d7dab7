"""Collect a small corpus of real text and real code from this machine, without a network.

    python data_tools/collect_local_corpus.py --output corpus

Every machine with Python has it: the language reference (pydoc_data), the installed packages' descriptions, guides and
licences, documentation strings where that is not enough, and the standard library's sources as code. Writes
DIR/{text,code}/{train,validation}.jsonl.zst with {"text", "source", "license"} per line, and then DIR/corpus.json.
Nothing is in two splits: copies are dropped, and a module's documentation goes where its code goes.
"""

import ast
import hashlib
import importlib.metadata
import json
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveFloat

from data_tools.indexed_dataset import write_whole
from data_tools.sources import MAX_FILE_BYTES
from dsmoe_megatron.errors import DataError, DSMoEError, exit_with

CORPUS_FORMAT = 1
VALIDATION_SHARE = 0.03
SHORTEST_DOCUMENT = 200  # characters; below are stubs
PYTHON_LICENSE = "PSF-2.0"
PROSE_SUFFIXES = (".md", ".rst", ".txt")
LICENSE_NAMES = ("license", "licence", "copying", "notice", "authors")
# tests, other people's packages, and what is generated: text in disguise and character tables
LEFT_OUT_FOLDERS = {"test", "tests", "idle_test", "site-packages", "dist-packages", "pydoc_data", "encodings"}


@dataclass(frozen=True)
class Document:
    """One document of the corpus.

    Args:
        text: its content.
        source: where it is from, without the machine's own folders.
        license: of the package that it is part of.
        family: text that decides the split; that of the module for its documentation strings.
    """

    text: str
    source: str
    license: str
    family: str = ""

    @cached_property
    def key(self) -> str:
        """Equal for copies, also where only white space or the copyright holder differs."""
        return _digest(self.text)

    @cached_property
    def split_position(self) -> float:
        """Uniform in [0, 1); the lowest go to validation."""
        return uniform(_digest(self.family or self.text))


@dataclass(frozen=True)
class Package:
    """An installed package: its name, licence, long description, and files."""

    name: str
    license: str
    description: str
    files: tuple[importlib.metadata.PackagePath, ...]


@dataclass
class Collection:
    """Documents of one corpus up to a size, each once.

    Args:
        budget: bytes of text to collect.
    """

    budget: float
    documents: dict[str, Document] = field(default_factory=dict)
    groups: dict[str, dict[str, int]] = field(default_factory=dict)
    duplicates: int = 0

    def take(self, group: str, documents: Iterable[Document]) -> None:
        """Take documents until the budget is spent."""
        counts = self.groups.setdefault(group, {"documents": 0, "bytes": 0})
        if self.budget <= 0:
            return
        for document in documents:
            if document.key in self.documents:
                self.duplicates += 1
                continue
            size = len(document.text.encode())
            self.documents[document.key] = document
            self.budget -= size
            counts["documents"] += 1
            counts["bytes"] += size
            if self.budget <= 0:
                return

    def splits(self) -> dict[str, list[Document]]:
        """Train and validation, each in an order that mixes the groups and is the same every time."""
        documents = [self.documents[key] for key in sorted(self.documents)]
        if len(documents) < 2:
            raise DataError("fewer than two documents found on this machine: ask for more megabytes")
        # at least one document to validate on, however small the corpus
        border = max(VALIDATION_SHARE, min(document.split_position for document in documents))
        validation = [document for document in documents if document.split_position <= border]
        train = [document for document in documents if document.split_position > border]
        return {"train": train, "validation": validation}


def collect(
    output: str, text_megabytes: float = 6, code_megabytes: float = 6, overwrite: bool = False
) -> dict[str, Any]:
    """Collect and write the corpus, unless it is there already.

    Returns:
        What DIR/corpus.json tells.
    """
    folder = Path(output)
    options = {"text_megabytes": text_megabytes, "code_megabytes": code_megabytes}
    if not overwrite and (existing := _existing_corpus(folder, options)) is not None:
        print(f"{output}: collected already, nothing to do (--overwrite collects again)")
        return existing

    modules = list(_standard_library())
    collections = {
        "text": _collect_text(Collection(text_megabytes * 1e6), modules),
        "code": _collect_code(Collection(code_megabytes * 1e6), modules),
    }
    corpus: dict[str, Any] = {
        "format": CORPUS_FORMAT,
        "options": options,
        "groups": {kind: collection.groups for kind, collection in collections.items()},
        "duplicates": {kind: collection.duplicates for kind, collection in collections.items()},
    }
    try:
        (folder / "corpus.json").unlink(missing_ok=True)
        corpus["files"] = write_splits(folder, collections)
        write_whole(folder / "corpus.json", json.dumps(corpus, indent=1).encode() + b"\n")
    except OSError as error:
        raise DataError(f"{error.filename or output}: {error.strerror or error}") from error
    _print_table(corpus)
    return corpus


def write_splits(folder: Path, collections: dict[str, Collection]) -> dict[str, dict[str, Any]]:
    """Write FOLDER/KIND/{train,validation}.jsonl.zst of each kind.

    Returns:
        Sizes and checksum of each file, by its name below the folder.

    Raises:
        DataError: there are too few documents to split.
        OSError: a file cannot be written.
    """
    return {
        f"{kind}/{split}.jsonl.zst": _write_documents(folder / kind / f"{split}.jsonl.zst", documents)
        for kind, collection in collections.items()
        for split, documents in collection.splits().items()
    }


def _collect_text(collection: Collection, modules: list[Document]) -> Collection:
    """Prose first; documentation strings only for what is then missing."""
    packages = installed_packages()
    collection.take("language reference", _language_reference())
    collection.take("package descriptions", _package_descriptions(packages))
    collection.take("package guides", _package_files(packages, PROSE_SUFFIXES))
    collection.take("licences", _license_texts(packages))
    collection.take("library documentation", _documentation_strings(modules))
    collection.take("package documentation", _documentation_strings(_package_files(packages, (".py",))))
    return collection


def _collect_code(collection: Collection, modules: list[Document]) -> Collection:
    collection.take("standard library", modules)
    return collection


def _language_reference() -> Iterator[Document]:
    from pydoc_data.topics import topics

    for name in sorted(topics):
        yield from document(topics[name], f"pydoc_data/topics/{name}", PYTHON_LICENSE)


def _package_descriptions(packages: list[Package]) -> Iterator[Document]:
    for package in packages:
        yield from document(package.description, f"{package.name}/description", package.license)


def _package_files(packages: list[Package], suffixes: tuple[str, ...]) -> Iterator[Document]:
    """The packages' files of these kinds, but no licences."""
    for package, file in _in_mixed_order(packages):
        in_metadata = any(part.endswith(".dist-info") for part in file.parts)
        if file.suffix.lower() in suffixes and not in_metadata and not _is_license(file) and _wanted(file.parts):
            yield from document(_read(Path(str(file.locate()))), f"{package.name}/{file}", package.license)


def _license_texts(packages: list[Package]) -> Iterator[Document]:
    for package, file in _in_mixed_order(packages):
        if _is_license(file) and file.suffix.lower() in ("", *PROSE_SUFFIXES):
            yield from document(_read(Path(str(file.locate()))), f"{package.name}/{file}", package.license)


def _in_mixed_order(packages: list[Package]) -> list[tuple[Package, importlib.metadata.PackagePath]]:
    pairs = [(package, file) for package in packages for file in package.files]
    return sorted(pairs, key=lambda pair: _mixed(f"{pair[0].name}/{pair[1]}"))


def _is_license(file: importlib.metadata.PackagePath) -> bool:
    return file.name.lower().startswith(LICENSE_NAMES)


def _standard_library() -> Iterator[Document]:
    root = Path(sysconfig.get_path("stdlib"))
    names = sorted((path.relative_to(root).as_posix() for path in root.rglob("*.py")), key=_mixed)
    for name in names:
        if _wanted(Path(name).parts) and not name.startswith("_sysconfigdata"):
            yield from document(_read(root / name), f"python/{name}", PYTHON_LICENSE)


def _documentation_strings(modules: Iterable[Document]) -> Iterator[Document]:
    """The documentation strings of each module as one document."""
    for module in modules:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # other people's invalid escapes
                tree = ast.parse(module.text)
        except (SyntaxError, ValueError, RecursionError):
            continue
        text = "\n\n".join(_strings_below(tree))
        for found in document(text, f"{module.source}#documentation", module.license):
            yield Document(found.text, found.source, found.license, family=module.text)


def _strings_below(node: ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) -> Iterator[str]:
    """The documentation strings of a module or class and of what it defines, in order."""
    if string := ast.get_docstring(node):
        yield string
    if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        for child in node.body:
            if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
                yield from _strings_below(child)


def document(text: str, source: str, license_name: str) -> Iterator[Document]:
    """The document, unless it is a stub or no text."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:  # old metadata in another encoding
        return
    if len(text) >= SHORTEST_DOCUMENT and "\0" not in text:
        yield Document(text, source, license_name)


def installed_packages() -> list[Package]:
    """The installed packages by name; the first where a name is on the path twice, as for imports."""
    packages: dict[str, Package] = {}
    for distribution in importlib.metadata.distributions():
        metadata = distribution.metadata  # read anew at every access
        name = metadata["Name"] if "Name" in metadata else ""  # noqa: SIM401 (no `get` in its type)
        if name and name not in packages:
            fields = {field: metadata[field] for field in ("License-Expression", "License") if field in metadata}
            # some put their whole licence into the old field
            license_name = fields.get("License-Expression") or fields.get("License", "").strip().split("\n")[0]
            description = metadata["Description"] if "Description" in metadata else ""  # noqa: SIM401
            files = tuple(distribution.files or ())
            packages[name] = Package(name, license_name or "see the package", description, files)
    return [packages[name] for name in sorted(packages)]


def _read(path: Path) -> str:
    """A file's text, or none where it is missing, large or not UTF-8."""
    try:
        return path.read_text("utf-8") if path.stat().st_size <= MAX_FILE_BYTES else ""
    except (OSError, UnicodeDecodeError):
        return ""


def _wanted(parts: tuple[str, ...]) -> bool:
    return LEFT_OUT_FOLDERS.isdisjoint(parts[:-1])


def _mixed(name: str) -> str:
    """Sort key that mixes folders and packages, the same way every time."""
    return hashlib.sha256(name.encode()).hexdigest()


def uniform(digest: str) -> float:
    """A hexadecimal digest as a number in [0, 1)."""
    return int(digest[:12], 16) / 16**12


def _digest(text: str) -> str:
    """SHA-256 of the words, without lines that name a copyright holder."""
    lines = (line for line in text.split("\n") if "copyright" not in line.lower())
    return hashlib.sha256(" ".join(" ".join(lines).split()).encode()).hexdigest()


def _write_documents(path: Path, documents: list[Document]) -> dict[str, Any]:
    import zstandard

    records = [{"text": d.text, "source": d.source, "license": d.license} for d in documents]
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    content = zstandard.ZstdCompressor().compress(lines.encode())
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, content)
    return {
        "documents": len(documents),
        "text_bytes": sum(len(document.text.encode()) for document in documents),
        "bytes": len(content),
        "sha256": hashlib.sha256(content).hexdigest(),
    }


def _existing_corpus(folder: Path, options: dict[str, float]) -> dict[str, Any] | None:
    """The description of a whole corpus of these options in the folder, if there is one."""
    try:
        corpus: dict[str, Any] = json.loads((folder / "corpus.json").read_bytes())
        sizes_fit = all((folder / name).stat().st_size == file["bytes"] for name, file in corpus["files"].items())
        same = (corpus["format"], corpus["options"]) == (CORPUS_FORMAT, options)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return corpus if sizes_fit and same else None


def _print_table(corpus: dict[str, Any]) -> None:
    print(f"{'':<34}{'documents':>10}{'MB':>8}")
    for kind, groups in corpus["groups"].items():
        for group, counts in groups.items():
            print(f"{kind + ': ' + group:<34}{counts['documents']:>10,}{counts['bytes'] / 1e6:>8.2f}")
    for name, file in corpus["files"].items():
        print(f"{name:<34}{file['documents']:>10,}{file['text_bytes'] / 1e6:>8.2f}")


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="collect_local_corpus.py", description="A corpus of text and code from this machine")
    parser.add_argument("--output", type=str, required=True, metavar="DIR", help="folder of the corpus")
    parser.add_argument("--text-megabytes", type=PositiveFloat, default=6.0, help="text to collect, at most [MB]")
    parser.add_argument("--code-megabytes", type=PositiveFloat, default=6.0, help="code to collect, at most [MB]")
    parser.add_argument("--overwrite", action="store_true", help="collect again")
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    try:
        collect(arguments.output, arguments.text_megabytes, arguments.code_megabytes, arguments.overwrite)
    except DSMoEError as error:
        exit_with(error, "collect_local_corpus")
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()
