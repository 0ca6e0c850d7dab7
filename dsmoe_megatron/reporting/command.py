"""The verb `report`: one self-contained HTML page of one or several runs."""

import argparse
import importlib.util
from collections.abc import Sequence
from pathlib import Path

from dsmoe_megatron.errors import EnvironmentNotSupportedError
from dsmoe_megatron.output_file import check_output, write_output
from dsmoe_megatron.reporting.records import read_runs


def build_parser(program: str = "dsmoe-megatron report") -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog=program, description="Draw the pictures of one or several runs into one HTML page.", allow_abbrev=False
    )
    parser.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="run folders, or folders of them")
    parser.add_argument("--output", type=Path, required=True, metavar="FILE", help="HTML page to write")
    parser.add_argument(
        "--evaluation",
        type=Path,
        nargs="+",
        default=[],
        metavar="FILE",
        help="results of `evaluate --output` besides the evaluation*.json of the run folders",
    )
    return parser


def report(arguments: Sequence[str], program: str = "dsmoe-megatron report") -> None:
    """Run the verb.

    Raises:
        DSMoEError: see the message; the page is whole or not there.
    """
    options = build_parser(program).parse_args(arguments)
    if importlib.util.find_spec("matplotlib") is None:
        raise EnvironmentNotSupportedError("report needs matplotlib: pip install '.[report]'")
    check_output(options.output, "--output")
    runs = read_runs(options.runs, options.evaluation)

    from dsmoe_megatron.reporting.page import page

    text = page(runs)
    write_output(options.output, text, "--output")
    for run in runs:
        for remark in run.remarks:
            print(f"{run.name}: {remark}")
    print(f"{options.output}: {len(runs)} run{'s' * (len(runs) > 1)}, {len(text) / 1e6:.1f} MB")
