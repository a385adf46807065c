"""Errors of the backend. Each also derives from Dynamo's ShortenTraceback: such an error leaves torch.compile as it is, any
other would reach the user wrapped as BackendCompilerFailed."""

from torch._dynamo.exc import ShortenTraceback


class OptionError(ShortenTraceback, ValueError):
    """An option of the recipe that does not exist or is out of range."""


class StateError(ShortenTraceback, ValueError):
    """A session state that does not fit the model or the recipe."""


class NotFiniteError(ShortenTraceback, FloatingPointError):
    """NaN in a sparse weight: no mask can be searched, and training has already failed."""


class SkippedError(ShortenTraceback, RuntimeError):
    """A wanted layer stays dense, under strict=True."""
