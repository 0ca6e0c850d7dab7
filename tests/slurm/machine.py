"""An emulated machine: host name, processes, mounts and network of its own on the files of this one.

Process 1 of the machine only holds the namespaces. When it dies, the kernel kills every process of the machine before
the death can be waited for, and the machine's end of its cable goes with it. Process 1 dies with `unshare`, which dies
with the thread that started it (PR_SET_PDEATHSIG), so that nothing outlives a test run, however that ends.
"""

import contextlib
import os
import signal
import subprocess
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

END_WITH_PARENT = ("setpriv", "--pdeathsig", "KILL")
UNSHARE = ("unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child")
# Arguments: host name, file for /etc/hosts. Its one line of output is the number by which the starter knows process 1,
# read while /proc shows the starter's numbers. A shell that waits also reaps the orphans that process 1 inherits.
PROCESS_ONE = """
read -r number _ < /proc/self/stat
set -e
mount -t proc proc /proc
mount --bind "$2" /etc/hosts
hostname "$1"
ip link set lo up
echo "$number"
exec > /dev/null 2>&1
sleep infinity &
wait
"""
PROGRAMS = ("bash", "env", "hostname", "ip", "mount", "nsenter", "setpriv", "sleep", "unshare")
"""What an emulated machine is made with."""


class ClusterError(RuntimeError):
    """The cluster did not do what it was told to."""


@dataclass(frozen=True)
class Machine:
    name: str
    holder: subprocess.Popen[str]
    """`unshare`, the parent of process 1."""
    process_one: int

    def command(self, words: Sequence[str], cwd: Path, variables: Mapping[str, str]) -> list[str]:
        """The command line that runs `words` on this machine; they end with the process that it is started as."""
        return [
            *("nsenter", "--target", str(self.process_one), "--net", "--mount", "--uts", "--pid", "--root", "--"),
            # not an option of nsenter: before util-linux 2.38 that named a folder of the mounts that were left
            *("env", f"--chdir={cwd}", *(f"{name}={value}" for name, value in variables.items())),
            *END_WITH_PARENT,
            *words,
        ]

    def is_running(self) -> bool:
        return self.holder.poll() is None

    def kill(self) -> None:
        """End the machine as a power cut does; on return none of its processes is left."""
        if self.is_running():
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.process_one, signal.SIGKILL)
        self.holder.wait()


def start_machine(name: str, hosts: Path, environment: Mapping[str, str]) -> Machine:
    """Start a machine without a network but its loopback.

    Raises:
        ClusterError: the machine could not be made, as where the kernel does not permit namespaces.
    """
    holder = subprocess.Popen(
        [*END_WITH_PARENT, *UNSHARE, "bash", "-c", PROCESS_ONE, "process_one", name, str(hosts)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=dict(environment),
        start_new_session=True,  # an interrupt from the keyboard is the test run's to handle
    )
    try:
        return Machine(name, holder, _number_of_process_one(name, holder))
    except BaseException:
        holder.kill()
        holder.wait()
        raise


def _number_of_process_one(name: str, holder: subprocess.Popen[str]) -> int:
    assert holder.stdout is not None
    with holder.stdout as output:
        answer = output.readline()
        if not answer.strip().isdigit():
            raise ClusterError(f"machine {name} did not start: {(answer + output.read()).strip()}")
    return int(answer)


def make_switch(machine: Machine, address: str) -> None:
    """Make a switch on `machine` to which others can be connected, and give it an address there."""
    _in_network_of(machine, "link", "add", "switch", "type", "bridge")
    _in_network_of(machine, "address", "add", f"{address}/24", "dev", "switch")
    _in_network_of(machine, "link", "set", "switch", "up")


def connect(machine: Machine, address: str, switch: Machine) -> None:
    """Lay a cable from `machine` to the switch."""
    # A machine that comes back keeps its hardware address: its neighbours remember that for a while.
    hardware_address = "02:00:" + ":".join(f"{int(part):02x}" for part in address.split("."))
    _in_network_of(
        *(switch, "link", "add", _port_of(machine), "type", "veth", "peer", "name", "eth0"),
        *("address", hardware_address, "netns", str(machine.process_one)),
    )
    _in_network_of(switch, "link", "set", _port_of(machine), "master", "switch", "up")
    _in_network_of(machine, "address", "add", f"{address}/24", "dev", "eth0")
    _in_network_of(machine, "link", "set", "eth0", "up")


def set_cable(machine: Machine, switch: Machine, up: bool) -> None:
    """Plug the machine's cable into the switch, or pull it out."""
    _in_network_of(switch, "link", "set", _port_of(machine), "up" if up else "down")


def _port_of(machine: Machine) -> str:
    """The switch's end of the cable; a killed machine's end goes late, so one that follows needs another name."""
    return f"port{machine.process_one}"


def _in_network_of(machine: Machine, *words: str) -> None:
    # the other namespaces stay the starter's, in whose numbers process 1 of the other machine is named
    command = ["nsenter", "--target", str(machine.process_one), "--net", "--", "ip", *words]
    finished = subprocess.run(command, capture_output=True, text=True, check=False)
    if finished.returncode != 0:
        raise ClusterError(f"ip {' '.join(words)} on {machine.name}: {finished.stderr.strip()}")
