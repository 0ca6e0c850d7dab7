"""The named errors that users see. Each message is one line: what is wrong, where, which rule, what to do."""

import sys
from typing import NoReturn


class DSMoEError(Exception):
    """A fault that the user can mend. The command line prints its message alone, without a traceback.

    Attributes:
        exit_code: of the process that it ends.
        on_every_rank: every process of the run raises it, so that one of them saying so is enough.
    """

    exit_code = 1
    on_every_rank = False


class ConfigurationError(DSMoEError):
    """A key, value or combination in the recipe or on the command line breaks a rule.

    Args:
        key: dotted key, as on the command line (`model.hidden_size`).
        value: the value found there.
        rule: the rule that it breaks and, where it is not obvious, what to set instead.
    """

    exit_code = 2
    on_every_rank = True

    def __init__(self, key: str, value: object, rule: str) -> None:
        super().__init__(f"{key} = {value!r}: {rule}")
        self.key, self.value, self.rule = key, value, rule


class DataError(DSMoEError):
    """A dataset, manifest or corpus file is missing, empty, truncated or does not fit the run."""


class TokenizerError(DSMoEError):
    """A tokenizer cannot be loaded, or is not the one that the data was made with."""


class CheckpointError(DSMoEError):
    """A checkpoint is missing, incomplete, or of another architecture."""


class TrainingError(DSMoEError):
    """The run itself went wrong: a loss that is not finite, a disk that is full."""


class PassingError(TrainingError):
    """Ended from outside by what may be over at the next start: a rank that is gone, a file that could not be read."""


class EnvironmentNotSupportedError(DSMoEError):
    """A library version or a device that this code was not written for."""


def first_line(error: BaseException) -> str:
    """What a library says went wrong, without the lines that follow; its kind where it says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def exit_with(error: DSMoEError, program: str) -> NoReturn:
    """Print one line on standard error and end the process with the error's code."""
    message = " ".join(str(error).split())
    print(f"{program}: error: {message}", file=sys.stderr, flush=True)
    sys.exit(error.exit_code)
