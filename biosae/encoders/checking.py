"""``bs.encoders.check``: what stands between a name of the catalogue and an encoder that runs; asks no network."""

from __future__ import annotations

import importlib.util
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from biosae.encoders.catalog import EncoderInfo, info
from biosae.encoders.sources import FILES, expect_hash, find_folder, from_folder
from biosae.errors import WeightsError
from biosae.settings import settings

_PACKAGES = {"timm": "timm", "open_clip": "open_clip", "braindecode": "braindecode", "biosae": "torch",
             "torchxrayvision": "torchvision"}  # fmt: skip
_EXTRAS = {"braindecode": "eegmodels"}


@dataclass(frozen=True)
class EncoderCheck:
    """What :func:`check` found; ``dict(check)`` is not needed, :meth:`to_dict` gives plain JSON values.

    Attributes
    ----------
    name, domain, item, library, source
        As in the catalogue.
    licence : str
    derivatives_restricted : bool or None
        The licence reaches what is made from the encoder's outputs (an SAE, a shared embedding file).
    gated : bool
        The source asks for an accepted licence.
    found : str or None
        Where weights lie on this machine: ``"bundled"``, ``"weights_dirs: <folder>"``, ``"hub cache: <commit>"``,
        ``"none needed"``; None if nowhere.
    hash : str
        ``"agrees"`` with a stated SHA-256, ``"differs"``, ``"not stated"``, or ``"no weights"``.
    expects : dict
        Size and micrometres per pixel of images; rate (Hz), unit, channels, seconds, amplitude and band (Hz) of
        signals. ``"not stated"`` where the catalogue knows nothing; ``"any"`` only for encoders without weights.
    unconfirmed : tuple of str
        Fields that no source confirms.
    missing : tuple of str
        What has to be done before :func:`~biosae.encoders.load` works; empty if it works now.
    """

    name: str
    domain: str
    item: str
    library: str
    source: str
    licence: str
    derivatives_restricted: bool | None
    gated: bool
    found: str | None
    hash: str
    expects: dict[str, Any]
    unconfirmed: tuple[str, ...] = ()
    missing: tuple[str, ...] = field(default=())

    @property
    def ready(self) -> bool:
        """Whether ``load(name)`` works here, now, without a network."""
        return not self.missing

    def to_dict(self) -> dict[str, Any]:
        """Every attribute and ``ready``, as plain JSON values."""
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        return values | {"ready": self.ready}

    def __repr__(self) -> str:
        reach = {True: "reaches what is made from its outputs", False: "leaves derivatives free", None: "unknown reach"}
        lines = [
            f"{self.name}: {self.domain}, {self.library}, {'ready' if self.ready else 'not ready'}",
            f"  licence   {self.licence} ({reach[self.derivatives_restricted]}){', gated' if self.gated else ''}",
            f"  weights   {self.found or 'not on this machine'}, hash {self.hash}; source {self.source}",
            f"  expects   {self.item}: " + ", ".join(f"{k} {_words(v)}" for k, v in self.expects.items()),
        ]
        if self.unconfirmed:
            lines.append(f"  unsure    {', '.join(self.unconfirmed)} (no source confirms them)")
        return "\n".join([*lines, *(f"  missing   {m}" for m in self.missing)])


