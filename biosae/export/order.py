"""The order in which pseudonyms are numbered: nobody can work it out from a list of the people who may be meant."""

from __future__ import annotations

import hmac
import os
import secrets
import tempfile
import warnings
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from biosae.settings import settings

KEY_FILE = "pseudonyms.key"
_BYTES = 32


def hidden_order(names: Sequence[str], *, kind: str = "") -> list[int]:
    """Positions of names in an order that depends on them and on a secret of this computer's user alone.

    They are sorted by ``HMAC-SHA256(secret, kind, name)``. An order that depends on the names alone can be made again
    by anybody who has a list of them, and with it the way back from every pseudonym. The secret is the file
    ``pseudonyms.key`` in ``settings.cache_dir``, made when first needed; where it stays, the same names give the same
    order, so that several exports can be joined.
    """
    secret = _secret(settings.cache_dir / KEY_FILE)
    marks = [hmac.digest(secret, f"{kind}\0{name}".encode(errors="surrogatepass"), "sha256") for name in names]
    return sorted(range(len(names)), key=marks.__getitem__)


@cache
def _secret(path: Path) -> bytes:
    try:
        if not path.exists():
            _make(path)
        if len(held := path.read_bytes()) >= _BYTES:
            return held
        problem = "it is damaged; delete it"
    except OSError as error:
        problem = os.strerror(error.errno) if error.errno else "it cannot be written"
    warnings.warn(
        f"the secret of pseudonyms is not kept ({path}: {problem}); exports of another session get other pseudonyms",
        stacklevel=4,
    )
    return secrets.token_bytes(_BYTES)


def _make(path: Path) -> None:
    """Write a new secret for this user alone; of processes that do so at once the first wins."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with open(handle, "wb") as stream:
            stream.write(secrets.token_bytes(_BYTES))
        os.link(name, path)
    except FileExistsError:
        pass
    finally:
        os.unlink(name)
