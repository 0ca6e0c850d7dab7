"""The paper in small: DS-MoE, dense and sparse-trained models of a size that a CPU can train, on equal terms.

    python -m benchmarks.paper_in_small [--study FILE] [--folder DIR] [--results DIR] [--processes N] [--runs RUN ...]

Makes the data, then the runs that are not done, then the document. May be stopped at any moment; the same command goes
on. `make paper-small` is this.
"""

import sys
from pathlib import Path

from jsonargparse import ArgumentParser
from jsonargparse.typing import PositiveInt

from benchmarks.paper_in_small.data import make_data
from benchmarks.paper_in_small.runner import Runner, processes_of_this_machine
from benchmarks.paper_in_small.study import FOLDER, HERE, RESULTS, read_study
from dsmoe_megatron.errors import DSMoEError, exit_with


def build_parser() -> ArgumentParser:
    """The command line."""
    parser = ArgumentParser(prog="python -m benchmarks.paper_in_small", description="Make the study, or go on with it")
    parser.add_argument("--study", type=Path, default=HERE / "study.yaml", metavar="FILE", help="the runs to make")
    parser.add_argument("--folder", type=Path, default=FOLDER, metavar="DIR", help="corpus, data, run folders")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="what is kept of finished runs")
    parser.add_argument(
        "--processes", type=PositiveInt, default=processes_of_this_machine(), help="runs at a time, a core each"
    )
    parser.add_argument(
        "--runs", type=str, nargs="+", metavar="RUN", help="these alone, in this order: name of the entry, _seed_, seed"
    )
    return parser


def main() -> None:
    parser = build_parser()
    arguments = parser.parse_args()
    try:
        study = read_study(arguments.study)
        if arguments.runs:
            study = study.only(arguments.runs)
        data_recipe = make_data(arguments.folder, study)
        is_done = Runner(study, arguments.folder, data_recipe, arguments.results).make(arguments.processes)
    except DSMoEError as error:
        exit_with(error, parser.prog)
    if not is_done:
        sys.exit("stopped; the same command goes on")


if __name__ == "__main__":
    main()
