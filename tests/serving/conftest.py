"""Tests on real vLLM; `make test-vllm` runs them in its environment. Elsewhere nothing here is collected."""

import importlib.util
import os

import pytest

HAS_VLLM = importlib.util.find_spec("vllm") is not None
collect_ignore_glob = [] if HAS_VLLM else ["test_*.py"]


def pytest_report_header() -> str | None:
    return None if HAS_VLLM else "tests/serving: not collected, because vllm is not installed (make test-vllm)"


@pytest.fixture(autouse=True, scope="session")
def vllm_environment() -> None:
    """Before vllm is imported: the engine in this process, little memory for keys and values, any free processor."""
    os.environ |= {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # two ranks on one NUMA node cannot be bound
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR",
    }
