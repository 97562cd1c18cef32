"""Text towers of open_clip models: texts to vectors in the space of the same model's image features."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from biosae.errors import IdentityError, InputError, MissingExtraError, WeightsError

if TYPE_CHECKING:
    import torch
    from torch import nn


class TextTower:
    """Texts to unit vectors; made by :func:`text_tower`.

    Attributes
    ----------
    name : str
    weights_sha256 : str
        Of the file that holds both towers: image features belong to these texts if their identity states the same hash.
    dim : int
        Width of the common space.
    """

    def __init__(
        self, network: nn.Module, tokenize: Callable[[list[str]], torch.Tensor], *, name: str, weights_sha256: str,
        device: str = "cpu",
    ) -> None:  # fmt: skip
        self.network = network.to(device).eval().requires_grad_(False)
        self.tokenize = tokenize
        self.name, self.weights_sha256, self.device = name, weights_sha256, device
        self.dim = self._run([""]).shape[1]

    def embed(self, texts: Sequence[str], *, templates: Sequence[str] = ("{}",), batch_size: int = 256) -> np.ndarray:
        """Unit vectors of texts.

        Parameters
        ----------
        texts
            Words or sentences. What does not fit the tower's context is cut by its tokenizer.
        templates
            Sentences with ``{}`` where the text goes. The vector is the unit mean over them.
        batch_size
            Sentences at a time.

        Returns
        -------
        ndarray (n, dim)
            float32, of unit length.

        Raises
        ------
        InputError
            If there are no texts, one is empty, or a template has no ``{}``.
        """
        texts = list(texts)
        if not texts or any(not isinstance(t, str) or not t.strip() for t in texts):
            raise InputError("give at least one text, and no empty ones")
        if not templates or any("{}" not in t for t in templates):
            raise InputError("every template needs {} where the text goes, such as 'an H&E image of {}'")
        sentences = [template.replace("{}", text) for text in texts for template in templates]
        rows = np.concatenate(
            [_unit(self._run(sentences[i : i + batch_size])) for i in range(0, len(sentences), batch_size)]
        )
        return _unit(rows.reshape(len(texts), len(templates), -1).mean(axis=1)).astype(np.float32)

    def check(self, emb: Any) -> None:
        """Refuse image features that are not of this model's common space.

        Raises
        ------
        IdentityError
            If the embeddings are of another model, layer or pooling, or of unknown origin.
        """
        identity = emb.identity or {}
        if identity.get("weights_sha256") != self.weights_sha256:
            raise IdentityError(
                f"these embeddings are of {identity.get('encoder', 'an unknown encoder')}, the texts of {self.name}: "
                "embed the images with the image tower of the same file"
            )
        if identity.get("layer") != "final" or identity.get("pool") != "head":
            raise IdentityError(
                "texts can be compared with the model's projected image features only; use layer=-1, pool='head' "
                f"(these are layer={identity.get('layer')!r}, pool={identity.get('pool')!r})"
            )

    def _run(self, sentences: list[str]) -> np.ndarray:
        import torch

        with torch.inference_mode():
            return self.network.encode_text(self.tokenize(sentences).to(self.device)).float().cpu().numpy()


def text_tower(name_or_path: str | Path, *, weights: str | Path | None = None, device: str = "auto") -> TextTower:
    """Load the text tower of an open_clip model, and prove that it holds the weights of its file.

    Parameters
    ----------
    name_or_path
        As in :func:`biosae.encoders.load`: a catalogue name, a folder with ``open_clip_config.json`` and a weight file
        (and the tokenizer's files, where the model does not use CLIP's own), ``"hf-hub:organisation/name"``, or
        ``"open_clip:<architecture>"`` with ``weights``.
    weights
        File or folder to use instead of the catalogue's source.
    device
        ``"auto"`` or a torch device.

    Raises
    ------
    InputError
        If the name is not of an open_clip model.
    WeightsError
        If weights are absent, do not fit or did not arrive (also ``OfflineError`` and ``GatedError``).
    MissingExtraError
        If the tower needs transformers and it is not installed.
    """
    import torch

    from biosae.encoders.build import BUILDERS
    from biosae.encoders.dinov2 import in_timm_names
    from biosae.encoders.loading import _identify
    from biosae.encoders.sources import StateFile, check_loaded, expect_hash, find

    facts, found = _identify(name_or_path)
    if found is None or weights is not None:
        if facts.library not in ("", "open_clip"):
            raise InputError(f"{facts.name} is a {facts.library} network without a text tower; name an open_clip model")
        found = find(facts, weights)
    library = found.library or facts.library
    if library != "open_clip":
        raise InputError(f"{facts.name} is a {library} network without a text tower; name an open_clip model")
    expect_hash(found.file, found.sha256, facts.sha256)
    built = BUILDERS["open_clip"](facts, found, {}, resized=False, random=False)
    if not hasattr(built.network, "encode_text"):
        raise InputError(f"{facts.name} has no text tower")
    check_loaded(built.network, in_timm_names(StateFile(found.file)))
    device = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    return TextTower(
        built.network, _tokenizer(facts, found), name=facts.name, weights_sha256=found.sha256, device=device
    )


def _tokenizer(facts: Any, found: Any) -> Callable[[list[str]], torch.Tensor]:
    """The tokenizer that belongs to the weights; nothing is downloaded that was not."""
    import open_clip

    source = f"local-dir:{found.file.parent}" if found.config is not None else facts.arch
    try:
        return open_clip.get_tokenizer(source)
    except ImportError as error:
        raise MissingExtraError(f"the tokenizer of {facts.name} needs a package that is absent ({error})") from error
    except (OSError, ValueError) as error:
        raise WeightsError(
            f"the tokenizer of {facts.name} could not be loaded ({error}); put its files (tokenizer.json, "
            f"tokenizer_config.json, ...) beside the weights in {found.file.parent}"
        ) from error


def _unit(rows: np.ndarray) -> np.ndarray:
    norm = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, norm, out=np.zeros_like(rows), where=norm > 0)
