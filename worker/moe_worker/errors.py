"""One tree of errors; the type says whether a retry can help."""

from typing import ClassVar


class WorkerError(Exception):
    """Base of all errors that this package raises on purpose; the message is for the user.

    `exit_code` is what `moe-worker` exits with: 2 for bad input or configuration, 1 for failures of the
    machine, 3 where another rank of the mesh ended first. `retryable` says whether the same call can succeed
    later unchanged.
    """

    exit_code: int = 1
    retryable: ClassVar[bool] = False


class InputError(WorkerError):
    """The user's input cannot work; the same input fails again."""

    exit_code = 2


class CheckpointError(InputError):
    """A checkpoint directory, or a file in it, cannot be used."""


class ConfigError(CheckpointError):
    """A field of config.json is missing, impossible or not supported."""


class TokenizerError(CheckpointError):
    """tokenizer.json is missing, unreadable or does not belong to the model."""


class DataError(InputError):
    """A file of text to train on or to evaluate cannot be used."""


class SettingsError(InputError):
    """A flag or a keyword argument of the engine is impossible (on this machine, with this model)."""


class DivergedError(InputError):
    """Training reached NaN or infinity; the last good state is kept."""


class SourceError(InputError):
    """The source of a model does not have it, or does not give it to us."""


class FetchError(WorkerError):
    """A model could not be downloaded this time: the network, the source or the disk failed."""

    retryable = True


class DiskFullError(FetchError):
    """The disk has no room for a model."""


class RequestError(InputError):
    """One field of a request is out of range."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field


class QueueFullError(WorkerError):
    """The queue is full; retry after `retry_after_s` seconds."""

    retryable = True

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class DeviceMemoryError(WorkerError):
    """The device has no memory left even for the smallest step."""


class EngineDiedError(WorkerError):
    """The engine process ended while it was needed; another worker may succeed."""

    retryable = True
