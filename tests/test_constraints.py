"""constraints.txt against the packages that are installed here, whose own metadata says which Python they need."""

import importlib.metadata
from pathlib import Path

from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
OLDEST = "3.10"  # requires-python of pyproject.toml


def holds_on_the_oldest(marker: Marker | None) -> bool:
    return marker is None or marker.evaluate({"python_version": OLDEST, "python_full_version": f"{OLDEST}.0"})


def test_no_pin_keeps_the_oldest_python_from_installing() -> None:
    lines = [line for line in CONSTRAINTS.read_text().splitlines() if line and not line.startswith("#")]
    checked = 0
    for requirement in map(Requirement, lines):
        try:
            metadata = importlib.metadata.metadata(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            continue
        checked += 1
        if holds_on_the_oldest(requirement.marker):
            needed = str(metadata.json.get("requires_python", ""))
            assert SpecifierSet(needed).contains(f"{OLDEST}.99"), f"{requirement} wants Python {needed}"

    assert checked > 100
