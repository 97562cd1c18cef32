"""Which method for these embeddings? Several coders, seeds and sparsities on one stream of rows, in one table."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from biosae.errors import InputError, nearest, require
from biosae.sae.agreement import stability
from biosae.sae.coder import Coder
from biosae.sae.config import ARCHITECTURES
from biosae.sae.estimator import SAE
from biosae.sae.fitting import fit_many
from biosae.sae.labels import Labels
from biosae.sae.methods import METHODS, method
from biosae.sae.named import OTHERS, named
from biosae.sae.rows import Held, Rows, row_groups, spread

STREAM = ("batch_size", "order", "buffer_rows", "validation", "parallel", "device")
"""Settings that models on one stream have in common."""
NO_K = ("relu", "gated", "gba", "top_afa", "kmeans")
"""Methods whose sparsity is not set by k."""
AXES = ("pca", "ica")
"""Methods that have no more latents than there are features."""
SHARED_ROWS = 4096
"""Held-out rows on which codes of seeds are compared."""
LABELLED_ROWS = 20_000
"""Held-out rows on which latents are held against labels."""
WEIGHTS_TOGETHER = 2**27
"""Weights of all dictionaries that are held at once; what goes beyond has its turn later, on the same rows."""
QUALITY = ("fvu", "fvu_val", "l0", "l0_val", "dead_share", "gamma", "seconds")
STABILITY = ("shared", "shared_null", "mmcs", "mmcs_null", "activation")
COLUMNS = (
    "method", "setting", "k", "n_latents", "seed", *QUALITY, *STABILITY, "alignment", "alignment_null",
    "n_rows", "n_rows_val", "n_groups_val", "error",
)  # fmt: skip


@dataclass
class _Run:
    """One method with one setting: what it is called, the coder to copy, and what came of it, by seed."""

    name: str
    setting: str
    coder: Coder
    fitted: dict[int, Coder] = field(default_factory=dict)
    seconds: dict[int, float] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)


def compare(
    X: Any,
    *,
    methods: Sequence[str | Mapping[str, Any] | Coder] = ARCHITECTURES,
    seeds: Sequence[int] = (0, 1, 2),
    k: int | Sequence[int] | None = None,
    n_latents: int | None = None,
    labels: Any = None,
    groups: Any = None,
    validation: float = 0.2,
    n_null: int = 20,
    random_state: int = 0,
) -> Any:
    """Fit methods side by side and say how well each reconstructs, how sparse and how stable it is.

    All fits have the same training rows and the same held-out groups. Those trained by gradient with one seed learn
    from one stream: the same batches in the same order, each read once. What fails is listed and does not stop the
    others.

    Parameters
    ----------
    X
        Embeddings (n, d): array, tensor, data frame or :class:`biosae.Embeddings`.
    methods
        Names (of an architecture of :class:`SAE`, or ``itda``, ``semi_nmf``, ``pca``, ``ica``, ``kmeans``, ``nmf``,
        ``dictionary``), dicts of settings with the name under ``architecture`` (``{"architecture": "relu", "l1":
        0.6}``), or unfitted estimators, which are copied.
    seeds
        One fit each; of two and more the stability is known.
    k, n_latents
        Set in every method that has this setting and does not give it itself. Several k give a curve.
    labels
        What latents may stand for: values of each row or sample, the name of a column of the embeddings' table, or
        several as a dict, data frame or list of column names. Missing values are left out.
    groups
        Group (patient) of each row or sample. None: the ``patient`` column, else the sample, else the row.
    validation
        Share of the rows held out, whole groups.
    n_null
        Shuffles of each label for its chance level.
    random_state
        Of the held-out groups and the shuffles.

    Returns
    -------
    pandas.DataFrame
        One row a method, setting and seed. ``fvu, l0, dead_share`` of training rows; ``fvu_val, l0_val, gamma`` of
        held-out rows; ``seconds`` of training; ``shared, mmcs, activation``: mean over the comparisons with the other
        seeds (:func:`biosae.sae.stability`, on held-out rows; ``_null``: directions turned at random with the second
        moment kept); ``alignment``: the latent that fits a label best on held-out rows, |2 AUROC - 1| for two classes
        (mean over classes, each against the rest, for more) and |Spearman's rho| for numbers, mean over labels;
        ``alignment_null``: the same for shuffled labels; ``error``: why a fit failed, else empty. With several labels
        there are columns ``alignment: <label>`` too.

    Raises
    ------
    InputError
        For an unknown name or setting, groups or labels that do not fit the rows, or nothing that could be held out.

    Notes
    -----
    ``alignment`` is the best of many latents chosen on the rows that it is told of. Read it against its own null, and
    use :mod:`biosae.stats` for a test.
    """
    pandas = require("pandas", extra="all")
    if not len(seeds) or len(set(seeds)) < len(seeds):
        raise InputError(f"seeds={list(seeds)!r} must be different whole numbers, at least one")
    rows = Rows(X)
    runs = _planned(methods, k=k, n_latents=n_latents, d=rows.d)
    train, held, n_groups = _divided(rows, groups, share=validation, random_state=random_state)
    known = None if labels is None else _labels(rows, labels, held, n_null=n_null, random_state=random_state)
    table = []
    for portion in _portions(runs, rows.d, len(seeds)):
        for seed in seeds:
            _fit(portion, seed, train)
        for run in portion:
            sizes = {"n_rows": len(train), "n_rows_val": len(held), "n_groups_val": n_groups}
            table += [line | sizes for line in _lines(run, seeds, held, known)]
            run.fitted.clear()
    names = [] if known is None or len(known.targets) < 2 else [f"alignment: {name}" for name in known.targets]
    return pandas.DataFrame(table, columns=[*COLUMNS[:-1], *names, "error"])


# ------------------------------------------------------------------------------------------------- what to fit


def _planned(methods: Any, *, k: int | Sequence[int] | None, n_latents: int | None, d: int) -> list[_Run]:
    if isinstance(methods, str | Mapping | Coder):
        methods = [methods]
    ks = [k] if k is None or hasattr(k, "__index__") else list(k)
    runs = []
    for given in methods:
        if isinstance(given, Coder):
            coder = _copy(given)
        elif isinstance(given, Mapping):
            settings = dict(given)
            coder = named(settings.pop("architecture", "topk"), **settings)
        else:
            coder = named(given)
        if n_latents is not None and "n_latents" in coder.names() and coder.n_latents is None:
            coder.set_params(n_latents=min(n_latents, d) if _name(coder) in AXES else n_latents)
        several = "k" in coder.names() and coder.k is None and _name(coder) not in NO_K
        for value in ks if several else [None]:
            one = _copy(coder)
            if value is not None:
                one.set_params(k=value)
            run = _Run(_name(coder), _setting(coder), one)
            if all((r.name, r.coder.get_params()) != (run.name, one.get_params()) for r in runs):
                runs.append(run)
    if not runs:
        raise InputError("methods is empty; name at least one, for example methods=['topk', 'relu']")
    return runs


def _copy(coder: Coder) -> Coder:
    return type(coder)().set_params(**coder.get_params())


def _name(coder: Coder) -> str:
    if isinstance(coder, SAE):
        return coder.architecture
    for name, (_, kind, given) in OTHERS.items():
        if type(coder).__name__ == kind and all(getattr(coder, key) == value for key, value in given.items()):
            return name
    return type(coder).__name__


def _setting(coder: Coder) -> str:
    """Settings that are not the default, but for those that have a column."""
    skipped = {"architecture", "method", "k", "n_latents", "random_state", "validation", "device", "verbose"}
    default = type(coder)().get_params()
    shown = {
        n: v for n, v in coder.get_params().items() if n not in skipped and v is not default[n] and v != default[n]
    }
    options = shown.pop("options", None) or {}
    return ", ".join(f"{name} {value}" for name, value in {**shown, **options}.items())


# -------------------------------------------------------------------------------------------- rows and labels


class _Part:
    """Some rows of a table, as a table that is read in blocks."""

    tokens_per_sample, obs = 1, None

    def __init__(self, rows: Rows, numbers: np.ndarray) -> None:
        self.rows, self.numbers = rows, numbers
        self.shape, self.dtype = (len(numbers), rows.d), rows.dtype
        self.identity, self.fingerprint = rows.identity, rows.fingerprint
        self.groups: Any = None

    def __len__(self) -> int:
        return len(self.numbers)

    def some(self, count: int) -> np.ndarray:
        """Positions of up to ``count`` rows spread over the part."""
        return spread(len(self), count, np.random.default_rng(0))

    def __getitem__(self, which: Any) -> np.ndarray:
        return self.rows.take(self.numbers[which])

    def blocks(self, rows: int = SHARED_ROWS) -> Iterator[tuple[int, np.ndarray]]:
        for start in range(0, len(self.numbers), rows):
            yield start, self[start : start + rows]


def _divided(rows: Rows, groups: Any, *, share: float, random_state: int) -> tuple[_Part, _Part, int]:
    """Training rows, held-out rows, and how many groups the latter are (rows, where there are none)."""
    if rows.n is None:
        raise InputError("compare needs to know its rows: pass one table, not chunks")
    if not 0 < share < 1:
        raise InputError(f"validation={share!r} must lie between 0 and 1: methods are judged on held-out rows")
    held = Held.draw(rows, groups=groups, share=share, rng=np.random.default_rng(random_state))
    if not len(held):
        raise InputError(f"nothing could be held out of {rows.n} rows; give at least 20 rows and two groups")
    out = held.mask(0, rows.n)
    train, held_rows = _Part(rows, np.flatnonzero(~out)), _Part(rows, np.flatnonzero(out))
    labels = row_groups(rows, groups)
    if labels is not None:
        train.groups, held_rows.groups = labels[~out], labels[out]
    return train, held_rows, held.n_groups or len(held)


def _labels(rows: Rows, labels: Any, held: _Part, *, n_null: int, random_state: int) -> Labels:
    """Labels of up to :data:`LABELLED_ROWS` held-out rows, ready to be held against codes."""
    some, found = held.some(LABELLED_ROWS), {}
    for name, values in _label_columns(rows, labels).items():
        if len(values) not in (rows.n, rows.n // rows.tokens):
            raise InputError(f"label {name!r} has {len(values)} entries for {rows.n} rows")
        found[name] = np.repeat(values, rows.n // len(values))[held.numbers[some]]
    groups = None if held.groups is None else held.groups[some]
    return Labels(found, groups=groups, n_null=n_null, random_state=random_state)


def _label_columns(rows: Rows, labels: Any) -> dict[str, np.ndarray]:
    names = [labels] if isinstance(labels, str) else labels
    if isinstance(names, list | tuple) and names and all(isinstance(n, str) for n in names):
        columns = getattr(rows.obs, "columns", ())
        if all(n in columns for n in names):
            return {n: np.asarray(rows.obs[n], dtype=object) for n in names}
        if isinstance(labels, str) or len(names) not in (rows.n, rows.n // rows.tokens):
            unknown = next(n for n in names if n not in columns)
            raise InputError(f"the embeddings' table has no column {unknown!r}; {nearest(unknown, map(str, columns))}")
    if isinstance(labels, Mapping) or hasattr(labels, "columns"):
        return {str(name): np.asarray(labels[name], dtype=object) for name in labels}
    return {str(getattr(labels, "name", None) or "label"): np.asarray(labels, dtype=object)}


# -------------------------------------------------------------------------------------------------------- fits


def _portions(runs: list[_Run], d: int, n_seeds: int) -> Iterator[list[_Run]]:
    """Runs whose models are held in memory together."""
    part: list[_Run] = []
    used = 0
    for run in runs:
        weights = (getattr(run.coder, "n_latents", None) or 8 * d) * d * n_seeds
        if part and used + weights > WEIGHTS_TOGETHER:
            yield part
            part, used = [], 0
        part.append(run)
        used += weights
    if part:
        yield part


def _fit(runs: list[_Run], seed: int, train: _Part) -> None:
    """Fit every run with one seed: by gradient together where one stream serves them, the others one by one."""
    streams: dict[tuple, list[_Run]] = {}
    for run in runs:
        coder = run.fitted[seed] = _copy(run.coder)
        own = {"random_state": seed, "validation": 0.0, "checkpoint": None}
        if getattr(coder, "early_stopping", False):
            del own["validation"]  # it stops by a part of the training rows
        coder.set_params(**{name: value for name, value in own.items() if name in coder.names()})
        shared: tuple = (run.name, id(run))
        if isinstance(coder, SAE):
            partner = method(run.name).partner if run.name in METHODS else None
            shared = (partner, *(getattr(coder, name) for name in STREAM))
        streams.setdefault(shared, []).append(run)
    for together in streams.values():
        coders = [_copy(run.fitted[seed]) for run in together]
        if len(together) > 1:
            with contextlib.suppress(Exception):  # whose it was comes out when each is fitted alone
                fit_many(coders, train, groups=train.groups)
                for run, coder in zip(together, coders, strict=True):
                    run.fitted[seed], run.seconds[seed] = coder, coder.seconds_
                continue
        for run in together:
            _fit_alone(run, seed, train)


def _fit_alone(run: _Run, seed: int, train: _Part) -> None:
    started = time.perf_counter()
    try:
        coder = run.fitted[seed].fit(train, groups=train.groups)
    except Exception as error:  # of whatever kind: the other methods go on
        run.errors[seed] = f"{type(error).__name__}: {error}"
        del run.fitted[seed]
    else:
        run.seconds[seed] = getattr(coder, "seconds_", time.perf_counter() - started)


# ------------------------------------------------------------------------------------------------------ judging


def _lines(run: _Run, seeds: Sequence[int], held: _Part, labels: Labels | None) -> list[dict[str, Any]]:
    """One row of the table for each seed."""
    again = _stability(run, held)
    lines = []
    for seed in seeds:
        line: dict[str, Any] = {"method": run.name, "setting": run.setting, "seed": seed}
        line["k"] = getattr(run.coder, "k", None)
        line["error"] = run.errors.get(seed, "")
        lines.append(line)
        if seed not in run.fitted:
            continue
        coder = run.fitted[seed]
        here, there = coder.metrics_, coder.evaluate(held)
        line |= {"n_latents": coder.n_latents_, "seconds": run.seconds[seed], **again.get(seed, {})}
        line["k"] = getattr(coder, "k_", line["k"]) if run.name not in NO_K else None
        line |= {name: here[name] for name in ("fvu", "l0", "dead_share")}
        line |= {"fvu_val": there["fvu"], "l0_val": there["l0"], "gamma": there["gamma"]}
        if labels is not None:
            scores = labels.scores(coder.codes(held[held.some(LABELLED_ROWS)]))
            line["alignment"], line["alignment_null"] = np.mean(list(scores.values()), axis=0)
            line |= {f"alignment: {name}": score for name, (score, _) in scores.items()}
    return lines


def _stability(run: _Run, held: _Part) -> dict[int, dict[str, float]]:
    """Of each seed, the mean of its comparisons with the others; nothing where they cannot be compared."""
    seeds = list(run.fitted)
    if len(seeds) < 2:
        return {}
    coders, some = [run.fitted[seed] for seed in seeds], held[held.some(SHARED_ROWS)]
    signed = any(coder.codes(some).data.min(initial=0) < 0 for coder in coders)
    try:
        found = stability(coders, some, n_null=2, null="second_moment", random_state=0, signed=signed)
    except InputError:  # a model without a live latent, an atom of length 0
        return {}
    out = {}
    for number, seed in enumerate(seeds):
        pairs = [pair for pair in found.pairs if number in (pair.first, pair.second)]
        out[seed] = {
            "shared": np.mean([p.shared for p in pairs]),
            "shared_null": np.mean([p.null_mean["shared"] for p in pairs]),
            "mmcs": np.mean([(p.mmcs + p.mmcs_back) / 2 for p in pairs]),
            "mmcs_null": np.mean([(p.null_mean["mmcs"] + p.null_mean["mmcs_back"]) / 2 for p in pairs]),
            "activation": np.mean([(p.activation + p.activation_back) / 2 for p in pairs]),
        }
    return out
