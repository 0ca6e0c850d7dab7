"""The cluster that the tests of this folder share."""

from collections.abc import Iterator

import pytest

from tests.requirements import lacks
from tests.slurm.cluster import SlurmCluster, reason_against_a_cluster


@pytest.fixture(scope="session")
def slurm_programs() -> None:
    """Skip where no cluster can be made; fail there in continuous integration, where a skip would go unseen."""
    reason = reason_against_a_cluster()
    if reason is not None:
        lacks(reason)


@pytest.fixture(scope="session")
def slurm_cluster(slurm_programs: None) -> Iterator[SlurmCluster]:  # noqa: ARG001
    """Two nodes of 4 cores and 2 GPUs that only SLURM sees. A test leaves no job behind and no node down."""
    with SlurmCluster(nodes=2, cpus_per_node=4, gpus_per_node=2) as cluster:
        yield cluster
