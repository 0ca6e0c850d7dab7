"""The figures of a machine, from the table beside this file or from one of the user's."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml

from dsmoe_megatron.errors import ConfigurationError

TABLE = Path(__file__).with_name("hardware.yaml")


@dataclass(frozen=True)
class Assumptions:
    """What no datasheet says; see the head of hardware.yaml.

    Attributes:
        matmul_efficiency, attention_efficiency, memory_efficiency, communication_efficiency: shares, 0 to 1.
        collective_latency, layer_overhead: seconds.
        memory_reserve: bytes.
    """

    matmul_efficiency: float
    attention_efficiency: float
    memory_efficiency: float
    communication_efficiency: float
    collective_latency: float
    layer_overhead: float
    memory_reserve: float


@dataclass(frozen=True)
class Hardware:
    """One kind of GPU and how it is connected.

    Attributes:
        name: key of the table.
        description: in words.
        flops: peak of dense matrix products by precision (bf16, fp32) [operations / s].
        memory: of one GPU [bytes].
        memory_bandwidth: of one GPU [bytes / s].
        node_bandwidth: of one GPU to the others of its node, one direction [bytes / s].
        network_bandwidth: of one GPU out of its node, one direction [bytes / s].
        gpus_per_node: GPUs that share a node.
        sources: of the figures above.
        assumptions: the rest.
        device_names: what CUDA calls devices with these peaks; a row may leave it out.
    """

    name: str
    description: str
    flops: dict[str, float]
    memory: float
    memory_bandwidth: float
    node_bandwidth: float
    network_bandwidth: float
    gpus_per_node: int
    sources: tuple[str, ...]
    assumptions: Assumptions
    device_names: tuple[str, ...] = ()

    @property
    def usable_memory(self) -> float:
        return self.memory - self.assumptions.memory_reserve

    def peak(self, precision: str) -> float:
        """Operations per second.

        Raises:
            ConfigurationError: the table has no figure for this precision.
        """
        if precision not in self.flops:
            rule = f"{self.name} has no peak for it, only for {', '.join(self.flops)}; set one of these"
            raise ConfigurationError("train.precision", precision, rule)
        return self.flops[precision]


def load_hardware(name: str, file: str | None = None) -> Hardware:
    """One row.

    Args:
        name: of the row.
        file: rows of the user's own, which win over the table's.

    Raises:
        ConfigurationError: no such file or row, or a row with missing, unknown or impossible figures.
    """
    rows = _rows(TABLE)
    if file is not None:
        rows |= _rows(Path(file))
    if name not in rows:
        raise ConfigurationError("gpu", name, f"unknown; there is {', '.join(rows)}, and --hardware FILE adds your own")
    return _hardware(name, rows[name])


def peak_of_device(device_name: str, precision: str) -> float | None:
    """Peak of dense matrix products of a device of the table [operations / s]; None of one that is not in it.

    Args:
        device_name: as torch.cuda.get_device_name has it.
        precision: bf16 or fp32.
    """
    for name, row in _rows(TABLE).items():
        hardware = _hardware(name, row)
        if device_name in hardware.device_names:
            return hardware.flops.get(precision)
    return None


def _rows(path: Path) -> dict[str, Any]:
    try:
        rows = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigurationError("hardware", str(path), f"cannot be read: {reason}") from None
    if not isinstance(rows, dict):
        raise ConfigurationError("hardware", str(path), "expected rows of figures, as in planning/hardware.yaml")
    return rows


def _hardware(name: str, row: Any) -> Hardware:
    known = [field.name for field in fields(Hardware) if field.name not in ("name", "device_names")]
    _check_keys(row, known, name, optional="device_names")
    _check_keys(row["assumptions"], [field.name for field in fields(Assumptions)], f"{name}.assumptions")
    if not isinstance(row["flops"], dict) or not row["flops"]:
        raise ConfigurationError(f"hardware.{name}.flops", row["flops"], "expected {bf16: ..., fp32: ...}")
    return Hardware(
        name=name,
        description=str(row["description"]),
        flops={precision: _figure(value, f"{name}.flops.{precision}") for precision, value in row["flops"].items()},
        **{key: _figure(row[key], f"{name}.{key}") for key in known[2:6]},
        gpus_per_node=int(_figure(row["gpus_per_node"], f"{name}.gpus_per_node")),
        sources=tuple(map(str, row["sources"])),
        assumptions=Assumptions(
            **{key: _figure(value, f"{name}.assumptions.{key}") for key, value in row["assumptions"].items()}
        ),
        device_names=tuple(map(str, row.get("device_names", []))),
    )


def _check_keys(row: Any, known: list[str], key: str, optional: str | None = None) -> None:
    found = sorted(name for name in row if name != optional) if isinstance(row, dict) else row
    if found != sorted(known):
        raise ConfigurationError(f"hardware.{key}", found, f"expected exactly {', '.join(known)}")


def _figure(value: Any, key: str) -> float:
    try:
        figure = float(value)  # YAML 1.1 reads 80e9 as text
    except (TypeError, ValueError):
        figure = math.nan
    if isinstance(value, bool) or not 0 < figure < math.inf:
        raise ConfigurationError(f"hardware.{key}", value, "must be a number above 0")
    if key.endswith("_efficiency") and figure > 1:
        raise ConfigurationError(f"hardware.{key}", value, "must not be above 1")
    return figure
