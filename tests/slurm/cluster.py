"""A real SLURM cluster on one machine: munged, slurmctld and a slurmd on each emulated node.

The controller and each node are emulated machines (machine.py) on one switch, with the files of this machine in common,
as on a cluster with a shared file system. No traffic leaves them. Needs root and Linux.
"""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType

from tests.slurm import machine
from tests.slurm.configuration import CONTROLLER, CONTROLLER_ADDRESS, ClusterShape, write_configuration
from tests.slurm.machine import ClusterError, Machine

SLURM_PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "squeue", "sinfo", "scontrol", "scancel")
FINAL_STATES = ("BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL", "OUT_OF_MEMORY", "TIMEOUT")
LOG_TAIL_LINES = 20
POLL_SECONDS = 0.1


def reason_against_a_cluster() -> str | None:
    """Why no cluster can be made here, or None."""
    if os.geteuid() != 0:
        return "a SLURM cluster of emulated nodes needs root"
    missing = [program for program in (*SLURM_PROGRAMS, *machine.PROGRAMS) if shutil.which(program) is None]
    if missing:
        return f"a SLURM cluster of emulated nodes needs {', '.join(missing)} (CONTRIBUTING.md, Tests on SLURM)"
    trial = subprocess.run([*machine.UNSHARE, "true"], capture_output=True, text=True, check=False)
    if trial.returncode != 0:
        return f"a SLURM cluster of emulated nodes needs namespaces: {trial.stderr.strip()}"
    return None


