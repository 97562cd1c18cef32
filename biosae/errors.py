"""The exceptions that users meet. Every message says what to do next."""

from __future__ import annotations

import difflib
import importlib
from collections.abc import Iterable
from types import ModuleType


class BiosaeError(Exception):
    """Base class of every error raised on purpose by biosae."""


class InputError(BiosaeError, ValueError):
    """An argument, a table or a column is not what the function needs."""


class StatisticsError(InputError):
    """A statistical question that must be refused as it was asked."""


class TooManyFailuresError(BiosaeError):
    """More items failed than ``max_failures`` allows; ``failures.csv`` lists them."""


class FormatError(BiosaeError):
    """A file on disk is corrupt, truncated, of a newer version, or not ours."""


class IdentityError(BiosaeError, ValueError):
    """Embeddings and model come from different encoders, layers or preprocessing."""


class WeightsError(BiosaeError):
    """Encoder weights are absent, unverified or do not match their hash."""


class OfflineError(WeightsError):
    """A download would be needed, but biosae may not use the network."""


class GatedError(WeightsError):
    """The weights need an access token or an accepted licence at their source."""


class AccessError(BiosaeError):
    """Data that their source gives only to people who ask for them; the message says how."""


class DownloadError(BiosaeError):
    """A file could not be fetched, or what was fetched is not what its source publishes."""


class EndpointError(BiosaeError):
    """A model server did not answer, refused the key or the model, or the budget for it is spent."""


class MissingExtraError(BiosaeError, ImportError):
    """An optional package is absent; the message names the extra that brings it."""


class FolderInUseError(BiosaeError):
    """Another process is writing the same folder."""


class RanksError(BiosaeError):
    """Of several processes that share a job, some ended before their part was done."""


class DivergedError(BiosaeError):
    """Training stopped being finite; the model keeps its last good weights."""


class NotFittedError(BiosaeError, ValueError, AttributeError):
    """The estimator was used before ``fit`` or ``load``."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """Phrase that lists valid choices and the nearest one to ``name``.

    >>> nearest("topq", ["relu", "topk"])
    "did you mean 'topk'? Valid: 'relu', 'topk'"
    """
    choices = [str(c) for c in choices]
    close = difflib.get_close_matches(str(name), choices, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]!r}? " if close else ""
    shown = ", ".join(repr(c) for c in choices[:30]) + (" ..." if len(choices) > 30 else "")
    return f"{hint}Valid: {shown}"


def require(module: str, *, extra: str) -> ModuleType:
    """Import an optional module, or say which extra installs it.

    Raises
    ------
    MissingExtraError
        If the module (or something that it imports) is not installed.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingExtraError(
            f"{module!r} could not be imported ({error}). Install it with: pip install 'biosae[{extra}]'"
        ) from error
