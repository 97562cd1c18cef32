"""What every frozen encoder offers: layers, pooling, tokens with a grid, and an identity that is hashed."""

from __future__ import annotations

import copy
import math
from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from biosae.encoders import sites
from biosae.encoders.catalog import EncoderInfo
from biosae.encoders.hooks import Tap, run_with_taps
from biosae.encoders.scale import of_right_scale
from biosae.errors import InputError, nearest
from biosae.files import hash_json

if TYPE_CHECKING:
    import pandas as pd
    import torch
    from torch import nn

POOLS = ("default", "cls", "mean", "cls+mean", "registers", "head", "tokens")
PRECISIONS = ("float32", "bfloat16")
_DESCRIPTIVE = ("source", "library", "licence", "derivatives_restricted", "mpp", "tile_mpp", "given")


class Layer(NamedTuple):
    """One place in the network.

    Width of its tokens, pixels between tokens, module that makes it; then what it is (``kind``), the normalisation that
    it has gone through, the side of the module (see :class:`~biosae.encoders.hooks.Tap`), the columns taken of it, the
    axis order of a map (``NCHW`` or ``NHWC``), and the tokens before the patches (None: as many as the encoder has).
    """

    width: int
    stride: int
    path: str | None = None
    kind: str = "residual"
    norm: str = "none"
    side: str = "output"
    part: tuple[int, int] | None = None
    form: str = "tokens"
    n_prefix: int | None = None


def pool_tokens(x: torch.Tensor, pool: str, *, n_prefix: int, n_registers: int = 0) -> torch.Tensor:
    """Pool a token sequence ``(B, n_prefix + T, d)``; prefix tokens are in neither ``mean`` nor ``tokens``.

    The last ``n_registers`` of the prefix tokens are the registers.

    Returns
    -------
    torch.Tensor
        float32; ``(B, d)`` for ``cls``, ``mean`` and ``registers`` (their mean), ``(B, 2 d)`` for ``cls+mean``,
        ``(B, T, d)`` for ``tokens``, ``(B, n_prefix + T, d)`` for ``all``.
    """
    import torch

    if pool == "all":
        return x.float().clone()
    if pool == "registers":
        return x[:, n_prefix - n_registers : n_prefix].float().mean(dim=1)

    if pool == "tokens":
        return x[:, n_prefix:].float().clone()
    parts = []
    if "cls" in pool:
        parts.append(x[:, 0].float())
    if "mean" in pool:
        parts.append(x[:, n_prefix:].float().mean(dim=1))
    return torch.cat(parts, dim=-1)


def fingerprint(identity: Mapping[str, Any]) -> str:
    """Hash of what determines the numbers of an embedding: weights, architecture, layer, pooling, preprocessing.

    Where the weights came from, their licence and the tiles' own micrometres per pixel are not in it; neither is the
    name, where the weights have a hash.

    Parameters
    ----------
    identity
        As :meth:`Encoder.identity` gives it, or a user's own mapping.

    Returns
    -------
    str
        SHA-256, hex.
    """
    left_out = _DESCRIPTIVE + (("encoder",) if identity.get("weights_sha256") else ())
    return hash_json({k: v for k, v in identity.items() if k not in left_out})


