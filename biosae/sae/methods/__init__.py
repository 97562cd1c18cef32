"""Architectures that are trained by autograd, one file each: how they encode, decode, and what they minimise.

``SAE("gated", options={"l1": 0.1})`` trains one of them; docs/methods has a page for each.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from dataclasses import fields
from typing import Any

from biosae.errors import InputError, nearest

METHODS: dict[str, str] = {
    "relu": "biosae.sae.methods.plain:Relu",
    "topk": "biosae.sae.methods.plain:TopK",
    "batchtopk": "biosae.sae.methods.plain:BatchTopK",
    "matryoshka": "biosae.sae.methods.plain:Matryoshka",
    "jumprelu": "biosae.sae.methods.plain:JumpRelu",
    "gated": "biosae.sae.methods.gated:Gated",
    "abstopk": "biosae.sae.methods.abstopk:AbsTopK",
    "threshold": "biosae.sae.methods.threshold:Threshold",
    "topk_signed": "biosae.sae.methods.topk_signed:SignedTopK",
    "group_sparse": "biosae.sae.methods.group_sparse:GroupSparse",
    "vl_sae": "biosae.sae.methods.vl:VLSAE",
    "transcoder": "biosae.sae.methods.transcoder:Transcoder",
    "polysae": "biosae.sae.methods.poly:PolySAE",
    "mp": "biosae.sae.methods.pursuit:MatchingPursuit",
    "variational": "biosae.sae.methods.variational:Variational",
    "archetypal": "biosae.sae.methods.archetypal:StrictArchetypal",
    "relaxed_archetypal": "biosae.sae.methods.archetypal:Archetypal",
    "top_afa": "biosae.sae.methods.afa:TopAFA",
    "mutual_choice": "biosae.sae.methods.choice:MutualChoice",
    "feature_choice": "biosae.sae.methods.choice:FeatureChoice",
    "gsae": "biosae.sae.methods.gsae:GradientSAE",
    "gba": "biosae.sae.methods.gba:GBA",
}
"""Architecture to ``module:class``, imported when it is asked for."""


def method(name: str) -> type:
    """Class of an architecture, a :class:`biosae.sae.methods.base.Method`.

    Raises
    ------
    InputError
        If there is none of this name.
    """
    if name not in METHODS:
        raise InputError(f"architecture={name!r} takes no options; {nearest(name, tuple(METHODS))}")
    module, kind = METHODS[name].split(":")
    return getattr(importlib.import_module(module), kind)


def options_of(name: str, options: Mapping[str, Any] | None) -> Any:
    """The ``Options`` of an architecture, checked.

    Raises
    ------
    InputError
        For an unknown option, with the nearest known one, or a value that the architecture does not take.
    """
    kind = method(name).Options
    known = [f.name for f in fields(kind)]
    if options is not None and not isinstance(options, Mapping):
        raise InputError(f"options={options!r} must be a dict of settings of {name!r}: {', '.join(known) or 'none'}")
    for given in options or {}:
        if given not in known:
            hint = nearest(given, known) if known else "it has none"
            raise InputError(f"architecture {name!r} has no option {given!r}; {hint}")
    made = kind(**(options or {}))
    made.check()
    return made
