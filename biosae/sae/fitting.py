"""From settings and rows to trained models: everything that :meth:`SAE.fit` does, for one model or several."""

from __future__ import annotations

import copy
import hashlib
import os
import warnings
from collections.abc import Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from biosae.errors import DivergedError, InputError
from biosae.sae import state
from biosae.sae.config import Plan, SAEConfig, resolve
from biosae.sae.distributed import ALONE, Alone, connect
from biosae.sae.model import SparseAutoencoder
from biosae.sae.normalise import Normaliser
from biosae.sae.rows import Held, Rows
from biosae.sae.sparse_ops import kernels
from biosae.sae.stream import Stream
from biosae.sae.train import Trainer, run
from biosae.settings import resolve_device

if TYPE_CHECKING:
    from biosae.sae.estimator import SAE

INIT_ROWS = 32_768
HELD_ROWS = 1024
"""Held-out rows on which a history point is measured."""
CALIBRATION_ROWS = 16_384
CHUNK_ROWS = 65_536
"""Rows of a source of unknown length from which scaling, start and quality are taken."""
MEASURED_ROWS = 2**18
MEASURED_BLOCK = 2048
ENDLESS = 2**62


def fit_many(models: list[SAE], X: Any, *, groups: Any = None) -> list[SAE]:
    """Fit several SAEs (seeds, k, widths, architectures) to one stream of rows, each batch read once for all.

    Parameters
    ----------
    models
        Unfitted or, with ``warm_start``, fitted estimators. They must come out at one batch size. The seed and the
        ``validation`` of the first decide which rows are held out and in which order the others come; the first model
        is the same as if it had been fitted alone.
    X, groups
        As for :meth:`biosae.sae.SAE.fit`.

    Returns
    -------
    list of SAE
        The same objects.

    Raises
    ------
    InputError
        For invalid input, settings, or different batch sizes.
    DivergedError
        If the training of one stops being finite; all are left with their last good weights.
    """
    if not models:
        raise InputError("fit_many needs at least one SAE")
    for sae in models:
        sae.validate()
    folders = [os.path.abspath(sae.checkpoint) for sae in models if sae.checkpoint is not None]
    if len(set(folders)) < len(folders):
        raise InputError("models on one stream need a checkpoint folder each: two of these have the same")
    if len({sae.parallel for sae in models}) > 1:
        raise InputError("models on one stream need one setting of parallel")
    comm, device = connect(models[0].parallel, torch.device(resolve_device(models[0].device)))
    try:
        return _fit(models, Rows(X), groups, comm, device)
    finally:
        comm.close()


def _fit(models: list[SAE], rows: Rows, groups: Any, comm: Alone, device: torch.device) -> list[SAE]:
    for sae in models:
        if _continues(sae):
            sae._check_rows(rows)
    seeds = [int(comm.of_all(str(_seed(sae)))[0]) for sae in models]
    held = Held.draw(rows, groups=groups, share=models[0].validation, rng=np.random.default_rng(seeds[0]))
    n = None if rows.n is None else rows.n - len(held)
    plans = [resolve(_warm(sae, _continues(sae)), n, rows.d) for sae in models]
    sizes = {plan.batch_size for plan in plans}
    if len(sizes) > 1:
        raise InputError(f"models on one stream need one batch size, these come out at {sorted(sizes)}; set batch_size")
    stream = Stream(rows, held=held, batch_size=plans[0].batch_size, seed=seeds[0], device=device)
    data = {"n": rows.n, "d": rows.d, "rows": _digest(rows), "fingerprint": rows.fingerprint, "held": _hash(held.units)}
    normalisers: dict[str, Normaliser] = {}
    trainers = []
    for sae, plan, seed in zip(models, plans, seeds, strict=True):
        sae._keep_plan(plan, seed, rows.d)
        key = state.key(sae, plan, {**data, "seed": seed, "stream": seeds[0], "shards": comm.shards})
        if len(set(comm.of_all(key))) > 1:
            raise InputError(
                "the processes were given different rows or settings; give every process the same X and the same "
                "settings: each takes its own part"
            )
        normaliser = _normaliser(sae, stream, normalisers)
        first = None if _continues(sae) else stream.sample(INIT_ROWS, seed)
        held_rows = stream.held_sample(HELD_ROWS, seed + 1) if len(held) else None
        trainer = trainer_of(sae, plan, normaliser, first, seed, device, held=held_rows, comm=comm)
        del first
        trainer.key, trainer.seed = key, seed
        if sae.checkpoint is not None:
            state.read(sae.checkpoint, trainer)
            if len(set(comm.of_all(str(trainer.done)))) > 1:
                raise InputError(
                    f"not all processes see the state in {sae.checkpoint}; give a folder that all nodes share"
                )
        trainers.append((trainer, normaliser))
    diverged = None
    try:
        run(
            [t for t, _ in trainers],
            lambda start: stream.batches(start, part=(comm.rank % comm.replicas, comm.replicas)),
        )
    except DivergedError as error:
        diverged = error
    for sae, seed in zip(models, seeds, strict=True):
        trainer, normaliser = trainers.pop(0)
        trainer.finish()
        model, history = comm.whole(trainer.model), trainer.history
        del trainer  # and with it moments and gradients, before more is held
        _complete(sae, model, normaliser, stream.sample(CALIBRATION_ROWS, seed + 2))
        sae._trainer = None
        sae._keep_fit(model, normaliser, rows, held, history, went_on=_continues(sae))
        sae._measure(_measured(rows, stream, seed), held)
    if diverged is not None:
        raise diverged
    return models


