"""The files that a cluster reads: slurm.conf, gres.conf, hosts and munge's key, in one folder with logs and state."""

import secrets
from dataclasses import dataclass
from pathlib import Path

CONTROLLER = "controller"
CONTROLLER_ADDRESS = "10.77.0.254"

# Ports and addresses may be the same in every cluster: each has a network of its own.
# cred_expire is also the delay before a requeued job may start again; SLURM takes 120 s for all below 5 s.
# JobRequeue and ReturnToService: a lost node's jobs are requeued, and the node is used again once it is back.
# MinJobAge: how long the end of a job can be asked for.
SLURM_CONF = """\
ClusterName=emulated
SlurmctldHost={controller}({controller_address})
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.sock,cred_expire=5
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.%n.pid
SlurmctldLogFile={folder}/log/slurmctld.log
SlurmdLogFile={folder}/log/slurmd.%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/none
AccountingStorageType=accounting_storage/none
MailProg=/bin/true
MpiDefault=none
SwitchType=switch/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core_Memory
DefMemPerCPU=100
GresTypes=gpu
SlurmdParameters=config_overrides
JobRequeue=1
ReturnToService=2
SlurmdTimeout={node_timeout}
SlurmctldTimeout=10
MessageTimeout=5
KillWait=30
InactiveLimit=0
MinJobAge=3600
PreemptType=preempt/partition_prio
PreemptMode=REQUEUE
SchedulerType=sched/backfill
SchedulerParameters=sched_interval=1,bf_interval=1,batch_sched_delay=0
"""
NODE = "NodeName={name} NodeAddr={address} CPUs={cpus} RealMemory=8000 Gres=gpu:{gpus}\n"
# A job of the partition `urgent` takes its nodes from jobs of `all`, which have GraceTime seconds to end.
PARTITIONS = """\
PartitionName=all Nodes=ALL Default=YES DefaultTime=10 MaxTime=INFINITE State=UP GraceTime=60
PartitionName=urgent Nodes=ALL PriorityTier=2 DefaultTime=10 MaxTime=INFINITE State=UP
"""


@dataclass(frozen=True)
class ClusterShape:
    nodes: int
    cpus_per_node: int
    gpus_per_node: int
    """GPUs that only SLURM sees: it counts them and sets CUDA_VISIBLE_DEVICES."""
    node_timeout: int
    """Seconds without an answer after which a node counts as lost; SLURM says so some 8 s later."""

    def addresses(self) -> dict[str, str]:
        """Network address of each node by its name."""
        return {f"n{number}": f"10.77.0.{number}" for number in range(1, self.nodes + 1)}


def write_configuration(folder: Path, shape: ClusterShape) -> None:
    """Write into the empty `folder` all that the cluster's programs read, and make the folders that they write to."""
    for name in ("log", "state", "devices", *(f"spool/{node}" for node in shape.addresses())):
        (folder / name).mkdir(parents=True)
    (folder / "slurm.conf").write_text(_slurm_conf(folder, shape))
    (folder / "gres.conf").write_text(_fake_gpus(folder / "devices", shape.gpus_per_node))
    (folder / "hosts").write_text(_hosts(shape))
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(secrets.token_bytes(128))


def _slurm_conf(folder: Path, shape: ClusterShape) -> str:
    head = SLURM_CONF.format(
        folder=folder,
        controller=CONTROLLER,
        controller_address=CONTROLLER_ADDRESS,
        node_timeout=shape.node_timeout,
    )
    nodes = [
        NODE.format(name=name, address=address, cpus=shape.cpus_per_node, gpus=shape.gpus_per_node)
        for name, address in shape.addresses().items()
    ]
    return head + "".join(nodes) + PARTITIONS


def _fake_gpus(devices: Path, count: int) -> str:
    """Make device files, which SLURM wants to be character devices, and return the lines that name them."""
    lines = []
    for number in range(count):
        (devices / f"gpu{number}").symlink_to("/dev/null")
        lines.append(f"Name=gpu File={devices}/gpu{number}\n")
    return "".join(lines)


def _hosts(shape: ClusterShape) -> str:
    addresses = {"localhost": "127.0.0.1", CONTROLLER: CONTROLLER_ADDRESS, **shape.addresses()}
    return "".join(f"{address} {name}\n" for name, address in addresses.items())
