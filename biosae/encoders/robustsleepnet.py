"""RobustSleepNet: an encoder of 30 s epochs of sleep, for any set of derivations.

Source: Guillot and Thorey 2021, "RobustSleepNet: Transfer learning for automated sleep staging at scale", IEEE TNSRE,
doi 10.1109/TNSRE.2021.3098968; Dreem-Organization/RobustSleepNet (MIT).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from biosae.encoders.base import Layer, pool_tokens
from biosae.encoders.signals import SignalEncoder

EPOCH = 1800
"""Samples in an epoch: 30 s at 60 Hz."""
FFT, HOP = 128, 60
FRAMES = (EPOCH - FFT) // HOP + 1
STAGES = ("Wake", "N1", "N2", "N3", "REM")
"""Classes of the classifier, in order."""


class Attention(nn.Module):
    """Softmax weights ``context_vector(tanh(context_matrix(x)))`` over one axis, and the weighted sum."""

    def __init__(self, width: int, context: int) -> None:
        super().__init__()
        self.context_matrix = nn.Linear(width, context)
        self.context_vector = nn.Linear(context, 1, bias=False)

    def forward(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        score = self.context_vector(torch.tanh(self.context_matrix(x)))
        return (x * score.softmax(dim)).sum(dim)


class _Residual(nn.Module):
    """Mean of a linear map and a bidirectional GRU."""

    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.gru = nn.GRU(inputs, hidden, batch_first=True, bidirectional=True)
        self.residual_connection = nn.Linear(inputs, 2 * hidden)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return (self.residual_connection(x) + self.gru(x)[0]) / 2


class RobustSleepNet(nn.Module):
    """Spectrogram, attention over channels, GRU over frames, attention over frames, two GRUs over epochs."""

    def __init__(self) -> None:
        super().__init__()
        heads = nn.ModuleDict({f"attention_{i}": Attention(32, 30) for i in range(4)})
        encoder = {
            "filter_reduction": nn.Linear(FFT // 2 + 1, 32),
            "channel_attention": heads,
            "gru": nn.GRU(128, 64, batch_first=True, bidirectional=True),
        }
        self.encoder_eeg = nn.ModuleDict({"encoder": nn.ModuleDict(encoder)})
        self.reducer_eeg = nn.ModuleDict({"reduction": nn.Linear(128, 50), "attention": Attention(50, 25)})
        self.sequence_encoder = nn.ModuleDict({"encoder": nn.ModuleList([_Residual(50, 50), _Residual(100, 50)])})
        self.classifier = nn.Linear(100, len(STAGES))

    def spectrogram(self, x: torch.Tensor) -> torch.Tensor:
        """Standardised log spectrogram ``(B, C, E, 28, 65)`` of ``(B, C, E * 1800)``.

        Log10 power of 128-sample frames every 60 samples (symmetric Hann window of sum 1), standardised for each
        channel and frequency over all frames of all epochs of the item.
        """
        exact = torch.float32 if x.device.type == "mps" else torch.float64  # empty bins are rounding noise in float32
        frames = (x.unflatten(-1, (-1, EPOCH)).clamp(-20, 20) / 20).to(exact).unfold(-1, FFT, HOP)
        window = torch.hann_window(FFT, periodic=False, dtype=exact, device=x.device)
        log = torch.fft.rfft(frames * (window / window.sum())).abs().square().to(x.dtype).clamp(min=1e-20).log10()
        mean, sd = log.mean((2, 3), keepdim=True), log.std((2, 3), keepdim=True)
        return (log - mean) / sd.clamp(min=1e-8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        """All layers of ``(B, C, E * 1800)``: ``spectrogram (B, C, E, 28, 65)``, ``frames (B, E, 28, 128)``,
        ``epochs (B, E, 50)`` and ``final (B, E, 100)``."""
        spectrogram = self.spectrogram(x)
        coder = self.encoder_eeg["encoder"]
        filtered = coder["filter_reduction"](spectrogram)
        mixed = torch.cat([head(filtered, 1) for head in coder["channel_attention"].values()], dim=-1)
        frames = coder["gru"](mixed.flatten(0, 1))[0].unflatten(0, mixed.shape[:2])
        epochs = self.reducer_eeg["attention"](self.reducer_eeg["reduction"](frames), 2)
        sequence = epochs
        for layer in self.sequence_encoder["encoder"]:
            sequence = layer(sequence)
        return {"spectrogram": spectrogram, "frames": frames, "epochs": epochs, "final": sequence}


class RobustSleepNetEncoder(SignalEncoder):
    """RobustSleepNet over recordings or runs of 30 s epochs (60 Hz, any EEG and EOG derivations, order irrelevant).

    One item is a run of epochs, best a whole night: the spectrogram is standardised over all of them and the last
    layers look at the neighbours, so an epoch's embedding depends on the other epochs of its item. A token of
    ``final`` and of ``epochs`` is one epoch, of ``frames`` one second, of ``spectrogram`` one frame of one channel.
    """

    def __init__(self, model: RobustSleepNet, *args: Any, **kwargs: Any) -> None:
        sites = {
            "spectrogram": Layer(FFT // 2 + 1, HOP),
            "frames": Layer(128, HOP),
            "epochs": Layer(50, EPOCH),
            "final": Layer(100, EPOCH),
        }
        super().__init__(model, *args, sites, head_width=100, **kwargs)

    def grid(self, layer: int | str, input_hw: tuple[int, int]) -> tuple[int, int]:
        """(channels or 1, frames or epochs); the 28 frames of an epoch do not reach its last 0.9 s."""
        name = self.resolve_layer(layer)
        epochs = input_hw[1] // EPOCH
        steps = epochs if name in ("epochs", "final") else epochs * FRAMES
        return (input_hw[0] if name == "spectrogram" else 1), steps

    def stages(self, batch: torch.Tensor) -> torch.Tensor:
        """Logits of the sleep stages ``(B, E, 5)`` (order: ``STAGES``) of preprocessed items ``(B, C, E * 1800)``."""
        return self.model.classifier(self.forward(batch, "final", "tokens")["final"].to(self.device))

    def _run(self, x: torch.Tensor, pools: dict[str, str]) -> dict[str, torch.Tensor]:
        found = self.model(x)
        tokens = {n: found[n].flatten(1, -2) for n in pools}
        return {n: pool_tokens(tokens[n], "mean" if p == "head" else p, n_prefix=0) for n, p in pools.items()}