def partial_fit(sae: SAE, X: Any) -> SAE:
    """See :meth:`biosae.sae.SAE.partial_fit`."""
    sae.validate()
    comm, _ = connect(sae.parallel, torch.device(resolve_device(sae.device)))
    comm.close()
    if comm is not ALONE:
        raise InputError("partial_fit works in a single process: set parallel=None, or use fit")
    goes_on = hasattr(sae, "_model")
    rows = sae._rows(X) if goes_on else Rows(X)
    if rows.n is None:
        raise InputError("partial_fit takes one table at a time: call it for each chunk, or pass the chunks to fit")
    for _ in rows.blocks():  # a bad row is named before anything is learnt
        pass
    trainer = sae._trainer
    if trainer is None:
        seed = sae.random_state_ if goes_on else _seed(sae)
        plan = resolve(_warm(sae, goes_on), rows.n, rows.d)
        sae._keep_plan(plan, seed, rows.d)
        endless = replace(
            plan,
            n_steps=ENDLESS,
            warmup_steps=0,
            decay_start=ENDLESS,
            l1_warmup_steps=0,
            k_anneal_steps=0,
            log_every=50,
        )
        normaliser = sae.normaliser_ if goes_on else _scaling(sae.normalise, (x for _, x in rows.blocks()))
        device = torch.device(resolve_device(sae.device))
        first = None if goes_on else rows.take(np.random.default_rng(seed).permutation(rows.n)[:INIT_ROWS])
        trainer = trainer_of(sae, endless, normaliser, first, seed, device)
        trainer.seed = seed
    normaliser, start = sae.normaliser_ if goes_on else normaliser, trainer.done
    order = np.random.default_rng([trainer.seed, trainer.done]).permutation(rows.n)
    for at in range(0, rows.n, trainer.plan.batch_size):
        batch = rows.take(order[at : at + trainer.plan.batch_size])
        trainer.step(torch.from_numpy(batch).to(trainer.model.W_dec.device))
        trainer.tell()
    sae.n_steps_ = sae.n_steps_ + trainer.done - start if goes_on else trainer.done
    model = copy.deepcopy(trainer.model).eval()
    _complete(sae, model, normaliser, rows.take(order[:CALIBRATION_ROWS]))
    seen = Held.draw(rows, share=0, rng=np.random.default_rng(0))  # holds nothing out, and knows the patients
    sae._keep_fit(model, normaliser, rows, seen, trainer.history, went_on=goes_on)
    sae._trainer = trainer
    sae._measure(rows.blocks(), Held())
    return sae


def _complete(sae: SAE, model: SparseAutoencoder, normaliser: Normaliser, sample: np.ndarray) -> None:
    """Set the common threshold where there is one, and fold the scaling into the weights."""
    if sae.architecture in ("batchtopk", "matryoshka"):
        model.threshold.fill_(calibrated(model, normaliser, sample, sae.k_))
    normaliser.fold_(model)


def trainer_of(
    sae: SAE,
    plan: Plan,
    normaliser: Normaliser,
    first: np.ndarray | None,
    seed: int,
    device: torch.device,
    *,
    held: np.ndarray | None = None,
    comm: Alone = ALONE,
) -> Trainer:
    """A trainer at step 0, of a new model started on the raw rows ``first``, or of the fitted one (None)."""
    generator = torch.Generator().manual_seed(seed)
    if first is None:
        model = copy.deepcopy(sae._model).to(device)
        model.k, model.ends, model.bandwidth = plan.k, plan.ends, sae.bandwidth
        normaliser.unfold_(model)
    else:
        model = empty_model(sae, plan, first.shape[1]).to(device)
        start = torch.empty(first.shape)
        for at in range(0, len(first), MEASURED_BLOCK):  # in parts: these are many rows
            part = normaliser.ready(first[at : at + MEASURED_BLOCK])
            start[at : at + MEASURED_BLOCK] = normaliser.apply(torch.from_numpy(part))
        model.initialise(start, atoms=sae.decoder_init, scale=plan.encoder_init, generator=generator)
    if held is not None:
        held = _normalised(normaliser, torch.from_numpy(held).to(device))
    if sae.backend == "dense" and comm is not ALONE:
        raise InputError("backend='dense' works in a single process: choose another backend, or parallel=None")
    ops = None if sae.backend == "dense" else kernels(sae.backend, device)
    model = comm.shard(model)
    return Trainer(
        model, lambda x: _normalised(normaliser, x), config=sae, plan=plan, generator=generator, ops=ops, held=held,
        comm=comm,
    )  # fmt: skip


