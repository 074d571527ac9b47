"""Errors that a user of the command line sees as one line."""


class TrainingError(ValueError):
    """Something that the user gave does not fit: data, a checkpoint, a name."""


class DataError(TrainingError):
    """Data that cannot be read, or that do not fit the options."""


class CheckpointError(TrainingError):
    """A file that is no checkpoint of this package, or one of another model or format."""
