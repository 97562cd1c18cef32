"""Every kind of coder by one name, for those who choose among them: the shell, pipelines, comparisons."""

from __future__ import annotations

import importlib
from dataclasses import fields
from typing import Any

from biosae.errors import InputError, nearest
from biosae.sae.coder import Coder
from biosae.sae.config import ARCHITECTURES
from biosae.sae.estimator import SAE
from biosae.sae.methods import METHODS, method

OTHERS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "itda": ("biosae.sae.itda", "ITDA", {}),
    "semi_nmf": ("biosae.sae.semi_nmf", "SemiNMF", {}),
    **{
        name: ("biosae.sae.baselines", "Baseline", {"method": name})
        for name in ("pca", "ica", "kmeans", "nmf", "dictionary")
    },
}
"""Coders that are not trained by gradient: module, class and settings."""


def named(name: str, **settings: Any) -> Coder:
    """An unfitted coder by the name of its method.

    Parameters
    ----------
    name
        An architecture of :class:`biosae.sae.SAE`, or ``itda``, ``semi_nmf``, ``pca``, ``ica``, ``kmeans``, ``nmf``,
        ``dictionary``.
    **settings
        Settings of the coder; what an :class:`SAE` has no setting for is an option of its architecture.

    Raises
    ------
    InputError
        For an unknown name or setting; the message gives the nearest valid one.

    Examples
    --------
    >>> named("gba", highest=0.5, n_latents=64).options
    {'highest': 0.5}
    """
    if name in OTHERS:
        module, kind, given = OTHERS[name]
        return getattr(importlib.import_module(module), kind)().set_params(**given, **settings)
    known = [*ARCHITECTURES, *METHODS, *OTHERS]
    if name not in known:
        raise InputError(f"there is no method {name!r}; {nearest(name, dict.fromkeys(known))}")
    own = {f.name for f in fields(method(name).Options)} if name in METHODS else set()
    options = dict(settings.pop("options", None) or {})
    if options or name not in ARCHITECTURES or not set(settings) <= set(SAE.names()):
        options |= {setting: settings.pop(setting) for setting in list(settings) if setting in own}
    for setting in settings:
        if setting not in SAE.names():
            raise InputError(f"{name!r} has no setting {setting!r}; {nearest(setting, [*sorted(own), *SAE.names()])}")
    if options:
        settings["options"] = options
    return SAE().set_params(architecture=name, **settings)
