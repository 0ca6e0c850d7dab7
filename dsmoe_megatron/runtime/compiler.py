"""torch's compiler, kept out where a library would load it for what is not run here."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


@contextlib.contextmanager
def nothing_compiled() -> Iterator[None]:
    """What is decorated with torch.compile meanwhile stays as it is: loading the compiler takes seconds."""

    def as_it_is(function: Any = None, **_: Any) -> Any:
        return function if function is not None else as_it_is

    compiler = torch.compile
    torch.compile = as_it_is  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.compile = compiler
