"""Errors of the trainer; the tree's root is `adapters.errors`.

LorikeetError
├── DataError       INVALID_ARGUMENT     the training data is wrong; names the file and the line
├── SettingsError   INVALID_ARGUMENT     a number or a choice of the run is wrong
├── RunError        INVALID_ARGUMENT     a run's directory cannot be used
├── DiskFull        RESOURCE_EXHAUSTED   no room for a checkpoint or a result
├── PeerFailed      ABORTED              another process of the same run has ended
└── TrainingError   FAILED_PRECONDITION  training itself went wrong (the loss is not a number, …)
"""

from adapters.errors import LorikeetError


class DataError(LorikeetError):
    """The training data cannot be used."""

    code = "INVALID_ARGUMENT"
    reason = "TRAINING_DATA_INVALID"


class SettingsError(LorikeetError):
    """A setting of the run is out of range or does not fit the base."""

    code = "INVALID_ARGUMENT"
    reason = "TRAINING_SETTINGS_INVALID"


class RunError(LorikeetError):
    """A run's directory cannot be used: not there, not a run, damaged, or taken."""

    code = "INVALID_ARGUMENT"
    reason = "TRAINING_RUN_INVALID"


class DiskFull(LorikeetError):
    """No room on the disk; what was written before is whole."""

    code = "RESOURCE_EXHAUSTED"
    reason = "TRAINING_DISK_FULL"


class PeerFailed(LorikeetError):
    """Another process of the same run has ended; why, it said itself."""

    code = "ABORTED"
    reason = "TRAINING_PEER_FAILED"


class TrainingError(LorikeetError):
    """Training went wrong; nothing is published."""

    code = "FAILED_PRECONDITION"
    reason = "TRAINING_FAILED"
