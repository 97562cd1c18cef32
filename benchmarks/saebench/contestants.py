"""Who is measured, and on what."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any


@dataclass(frozen=True)
class Contestant:
    """One row of the table."""

    label: str
    module: str
    """Module of ``peers``."""
    options: dict[str, Any] = field(default_factory=dict)
    kind: str = "peer"
    """``ours``, ``peer`` or ``yardstick``."""
    pace: int = 1
    """Timed steps are this many times those of the case: fast contestants need more to be timed well."""


OURS = "biosae, float32"
OURS_LOW = "biosae, bf16 prefilter"
DENSE = "biosae, dense autograd"
PLAIN_LOW = "dense loop, bf16 autocast"
PRODUCT = "one encoder product (oneDNN)"
CONTESTANTS = [
    Contestant(OURS, "biosae_sae", {"backend": "numba"}, "ours", 10),
    Contestant(OURS_LOW, "biosae_sae", {"backend": "numba", "prefilter": "bfloat16"}, "ours", 10),
    Contestant("biosae, torch only", "biosae_sae", {"backend": "torch"}, "ours", 5),
    Contestant(DENSE, "biosae_sae", {"backend": "dense"}, "ours"),
    Contestant("sparsify", "eai_sparsify"),
    Contestant("overcomplete", "overcomplete_train"),
    Contestant("dictionary-learning", "dictionary_learning_train"),
    Contestant("SAELens", "sae_lens_train"),
    Contestant(
        "SAELens, sparse codes",
        "sae_lens_train",
        {"use_sparse_activations": True, "rescale_acts_by_decoder_norm": False},
    ),
    Contestant("dense loop, float32", "plain", {}, "yardstick"),
    Contestant(PLAIN_LOW, "plain", {"autocast": True}, "yardstick"),
    Contestant(PRODUCT, "plain", {"product": True}, "yardstick", 10),
]
COMMON_RATE = 1e-3
"""Learning rate of the second comparison of quality, the same for everyone."""


@dataclass(frozen=True)
class Case:
    """A shape: rows of the matrix n, features d, latents m, active latents k, rows a step."""

    name: str
    n: int
    d: int
    m: int
    k: int
    batch: int
    steps: int
    """Steps after which the quality is judged, the same for everyone."""
    timed: int
    """Timed steps of one round (times the pace)."""
    warm: int = 3

    def as_dict(self) -> dict[str, Any]:
        """For the JSON file."""
        return asdict(self)


# the estimator takes at most n / 16 rows a step, hence 65,536 rows for steps of 4,096
CASES = [
    Case("synthetic 384", 65_536, 384, 4_096, 32, 4_096, 100, 12),
    Case("synthetic 768", 65_536, 768, 12_288, 32, 4_096, 40, 3, 2),
    Case("synthetic 1024", 65_536, 1_024, 16_384, 64, 4_096, 20, 2, 2),
]
REAL = Case("her2st patches", 0, 128, 1_024, 16, 0, 400, 100)
"""The sizes of n and batch follow from the embeddings."""
BASE = Case("base", 32_768, 384, 4_096, 32, 2_048, 0, 6)
SWEEPS = {
    "batch": (256, 512, 1_024, 2_048, 4_096),
    "d": (96, 192, 384, 768, 1_536),
    "m": (1_024, 2_048, 4_096, 8_192, 16_384),
    "k": (8, 16, 32, 64, 128),
}


def sweep(base: Case, axis: str, value: int) -> Case:
    """``base`` with one size changed; the rows follow the batch."""
    case = replace(base, **{axis: value}, name=f"{axis}={value}")
    return replace(case, n=16 * case.batch)


def small(case: Case) -> Case:
    """A toy of the same form, to see that everything runs."""
    return replace(case, n=4_096, d=min(case.d, 64), m=512, k=8, batch=256, steps=min(case.steps, 30), timed=6, warm=2)
