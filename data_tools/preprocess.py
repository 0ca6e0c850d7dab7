"""Tokenise raw text and code into a dataset that training reads.

    python data_tools/preprocess.py --input 'corpus/*.jsonl.zst' --output-prefix data/corpus --tokenizer tokenizer.model

Writes PREFIX.bin and PREFIX.idx (Megatron's indexed dataset, one sequence per document, the end-of-document token last)
and then PREFIX.manifest.json, which says what they were made of. A dataset without its manifest is not whole.
The documents keep the order of the input, and the files do not depend on the number of workers. A run that was stopped,
however it was, goes on where it was when the same command is given again.
"""

import io
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import Any

from jsonargparse import ArgumentParser, Namespace
from jsonargparse.typing import ClosedUnitInterval, PositiveInt

from data_tools.assembling import Assembly
from data_tools.documents import DocumentRules
from data_tools.executors import SlurmJob, prepare_workers, queued_jobs, run_locally, submit_to_slurm
from data_tools.planned_run import PlannedRun
from data_tools.sources import DEFAULT_EXTENSIONS, MAX_FILE_BYTES
from dsmoe_megatron.errors import ConfigurationError, DataError, DSMoEError, exit_with


def preprocess(
    inputs: list[str],
    output_prefix: str,
    tokenizer_spec: str,
    workers: int = 1,
    rules: DocumentRules | None = None,
    max_malformed: float = 0.01,
    encoder: str = "auto",
    overwrite: bool = False,
    slurm: SlurmJob | None = None,
) -> list[dict[str, Any]]:
    """Make the dataset, unless it is there already. The arguments are those of the command line.

    Returns:
        The manifests: one, or one of each set. None yet where jobs of SLURM make them.

    Raises:
        ConfigurationError: two rules contradict each other.
        DataError: the input, or what is at the output already, cannot be used.
        TokenizerError: the tokenizer cannot be used.
    """
    start = time.perf_counter()
    if workers > 1 and slurm is None:
        prepare_workers()
    run = PlannedRun(inputs, output_prefix, tokenizer_spec, rules or DocumentRules())
    with _system_faults_named(output_prefix):
        if not overwrite and (existing := run.existing()):
            print(f"{output_prefix}: made from this input already, nothing to do (--overwrite makes it again)")
            return existing
        if jobs := queued_jobs(output_prefix):  # before anything of theirs is touched
            raise DataError(
                f"{output_prefix}: job {' and '.join(jobs)} of this run is in SLURM's queue: wait, or scancel it"
            )
        with run.begun(workers, max_malformed, encoder, overwrite):
            if slurm is not None:
                _submit(output_prefix, workers, slurm)
                return []
            with Assembly(output_prefix) as assembly:
                assembly.follow()
                run_locally(output_prefix, workers, sum(source.bytes for source in run.sources))
                datasets = assembly.finish()
    for prefix, manifest in datasets.items():
        _print_summary(prefix, manifest)
    _print_speed(list(datasets.values()), time.perf_counter() - start)
    return list(datasets.values())


@contextmanager
def _system_faults_named(prefix: str) -> Iterator[None]:
    """A full disk or a folder that cannot be written is a fault that the user can mend."""
    try:
        yield
    except OSError as error:
        raise DataError(f"{error.filename or prefix}: {error.strerror or error}") from error


def _submit(prefix: str, workers: int, slurm: SlurmJob) -> None:
    jobs = submit_to_slurm(prefix, workers, slurm)
    print(f"{prefix}: submitted job {' and '.join(jobs)}; the last one writes {prefix}.manifest.json when all is done")
    print(f"the same command, given when they have left the queue, goes on with what failed; logs: {prefix}.slurm_logs")


def _print_summary(prefix: str, manifest: dict[str, Any]) -> None:
    text_bytes, tokens = manifest["text_bytes"], manifest["tokens"]
    print(
        f"{prefix}: {manifest['documents']:,} documents, {text_bytes / 1e6:.1f} MB of text, {tokens:,} tokens"
        f" ({text_bytes / max(tokens, 1):.2f} bytes per token)"
    )
    counts = manifest["skipped"] | {
        "invalid UTF-8 replaced": manifest["invalid_utf8_replaced"],
        "parts cut off long documents": manifest["long_documents_split"],
    }
    for reason, count in counts.items():
        if count:
            print(f"  {reason.replace('_', ' ')}: {count:,}")


