"""Whether the study's models copy from their context: the loss on a passage, and on the same passage read again.

    python -m benchmarks.paper_in_small.copying [--study FILE] [--folder DIR] [--results DIR]

A transformer learns rather suddenly to look up what followed a token before (induction heads, arXiv 2209.11895), and
its loss falls when it does. Models that are compared after few tokens may stand on either side of that. Each finished
run whose checkpoint is in the folder is measured, and its figures are put beside its other results.
"""

import json
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from jsonargparse import ArgumentParser
from torch import Tensor
from tqdm import tqdm
from transformers.utils.logging import disable_progress_bar

from benchmarks.paper_in_small.study import COPYING, EVALUATION, FOLDER, HERE, RESULTS, Study, read_study
from data_tools.dataset_reader import map_tokens, read_index
from data_tools.indexed_dataset import write_whole
from dsmoe_megatron.errors import DataError, DSMoEError, exit_with
from dsmoe_megatron.evaluation.loading import LoadedModel, load_model
from dsmoe_megatron.run_folder import find_checkpoint

PASSAGES, LENGTH = 96, 120  # twice the length must fit into the models' sequence
AT_ONCE = 16  # passages
WITHOUT_CONTEXT = 20  # first tokens of a passage, which are not scored in either reading


def measure_runs(study: Study, folder: Path, results: Path) -> None:
    """Measure what has results and a checkpoint, and has not been measured.

    Args:
        study: the runs.
        folder: of the study, with its data and run folders.
        results: folder of the results; gets a file per run.
    """
    passages_PL = held_out_passages(folder / "data" / "text_validation")
    runs = [
        run
        for run in study.runs
        if (results / run.name / EVALUATION).is_file()
        and not (results / run.name / COPYING).is_file()
        and find_checkpoint(folder / "runs" / run.name) is not None
    ]
    for run in tqdm(runs, unit=" runs", disable=None):
        figures = read_twice(load_model(folder / "runs" / run.name), passages_PL)
        write_whole(results / run.name / COPYING, (json.dumps(figures, indent=2) + "\n").encode())


def held_out_passages(prefix: Path) -> Tensor:
    """Runs of tokens at equal distances, [P, L].

    Raises:
        DataError: the dataset is missing, damaged or too small.
    """
    tokens = map_tokens(str(prefix), read_index(str(prefix)).dtype)
    if len(tokens) < LENGTH + PASSAGES:
        raise DataError(f"{prefix}: has {len(tokens)} tokens, too few for {PASSAGES} passages of {LENGTH}")
    distance = (len(tokens) - LENGTH) // PASSAGES
    return torch.stack(
        [
            torch.from_numpy(tokens[start : start + LENGTH].astype("int64"))
            for start in range(0, PASSAGES * distance, distance)
        ]
    )


@torch.inference_mode()
def read_twice(loaded: LoadedModel, passages_PL: Tensor) -> dict[str, Any]:
    """Mean loss of the same tokens in the first and the second reading [nats per token], as the model was trained."""
    loaded.set_policy(loaded.reference_policy)
    length = passages_PL.shape[1]
    parts = []
    for part_PL in passages_PL.to(loaded.device).split(AT_ONCE):
        twice_PT = torch.cat([part_PL, part_PL], dim=1)
        logits_PVT = loaded.model(twice_PT[:, :-1]).logits.float().transpose(1, 2)
        parts.append(F.cross_entropy(logits_PVT, twice_PT[:, 1:], reduction="none"))
    losses_PT = torch.cat(parts)  # of the tokens from the second on
    return {
        "passages": len(passages_PL),
        "first_reading": float(losses_PT[:, WITHOUT_CONTEXT : length - 1].mean()),
        "second_reading": float(losses_PT[:, length + WITHOUT_CONTEXT :].mean()),
    }


def main() -> None:
    parser = ArgumentParser(prog="python -m benchmarks.paper_in_small.copying", description="Copying from the context")
    parser.add_argument("--study", type=Path, default=HERE / "study.yaml", metavar="FILE", help="the runs")
    parser.add_argument("--folder", type=Path, default=FOLDER, metavar="DIR", help="of the study")
    parser.add_argument("--results", type=Path, default=RESULTS, metavar="DIR", help="of its finished runs")
    arguments = parser.parse_args()
    disable_progress_bar()  # of each model's loading
    try:
        measure_runs(read_study(arguments.study), arguments.folder, arguments.results)
    except DSMoEError as error:
        exit_with(error, parser.prog)


if __name__ == "__main__":
    main()
