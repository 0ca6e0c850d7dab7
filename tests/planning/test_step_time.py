"""Time per step: what must follow from the figures of a machine, of an ideal one where it is reckoned by hand."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsmoe_megatron.config import Config, ParallelConfig
from dsmoe_megatron.config_parsing import load_config
from dsmoe_megatron.config_rules import check_config
from dsmoe_megatron.errors import ConfigurationError
from dsmoe_megatron.planning.flops import training_flops
from dsmoe_megatron.planning.hardware import Assumptions, Hardware, load_hardware
from dsmoe_megatron.planning.step_time import link_bandwidth, step_time
from dsmoe_megatron.planning.traffic import Group, step_traffic

ROOT = Path(__file__).resolve().parents[2]
# computes at 1 PFLOP/s; memory, links and host cost nothing
IDEAL = Hardware(
    name="ideal",
    description="a machine for reckoning",
    flops={"bf16": 1e15, "fp32": 1e15},
    memory=1e12,
    memory_bandwidth=1e30,
    node_bandwidth=1e30,
    network_bandwidth=1e30,
    gpus_per_node=8,
    sources=(),
    assumptions=Assumptions(1.0, 1.0, 1.0, 1.0, 1e-30, 1e-30, 1.0),
)


def config(recompute: str = "none", micro_batch_size: int = 1, **parallel: Any) -> Config:
    recipe = load_config(ROOT / "launchers" / "recipes" / "dsmoe_6b.yaml")
    train = replace(recipe.train, micro_batch_size=micro_batch_size)
    train.recompute = recompute  # type: ignore[assignment]
    changed = replace(recipe, parallel=ParallelConfig(**parallel), train=train)
    check_config(changed, 32)
    return changed


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
@pytest.mark.parametrize("parallel", [{}, {"tensor": 4, "sequence": True}, {"context": 4}, {"expert": 8}], ids=str)
def test_an_ideal_machine_takes_the_counted_operations(recompute: str, parallel: dict[str, Any]) -> None:
    recipe = config(recompute, **parallel)

    time = step_time(recipe, 32, IDEAL)

    operations = training_flops(recipe).machine * time.tokens
    assert time.total == pytest.approx(operations / (32 * 1e15), rel=1e-6)
    assert time.model_flops_utilisation == pytest.approx(training_flops(recipe).model / training_flops(recipe).machine)
    assert time.gpu_hours == pytest.approx(time.days * 24 * 32)
    assert time.tokens_per_second == pytest.approx(1024 * 2048 / time.total)


def test_the_bubble_is_that_of_the_schedules() -> None:
    """1F1B waits (stages - 1) / micro-batches of the time, interleaving a chunk's share of it."""
    even = replace(config(pipeline=4), model=replace(config().model, vocab_size=1, vocab_size_multiple=1))
    micro_batches = 1024 // 8

    plain = step_time(even, 32, IDEAL)
    interleaved = step_time(replace(even, parallel=ParallelConfig(pipeline=4, virtual_pipeline=3)), 32, IDEAL)

    assert plain.bubble / (plain.total - plain.bubble) == pytest.approx(3 / micro_batches, rel=1e-3)
    assert interleaved.bubble == pytest.approx(plain.bubble / 3)


def test_lighter_outer_stages_even_out_the_logits() -> None:
    even = step_time(config(pipeline=4), 32, IDEAL)
    lighter = step_time(config(pipeline=4, first_stage_layers=9, last_stage_layers=7, micro_batch_size=1), 32, IDEAL)

    assert lighter.total < even.total


def test_replicated_routers_are_computed_by_every_tensor_parallel_rank() -> None:
    split = step_time(config(tensor=4, sequence=True), 32, IDEAL)
    replicated = step_time(config(tensor=4), 32, IDEAL)

    assert replicated.routers == pytest.approx(4 * split.routers)