def _words(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def check(name: str) -> EncoderCheck:
    """Say what an encoder is, what it expects and what is missing before it can be loaded here.

    Weight files that lie on this machine are hashed; nothing is downloaded and no network is asked.

    Parameters
    ----------
    name
        Catalogue name (``bs.encoders.list()``).

    Raises
    ------
    InputError
        If the catalogue has no such name; the message gives the nearest one.
    """
    facts = info(name)
    found, state, problem = _weights(facts)
    missing = [] if problem is None else [problem]
    if facts.needs_remote_code:
        missing.append("a network that is not downloaded code; compute features elsewhere (Embeddings.from_array)")
    elif not facts.loadable:
        missing.append(
            f"a way to load it: it needs {facts.library!r}, with which biosae loads no encoders. Instead: "
            + (facts.instead or f"compute features with {facts.library} and use Embeddings.from_array")
        )
    else:
        package = _PACKAGES[facts.library]
        if importlib.util.find_spec(package) is None:
            extra = _EXTRAS.get(facts.library)
            wanted = f"biosae[{extra}]" if extra else package
            missing.append(f"the package {package!r}: pip install '{wanted}'")
        if found is None and problem is None:
            missing += _download(facts)
    return EncoderCheck(
        name=facts.name, domain=facts.domain, item=facts.item, library=facts.library, source=facts.source,
        licence=facts.licence, derivatives_restricted=facts.derivatives_restricted, gated=facts.gated,
        found=found, hash=state, expects=_expects(facts), unconfirmed=facts.unconfirmed, missing=tuple(missing),
    )  # fmt: skip


def _expects(facts: EncoderInfo) -> dict[str, Any]:
    absent = "any" if facts.source.startswith("none:") else "not stated"  # no weights that would mind
    if facts.item == "features":
        return {"length": absent}
    if facts.item == "image":
        return {"size_px": facts.size or absent, "um_per_px": facts.mpp or absent}
    return {
        "rate_hz": facts.rate or absent, "unit": facts.unit or absent,
        "channels": list(facts.channels or ()) or facts.n_channels or absent, "seconds": facts.seconds or absent,
        "amplitude": facts.amplitude or absent, "band_hz": list(facts.band or ()) or absent,
    }  # fmt: skip


def _weights(facts: EncoderInfo) -> tuple[str | None, str, str | None]:
    """Where the weights are, the state of their hash, and what is wrong with them."""
    if facts.source.startswith("none:"):
        return "none needed", "no weights", None
    folder = find_folder(facts.source.removeprefix("local:")) if facts.source.startswith("local:") else None
    folder = folder or find_folder(facts.name)
    place = f"weights_dirs: {folder}"
    if folder is None and facts.source.startswith("bundled:"):
        folder, place = Path(__file__).parent / facts.source.removeprefix("bundled:"), "bundled"
    if folder is None:
        return _cached(facts)
    try:
        weights = from_folder(folder, library=facts.library)
        expect_hash(weights.file, weights.sha256, facts.sha256)
    except WeightsError as error:
        return place, "differs" if "SHA-256" in str(error) else "no weights", str(error)
    stated = facts.sha256 or _states(weights.config)
    return place, "agrees" if stated else "not stated", None


def _states(config: Any) -> bool:
    own = (config or {}).get("biosae")
    keys = ("sha256_model_safetensors", "sha256")
    return any(k in (config or {}) for k in keys) or (isinstance(own, dict) and keys[0] in own)


def _cached(facts: EncoderInfo) -> tuple[str | None, str, str | None]:
    """The same for the hub's cache, whose large files are named by the hash that the hub states."""
    if facts.repository is None or facts.library not in FILES:
        return None, "no weights", None
    from huggingface_hub import try_to_load_from_cache

    from biosae.files import hash_file

    repository, _, revision = facts.repository.partition("@")
    for name in FILES[facts.library]:
        path = try_to_load_from_cache(repository, name, revision=revision or None)
        if not isinstance(path, str):
            continue
        stored = Path(path).resolve().name
        place = f"hub cache: {Path(path).parent.name}"
        if len(stored) != 64:
            return place, "not stated", None
        if hash_file(Path(path)) == stored:
            return place, "agrees", None
        return place, "differs", f"a whole copy of the weights: {path} is damaged; delete it and load again"
    return None, "no weights", None


def _download(facts: EncoderInfo) -> list[str]:
    """What is missing to get the weights."""
    folder = facts.source.removeprefix("local:") if facts.source.startswith("local:") else facts.name
    place = f"put the folder {folder!r} into one of settings.weights_dirs"
    if facts.repository is None:
        return [f"the weights, which are on no hub: {place}"]
    from huggingface_hub import get_token

    steps = []
    if facts.gated and get_token() is None:
        steps.append(f"a token: accept the licence at https://huggingface.co/{facts.repository} and set HF_TOKEN")
    why = "settings.offline forbids it" if settings.offline else "load() downloads it"
    return [*steps, f"the weights ({why}): hf download {facts.repository}, or {place}"]
