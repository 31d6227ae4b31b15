"""Every error that manylora raises on purpose has its place in one small tree.

    ManyloraError
    ├── ConfigError (ValueError)          a run file, an option or an adapter's settings
    │   └── TargetError                   a target pattern that matches no linear layer
    ├── DataError (ValueError)            a line of a data file, or a datum
    │   └── DatumTooLong                  longer than the base model's context
    ├── BaseModelError                    a base model that cannot be opened
    ├── Unsupported                       known, and refused by name
    ├── DoesNotFit                        more memory than there is; nothing was allocated
    ├── AdapterNotFound (KeyError)        no adapter of that name
    ├── AdapterExists (ValueError)        the name is taken
    ├── NotFinite (ArithmeticError)       NaN or Inf in one adapter's loss or gradient
    ├── RewardError                       a reward that raised, or gave no number
    ├── RolloutFailed                     a rollout that raised, hung, or gave nothing to train on
    ├── StepRefused                       an optimizer step whose gradients were dropped
    ├── Cancelled                         an operation that was dropped before it ran
    ├── EngineLost                        the processes of an engine are gone, and what they held
    ├── TooManyFilesOpen                  no descriptor left; nothing is damaged, try again
    ├── StoreError                        the database, or a folder that only one process may write
    │   ├── Conflict (ValueError)         an id that is taken by another request
    │   ├── CheckpointExists (ValueError) the name is taken, and replacing it was not asked for
    │   └── StoreTooNew                   written by a newer manylora
    └── CheckpointError                   files of an adapter
        ├── CheckpointDamaged             torn, truncated or altered
        ├── CheckpointMismatch            of another rank, alpha, layout or base
        └── SaveFailed (OSError)          could not be written

A message says what is wrong, where (file, field or adapter), and what would be right. An error
concerns one adapter; it never harms another.
"""


class ManyloraError(Exception):
    """Every error that manylora raises on purpose is a `ManyloraError`."""

    def __str__(self) -> str:
        # KeyError would print the repr of its message.
        return str(self.args[0]) if len(self.args) == 1 else super().__str__()


class ConfigError(ManyloraError, ValueError):
    """A run file, an option or an adapter's settings are wrong."""


class TargetError(ConfigError):
    """A target pattern matches no linear layer of the base."""


class DataError(ManyloraError, ValueError):
    """A line of a data file, or a datum, is wrong."""


class DatumTooLong(DataError):
    """A datum is longer than the base model's context."""


class BaseModelError(ManyloraError):
    """The base model cannot be opened."""


class Unsupported(ManyloraError):
    """Something known was asked for that manylora does not do."""


class DoesNotFit(ManyloraError):
    """Something needs more memory than is free; the message says how much, and what would fit."""


class AdapterNotFound(ManyloraError, KeyError):
    """No adapter of that name exists."""


class AdapterExists(ManyloraError, ValueError):
    """An adapter of that name exists already."""


class NotFinite(ManyloraError, ArithmeticError):
    """One adapter's loss or gradient holds NaN or Inf."""


class RewardError(ManyloraError):
    """Somebody's reward raised, or what it returned is not a finite number for each sample."""


class RolloutFailed(ManyloraError):
    """A rollout raised, took longer than it may, or gave nothing to train on."""


class StepRefused(ManyloraError):
    """An optimizer step was refused because gradients of that step were dropped."""


class Cancelled(ManyloraError):
    """The operation was dropped before it ran."""


class EngineLost(ManyloraError):
    """The processes of an engine are gone, and with them what was not saved.

    Attributes:
        silent: one of them ended without a message, as a process does that is killed from outside.
            The work that ran just then is unlikely to be the cause.
    """

    def __init__(self, message: str, *, silent: bool = False):
        super().__init__(message)
        self.silent = silent


class TooManyFilesOpen(ManyloraError):
    """A file could not be opened because as many files are open as may be.

    Nothing is wrong with the file, and it can be opened once another one is closed: this is never
    a reason to take a file for damaged, lost or missing.
    """


class StoreError(ManyloraError):
    """The database failed, or a folder that only one process may write is in use."""


class Conflict(StoreError, ValueError):
    """The id is taken by another request."""


class CheckpointExists(StoreError, ValueError):
    """A checkpoint of that path exists, and replacing it was not asked for."""


class StoreTooNew(StoreError):
    """The database was written by a newer manylora."""


class CheckpointError(ManyloraError):
    """Files of an adapter cannot be read or written."""


class CheckpointDamaged(CheckpointError):
    """Files are torn, truncated or altered."""


class CheckpointMismatch(CheckpointError):
    """Files belong to another rank, alpha, layout or base."""


class SaveFailed(CheckpointError, OSError):
    """Files could not be written."""

    def __str__(self) -> str:
        return ManyloraError.__str__(self)
