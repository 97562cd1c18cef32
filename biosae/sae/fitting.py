"""From settings and rows to trained models: everything that :meth:`SAE.fit` does, for one model or several."""

from __future__ import annotations

import copy
import hashlib
import os
import warnings
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from biosae.errors import DivergedError, InputError
from biosae.sae import state
from biosae.sae.config import Plan, SAEConfig, resolve
from biosae.sae.distributed import ALONE, Alone, connect
from biosae.sae.loop import run
from biosae.sae.methods import method, options_of
from biosae.sae.methods.base import Method
from biosae.sae.model import SparseAutoencoder, calibrated
from biosae.sae.normalise import Normaliser
from biosae.sae.partner import Joined, Scalings
from biosae.sae.rows import Held, Rows
from biosae.sae.sequential import bounds
from biosae.sae.sparse_ops import kernels
from biosae.sae.stream import Stream
from biosae.sae.train import Trainer
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


def fit_many(models: list[SAE], X: Any, *, groups: Any = None, partner: Any = None) -> list[SAE]:
    """Fit several SAEs (seeds, k, widths, architectures) to one stream of rows, each batch read once for all.

    Parameters
    ----------
    models
        Unfitted or, with ``warm_start``, fitted estimators. They must come out at one batch size. The seed and the
        ``validation`` of the first decide which rows are held out and in which order the others come; the first model
        is the same as if it had been fitted alone.
    X, groups, partner
        As for :meth:`biosae.sae.SAE.fit`; a partner goes to all of them, which must take the same kind.

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
    joined = _joined(models, X, partner)
    comm, device = connect(models[0].parallel, torch.device(resolve_device(models[0].device)))
    try:
        return _fit(models, Rows(X if joined is None else joined), groups, comm, device, joined)
    finally:
        comm.close()


def _joined(models: list[SAE], X: Any, partner: Any) -> Joined | None:
    """X and its partner as one table, if the methods take one.

    Raises
    ------
    InputError
        If a method needs a partner and there is none, takes none and there is one, or they take different kinds.
    """
    kinds = {method(sae.architecture).partner if sae.is_method else None for sae in models}
    if len(kinds) > 1:
        raise InputError("models on one stream must take the same kind of partner table, or none; fit them apart")
    (kind,) = kinds
    name = models[0].architecture
    if partner is None:
        if kind not in (None, "gradient"):
            raise InputError(
                f"architecture={name!r} learns from two tables: pass fit(X, partner=Y), a {kind} of each row"
            )
        return None
    if kind is None:
        raise InputError(f"architecture={name!r} takes no partner table; leave partner out")
    return Joined(X, partner, kind)


def _fit(
    models: list[SAE], rows: Rows, groups: Any, comm: Alone, device: torch.device, joined: Joined | None
) -> list[SAE]:
    d = rows.d if joined is None else joined.widths[0]
    for sae in models:
        if sae.is_method and comm is not ALONE:
            raise InputError(f"architecture={sae.architecture!r} trains in a single process: set parallel=None")
        if _continues(sae):
            if joined is not None:
                raise InputError("a training with a partner table cannot go on from a fitted model: warm_start=False")
            sae._check_rows(rows)
    seeds = [int(comm.of_all(str(_seed(sae)))[0]) for sae in models]
    held = Held.draw(rows, groups=groups, share=models[0].validation, rng=np.random.default_rng(seeds[0]))
    n = None if rows.n is None else rows.n - len(held)
    plans = [resolve(_warm(sae, _continues(sae)), n, d) for sae in models]
    sizes = {plan.batch_size for plan in plans}
    if len(sizes) > 1:
        raise InputError(f"models on one stream need one batch size, these come out at {sorted(sizes)}; set batch_size")
    stream = _stream(models, rows, groups, held=held, batch_size=plans[0].batch_size, seed=seeds[0], device=device)
    data = {"n": rows.n, "d": rows.d, "rows": _digest(rows), "fingerprint": rows.fingerprint, "held": _hash(held.units)}
    if stream.instances is not None:
        data["instances"] = _hash(stream.instances)
    normalisers: dict[str, Normaliser | Scalings] = {}
    trainers = []
    for sae, plan, seed in zip(models, plans, seeds, strict=True):
        sae._keep_plan(plan, seed, d)
        key = state.key(sae, plan, {**data, "seed": seed, "stream": seeds[0], "shards": comm.shards})
        if len(set(comm.of_all(key))) > 1:
            raise InputError(
                "the processes were given different rows or settings; give every process the same X and the same "
                "settings: each takes its own part"
            )
        normaliser = _normaliser(sae, stream, normalisers, joined)
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
        model, history, sae.seconds_ = comm.whole(trainer.model), trainer.history, trainer.seconds
        del trainer  # and with it moments and gradients, before more is held
        _complete(sae, model, normaliser, stream.sample(CALIBRATION_ROWS, seed + 2), seed)
        sae._trainer = None
        sae._keep_fit(model, normaliser, rows, held, history, went_on=_continues(sae))
        sae._measure(_measured(rows, stream, seed), held)
    if diverged is not None:
        raise diverged
    return models


def _stream(models: list[SAE], rows: Rows, groups: Any, *, batch_size: int, **settings: Any) -> Stream:
    """The stream of all models, in the order that they ask for."""
    if len({(sae.order, sae.buffer_rows) for sae in models}) > 1:
        raise InputError("models on one stream need one order and one buffer_rows; fit them apart")
    if models[0].order == "shuffled":
        return Stream(rows, batch_size=batch_size, **settings)
    instances = None if rows.n is None else bounds(rows, groups)
    buffer = models[0].buffer_rows or 4 * batch_size
    return Stream(rows, batch_size=batch_size, fast_buffer=buffer, instances=instances, **settings)


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
        normaliser = sae.normaliser_ if goes_on else _scaling(sae.normalise, lambda: (x for _, x in rows.blocks()))
        device = torch.device(resolve_device(sae.device))
        first = None if goes_on else rows.take(np.random.default_rng(seed).permutation(rows.n)[:INIT_ROWS])
        trainer = trainer_of(sae, endless, normaliser, first, seed, device)
        trainer.seed = seed
    normaliser, start = sae.normaliser_ if goes_on else normaliser, trainer.done
    order = np.random.default_rng([trainer.seed, trainer.done]).permutation(rows.n)
    for at in range(0, rows.n, trainer.plan.batch_size):
        batch = rows.take(order[at : at + trainer.plan.batch_size])
        trainer.step(torch.from_numpy(batch).to(trainer.since_fired.device))
        trainer.tell()
    sae.n_steps_ = sae.n_steps_ + trainer.done - start if goes_on else trainer.done
    model = copy.deepcopy(trainer.model).eval()
    _complete(sae, model, normaliser, rows.take(order[:CALIBRATION_ROWS]), trainer.seed)
    seen = Held.draw(rows, share=0, rng=np.random.default_rng(0))  # holds nothing out, and knows the patients
    sae._keep_fit(model, normaliser, rows, seen, trainer.history, went_on=goes_on)
    sae._trainer = trainer
    sae._measure(rows.blocks(), Held())
    return sae


def _complete(
    sae: SAE, model: SparseAutoencoder | Method, normaliser: Normaliser | Scalings, sample: np.ndarray, seed: int
) -> None:
    """Set what evaluation needs; fold the scaling into the weights of a built-in architecture."""
    device = next(model.parameters()).device
    parts = (torch.from_numpy(sample[at : at + 256]).to(device) for at in range(0, len(sample), 256))
    parts = (_normalised(normaliser, part) for part in parts)
    if sae.is_method:
        model.complete_(torch.cat(list(parts)), torch.Generator().manual_seed(seed))
        return
    if sae.architecture in ("batchtopk", "matryoshka"):
        model.threshold.fill_(calibrated(model.preactivations, parts, sae.k_))
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
        model.k = plan.k
        if sae.is_method:
            model.options = options_of(sae.architecture, sae.options)
        else:
            model.ends, model.bandwidth = plan.ends, sae.bandwidth
            normaliser.unfold_(model)
    else:
        widths = normaliser.widths if isinstance(normaliser, Scalings) else (first.shape[1], 0)
        model = empty_model(sae, plan, *widths)
        start = torch.empty(first.shape)
        for at in range(0, len(first), MEASURED_BLOCK):  # in parts: these are many rows
            part = normaliser.ready(first[at : at + MEASURED_BLOCK])
            start[at : at + MEASURED_BLOCK] = normaliser.apply(torch.from_numpy(part))
        if not sae.is_method:
            model = model.to(device)
        model.initialise(start, atoms=sae.decoder_init, scale=plan.encoder_init, generator=generator)
        model = model.to(device)
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


def empty_model(sae: SAEConfig, plan: Plan, n_features: int, n_partner: int = 0) -> SparseAutoencoder | Method:
    """Model of the planned size, all zeros."""
    if sae.is_method:
        options = options_of(sae.architecture, sae.options)
        return method(sae.architecture)(n_features, plan.n_latents, k=plan.k, options=options, n_partner=n_partner)
    return SparseAutoencoder(
        n_features, plan.n_latents, architecture=sae.architecture, k=plan.k, ends=plan.ends,
        threshold=sae.threshold, bandwidth=sae.bandwidth,
    )  # fmt: skip


def _normalised(normaliser: Normaliser | Scalings, x: torch.Tensor) -> torch.Tensor:
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
        If the settings now ask for another architecture, other options or another width than the fitted model has.
    """
    if not goes_on:
        return sae
    sae._check_made()
    if sae.n_latents not in (sae.n_latents_, None):
        raise InputError(
            f"the fitted model that is to go on has n_latents={sae.n_latents_!r}, the setting now is "
            f"{sae.n_latents!r}; set it back, or clone the SAE to start anew"
        )
    given = SAEConfig(**sae.get_params())
    return given.set_params(n_latents=sae.n_latents_, k=sae.k if sae.k is not None else sae.k_)


def _normaliser(
    sae: SAE, stream: Stream, made: dict[str, Normaliser | Scalings], joined: Joined | None
) -> Normaliser | Scalings:
    if _continues(sae):
        return sae.normaliser_
    if sae.normalise not in made:
        blocks = stream.blocks if stream.n is not None else lambda: [stream.sample(CHUNK_ROWS, 0)]
        made[sae.normalise] = _scaling(sae.normalise, blocks, joined)
    return made[sae.normalise]


def _scaling(
    mode: str, blocks: Callable[[], Iterable[np.ndarray]], joined: Joined | None = None
) -> Normaliser | Scalings:
    """The scaling, fitted; what speaks against the mode on these rows is said before training starts."""
    if joined is None:
        normaliser = Normaliser.fit(mode, blocks())
    else:
        normaliser = Scalings.fit(mode, blocks, kind=joined.kind, widths=joined.widths)
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