def _print_speed(manifests: list[dict[str, Any]], seconds: float) -> None:
    for complaint in manifests[0]["malformed_first"]:
        print(f"left out: {' '.join(complaint.split())}", file=sys.stderr)
    megabytes = sum(manifest["text_bytes"] for manifest in manifests) / 1e6
    print(f"{seconds:.1f} s, {megabytes / seconds:.1f} MB/s, encoded with {manifests[0]['encoder']}")


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="preprocess.py", description="Raw text and code -> PREFIX.bin, .idx, .manifest.json")
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="GLOB",
        help=".jsonl, .jsonl.gz, .jsonl.zst and .parquet files, folders of source files, URLs of such files (s3://...),"
        " hf:NAME[:CONFIG[:SPLIT]]; their order is the dataset's",
    )
    parser.add_argument("--output-prefix", type=str, required=True, metavar="PREFIX", help="path of the dataset")
    parser.add_argument(
        "--tokenizer",
        type=str,
        required=True,
        metavar="SPEC",
        help="a sentencepiece .model file, a folder with a Hugging Face tokenizer, its name on the hub, or `codegen`",
    )
    parser.add_argument("--workers", type=PositiveInt, default=1, help="processes that tokenise")
    parser.add_argument(
        "--encoder",
        choices=["auto", "reference"],
        default="auto",
        help="auto: gigatoken where it gives the ids of the tokenizer's own library; reference: that library",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace a dataset or an unfinished run")
    add_rules(parser)
    add_slurm(parser)
    return parser


def add_rules(parser: ArgumentParser) -> None:
    """Options of how records become documents."""
    parser.add_argument("--text-key", type=str, default="text", help="key, or column, of the text")
    parser.add_argument(
        "--extensions", nargs="+", default=list(DEFAULT_EXTENSIONS), metavar=".EXT", help="files taken from folders"
    )
    parser.add_argument(
        "--max-file-bytes", type=PositiveInt, default=MAX_FILE_BYTES, help="larger files of folders are left out"
    )
    parser.add_argument(
        "--generated-files",
        choices=["skip", "keep"],
        default="skip",
        help="files of folders that say so, or have lines longer than people write",
    )
    parser.add_argument(
        "--special-tokens",
        choices=["ordinary", "parse"],
        default="ordinary",
        help="special tokens spelled out in a text are ordinary text, or parsed",
    )
    parser.add_argument(
        "--end-of-document",
        type=str,
        default="append",
        metavar="append|none|TOKEN",
        help="after each document: the tokenizer's own token, nothing, or this token",
    )
    parser.add_argument(
        "--empty-documents", choices=["skip", "keep"], default="skip", help="documents without any character"
    )
    parser.add_argument(
        "--max-document-bytes", type=PositiveInt, default=None, help="longer documents are split or left out [bytes]"
    )
    parser.add_argument("--long-documents", choices=["split", "skip"], default="split", help="which of the two")
    parser.add_argument(
        "--invalid-utf8", choices=["replace", "skip", "stop"], default="replace", help="documents that are no UTF-8"
    )
    parser.add_argument(
        "--max-malformed", type=ClosedUnitInterval, default=0.01, help="share of malformed records above which to stop"
    )
    parser.add_argument(
        "--damaged-files",
        choices=["stop", "keep-readable"],
        default="stop",
        help="files that cannot be read to their end: stop there, or keep what can be read",
    )
    parser.add_argument("--sets", nargs="+", default=[], metavar="NAME", help="keep these sets alone")
    parser.add_argument("--one-dataset-per-set", action="store_true", help="make PREFIX_NAME of each set")
    parser.add_argument(
        "--set-key", type=str, default="meta.pile_set_name", help="key of the name of a document's set, below others"
    )


def add_slurm(parser: ArgumentParser) -> None:
    """Options of where to run."""
    parser.add_argument("--executor", choices=["local", "slurm"], default="local", help="where to run")
    parser.add_argument("--slurm-partition", type=str, default=None, metavar="NAME", help="partition to run in")
    parser.add_argument("--slurm-time", type=str, default="24:00:00", metavar="TIME", help="limit of each task")
    parser.add_argument("--slurm-memory-gb", type=PositiveInt, default=2, help="memory of each task [GB]")
    parser.add_argument(
        "--slurm-arguments", type=dict[str, str], default={}, metavar="JSON", help='more of sbatch: {"account": "x"}'
    )


def rules_of(arguments: Namespace) -> DocumentRules:
    """The rules that the command line tells."""
    return DocumentRules.from_options({each.name: getattr(arguments, each.name) for each in fields(DocumentRules)})


def slurm_of(arguments: Namespace) -> SlurmJob | None:
    """What SLURM is to be asked for, if it is to run the work."""
    if arguments.executor == "local":
        return None
    if arguments.slurm_partition is None:
        raise ConfigurationError("--slurm-partition", None, "--executor slurm needs one; sinfo lists them")
    return SlurmJob(
        arguments.slurm_partition, arguments.slurm_time, arguments.slurm_memory_gb, dict(arguments.slurm_arguments)
    )


def main() -> None:
    arguments = build_parser().parse_args()
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="surrogateescape")  # a path may have bytes that are no UTF-8
    try:
        preprocess(
            inputs=arguments.input,
            output_prefix=arguments.output_prefix,
            tokenizer_spec=arguments.tokenizer,
            workers=arguments.workers,
            rules=rules_of(arguments),
            max_malformed=arguments.max_malformed,
            encoder=arguments.encoder,
            overwrite=arguments.overwrite,
            slurm=slurm_of(arguments),
        )
    except DSMoEError as error:
        exit_with(error, "preprocess")
    except KeyboardInterrupt:
        print("preprocess: stopped; the same command goes on from here", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
