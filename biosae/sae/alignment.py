"""Two tables of the same samples brought into one space, by a pair of linear autoencoders that learn to match pairs.

``group_sparse`` and ``vl_sae`` need tables in which the members of a pair lie close by cosine. Encoders that were
trained together (CLIP, CLAP) give such tables; a histology encoder and a gene profile do not.

Source: the auxiliary autoencoder of Shen, Sun, Huang, Wang 2025, arXiv 2510.21323 (VL-SAE), with the released code.
"""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import safetensors.torch
import torch
from torch.nn import functional as F

from biosae.errors import FormatError, InputError, NotFittedError
from biosae.sae.checkpoint import write_tensors
from biosae.sae.config import Settings
from biosae.sae.partner import Joined
from biosae.sae.rows import Rows

FORMAT = "biosae-alignment"


@dataclass(eq=False)
class Alignment(Settings):
    """Linear maps of two tables into one space in which the two rows of a sample match.

    ``h_m = (x_m - mu_m) c_m P_m^T + p_m`` and back ``x_hat_m = h_m Q_m^T + q_m``;
    ``L = InfoNCE(h_1, h_2) + MSE(x_1, x_hat_1) + MSE(x_2, x_hat_2)`` with element means;
    both directions of InfoNCE are averaged.

    Attributes
    ----------
    n_features_in_ : tuple of two int
        Widths of the tables.
    n_components_ : int
        Width of the common space.
    history_ : list of float
        Loss of each step.
    """

    n_components: int | None = None
    """Width of the common space. None: that of the narrower table."""
    temperature: float = 0.07
    """Temperature of InfoNCE."""
    cosine: bool = True
    """Match by cosines, as the codes of both methods do. False: by inner products, as the released code does."""
    learning_rate: float = 3e-3
    """Largest step of AdamW; the released code takes 5e-5 for millions of pairs."""
    weight_decay: float = 0.01
    """Weight decay of AdamW."""
    batch_size: int = 256
    """Pairs a step: each is told from all others of its batch. The released code takes 2,048."""
    max_epochs: int = 50
    """Passes over the pairs, but at least ``min_steps`` steps."""
    min_steps: int = 500
    """Steps at least: of few pairs 50 passes are very few steps."""
    random_state: int | None = None
    """Seed of first weights and order. None: drawn from the system, kept in ``random_state_``."""

    def fit(self, X: Any, Y: Any) -> Alignment:
        """Fit to paired rows, (n, d) and (n, d2), arrays or Embeddings of the same samples.

        Raises
        ------
        InputError
            For fewer than two pairs, tables that do not fit each other, or settings that make no sense.
        """
        self._validate()
        tables = Joined(X, Y, "target")
        if tables.shape[0] < 2:
            raise InputError("an alignment needs at least two pairs: InfoNCE tells a pair from the others")
        if self.random_state is None:
            self.random_state_ = int(np.random.SeedSequence().generate_state(1)[0])
        else:
            self.random_state_ = int(self.random_state)
        generator = torch.Generator().manual_seed(self.random_state_)
        d = tables.widths[0]
        self.n_features_in_ = tables.widths
        self.n_components_ = self.n_components or min(tables.widths)
        joined = torch.from_numpy(tables[:])
        parts = []
        self._tensors = {}
        for t, part in enumerate((joined[:, :d], joined[:, d:])):
            mean = part.mean(0, dtype=torch.float64)
            spread = (part - mean).square().mean().sqrt()
            self._tensors[f"mean_{t}"] = mean.float()
            self._tensors[f"scale_{t}"] = (1 / spread if spread > 0 else torch.ones(())).float()
            parts.append(self._scaled(part, t))
        for t, width in enumerate(tables.widths):
            for name, rows, columns in (("in", self.n_components_, width), ("out", width, self.n_components_)):
                bound = columns**-0.5
                weight = torch.rand(rows, columns + 1, generator=generator) * 2 * bound - bound
                self._tensors[f"W_{name}_{t}"], self._tensors[f"b_{name}_{t}"] = (
                    weight[:, :-1].clone(),
                    weight[:, -1].clone(),
                )
        self._train(*parts, generator)
        return self

    def _train(self, x: torch.Tensor, y: torch.Tensor, generator: torch.Generator) -> None:
        learnt = [v.requires_grad_(True) for name, v in self._tensors.items() if name[0] in "Wb"]
        n, size = len(x), min(self.batch_size, len(x))
        per_epoch = n // size
        n_steps = max(self.max_epochs * per_epoch, self.min_steps)
        optimiser = torch.optim.AdamW(learnt, lr=self.learning_rate, weight_decay=self.weight_decay)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, T_max=n_steps)
        self.history_ = []
        for step in range(n_steps):
            if step % per_epoch == 0:
                order = torch.randperm(n, generator=generator)
            batch = order[step % per_epoch * size :][:size]
            optimiser.zero_grad()
            loss = self._loss(x[batch], y[batch])
            loss.backward()
            optimiser.step()
            schedule.step()
            self.history_.append(float(loss.detach()))
        for value in learnt:
            value.requires_grad_(False)

    def _loss(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        codes = [self._map(rows, "in", t) for t, rows in enumerate((x, y))]
        rebuilt = [
            F.mse_loss(self._map(h, "out", t), rows) for t, (h, rows) in enumerate(zip(codes, (x, y), strict=True))
        ]
        return info_nce(*codes, temperature=self.temperature, cosine=self.cosine) + rebuilt[0] + rebuilt[1]

    def transform(self, X: Any, *, table: int = 0) -> np.ndarray:
        """Rows of the first (0) or second (1) table in the common space, float32 (n, n_components)."""
        self._check_fitted()
        rows = Rows(X)
        if rows.d != self.n_features_in_[table]:
            raise InputError(
                f"table {table} had {self.n_features_in_[table]} columns when it was fitted, found {rows.d}"
            )
        parts = [self._map(self._scaled(torch.from_numpy(x), table), "in", table) for _, x in rows.blocks()]
        return torch.cat(parts).numpy()

    def inverse_transform(self, H: Any, *, table: int = 0) -> np.ndarray:
        """Rows of a table rebuilt from the common space, float32 (n, d); of the other table: what belongs to them."""
        self._check_fitted()
        H = torch.from_numpy(np.asarray(H, np.float32))
        if H.ndim != 2 or H.shape[1] != self.n_components_:
            raise InputError(f"expected {self.n_components_} columns of the common space, found shape {tuple(H.shape)}")
        t = self._tensors
        return (self._map(H, "out", table) / t[f"scale_{table}"] + t[f"mean_{table}"]).numpy()

    def matched(self, X: Any, Y: Any) -> float:
        """Share of the rows of X whose nearest row of Y, by cosine in the common space, is their own."""
        self._check_fitted()
        Joined(X, Y, "target")  # refuses rows that are no pairs
        x, y = (F.normalize(torch.from_numpy(self.transform(rows, table=t)), dim=1) for t, rows in enumerate((X, Y)))
        return float(((x @ y.T).argmax(1) == torch.arange(len(x))).float().mean())

    def save(self, file: str | os.PathLike) -> None:
        """Write one safetensors file."""
        self._check_fitted()
        header = {"format": FORMAT, "settings": json.dumps({**asdict(self), "random_state": self.random_state_})}
        write_tensors(Path(file), self._tensors, header)

    @classmethod
    def load(cls, file: str | os.PathLike) -> Alignment:
        """Read what :meth:`save` wrote; ``history_`` is not kept.

        Raises
        ------
        FormatError
            If the file is absent, corrupt or of another kind.
        """
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                header = opened.metadata() or {}
                tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is not a dict)
        except Exception as error:  # safetensors has an error type of its own
            raise FormatError(f"{file} is not a readable alignment ({error})") from None
        expected = {f"{n}_{t}" for n in ("mean", "scale", "W_in", "b_in", "W_out", "b_out") for t in (0, 1)}
        if header.get("format") != FORMAT or tensors.keys() != expected:
            raise FormatError(f"{file} is not an alignment; give a file that Alignment.save wrote")
        made = cls(**json.loads(header["settings"]))
        made.random_state_, made._tensors = made.random_state, tensors
        made.n_features_in_ = tuple(tensors[f"W_in_{t}"].shape[1] for t in (0, 1))
        made.n_components_ = len(tensors["b_in_0"])
        return made

    def _scaled(self, x: torch.Tensor, table: int) -> torch.Tensor:
        return (x - self._tensors[f"mean_{table}"]) * self._tensors[f"scale_{table}"]

    def _map(self, x: torch.Tensor, name: str, table: int) -> torch.Tensor:
        return F.linear(x, self._tensors[f"W_{name}_{table}"], self._tensors[f"b_{name}_{table}"])

    def _check_fitted(self) -> None:
        if not hasattr(self, "_tensors"):
            raise NotFittedError("this alignment is not fitted yet: call fit(X, Y) first, or Alignment.load(file)")

    def _validate(self) -> None:
        for name in ("temperature", "learning_rate", "batch_size", "max_epochs", "min_steps"):
            if not getattr(self, name) > 0:
                raise InputError(f"{name}={getattr(self, name)!r} must be above 0")
        if self.batch_size < 2:
            raise InputError("batch_size must be at least 2: InfoNCE tells a pair from the others of its batch")


def info_nce(first: torch.Tensor, second: torch.Tensor, *, temperature: float, cosine: bool = True) -> torch.Tensor:
    """InfoNCE of pairs (row i of both), (n, e): mean over both directions of the cross-entropy of s_ij / temperature.

    s_ij is the cosine, or the inner product. It is 0 at best and log n where all rows are alike.
    """
    if cosine:
        first, second = F.normalize(first, dim=1), F.normalize(second, dim=1)
    similar = first @ second.T / temperature
    own = torch.arange(len(first), device=first.device)
    return (F.cross_entropy(similar, own) + F.cross_entropy(similar.T, own)) / 2
