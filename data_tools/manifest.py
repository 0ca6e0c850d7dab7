"""PREFIX.manifest.json: what a dataset holds and what it was made from. Written last, it vouches for the other files.

{"format": 1, "documents", "tokens", "text_bytes", "dtype", "set": name or null, "all_sets": [name of each of the run],
 "tokenizer": {"spec", "kind", "vocab_size", "fingerprint", "end_of_document_id"}, "encoder": gigatoken | reference,
 "files": {"bin": {"bytes", "sha256"}, "idx": {"bytes", "sha256"}, "paths.jsonl": where a source is a folder},
 "sources": [{"path", "kind", "files", "bytes", "state", "sha256", "left_out", "documents", "skipped": {reason: n}}],
 "skipped": {reason: n}, "malformed_first": ["file:line: what is wrong"], "invalid_utf8_replaced",
 "long_documents_split", "options": {...}, "versions": {...},
 "checksum": SHA-256 over all of the above, see `manifest_checksum`}
"""

import hashlib
import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from data_tools.indexed_dataset import dataset_path, write_whole
from data_tools.sources import Source
from dsmoe_megatron.errors import DataError
from dsmoe_megatron.tokenizers import Tokenizer, load_tokenizer

MANIFEST_ENDING = ".manifest.json"  # after the prefix
MANIFEST_FORMAT = 1
DATA_FILES = ("bin", "idx")
REPLACING = "choose another --output-prefix, or replace it with --overwrite"
MANIFEST_CONTENT: dict[str, Any] = {  # what every reader may rely on
    "format": int,
    "documents": int,
    "tokens": int,
    "text_bytes": int,
    "dtype": str,
    "tokenizer": {"spec": str, "kind": str, "vocab_size": int, "fingerprint": str, "end_of_document_id": int},
    "files": {name: {"bytes": int, "sha256": str} for name in DATA_FILES},
    "sources": list,
    "options": {"special_tokens": str, "end_of_document": str},
    "checksum": str,
}
REPORTED_LIBRARIES = (
    *("dsmoe-megatron", "datatrove", "gigatoken", "numpy", "orjson", "pyarrow", "sentencepiece", "tokenizers"),
    *("transformers", "zstandard"),
)


def manifest_path(prefix: str) -> Path:
    return Path(f"{prefix}{MANIFEST_ENDING}")


def planned_manifest(
    tokenizer: Tokenizer, end_of_document_id: int | None, sources: list[Source], options: dict[str, Any]
) -> dict[str, Any]:
    """The part that is known before the work: what the dataset is made from."""
    return {
        "format": MANIFEST_FORMAT,
        "tokenizer": {
            "spec": tokenizer.spec,
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
            "end_of_document_id": tokenizer.end_of_document_id if end_of_document_id is None else end_of_document_id,
        },
        "options": options,
        "sources": [
            {
                "path": source.path,
                "kind": source.kind,
                "files": len(source.files),
                "bytes": source.bytes,
                "state": source.state,
                "left_out": source.left_out,
            }
            for source in sources
        ],
    }


