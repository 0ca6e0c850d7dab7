"""What every worker of tests/worker_pool.py has loaded: imported once, by the server that they are forked from."""

import importlib.util
import os

import torch
import torch._dynamo  # the first optimizer of a process loads it

from dsmoe_megatron.runtime.distributed import prepare_device

torch.set_num_threads(1)
prepare_device()  # before megatron.core is imported

import dsmoe_megatron.training.loop  # noqa: E402
import tests.pretrain_job  # noqa: E402
import tests.training_jobs  # noqa: E402, F401

if importlib.util.find_spec("deepspeed") is not None:
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import dsmoe_megatron.training.engines.deepspeed  # noqa: F401
