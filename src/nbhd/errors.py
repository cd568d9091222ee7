"""The errors nbhd raises on purpose.

    NbhdError
    ├── ArgumentError     (also ValueError)    an argument breaks a rule; the message names it, the value and a remedy
    ├── BackendError      (also RuntimeError)  a named backend cannot run this call, or none can
    ├── MissingExtra      (also ImportError)   an optional library is not installed; the message names the extra
    ├── FileError         (also OSError)       an input file is unreadable, damaged or not what it should be
    │   └── WrongFile                          what was named is not there, or is of another kind: no file failed
    ├── CheckpointError   (also ValueError)    a checkpoint does not fit, or is not one
    └── RecipeError       (also ValueError)    a recipe has an unknown key or a value of the wrong kind

Everything here is a mistake a caller can repair; the command line prints its text without a traceback.
"""

from __future__ import annotations


class NbhdError(Exception):
    """Base of every error nbhd raises on purpose."""


class ArgumentError(NbhdError, ValueError):
    """An argument breaks a rule."""


class BackendError(NbhdError, RuntimeError):
    """A backend that was asked for cannot run here, or cannot run this call."""


class MissingExtra(NbhdError, ImportError):
    """An optional dependency is missing."""

    def __init__(self, what: str, extra: str, package: str) -> None:
        super().__init__(
            f"{what} needs {package}, which is not installed. Install it with: pip install 'nbhd[{extra}]'"
        )


class FileError(NbhdError, OSError):
    """A file cannot be read, or its content is not what it should be."""


class WrongFile(FileError):
    """What was named is not there, or is of another kind: a mistake of the caller, and no file that failed."""


class CheckpointError(NbhdError, ValueError):
    """A checkpoint is missing, damaged, or does not fit the model."""


class RecipeError(NbhdError, ValueError):
    """A recipe is not valid."""