def write_manifest(prefix: str, planned: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """Complete the plan with the results of the work, write it and return it."""
    sources = [plan | result for plan, result in zip(planned["sources"], results["sources"], strict=True)]
    versions = {"python": platform.python_version()} | {name: _version(name) for name in REPORTED_LIBRARIES}
    manifest = planned | results | {"sources": sources, "versions": versions}
    manifest["checksum"] = manifest_checksum(manifest)
    write_whole(manifest_path(prefix), json.dumps(manifest, indent=1).encode() + b"\n")
    return manifest


def read_manifest(prefix: str) -> dict[str, Any]:
    """The manifest of the dataset at `prefix`, as it was written.

    Raises:
        DataError: it is missing, was not written by this program, or has been changed since.
    """
    path = manifest_path(prefix)
    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
    except FileNotFoundError as error:
        raise DataError(f"{path}: no such file; preprocess.py writes it when the dataset is whole") from error
    except OSError as error:
        raise DataError(f"{path}: {error.strerror or error}") from error
    except ValueError as error:
        raise DataError(f"{path} is damaged, or no manifest of preprocess.py ({error})") from error
    _require_content(path, manifest, MANIFEST_CONTENT, "")
    if manifest["format"] != MANIFEST_FORMAT:
        raise DataError(f"{path}: format {manifest['format']}, where this program reads format {MANIFEST_FORMAT}")
    if manifest["checksum"] != manifest_checksum(manifest):
        raise DataError(f"{path} has been changed since it was written: its checksum is not that of its content")
    return manifest


def manifest_checksum(manifest: dict[str, Any]) -> str:
    """SHA-256 over the values of a manifest, its own checksum left out; their layout in the file does not count."""
    content = {name: value for name, value in manifest.items() if name != "checksum"}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def dataset_tokenizer(manifest: dict[str, Any], spec: str | None) -> Tokenizer:
    """The tokenizer that a dataset was made with.

    Args:
        manifest: of the dataset.
        spec: where the tokenizer is now; None looks where it was.

    Raises:
        TokenizerError: it cannot be loaded.
        DataError: it is another one.
    """
    made_with = manifest["tokenizer"]
    parse_special = manifest["options"]["special_tokens"] == "parse"
    tokenizer = load_tokenizer(spec or made_with["spec"], parse_special)
    if (tokenizer.fingerprint, tokenizer.vocab_size) != (made_with["fingerprint"], made_with["vocab_size"]):
        raise DataError(
            f"tokenizer {tokenizer.spec} ({tokenizer.fingerprint[:12]}) is not the one that the data was made with,"
            f" {made_with['spec']} ({made_with['fingerprint'][:12]}): name that one with --tokenizer"
        )
    return tokenizer


def existing_manifest(prefix: str, planned: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a whole dataset at `prefix` that was made as planned; None if nothing is there.

    Raises:
        DataError: something else is there, which may be somebody's only copy.
    """
    path = manifest_path(prefix)
    if not path.exists():
        for file in (dataset_path(prefix, name) for name in DATA_FILES):
            if file.exists():
                raise DataError(f"{file} is there without {path.name}, so it may be unfinished: {REPLACING}")
        return None

    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        differences = different_parts(planned, manifest)
        sizes = sizes_of(manifest)
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no manifest of this program: {REPLACING}") from error
    if differences:
        raise DataError(f"{path}: the dataset there was made with other {' and '.join(differences)}: {REPLACING}")
    require_sizes(prefix, sizes)
    return manifest


def sizes_of(manifest: dict[str, Any]) -> dict[str, int]:
    """Bytes of the dataset's files, by their ending."""
    return {name: manifest["files"][name]["bytes"] for name in DATA_FILES}


def require_sizes(prefix: str, sizes: dict[str, int]) -> None:
    """Refuse a dataset whose files are not as long as its manifest tells.

    Raises:
        DataError: names the file.
    """
    for name, size in sizes.items():
        file = dataset_path(prefix, name)
        if not file.exists() or file.stat().st_size != size:
            raise DataError(f"{file} is not the {size} bytes that {manifest_path(prefix).name} tells: {REPLACING}")


def different_parts(planned: dict[str, Any], manifest: dict[str, Any]) -> list[str]:
    """In which parts that decide the ids two manifests, or plans of one, differ."""
    one, other = _identity(planned), _identity(manifest)
    return [name for name in one if one[name] != other[name]]


def _identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """What decides the ids. Where the tokenizer and the input lie does not."""
    return {
        "format": manifest["format"],
        "tokenizer": (manifest["tokenizer"]["fingerprint"], manifest["tokenizer"]["end_of_document_id"]),
        "options": manifest["options"],
        "input": [(source["bytes"], source["state"]) for source in manifest["sources"]],
    }


def _require_content(path: Path, found: Any, expected: Any, where: str) -> None:
    """Refuse a manifest in which a value is missing or of another type."""
    kind = dict if isinstance(expected, dict) else expected
    if not isinstance(found, kind) or isinstance(found, bool):
        name = where or "its content"
        raise DataError(f"{path} is damaged, or no manifest of this release of preprocess.py: {name} is {found!r}")
    if isinstance(expected, dict):
        for name, below in expected.items():
            _require_content(path, found.get(name), below, f"{where}.{name}".removeprefix("."))


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