class Encoder(ABC):
    """A frozen network with its preprocessing. Made by :func:`biosae.encoders.load`.

    Attributes
    ----------
    item : str
        Kind of item that it takes: ``"image"``, ``"signal"`` or ``"features"`` (see :class:`biosae.Samples`).
    info : EncoderInfo
        Facts, after the overrides of ``load``.
    preprocess : Preprocess
        Item to the network's input without its batch axis, for images ``uint8 (H, W, 3)`` to ``float32 (3, h, w)``;
        picklable.
    model : torch.nn.Module
        The network, in evaluation mode, without gradients.
    layers : list of str
        Names in order of depth; the last is ``"final"``, the network's own output.
    weights_sha256 : str
        Hash of the weight file, or ``"random:<seed>"`` for a random control.
    device, precision : str
        Where and in which number format the network runs.
    """

    item = "image"
    in_channels = 3
    _map_form = "NCHW"
    match_said: bool | None = None

    def __init__(
        self,
        model: nn.Module,
        info: EncoderInfo,
        preprocess: Any,
        sites: Mapping[str, Layer],
        *,
        architecture: Mapping[str, Any],
        weights_sha256: str,
        source: str,
        head_width: int,
        n_prefix: int = 0,
        has_cls: bool = False,
        n_registers: int = 0,
        final_norm: str = "none",
        head_norm: str = "none",
        device: str = "cpu",
        precision: str = "float32",
        channels_last: bool = False,
    ) -> None:
        import torch

        if precision not in PRECISIONS:
            raise InputError(f"no precision {precision!r}; {nearest(precision, PRECISIONS)}")
        self.info, self.preprocess, self.source = info, preprocess, source
        self.weights_sha256, self.architecture = weights_sha256, dict(architecture)
        self.n_prefix, self.has_cls, self.n_registers = n_prefix, has_cls, n_registers
        self.precision, self.channels_last = precision, channels_last
        self._sites, self._head_width = dict(sites), head_width
        self._further: dict[str, Layer] = {}
        self._shapes: dict[tuple[int, int], dict[str, list[tuple[int, ...]]]] = {}
        self._final_norm, self._head_norm = final_norm, head_norm
        self._memory = torch.channels_last if channels_last else torch.contiguous_format
        self.model = model.eval().requires_grad_(False).to(dtype=getattr(torch, precision), memory_format=self._memory)
        self.to(device)

    def __repr__(self) -> str:
        control = "RANDOM WEIGHTS (control), " if self.weights_sha256.startswith("random:") else ""
        return (
            f"<Encoder {self.info.name}: {control}{self.info.library}, {len(self.layers)} layers, weights "
            f"{self.weights_sha256[:16]}, {self.device}, {self.precision}, licence {self.info.licence}>"
        )

    @property
    def layers(self) -> list[str]:
        """Names of the layers in order of depth; the last one is ``"final"``."""
        return list(self._sites)

    def to(self, device: str) -> Encoder:
        """Move the network; returns the encoder itself."""
        from biosae.settings import resolve_device

        self.device = resolve_device(device)
        self.model.to(self.device)
        return self

    def at_mpp(self, mpp: float | None, *, match_mpp: bool | None = None) -> Encoder:
        """The same network for tiles of another physical scale (micrometres per pixel); weights are shared.

        ``match_mpp=None`` keeps what was said to ``load`` or here before. If nothing was, encoders without a fixed
        input size rescale wherever both scales are known, and encoders with one do not (and refuse samples whose scale
        comes out wrong, see :meth:`suited`).
        """
        other = copy.copy(self)
        if match_mpp is None:
            match_mpp = self.match_said
        else:
            other.match_said = match_mpp
        if match_mpp is None:
            match_mpp = self.preprocess.size is None and None not in (mpp, self.preprocess.target_mpp)
        other.preprocess = replace(self.preprocess, tile_mpp=mpp, match_mpp=match_mpp)
        return other

    def suited(self, samples: Any) -> Encoder:
        """The encoder set to the physical scale of the samples (micrometres per pixel, for images).

        An encoder with a fixed input size and a scale of its own resizes tiles to that size. The scale that results for
        the first readable tile, ``tile_mpp x side / resized side``, must lie within 0.8 to 1.25 of the encoder's,
        unless ``match_mpp`` was given.

        Raises
        ------
        InputError
            If the samples' kind or scale is not what the encoder takes; the message says what to change.
        """
        self._check_item(samples)
        known, mpp = self.preprocess.tile_mpp, samples.mpp
        if mpp is None or (known is not None and math.isclose(known, mpp, rel_tol=1e-3)):
            return of_right_scale(self, samples)
        if known is not None:
            raise InputError(
                f"the encoder was loaded for tiles of {known:g} um/px, the samples have {mpp:g}; "
                "pass encoder.at_mpp(samples.mpp)"
            )
        return of_right_scale(self.at_mpp(mpp), samples)

    def _check_item(self, samples: Any) -> None:
        given = getattr(samples, "item", "image")
        if given != self.item:
            raise InputError(
                f"{self.info.name} takes an {self.item} a sample, these samples are of kind {given!r}; choose one of "
                f"bs.encoders.list(item={given!r})"
            )

    def resolve_layer(self, layer: int | str) -> str:
        """Name of a layer given as a name, a position or a position from the end.

        Parameters
        ----------
        layer
            A name of ``layers`` or of :meth:`sites`; ``"norm"`` and ``"embedding"`` also mean ``"final"``. An integer
            counts ``layers``:
            ``0`` is the first block of a transformer, ``-1`` is ``"final"``, ``-2`` the last block.

        Raises
        ------
        InputError
            If there is no such layer.
        """
        names = self.layers
        if isinstance(layer, str):
            layer = {"norm": "final", "embedding": "final"}.get(layer, layer)
            if layer in names:
                return layer
            if not layer.lstrip("-").isdigit():
                if self._site(layer) is not None:
                    return layer
                known = [*names, *sites.block_sites(self)] if self.item == "image" else names
                raise InputError(f"{self.info.name} has no layer {layer!r}; {nearest(layer, known)}")
        try:
            return names[int(layer)]
        except (IndexError, TypeError, ValueError):
            raise InputError(
                f"{self.info.name} has {len(names)} layers ({names[0]} ... {names[-1]}), not number {layer!r}"
            ) from None

    def _site(self, name: str) -> Layer | None:
        """The place of a name; places that are not among the layers are looked up once."""
        if name not in self._sites and name not in self._further:
            site = sites.find(self, name)
            if site is not None:
                self._further[name] = site
        return self._sites.get(name) or self._further.get(name)

    def sites(self, *, modules: bool = False) -> pd.DataFrame:
        """Every place whose values ``layer=`` can ask for.

        Parameters
        ----------
        modules
            Also list every single module of the network, by its path (``"module:<path>"``); this runs the network once
            over blank images.

        Returns
        -------
        pandas.DataFrame
            Index ``site``, in order of depth within the network; columns ``kind`` (``residual``, ``attention``,
            ``head``, ``mlp``, ``norm``, ``norm input``, ``module``, ``final``), ``width`` of a token, ``tokens``
            (patch tokens of an input of the encoder's size; missing where that is not fixed), ``prefix`` (tokens before
            them), ``norm`` (as in :meth:`identity`) and ``module`` (path of the module).
        """
        return sites.table(self, modules=modules)

    def resolve_pool(self, layer: int | str, pool: str) -> str:
        """What a pooling comes to at a layer; ``"default"`` becomes a definite one.

        At ``"final"`` the default is that of the catalogue; at an earlier layer, where the network's own head does
        not apply, a head becomes the mean of the patch tokens.

        Raises
        ------
        InputError
            If the pooling is unknown, or the network has no class token or no head there.
        """
        name = self.resolve_layer(layer)
        if pool not in POOLS:
            raise InputError(f"no pooling {pool!r}; {nearest(pool, POOLS)}")
        prefixed = self._site(name).n_prefix is None
        if pool == "default":
            pool = self.info.pool if name == "final" or (prefixed and self.info.pool != "head") else "mean"
        if "cls" in pool and not (self.has_cls and prefixed):
            raise InputError(f"{self.info.name} has no class token at {name!r}; use pool='mean' or pool='tokens'")
        if pool == "registers" and not (self.n_registers and prefixed):
            raise InputError(f"{self.info.name} has no register tokens at {name!r}; use pool='mean' or pool='tokens'")
        if pool == "head" and name != "final":
            raise InputError(f"the head of {self.info.name} applies to layer 'final' only, not to {name!r}")
        return pool

    def dim(self, layer: int | str = -1, pool: str = "default") -> int:
        """Length of one embedding vector (of one token for ``pool="tokens"``)."""
        name, pool = self.resolve_layer(layer), self.resolve_pool(layer, pool)
        if pool == "head":
            return self._head_width
        return self._site(name).width * (2 if pool == "cls+mean" else 1)

    def grid(self, layer: int | str, input_hw: tuple[int, int]) -> tuple[int, int]:
        """Rows and columns of the tokens of a layer, for an input of ``input_hw`` pixels (after preprocessing).

        Token ``t`` of ``pool="tokens"`` lies at row ``t // columns``, column ``t % columns``. For signals ``input_hw``
        is (channels, time steps), rows are channels (1 where the tokens span all channels) and columns steps of time.
        """
        name = self.resolve_layer(layer)
        site = self._site(name)
        if name not in self._sites and site.n_prefix is not None:
            return sites.module_grid(self, site, input_hw)
        return self._grid(name, input_hw)

    def _grid(self, name: str, input_hw: tuple[int, int]) -> tuple[int, int]:
        stride = self._site(name).stride
        return input_hw[0] // stride, input_hw[1] // stride

    def identity(self, layer: int | str = -1, pool: str = "default") -> dict[str, Any]:
        """What these embeddings are: encoder, weights, layer, pooling, normalisation, preprocessing, licence.

        ``norm`` is ``"final"`` where the network's last normalisation has been applied, ``"norm1"`` or ``"norm2"`` at
        the output of a block's own normalisation, and ``"none"`` for the raw output of a block (for a transformer the
        residual stream), of its attention or of its MLP. ``mpp`` is the physical scale the input was brought
        to, None where it was not matched; ``tile_mpp`` that of the tiles.
        """
        name, pool = self.resolve_layer(layer), self.resolve_pool(layer, pool)
        spec = self.preprocess.spec()
        return {
            "encoder": self.info.name,
            "library": self.info.library,
            "source": self.source,
            "architecture": self.architecture,
            "weights_sha256": self.weights_sha256,
            "precision": self.precision,
            "layer": name,
            "pool": pool,
            "norm": self._norm(name, pool),
            "preprocess": spec,
            "dim": self.dim(name, pool),
            "mpp": spec.get("rescale_to_mpp"),
            "tile_mpp": getattr(self.preprocess, "tile_mpp", None),
            "licence": self.info.licence,
            "derivatives_restricted": self.info.derivatives_restricted,
        }

    def _norm(self, name: str, pool: str) -> str:
        if name != "final":
            return self._site(name).norm
        return self._head_norm if pool == "head" else self._final_norm

    def forward(
        self, batch: torch.Tensor, layers: int | str | Iterable[int | str] = -1, pool: str = "default"
    ) -> dict[str, torch.Tensor]:
        """Embeddings of a batch at one or several layers, in one pass that ends at the deepest of them.

        Parameters
        ----------
        batch
            Preprocessed items: ``(B, 3, H, W)`` float32 for images, ``(B, C, T)`` for signals, ``(B, d)`` for features.
        layers
            One layer or several (see :meth:`resolve_layer`).
        pool
            ``"cls"``, ``"mean"`` (patch tokens only), ``"cls+mean"``, ``"registers"`` (mean of the register tokens),
            ``"head"`` (the network's own pooling),
            ``"default"`` (the encoder's published use) or ``"tokens"``.

        Returns
        -------
        dict
            Resolved layer name to float32 ``(B, d)``, or ``(B, T, d)`` for ``"tokens"``, on the encoder's device.

        Raises
        ------
        InputError
            If the layer, the pooling or the batch's shape does not suit the network.
        """
        wanted = [layers] if isinstance(layers, (int, str)) else list(layers)
        if not wanted:
            raise InputError("give at least one layer")
        self._check_batch(batch)
        return self._outputs(batch, {self.resolve_layer(one): self.resolve_pool(one, pool) for one in wanted})

    def _outputs(self, batch: torch.Tensor, pools: dict[str, str]) -> dict[str, torch.Tensor]:
        """Pooled float32 outputs of places, by resolved name and definite pooling."""
        import torch

        dtype = getattr(torch, self.precision)
        with torch.inference_mode():
            memory = self._memory if batch.ndim == 4 else torch.contiguous_format
            x = batch.to(self.device, dtype=dtype, memory_format=memory, non_blocking=True)
            listed = all(name in self._sites for name in pools)
            found = self._run(x, pools) if listed else self._run_tapped(x, pools)
        return {name: found[name].float() for name in pools}

    def _run_tapped(self, x: torch.Tensor, pools: dict[str, str]) -> dict[str, torch.Tensor]:
        """The same where some places are not among the layers: these are taken while the network runs as usual."""
        taps, rest = {}, {}
        for name, pool in pools.items():
            site = self._site(name)
            if name == "final" or site.path is None:
                rest[name] = pool
            else:
                taps[name] = Tap(site.path, partial(self._reduce, site=site, pool=pool), site.side)
        whole = rest if "final" in rest else rest | {"final": self.resolve_pool("final", "default")}
        found, out = run_with_taps(self.model, taps, lambda: self._run(x, whole), stop=not rest)
        absent = [name for name in taps if name not in found]
        if absent:
            raise InputError(f"{absent[0]!r} did not run in the pass of {self.info.name}; choose another of sites()")
        return found | {name: out[name] for name in rest}

    def _reduce(self, y: torch.Tensor, *, site: Layer, pool: str) -> torch.Tensor:
        """Pooled value of a place."""
        y = sites.tokens_of(y, site.form)
        if site.part is not None:
            y = y[..., slice(*site.part)]
        own = site.n_prefix is None
        return pool_tokens(
            y, pool, n_prefix=self.n_prefix if own else site.n_prefix, n_registers=self.n_registers if own else 0
        )

    __call__ = forward

    def _check_batch(self, batch: torch.Tensor) -> None:
        """Raise InputError if the network cannot take a batch of this shape."""
        if batch.ndim != 4 or batch.shape[1] != self.in_channels:
            raise InputError(f"a batch must be (B, {self.in_channels}, H, W), got {tuple(batch.shape)}")
        self._check_size(tuple(batch.shape[2:]))

    def _check_size(self, input_hw: tuple[int, int]) -> None:
        """Raise InputError if an image network cannot take inputs of this size in pixels; every size is fine here."""
        return

    @abstractmethod
    def _run(self, x: torch.Tensor, pools: dict[str, str]) -> dict[str, torch.Tensor]:
        """Pooled outputs of the resolved layers; ``pools`` is layer name to a definite pooling."""
