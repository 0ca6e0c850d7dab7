"""Parts of saved tensors are read right, whatever pieces they lie in and however alike these look."""

from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dsmoe_megatron.checkpoint_reading import CheckpointReader
from dsmoe_megatron.errors import CheckpointError

TENSORS = {
    "wide": torch.arange(200.0).view(10, 20),
    # archives of the same length: other shape, other strides, other type, and one like the first
    "tall": torch.arange(200.0, 400.0).view(20, 10),
    "turned": torch.arange(400.0, 600.0).view(20, 10).t(),
    "whole": torch.arange(200, dtype=torch.int32).view(10, 20),
    "alike": torch.arange(600.0, 800.0).view(10, 20),
}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    dcp.save(TENSORS, checkpoint_id=tmp_path, no_dist=True)
    return tmp_path


def test_every_tensor_and_every_part(folder: Path) -> None:
    reader = CheckpointReader(folder)
    for name, expected in [*TENSORS.items(), *TENSORS.items()]:  # in another order of what is known already
        whole = torch.empty(expected.shape, dtype=expected.dtype)
        part = torch.empty((3, 4), dtype=torch.float64)

        reader.read_into(whole, name, (0, 0))
        reader.read_into(part, name, (5, 6))

        assert whole.equal(expected)
        assert part.equal(expected[5:8, 6:10].double())


def test_what_is_missing_or_too_large_is_refused(folder: Path) -> None:
    reader = CheckpointReader(folder)

    for name, shape in (("another", (2, 2)), ("wide", (11, 20))):
        with pytest.raises(CheckpointError, match=name):
            reader.read_into(torch.empty(shape), name, (0, 0))
