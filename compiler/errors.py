"""Errors of the backend.

Each derives from Dynamo's ShortenTraceback too: such an error leaves torch.compile as it is, with the user's own
traceback; any other would reach the user wrapped as BackendCompilerFailed.
"""

from torch._dynamo.exc import ShortenTraceback


class BackendError(ShortenTraceback):
    """What all errors of sparse24 have in common."""

    def __init__(self, message: str) -> None:
        super().__init__(message, first_useful_frame=None)


class OptionError(BackendError, ValueError):
    """An option of the recipe that does not exist or is out of range."""


class StateError(BackendError, ValueError):
    """A session state that does not fit the model or the recipe."""


class NotFiniteError(BackendError, FloatingPointError):
    """NaN in a sparse weight: no mask can be searched, and training has already failed."""


class SkippedError(BackendError):
    """A wanted layer stays dense, under strict=True."""


class RankError(BackendError, RuntimeError):
    """Ranks that train one model differ."""
