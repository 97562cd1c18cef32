"""Settings of one sparse autoencoder and the rules that turn them into numbers for given data."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass, fields
from typing import Any

from biosae.errors import InputError, nearest
from biosae.sae.methods import METHODS, options_of
from biosae.sae.normalise import MODES

ARCHITECTURES = ("relu", "topk", "batchtopk", "matryoshka", "jumprelu")
"""Those with a sparse training step; the others are in :data:`biosae.sae.methods.METHODS`."""
BACKENDS = ("auto", "numba", "torch", "triton", "dense")
BUILT_IN = ("l1", "l0_weight", "bandwidth", "threshold", "prefixes")
"""Settings of the sparse step; methods have options of their own instead."""
DECODER_INITS = ("data", "random")
ENCODER_INITS = ("least_squares", "probes")
FEW_PASSES = 20
"""Passes over the rows from which ``encoder_init="probes"`` reconstructs held-out rows better (docs/methods/sae.md)."""
MIN_ROWS = 8
PREFIXES = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
LOGGED = 50
"""Points of the history; between them nothing is read back from the device."""


class Settings:
    """Settings of a dataclass as scikit-learn wants to read and write them."""

    @classmethod
    def names(cls) -> list[str]:
        """Names of all settings, in order."""
        return [f.name for f in fields(cls)]

    def get_params(self, deep: bool = True) -> dict[str, Any]:
        """Settings as a dict (scikit-learn contract)."""
        return {name: getattr(self, name) for name in self.names()}

    def set_params(self, **params: Any) -> Settings:
        """Change settings and return self.

        Raises
        ------
        InputError
            For an unknown name; the message gives the nearest valid one.
        """
        for name in params:
            if name not in self.names():
                raise InputError(f"{type(self).__name__} has no setting {name!r}; {nearest(name, self.names())}")
        for name, value in params.items():
            setattr(self, name, value)
        return self


@dataclass(eq=False)
class SAEConfig(Settings):
    """Every setting of :class:`biosae.sae.SAE`; ``None`` means that the value is chosen from the data."""

    architecture: str = "topk"
    """``relu`` (L1 penalty), ``topk`` (k latents a row), ``batchtopk`` (k a row on average), ``matryoshka``
    (``batchtopk`` whose prefixes reconstruct too), ``jumprelu`` (learnt thresholds, k a row on average), or another
    name of :data:`biosae.sae.methods.METHODS`."""
    n_latents: int | None = None
    """Number of latents m. None: the power of two nearest to min(8 d, max(8 k, n k / 800)), at least 2."""
    k: int | None = None
    """Active latents a row; unused by ``relu``; clipped to the number of latents. None: d / 8, between 4 and 32."""
    _: KW_ONLY
    order: str = "shuffled"
    """``shuffled``, or ``fast``: one slide, recording or sample after the other in random order, mixed in a buffer of
    which half is given out whenever it is full (Li et al. 2025). What belongs together is said by ``groups``, or by the
    columns ``slide``, ``recording`` or ``patient`` of the embeddings, else it is the tokens of a sample, or a chunk."""
    buffer_rows: int | None = None
    """Rows of the buffer of ``order="fast"``. None: four batches."""
    batch_size: int = 4096
    """Largest batch in rows; the batch used is min(batch_size, max(256, n / 16))."""
    n_steps: int | None = None
    """Optimiser steps. None: see ``max_epochs``."""
    max_epochs: float | None = None
    """Passes over the training rows when ``n_steps`` is None. None: 60 passes, between 400 and 20,000 steps."""
    learning_rate: float | None = None
    """Adam step size. None: 1e-3 / sqrt(m / 2**14), times sqrt(2000 / steps) for fewer steps, at most 4e-3."""
    warmup: float = 0.05
    """Share of the steps over which the learning rate rises from 0."""
    decay: float = 0.2
    """Share of the steps, at the end, over which the learning rate falls to 0."""
    l1: float = 0.2
    """Weight of the L1 penalty of ``relu``, in the units of the normalised rows."""
    l1_warmup: float = 0.1
    """Share of the steps over which the L1 weight rises from 0."""
    normalise: str = "centre_scale"
    """Input scaling while training: ``none``, ``centre``, ``unit_mean_square``, ``centre_scale`` or ``layernorm``."""
    l0_weight: float = 4.0
    """Weight of the penalty (L0 / k - 1)^2 of ``jumprelu``; it rises like that of ``l1``, over ``l1_warmup``."""
    bandwidth: float = 0.1
    """Width of the window about a threshold of ``jumprelu`` that lends it a derivative, in normalised units."""
    threshold: float = 1e-3
    """First threshold of ``jumprelu``, in normalised units."""
    prefixes: tuple[float, ...] | None = None
    """Ends of the prefixes of ``matryoshka``, as shares of the latents. None: 1/16, 1/8, 1/4, 1/2, 1."""
    k_start: int | None = None
    """Latents a row at the first step, going down (or up) to ``k`` over ``k_anneal``. None: k from the start."""
    k_anneal: float = 0.2
    """Share of the steps over which ``k_start`` becomes ``k``."""
    resample_every: int | None = None
    """Steps between two resamplings of latents silent over the last half of them (Bricken et al. 2023). None: never."""
    ema: float = 0.0
    """Decay of the moving average of the weights that becomes the model; 0 keeps the last weights."""
    early_stopping: bool = False
    """Stop when the held-out FVU has not improved for ``patience`` of the 50 looks, and keep the best weights."""
    patience: int = 5
    """Looks without improvement before ``early_stopping`` stops."""
    decoder_init: str = "data"
    """Atoms start as training rows minus the bias (``data``) or as random directions (``random``)."""
    encoder_init: str | None = None
    """Length of the first encoder rows: ``least_squares`` fits the first reconstructions to the data, ``probes`` to
    random unit vectors (Gao et al.). None: ``least_squares`` below 20 passes over the rows, else ``probes``."""
    aux_k: int | None = None
    """Dead latents that model the residual in AuxK. None: the power of two nearest to d / 2; 0 switches AuxK off."""
    aux_alpha: float = 1 / 8
    """Weight of the AuxK loss."""
    dead_after: int | None = None
    """Rows without firing after which a latent counts as dead. None: min(10,000,000, training rows)."""
    clip_norm: float | None = 1.0
    """Largest gradient norm. None: no limit."""
    validation: float = 0.1
    """Share of the rows held out (whole groups where groups are known); 0 holds out nothing."""
    options: dict[str, Any] | None = None
    """Settings of one architecture alone: the fields of its ``Options`` (docs/methods). None: their defaults."""
    backend: str = "auto"
    """Kernels: ``numba`` (CPU), ``triton`` (CUDA), ``torch`` (any), ``dense`` (autograd); ``auto``: the fastest."""
    prefilter: str | None = None
    """``bfloat16``: rank latents in bfloat16, score the best again in float32 (faster where the CPU has bfloat16).
    ``verify`` does so and counts at each look the latents that this misses (``missed`` in the history)."""
    checkpoint: str | None = None
    """Folder for the state of an unfinished training: ``fit`` goes on from there. None: nothing is written."""
    checkpoint_every: int | None = None
    """Steps between two states. None: about a minute of steps, by the clock."""
    callbacks: tuple[Callable[[int, dict], None], ...] = ()
    """Called as ``callback(step, numbers)`` at each logged step."""
    warm_start: bool = False
    """``fit`` starts from the weights of the last fit instead of new ones."""
    parallel: str | None = None
    """How the processes started by ``torchrun`` share one training: ``data`` (each has a part of every batch) or
    ``latents`` (each has a part of the latents). A single process is not changed. None: each process trains alone."""
    device: str = "auto"
    """``auto``, ``cpu``, ``cuda``, ``mps`` or another torch device."""
    random_state: int | None = None
    """Seed. None: drawn from the system and kept in ``random_state_``."""
    verbose: bool = False
    """Print one line at each logged step."""

    @property
    def is_method(self) -> bool:
        """Whether this architecture is trained by autograd, as a :class:`biosae.sae.methods.base.Method`."""
        return self.architecture not in ARCHITECTURES or bool(self.options)

    def validate(self) -> None:
        """Check every value.

        Raises
        ------
        InputError
            That names the setting and what it accepts.
        """
        for name, choices in (
            ("architecture", tuple(dict.fromkeys((*ARCHITECTURES, *METHODS)))),
            ("normalise", tuple(MODES)),
            ("order", ("shuffled", "fast")),
            ("decoder_init", DECODER_INITS),
            ("encoder_init", (None, *ENCODER_INITS)),
            ("backend", BACKENDS),
            ("prefilter", (None, "bfloat16", "verify")),
            ("parallel", (None, "data", "latents")),
        ):
            value = getattr(self, name)
            if value not in choices:
                raise InputError(f"{name}={value!r} is not known; {nearest(value, choices)}")
        for name, least in (
            ("n_latents", 1), ("k", 1), ("batch_size", 1), ("n_steps", 1), ("aux_k", 0), ("dead_after", 1),
            ("random_state", 0), ("k_start", 1), ("resample_every", 2), ("patience", 1), ("checkpoint_every", 1),
            ("buffer_rows", 2),
        ):  # fmt: skip
            value = getattr(self, name)
            optional = value is None and name not in ("batch_size", "patience")
            if not optional and not (_is_whole(value) and value >= least):
                raise InputError(f"{name}={value!r} must be a whole number >= {least}")
        for name, low, high in (
            ("max_epochs", 0, math.inf), ("learning_rate", 0, math.inf), ("l1", -math.inf, math.inf),
            ("clip_norm", 0, math.inf), ("aux_alpha", -math.inf, math.inf), ("l0_weight", -math.inf, math.inf),
            ("bandwidth", 0, math.inf), ("threshold", -math.inf, math.inf),
        ):  # fmt: skip
            value = getattr(self, name)
            if value is None and name in ("max_epochs", "learning_rate", "clip_norm"):
                continue
            if not (_is_real(value) and low < value < high) or (low < 0 and value < 0):
                raise InputError(f"{name}={value!r} must be a positive number" + (" or 0" if low < 0 else ""))
        for name in ("warmup", "decay", "l1_warmup", "validation", "k_anneal", "ema"):
            value = getattr(self, name)
            if not (_is_real(value) and 0 <= value < 1):
                raise InputError(f"{name}={value!r} is a share and must lie in [0, 1)")
        if self.prefixes is not None and (
            not len(self.prefixes)
            or not all(_is_real(p) and 0 < p <= 1 for p in self.prefixes)
            or list(self.prefixes) != sorted({*self.prefixes, 1})
        ):
            raise InputError(f"prefixes={self.prefixes!r} must be rising shares in (0, 1] that end with 1")
        if self.early_stopping and self.validation == 0:
            raise InputError("early_stopping=True needs held-out rows: set validation above 0")
        if self.is_method:
            options_of(self.architecture, self.options)
            for setting in fields(SAEConfig):
                value = getattr(self, setting.name)
                if setting.name in BUILT_IN and value != setting.default:
                    raise InputError(
                        f"{setting.name}={value!r} belongs to a built-in architecture without options; here give it in "
                        "options, by the name that the page of the architecture says"
                    )
        if self.warmup + self.decay > 1:
            raise InputError(f"warmup + decay = {self.warmup + self.decay} exceeds 1: no steps are left between them")


def _is_whole(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool)


def _is_real(value: Any) -> bool:
    return isinstance(value, (int, float)) or hasattr(value, "__float__")


def nearest_power_of_two(value: float) -> int:
    """Power of two nearest to ``value`` on the log scale, at least 1."""
    return 2 ** max(0, round(math.log2(max(value, 1.0))))


@dataclass(frozen=True)
class Plan:
    """The numbers of one training run, after the rules of :class:`SAEConfig` met the data."""

    n_latents: int
    k: int
    batch_size: int
    n_steps: int
    learning_rate: float
    aux_k: int
    dead_after: int
    warmup_steps: int
    decay_start: int
    l1_warmup_steps: int
    k_start: int
    k_anneal_steps: int
    ends: tuple[int, ...]
    log_every: int
    encoder_init: str


def resolve(config: SAEConfig, n_rows: int | None, n_features: int) -> Plan:
    """Numbers for ``n_rows`` training rows of width ``n_features``; None: a source of unknown length.

    Raises
    ------
    InputError
        If a setting is invalid, there are fewer than 8 training rows, or the length is unknown and ``n_steps`` is not
        given.
    """
    config.validate()
    if n_rows is None:
        if config.n_steps is None:
            raise InputError("chunks have no known length: set n_steps, the number of batches to train on")
        n_rows = config.n_steps * config.batch_size
    if n_rows < MIN_ROWS:
        raise InputError(
            f"n_samples = {n_rows} training rows are too few: at least {MIN_ROWS} are needed, thousands to be useful"
        )
    k = min(32, max(n_features // 8, min(4, n_features))) if config.k is None else int(config.k)
    latents = config.n_latents
    if latents is None:
        latents = max(2, nearest_power_of_two(min(8 * n_features, max(8 * k, n_rows * k / 800))))
    latents = int(latents)
    batch = min(config.batch_size, max(256, n_rows // 16), n_rows)
    per_epoch = max(1, n_rows // batch)
    steps = config.n_steps
    if steps is None:
        if config.max_epochs is not None:
            steps = max(1, math.ceil(config.max_epochs * per_epoch))
        else:
            steps = min(max(60 * per_epoch, 400), 20_000)
    steps = int(steps)
    rate = config.learning_rate
    if rate is None:
        rate = min(1e-3 / math.sqrt(latents / 2**14) * math.sqrt(max(1.0, 2000 / steps)), 4e-3)
    aux = config.aux_k if config.aux_k is not None else nearest_power_of_two(n_features / 2)
    if config.architecture == "relu":
        aux = 0
    k = min(k, latents)
    ends = (latents,)
    if config.architecture == "matryoshka" and not config.is_method:
        ends = tuple(sorted({max(1, round(share * latents)) for share in config.prefixes or PREFIXES}))
    return Plan(
        n_latents=latents,
        k=k,
        batch_size=int(batch),
        n_steps=steps,
        learning_rate=float(rate),
        aux_k=min(int(aux), latents),
        dead_after=int(config.dead_after or min(10_000_000, n_rows)),
        warmup_steps=round(config.warmup * steps),
        decay_start=steps - round(config.decay * steps),
        l1_warmup_steps=round(config.l1_warmup * steps),
        k_start=min(config.k_start or k, latents),
        k_anneal_steps=round(config.k_anneal * steps),
        ends=ends,
        log_every=max(1, steps // LOGGED),
        encoder_init=config.encoder_init or ENCODER_INITS[steps >= FEW_PASSES * per_epoch],
    )


def rate_at(plan: Plan, step: int) -> float:
    """Learning rate of step 0, 1, ...: linear warm-up from 0, constant, linear decay to 0 (section 0.7).

    The last step still has a positive rate.
    """
    rise = min(1.0, (step + 1) / plan.warmup_steps) if plan.warmup_steps else 1.0
    left = plan.n_steps - plan.decay_start
    fall = min(1.0, (plan.n_steps - step) / left) if left else 1.0
    return plan.learning_rate * rise * fall


def k_at(plan: Plan, step: int) -> int:
    """Latents a row at step 0, 1, ...: linear from ``k_start`` to ``k`` over the annealing steps."""
    if step >= plan.k_anneal_steps:
        return plan.k
    return round(plan.k_start + (plan.k - plan.k_start) * step / plan.k_anneal_steps)


def penalty_at(plan: Plan, step: int) -> float:
    """Share of the sparsity penalty at step 0, 1, ...: linear warm-up from 0."""
    return min(1.0, (step + 1) / plan.l1_warmup_steps) if plan.l1_warmup_steps else 1.0
