"""Workers end with torchrun, however early it is gone."""

import subprocess
import sys
from pathlib import Path

# a child that looks for its parent only when it has none any more
ORPHAN = """
import os, sys, time
if os.fork():
    os._exit(0)
while os.getppid() != 1:
    time.sleep(0.01)
from dsmoe_megatron.runtime.processes import end_with_parent
print("alone", flush=True)
end_with_parent()
print("lives on", flush=True)
"""


def printed(environment: dict[str, str]) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", ORPHAN], capture_output=True, text=True, check=True, env=environment, timeout=60
    )
    return done.stdout.split("\n")[:-1]


def test_a_worker_that_starts_after_torchrun_has_ended_ends_too() -> None:
    environment = {"PYTHONPATH": str(Path(__file__).resolve().parents[2])}

    assert printed({**environment, "TORCHELASTIC_RUN_ID": "none"}) == ["alone"]
    assert printed(environment) == ["alone", "lives on"]  # a service, which nobody has started
