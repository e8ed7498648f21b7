"""Errors of the trainer; the tree's root is `adapters.errors`.

LorikeetError
├── DataError       INVALID_ARGUMENT     the training data is wrong; names the file and the line
├── SettingsError   INVALID_ARGUMENT     a number or a choice of the run is wrong
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


class TrainingError(LorikeetError):
    """Training went wrong; nothing is published."""

    code = "FAILED_PRECONDITION"
    reason = "TRAINING_FAILED"
