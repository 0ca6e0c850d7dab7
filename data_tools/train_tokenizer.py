"""Train a BPE tokenizer on raw text and code.

    python data_tools/train_tokenizer.py --input 'corpus/*.jsonl.zst' --output tokenizer --vocab-size 4096

`--kind sentencepiece` writes PREFIX.model: BPE with byte fallback that keeps every character and space of the text, so
that code comes back exactly. `--kind huggingface` writes the folder PREFIX: byte-level BPE. Both split numbers into
digits. The same input gives the same tokenizer.
"""

import io
import math
import sys
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from jsonargparse import ArgumentParser
from jsonargparse.typing import ClosedUnitInterval, PositiveFloat, PositiveInt

from data_tools.documents import DocumentRules, read_documents
from data_tools.indexed_dataset import write_whole
from data_tools.sources import DEFAULT_EXTENSIONS, find_sources
from dsmoe_megatron.errors import DataError, DSMoEError, TokenizerError, exit_with

SENTENCE_BYTES = 4096  # sentencepiece trains on pieces of text and skips those longer than a limit
LONGEST_LINE_CHARACTERS = SENTENCE_BYTES // 4
END_OF_DOCUMENT = "<|endoftext|>"  # of the byte-level tokenizer; sentencepiece's is </s>
# How the byte-level tokenizer cuts text into words: Qwen2's pattern, with single digits, which fast encoders know too.
WORD_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(
    inputs: list[str],
    output: str,
    vocab_size: int,
    kind: Literal["sentencepiece", "huggingface"] = "sentencepiece",
    character_coverage: float = 0.9995,
    max_megabytes: float = math.inf,
    text_key: str = "text",
    extensions: tuple[str, ...] = DEFAULT_EXTENSIONS,
) -> Path:
    """Train and write a tokenizer. The arguments are those of the command line.

    Returns:
        The tokenizer's SPEC: the .model file or the folder.

    Raises:
        DataError: the input cannot be used.
        TokenizerError: the input does not give a tokenizer of this size.
    """
    texts = read_texts(inputs, extensions, text_key, max_megabytes)
    try:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
        if kind == "huggingface":
            _train_byte_level(texts, Path(output), vocab_size)
            return Path(output)
        path = Path(f"{output}.model")
        write_whole(path, _train_sentencepiece(texts, vocab_size, character_coverage))
    except OSError as error:
        raise DataError(f"{error.filename or output}: {error.strerror or error}") from error
    return path


def read_texts(inputs: list[str], extensions: tuple[str, ...], text_key: str, max_megabytes: float) -> Iterator[str]:
    """The documents to train on. Under a limit every source gives an equal share of it, from its beginning; what short
    sources leave goes to those after them."""
    sources = find_sources(inputs, extensions)
    rules = DocumentRules(text_key=text_key, extensions=extensions)
    budget = max_megabytes * 1e6
    documents, malformed = 0, []
    for number, source in enumerate(sources):
        end = budget - budget / (len(sources) - number) if math.isfinite(budget) else 0.0
        for found in read_documents([source], rules):
            malformed += found.complaints
            for text in found.texts:
                yield text
                documents += 1
                budget -= len(text.encode())
                if budget <= end:
                    break
            if budget <= end:
                break
    if malformed:
        print(f"malformed lines skipped, the first: {malformed[0]}", file=sys.stderr)
    if not documents:
        raise DataError(f"no document in {', '.join(inputs)} to train a tokenizer on")


def _train_sentencepiece(texts: Iterable[str], vocab_size: int, character_coverage: float) -> bytes:
    """A model in memory: unlike one that sentencepiece writes itself it does not carry the paths it was made from."""
    import sentencepiece

    # a list, because sentencepiece would swallow an error of the reader
    sentences = [sentence for text in texts for sentence in _sentences(text)]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            character_coverage=character_coverage,
            byte_fallback=True,
            split_digits=True,
            # the text as it is: nothing folded, no space added at the start or taken away
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,  # indentation
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            max_sentence_length=2 * SENTENCE_BYTES,
            minloglevel=2,
        )
    except RuntimeError as error:
        reason = str(error).rpartition("] ")[2] or str(error)
        raise TokenizerError(f"sentencepiece cannot train {vocab_size} pieces on this input: {reason}") from error
    return model.getvalue()


def _sentences(text: str) -> Iterator[str]:
    """Cut a document at line ends into pieces of up to SENTENCE_BYTES; several lines each, so that pieces like ":\\n"
    can be learned."""
    lines: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        for start in range(0, len(line), LONGEST_LINE_CHARACTERS):
            part = line[start : start + LONGEST_LINE_CHARACTERS]
            part_size = len(part.encode())
            if lines and size + part_size > SENTENCE_BYTES:
                yield "".join(lines)
                lines, size = [], 0
            lines.append(part)
            size += part_size
    if lines:
        yield "".join(lines)


def _train_byte_level(texts: Iterable[str], folder: Path, vocab_size: int) -> None:
    from tokenizers import Regex, Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from tokenizers.trainers import BpeTrainer
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_DOCUMENT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    if backend.get_vocab_size() != vocab_size:
        raise TokenizerError(f"byte-level BPE gives {backend.get_vocab_size()} pieces on this input, not {vocab_size}")

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        eos_token=END_OF_DOCUMENT,
        split_special_tokens=True,
        clean_up_tokenization_spaces=False,
    )
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        tokenizer.save_pretrained(scratch)
        for file in sorted(Path(scratch).iterdir()):
            write_whole(folder / file.name, file.read_bytes())


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="train_tokenizer.py", description="Train a BPE tokenizer on raw text and code")
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="GLOB",
        help=".jsonl, .jsonl.gz, .jsonl.zst files and folders of source files",
    )
    parser.add_argument(
        "--output", type=str, required=True, metavar="PREFIX", help="makes PREFIX.model, or the folder PREFIX"
    )
    parser.add_argument("--vocab-size", type=PositiveInt, required=True, help="ids, special ones and bytes included")
    parser.add_argument("--kind", choices=["sentencepiece", "huggingface"], default="sentencepiece", help="library")
    parser.add_argument(
        "--character-coverage",
        type=ClosedUnitInterval,
        default=0.9995,
        help="share of the characters that become pieces, the rest is bytes (sentencepiece)",
    )
    parser.add_argument("--max-megabytes", type=PositiveFloat, default=math.inf, help="text to train on [MB]")
    parser.add_argument("--text-key", type=str, default="text", help="key of the text in a .jsonl line")
    parser.add_argument(
        "--extensions", nargs="+", default=list(DEFAULT_EXTENSIONS), metavar=".EXT", help="files taken from folders"
    )
    return parser


def main() -> None:
    arguments = build_parser().parse_args()
    try:
        spec = train_tokenizer(
            inputs=arguments.input,
            output=arguments.output,
            vocab_size=arguments.vocab_size,
            kind=arguments.kind,
            character_coverage=arguments.character_coverage,
            max_megabytes=arguments.max_megabytes,
            text_key=arguments.text_key,
            extensions=tuple(arguments.extensions),
        )
    except DSMoEError as error:
        exit_with(error, "train_tokenizer")
    except KeyboardInterrupt:
        sys.exit(130)
    print(f"tokenizer: {spec}")


if __name__ == "__main__":
    main()
