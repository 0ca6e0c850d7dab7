"""What a test needs and this machine lacks."""

import os
from typing import NoReturn

import pytest


def lacks(reason: str) -> NoReturn:
    """Skip the test, and say why; fail it in continuous integration, where a skip would go unseen."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)
