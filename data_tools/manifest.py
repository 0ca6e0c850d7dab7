"""PREFIX.manifest.json: what a dataset holds and what it was made from. Written last, it vouches for the other files.

{"format": 1, "documents", "tokens", "text_bytes", "dtype",
 "tokenizer": {"spec", "kind", "vocab_size", "fingerprint", "end_of_document_id"},
 "files": {"bin": {"bytes", "sha256"}, "idx": {"bytes", "sha256"}},
 "sources": [{"path", "files", "bytes", "state", "documents", "skipped": {reason: count}}],
 "skipped": {reason: count}, "invalid_utf8_replaced", "options": {...}, "versions": {...}}
"""

import importlib.metadata
import json
import platform
from pathlib import Path
from typing import Any

from data_tools.documents import MAX_FILE_BYTES, Source
from data_tools.indexed_dataset import dataset_path, write_whole
from dsmoe_megatron.errors import DataError
from dsmoe_megatron.tokenizers import Tokenizer

MANIFEST_FORMAT = 1
REPORTED_LIBRARIES = ("dsmoe-megatron", "numpy", "sentencepiece", "tokenizers", "transformers", "zstandard")


def manifest_path(prefix: str) -> Path:
    return dataset_path(prefix, "manifest.json")


def planned_manifest(tokenizer: Tokenizer, sources: list[Source], options: dict[str, Any]) -> dict[str, Any]:
    """The part that is known before the work: what the dataset is made from."""
    return {
        "format": MANIFEST_FORMAT,
        "tokenizer": {
            "spec": tokenizer.spec,
            "kind": tokenizer.kind,
            "vocab_size": tokenizer.vocab_size,
            "fingerprint": tokenizer.fingerprint,
            "end_of_document_id": tokenizer.end_of_document_id,
        },
        "options": options | {"max_file_bytes": MAX_FILE_BYTES},
        "sources": [
            {"path": str(source.path), "files": len(source.files), "bytes": source.bytes, "state": source.state}
            for source in sources
        ],
    }


def write_manifest(prefix: str, planned: dict[str, Any], results: dict[str, Any]) -> dict[str, Any]:
    """Complete the plan with the results of the work, write it and return it."""
    sources = [plan | result for plan, result in zip(planned["sources"], results["sources"], strict=True)]
    versions = {"python": platform.python_version()} | {name: _version(name) for name in REPORTED_LIBRARIES}
    manifest = planned | results | {"sources": sources, "versions": versions}
    write_whole(manifest_path(prefix), json.dumps(manifest, indent=1).encode() + b"\n")
    return manifest


def existing_manifest(prefix: str, planned: dict[str, Any]) -> dict[str, Any] | None:
    """The manifest of a whole dataset at `prefix` that was made as planned; None if nothing is there.

    Raises:
        DataError: something else is there, which may be somebody's only copy.
    """
    path = manifest_path(prefix)
    data_files = {name: dataset_path(prefix, name) for name in ("bin", "idx")}
    advice = "choose another --output-prefix, or replace it with --overwrite"
    if not path.exists():
        for file in data_files.values():
            if file.exists():
                raise DataError(f"{file} is there without {path.name}, so it may be unfinished: {advice}")
        return None

    try:
        manifest: dict[str, Any] = json.loads(path.read_bytes())
        differences = [name for name in _identity(planned) if _identity(planned)[name] != _identity(manifest)[name]]
        sizes = {name: manifest["files"][name]["bytes"] for name in data_files}
    except (ValueError, KeyError, TypeError) as error:
        raise DataError(f"{path} is no manifest of this program: {advice}") from error
    if differences:
        raise DataError(f"{path}: the dataset there was made with other {' and '.join(differences)}: {advice}")
    for name, file in data_files.items():
        if not file.exists() or file.stat().st_size != sizes[name]:
            raise DataError(f"{file} is not the {sizes[name]} bytes that {path.name} tells: {advice}")
    return manifest


def _identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """What decides the ids. Where the tokenizer and the input lie does not."""
    return {
        "format": manifest["format"],
        "tokenizer": manifest["tokenizer"]["fingerprint"],
        "options": manifest["options"],
        "input": [(source["bytes"], source["state"]) for source in manifest["sources"]],
    }


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None
