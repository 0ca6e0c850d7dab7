"""Runs the pipeline with datatrove: on this machine, or as jobs of SLURM."""

import json
import os
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import multiprocess.forkserver
import multiprocess.util
from datatrove.executor import LocalPipelineExecutor, SlurmPipelineExecutor
from loguru import logger

from data_tools.assembling import Assembly
from data_tools.indexed_dataset import write_whole
from data_tools.pipeline import EncodeDocuments, KeepSegments, ReadTask, TaskStep, parent_is_dead
from data_tools.progress import ProgressWatcher
from data_tools.work_folder import WorkFolder
from dsmoe_megatron.errors import DataError

JOBS = "slurm_jobs.json"
WORKERS_LIBRARIES = ("tokenizers", "sentencepiece", "gigatoken")  # what is not installed is passed over
PARENT_CHECK_SECONDS = 0.5


class AssembleDatasets(TaskStep):
    """Puts the finished tasks together, as the last job of a run on SLURM."""

    type = "WRITER"
    name = "datasets"

    def run(self, data: Any = None, rank: int = 0, world_size: int = 1) -> Any:
        with Assembly(self.prefix) as assembly:
            assembly.finish()
        return ()


class QuietLocalExecutor(LocalPipelineExecutor):
    """datatrove's executor for one machine, without its log lines: faults are told in one line, and once."""

    def run(self) -> Any:
        # the process that counts the tasks would outlive a parent that was killed, and hold its pipes open
        parent = os.getpid()
        multiprocess.util.register_after_fork(self, lambda _: _end_with(parent))
        return super().run()

    def _launch_run_for_rank(self, *arguments: Any, **more: Any) -> Any:
        logger.disable("datatrove")
        try:
            return super()._launch_run_for_rank(*arguments, **more)
        finally:
            if parent_is_dead():
                os._exit(1)  # a worker has nobody left to answer


def _end_with(parent: int) -> None:
    """Let this process end soon after its parent."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(PARENT_CHECK_SECONDS)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


class PlainSlurmExecutor(SlurmPipelineExecutor):
    """datatrove's executor for SLURM, without its last job, whose statistics the manifest has."""

    def launch_merge_stats(self) -> None:
        """Nothing."""


def steps(prefix: str) -> list[TaskStep]:
    return [ReadTask(prefix), EncodeDocuments(prefix), KeepSegments(prefix)]


def prepare_workers() -> None:
    """Let the server that the workers are forked from load their modules, while this process has other work."""
    context: Any = multiprocess.get_context("forkserver")
    context.set_forkserver_preload(["data_tools.preprocess", *WORKERS_LIBRARIES])
    multiprocess.forkserver.ensure_running()


def run_locally(prefix: str, workers: int, total_bytes: int) -> None:
    """Finish all tasks of a run on this machine.

    Args:
        prefix: of the dataset.
        workers: processes.
        total_bytes: of the stored input, for the progress bar.

    Raises:
        DataError: the input cannot be used, or a worker was killed.
    """
    folder = WorkFolder(prefix)
    prepare_tasks(folder)
    tasks = int(folder.plan()["tasks"])
    logger.disable("datatrove")
    executor = QuietLocalExecutor(
        steps(prefix), tasks=tasks, workers=min(workers, tasks), logging_dir=str(folder.executor_path)
    )
    watcher = ProgressWatcher(folder, total_bytes)
    try:
        with watcher:
            executor.run()
    except KeyboardInterrupt:
        if watcher.killed:
            raise DataError(
                "a worker process was killed (out of memory?): the same command goes on from there; try fewer --workers"
            ) from None
        raise


def prepare_tasks(folder: WorkFolder) -> None:
    """Take back what a stopped run left unfinished. A task counts as completed if its segments say so."""
    completions = folder.executor_path / "completions"
    for number, task in enumerate(folder.tasks()):
        if not task.finished:
            task.clear_leftovers()
            (completions / f"{number:05d}").unlink(missing_ok=True)


@dataclass(frozen=True)
class SlurmJob:
    """What SLURM is asked for.

    Args:
        partition: to run in.
        time: limit of each task, HH:MM:SS.
        memory_gb: of each task [GB].
        arguments: further options of sbatch, name to value.
    """

    partition: str
    time: str = "24:00:00"
    memory_gb: int = 2
    arguments: dict[str, str] | None = None


def submit_to_slurm(prefix: str, workers: int, job: SlurmJob) -> list[str]:
    """Submit a job array that works on the tasks, and a job after it that puts them together.

    Args:
        prefix: of the dataset, in a folder that all nodes see.
        workers: tasks at a time.
        job: what to ask for.

    Returns:
        The numbers of the jobs.

    Raises:
        DataError: sbatch is missing, or refuses.
    """
    folder = WorkFolder(prefix)
    prepare_tasks(folder)
    logger.disable("datatrove")
    settings: dict[str, Any] = {
        "time": job.time,
        "partition": job.partition,
        "mem_per_cpu_gb": job.memory_gb,
        "qos": "",
        "mail_type": "NONE",
        # this Python's launch_pickled_pipeline
        "env_command": f'export PATH="{Path(sys.executable).parent}:$PATH"',
        "sbatch_args": job.arguments or {},
    }
    name = Path(prefix).name
    tasks = PlainSlurmExecutor(
        steps(prefix),
        tasks=int(folder.plan()["tasks"]),
        workers=workers,
        job_name=f"preprocess_{name}",
        logging_dir=str(folder.executor_path),
        **settings,
    )
    last = PlainSlurmExecutor(
        [AssembleDatasets(prefix)],
        tasks=1,
        job_name=f"assemble_{name}",
        depends=tasks,
        logging_dir=f"{prefix}.slurm_logs",  # not in the folder that its job removes
        skip_completed=False,
        **settings,
    )
    try:
        last.launch_job()
    except FileNotFoundError as error:
        raise DataError(f"{error.filename}: no such program; --executor slurm needs a machine of a cluster") from error
    except subprocess.CalledProcessError as error:
        raise DataError(f"sbatch refused the job with exit code {error.returncode}; its reason stands above") from error
    jobs = [str(each.job_id) for each in (tasks, last) if each.job_id not in (None, -1)]
    write_whole(folder.path / JOBS, json.dumps(jobs).encode())
    return jobs


def queued_jobs(prefix: str) -> list[str]:
    """The jobs of a run that SLURM still has in its queue."""
    try:
        jobs = json.loads((WorkFolder(prefix).path / JOBS).read_bytes())
        listing = subprocess.run(["squeue", "--noheader", "--format=%A"], capture_output=True, text=True, check=True)
    except (OSError, ValueError, subprocess.CalledProcessError):
        return []
    return [job for job in jobs if job in listing.stdout.split()]