def empty_model(sae: SAEConfig, plan: Plan, n_features: int) -> SparseAutoencoder:
    """Model of the planned size, all zeros."""
    return SparseAutoencoder(
        n_features, plan.n_latents, architecture=sae.architecture, k=plan.k, ends=plan.ends,
        threshold=sae.threshold, bandwidth=sae.bandwidth,
    )  # fmt: skip


@torch.no_grad()
def calibrated(model: SparseAutoencoder, normaliser: Normaliser, sample: np.ndarray, k: int) -> float:
    """Threshold that keeps k latents a row on average over a sample of training rows.

    It lies just below the (k n)-th largest positive pre-activation; each row offers its 8 k largest to the ranking.
    """
    best, device = [], model.W_dec.device
    for start in range(0, len(sample), 256):
        x = _normalised(normaliser, torch.from_numpy(sample[start : start + 256]).to(device))
        a = torch.relu(model.preactivations(x))
        best.append(a.topk(min(8 * k, a.shape[1]), dim=1).values.flatten().cpu())
    ranked = torch.cat(best)
    ranked = ranked[ranked > 0]
    wanted = k * len(sample)
    if len(ranked) <= wanted:
        return 0.0
    last, following = ranked.topk(wanted + 1).values[-2:].tolist()
    return (last + following) / 2


def _normalised(normaliser: Normaliser, x: torch.Tensor) -> torch.Tensor:
    if normaliser.rowwise:
        x = torch.from_numpy(normaliser.ready(x.cpu().numpy())).to(x.device)
    return normaliser.apply(x)


def _continues(sae: SAE) -> bool:
    return bool(sae.warm_start and hasattr(sae, "_model"))


def _warm(sae: SAE, goes_on: bool) -> SAEConfig:
    """Settings to plan with: a fitted model that goes on keeps its number of latents and, where none is given, its k.

    Raises
    ------
    InputError
        If the settings now ask for another architecture or width than the fitted model has.
    """
    if not goes_on:
        return sae
    made = {"architecture": sae._model.architecture, "n_latents": sae.n_latents_}
    for name, value in made.items():
        if getattr(sae, name) not in (value, None):
            raise InputError(
                f"the fitted model that is to go on has {name}={value!r}, the setting now is {getattr(sae, name)!r}; "
                "set it back, or clone the SAE to start anew"
            )
    given = SAEConfig(**sae.get_params())
    return given.set_params(n_latents=sae.n_latents_, k=sae.k if sae.k is not None else sae.k_)


def _normaliser(sae: SAE, stream: Stream, made: dict[str, Normaliser]) -> Normaliser:
    if _continues(sae):
        return sae.normaliser_
    if sae.normalise not in made:
        blocks = [stream.sample(CHUNK_ROWS, 0)] if stream.n is None else stream.blocks()
        made[sae.normalise] = _scaling(sae.normalise, blocks)
    return made[sae.normalise]


def _scaling(mode: str, blocks: Iterable[np.ndarray]) -> Normaliser:
    """The scaling, fitted; what speaks against the mode on these rows is said before training starts."""
    normaliser = Normaliser.fit(mode, blocks)
    if normaliser.offset["advice"]:
        warnings.warn(normaliser.offset["advice"], UserWarning, stacklevel=5)
    return normaliser


def _seed(sae: SAE) -> int:
    if sae.random_state is not None:
        return int(sae.random_state)
    stored = state.seed(sae.checkpoint) if sae.checkpoint is not None else None
    return int(np.random.SeedSequence().generate_state(1)[0]) if stored is None else stored


def _digest(rows: Rows) -> str | None:
    """Hash of 64 rows spread over the table; None for chunks."""
    if rows.n is None:
        return None
    spread = np.unique(np.linspace(0, rows.n - 1, 64).astype(np.int64))
    return _hash(rows.take(spread))


def _hash(array: np.ndarray) -> str:
    return hashlib.sha256(array.tobytes()).hexdigest()


def _measured(rows: Rows, stream: Stream, seed: int) -> Any:
    """``(start, rows)`` blocks on which quality is measured: all rows, or 2**18 of them in blocks spread at random."""
    if rows.n is None:
        return [(0, stream.sample(CHUNK_ROWS, seed))]
    if rows.n <= MEASURED_ROWS:
        return rows.blocks()
    starts = np.arange(0, rows.n, MEASURED_BLOCK)
    chosen = np.random.default_rng(seed).choice(starts, MEASURED_ROWS // MEASURED_BLOCK, replace=False)
    return ((int(s), rows.read(int(s), min(int(s) + MEASURED_BLOCK, rows.n)).float().numpy()) for s in np.sort(chosen))