def test_communication_is_traffic_over_bandwidth_and_overlap_hides_that_of_data() -> None:
    slow_links = replace(IDEAL, node_bandwidth=1e9, network_bandwidth=1e8)
    recipe = config(tensor=8, sequence=True)

    time = step_time(recipe, 32, slow_links)

    sent = {"sequence": 0.0, "data": 0.0}
    for transfer in step_traffic(recipe, 32, 0):
        sent[transfer.parallelism] += transfer.sent
    # tensor-parallel ranks share a node; of a data-parallel group each node has one rank
    assert time.communication == pytest.approx({"sequence": sent["sequence"] / 1e9, "data": sent["data"] / 1e8})
    overlapped = step_time(replace(recipe, parallel=replace(recipe.parallel, overlap=True)), 32, slow_links)
    assert 0 < overlapped.communication["data"] < time.communication["data"]
    assert overlapped.communication["sequence"] == time.communication["sequence"]


@pytest.mark.parametrize(
    ("size", "stride", "bandwidth"),
    [(8, 1, 450e9), (4, 2, 450e9), (32, 1, 400e9), (4, 8, 50e9), (8, 4, 100e9), (2, 16, 50e9)],
)
def test_a_ring_is_as_fast_as_the_ports_of_its_ranks_in_a_node(size: int, stride: int, bandwidth: float) -> None:
    assert link_bandwidth(Group(size, stride), load_hardware("h100")) == bandwidth


def test_narrow_products_are_bound_by_memory() -> None:
    """One token's products read every weight: then the time is that of the bytes."""
    narrow = config(micro_batch_size=1)
    narrow.train.sequence_length, narrow.train.global_batch_size = 1, 32
    bandwidth = 1e12

    time = step_time(narrow, 32, replace(IDEAL, memory_bandwidth=bandwidth))

    weights = 36 * (4096 * 4096 * 2 + 4096 * 2 * 4 * 128 + 2 * 4096 * 16384)
    assert time.matmul > 3 * 2 * weights / bandwidth
    assert time.matmul == pytest.approx(3 * 2 * weights / bandwidth, rel=0.01)


@pytest.mark.parametrize("name", ["h100", "h200", "a100"])
def test_datasheet_rows_name_their_sources(name: str) -> None:
    hardware = load_hardware(name)

    assert all(source.startswith("https://") and "nvidia.com" in source for source in hardware.sources)
    assert 0.3 < step_time(config(), 32, hardware).model_flops_utilisation < 0.6


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ("mine: {flops: {bf16: 1}}", "hardware.mine = ['flops']: expected exactly description, flops, memory,"),
        ("[]", "expected rows of figures"),
        ("a: {b: [", "cannot be read"),
    ],
)
def test_a_wrong_hardware_file_is_said_in_a_line(tmp_path: Path, rows: str, message: str) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text(rows)

    with pytest.raises(ConfigurationError) as raised:
        load_hardware("mine", str(file))

    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


def test_rows_of_a_file_win_and_impossible_figures_are_refused(tmp_path: Path) -> None:
    table = (ROOT / "dsmoe_megatron" / "planning" / "hardware.yaml").read_text("utf-8")
    file = tmp_path / "mine.yaml"
    file.write_text(table.replace("memory: 80e9", "memory: 96e9"))
    assert load_hardware("h100", str(file)).memory == 96e9

    file.write_text(table.replace("matmul_efficiency: 0.7\n", "matmul_efficiency: 70\n"))
    with pytest.raises(ConfigurationError, match=r"h100.assumptions.matmul_efficiency = 70: must not be above 1"):
        load_hardware("h100", str(file))
    file.write_text(table.replace("memory: 80e9", "memory: none"))
    with pytest.raises(ConfigurationError, match=r"h100.memory = 'none': must be a number above 0"):
        load_hardware("h100", str(file))


def test_a_precision_without_a_figure_is_refused() -> None:
    with pytest.raises(ConfigurationError, match=r"train.precision = 'bf16': cpu has no peak for it, only for fp32"):
        step_time(config(), 32, load_hardware("cpu"))