class SlurmCluster:
    """A context manager: the cluster is ready inside, and all that it started is gone afterwards.

    Enter it on a thread that outlives it: the death of that thread ends the cluster.
    """

    def __init__(self, nodes: int = 2, cpus_per_node: int = 4, gpus_per_node: int = 0, node_timeout: int = 10) -> None:
        self.shape = ClusterShape(nodes, cpus_per_node, gpus_per_node, node_timeout)
        self.addresses = self.shape.addresses()
        self.machines: dict[str, Machine] = {}
        self._folder = tempfile.TemporaryDirectory(prefix="slurm_")
        self.folder = Path(self._folder.name)

    def __enter__(self) -> "SlurmCluster":
        try:
            self._start()
        except BaseException:
            self.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    def stop(self) -> None:
        """End every process of the cluster, jobs and commands included, and remove its folder."""
        for each in self.machines.values():
            each.kill()
        self._folder.cleanup()

    def command(self, words: Sequence[str], cwd: Path | None = None, on: str = CONTROLLER) -> list[str]:
        """The command line that runs `words` on the controller, or on another machine of the cluster.

        For subprocess.Popen; the process is `nsenter`, with whose death that of `words` follows.
        """
        variables = {"SLURM_CONF": str(self.folder / "slurm.conf")}
        return self.machines[on].command(words, cwd or Path.cwd(), variables)

    def run(
        self,
        words: Sequence[str],
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        timeout: float = 120,
        on: str = CONTROLLER,
    ) -> subprocess.CompletedProcess[str]:
        """Run any command on the controller, or on another machine of the cluster, and wait for its end.

        Args:
            words: the command, as for subprocess.run.
            cwd: its working directory; default: the caller's.
            env: its whole environment, to which SLURM_CONF is added; default: the caller's without SLURM's variables.
            timeout: seconds after which it is killed with its whole process group.
            on: the machine's name.

        Raises:
            subprocess.TimeoutExpired: it did not end in time.
        """
        process = subprocess.Popen(
            self.command(words, cwd, on),
            env=dict(_environment() if env is None else env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        try:
            output, errors = process.communicate(timeout=timeout)
        except BaseException:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # a grandchild would keep the pipes open
            process.communicate()
            raise
        return subprocess.CompletedProcess(list(words), process.returncode, output, errors)

    def submit(
        self,
        script: Path,
        *arguments: str,
        options: Sequence[str] = (),
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
    ) -> int:
        """Give a script to sbatch, with options for sbatch and arguments for the script; return the job's number."""
        words = ["sbatch", "--parsable", *options, str(script), *arguments]
        return int(self._answer(words, cwd, env))

    def state(self, job: int) -> str:
        """What squeue calls the job's state: PENDING, RUNNING, COMPLETED ..."""
        return self._answer(["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"])

    def node_state(self, name: str) -> str:
        """What sinfo calls the node's state: idle, mixed, allocated, down ...; a star says that it does not answer."""
        return self._answer(["sinfo", "--noheader", "--partition=all", f"--nodes={name}", "--format=%T"])

    def wait(self, job: int, until: str = "COMPLETED", timeout: float = 120) -> None:
        """Wait until the job is in a state.

        Raises:
            ClusterError: it ended in another one or `timeout` seconds passed; with what SLURM and the job said.
        """
        final = tuple(state for state in FINAL_STATES if state != until)
        try:
            self._poll(f"job {job}", lambda: self.state(job), (until,), timeout, final)
        except ClusterError as error:
            raise ClusterError(f"{error}\n{self._report_of_job(job)}") from None

    def wait_for_node(self, name: str, until: Sequence[str], timeout: float = 120) -> None:
        """Wait until the node is in one of the states.

        Raises:
            ClusterError: `timeout` seconds passed; with what SLURM said.
        """
        self._poll(f"node {name}", lambda: self.node_state(name), until, timeout)

    def kill_node(self, name: str) -> None:
        """End the node and all that runs there, as a power cut does."""
        self.machines[name].kill()

    def start_node(self, name: str) -> None:
        """Start a node that was killed.

        Raises:
            ClusterError: it runs already, or slurmd could not be started.
        """
        node = self._start_machine(name)
        machine.connect(node, self.addresses[name], self.machines[CONTROLLER])
        self._answer(["slurmd"], on=name)

    def set_link(self, name: str, up: bool) -> None:
        """Cut the node's network or mend it; what runs there lives on."""
        machine.set_cable(self.machines[name], self.machines[CONTROLLER], up)

    def logs(self) -> str:
        """The last lines of what munged, slurmctld and each slurmd logged."""
        return "\n".join(_tail(log) for log in sorted((self.folder / "log").glob("*.log")))

    def _start(self) -> None:
        self.folder.chmod(0o755)  # munged refuses a socket that others cannot reach
        write_configuration(self.folder, self.shape)
        controller = self._start_machine(CONTROLLER)
        machine.make_switch(controller, CONTROLLER_ADDRESS)
        files = {"socket": "munge.sock", "key-file": "munge.key", "pid-file": "munged.pid", "seed-file": "munged.seed"}
        options = [f"--{option}={self.folder / name}" for option, name in files.items()]
        self._answer(["munged", *options, f"--log-file={self.folder / 'log' / 'munged.log'}"])
        self._answer(["slurmctld"])
        for name in self.addresses:
            self.start_node(name)
        for name in self.addresses:
            self.wait_for_node(name, ("idle",), timeout=60)

    def _start_machine(self, name: str) -> Machine:
        if name in self.machines and self.machines[name].is_running():
            raise ClusterError(f"{name} runs already; kill it first")
        # the variable lets a look at the processes of this machine tell whose they are
        environment = {**_environment(), "SLURM_CONF": str(self.folder / "slurm.conf")}
        self.machines[name] = machine.start_machine(name, self.folder / "hosts", environment)
        return self.machines[name]

    def _answer(
        self,
        words: Sequence[str],
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        on: str = CONTROLLER,
    ) -> str:
        finished = self.run(words, cwd, env, on=on)
        if finished.returncode != 0:
            said = (finished.stderr or finished.stdout).strip()
            raise ClusterError(f"{' '.join(words)} on {on}: exit {finished.returncode}: {said}\n{self.logs()}")
        return finished.stdout.strip()

    def _poll(
        self, what: str, ask: Callable[[], str], until: Sequence[str], timeout: float, final: Sequence[str] = ()
    ) -> None:
        deadline = time.monotonic() + timeout
        while (state := ask()) not in until:
            if state in final or time.monotonic() > deadline:
                ended = "ended in" if state in final else f"after {timeout} s is in"
                raise ClusterError(f"{what} {ended} state {state}, not {' or '.join(until)}\n{self.logs()}")
            time.sleep(POLL_SECONDS)

    def _report_of_job(self, job: int) -> str:
        report = self._answer(["scontrol", "show", "job", str(job)])
        output = re.search(r"StdOut=(.*)", report)
        return report if output is None else f"{report}\n{_tail(Path(output[1]))}"


def _environment() -> dict[str, str]:
    """The caller's environment, without what a SLURM job around it would have set."""
    return {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SBATCH_"))}


def _tail(log: Path) -> str:
    if not log.is_file():
        return f"{log}: no such file"
    lines = log.read_text(errors="replace").splitlines()[-LOG_TAIL_LINES:]
    return "\n".join((f"--- end of {log} ---", *lines))
