"""Training: a :class:`Trainer` holds one model and all that its next step depends on; :func:`run` feeds it batches."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from types import ModuleType

import torch

from biosae.errors import DivergedError, InputError
from biosae.sae import state
from biosae.sae.config import Plan, SAEConfig, k_at, penalty_at, rate_at
from biosae.sae.distributed import ALONE, Alone
from biosae.sae.kernels import torch_any
from biosae.sae.kernels.codes import Gradient
from biosae.sae.methods.base import Method, Now
from biosae.sae.model import SparseAutoencoder, unit_rows_
from biosae.sae.sparse_ops import GUESS
from biosae.sae.step import Outcome, Taken, Wanted, by_autograd, dense, missed, reconstruct, sparse

REFRESH = 8
"""Steps between two looks at what must come back from the device: dead latents, density, whether all is finite."""
SWITCH = 0.05
"""Share of active codes above which ``relu`` and ``jumprelu`` take the dense step, which is then the faster one."""
BETAS, EPS = (0.9, 0.999), 6.25e-10
SAVE_SECONDS = 60.0
RUNAWAY = 1e6
"""A squared error this many times the rows' own squares is called diverged, though all numbers are finite."""
ENCODES = ("W_enc", "b_enc", "W_dec", "b_dec")
"""Weights that resampling sets."""


class Trainer:
    """One model in training.

    Parameters
    ----------
    model
        Initialised, on its device.
    normalise
        Turns raw rows (n, d) on the device into the rows that the model sees.
    config, plan
        Settings and the numbers resolved from them.
    generator
        CPU generator for what is drawn in training (new atoms).
    ops
        Kernels of :func:`biosae.sae.sparse_ops.kernels`; None: the dense step.
    held
        Held-out rows, normalised; None: none.
    """

    def __init__(
        self,
        model: SparseAutoencoder | Method,
        normalise: Callable[[torch.Tensor], torch.Tensor],
        *,
        config: SAEConfig,
        plan: Plan,
        generator: torch.Generator,
        ops: ModuleType | None,
        held: torch.Tensor | None = None,
        comm: Alone = ALONE,
    ) -> None:
        self.model, self.normalise, self.held = model.train(), normalise, held
        self.config, self.plan, self.generator, self.ops, self.comm = config, plan, generator, ops, comm
        self.weights = {name: p.detach() for name, p in model.named_parameters()}
        self.moments = {name: (torch.zeros_like(w), torch.zeros_like(w)) for name, w in self.weights.items()}
        self.is_method = isinstance(model, Method)
        second = getattr(model, "partner", None) in ("target", "modality")
        if config.resample_every and (second or not set(ENCODES) <= self.weights.keys()):
            raise InputError(
                f"architecture={config.architecture!r} has no encoder rows to resample, or learns from two tables: "
                "resample_every=None"
            )
        device = next(iter(self.weights.values())).device
        self.since_fired = torch.zeros(model.n_latents, dtype=torch.int64, device=device)
        self.dead = self.since_fired.new_zeros(0)
        self.some_dead = False
        self.done, self.guess, self.density = 0, math.inf, 1.0
        self.seconds = 0.0
        self.stopped = ""
        self.history: list[dict[str, float]] = []
        self.average = {n: w.clone() for n, w in self._averaged().items()} if config.ema else {}
        self.kept: dict[str, torch.Tensor] = {}
        self._keep()
        self.best, self.waited = math.inf, 0
        self.key, self.seed = "", 0
        self._room = Gradient.empty(model.W_dec.detach()) if ops is not None and not self.is_method else None
        self._saved = time.monotonic()

    @property
    def buffers(self) -> dict[str, torch.Tensor]:
        """What a method keeps besides its weights, by name."""
        return dict(self.model.named_buffers()) if self.is_method else {}

    def _averaged(self) -> dict[str, torch.Tensor]:
        """What the moving average is of: the weights, and buffers that are learnt beside them."""
        buffers = self.buffers
        return self.weights | {name: buffers[name] for name in getattr(self.model, "averaged", ())}

    def set_buffer(self, name: str, value: torch.Tensor) -> None:
        """Put a buffer of the method back."""
        owner, _, leaf = name.rpartition(".")
        module = self.model.get_submodule(owner)
        setattr(module, leaf, value.to(getattr(module, leaf).device))

    @property
    def finished(self) -> bool:
        """Whether no step is left."""
        return bool(self.stopped) or self.done >= self.plan.n_steps

    def step(self, rows: torch.Tensor) -> None:
        """One optimiser step on raw rows (n, d).

        Raises
        ------
        DivergedError
            If the gradient is not finite or, at a logged step, the error beyond all measure. :meth:`finish` then puts
            back the weights of the last logged step whose own batch showed that all was well.
        """
        x = self.normalise(rows)
        outcome = self._gradient(x)
        grads, norm = self._reduced(outcome)
        look = self.done % REFRESH == REFRESH - 1
        logged = self.done % self.plan.log_every == self.plan.log_every - 1 or self.done == self.plan.n_steps - 1
        if (look or logged or norm.device.type == "cpu") and not math.isfinite(norm):
            self._diverged()
        if logged:
            self._check(x, outcome)
        clip = self.config.clip_norm
        factor = (clip / (norm + 1e-6)).clamp(max=1.0).float() if clip else torch.ones((), device=norm.device)
        rate, ops = rate_at(self.plan, self.done), self.ops or torch_any
        with torch.no_grad():
            for name, weight in self.weights.items():
                ops.adam_(
                    weight, grads[name], *self.moments[name], step=self.done + 1, rate=rate, betas=BETAS, eps=EPS,
                    factor=factor, unit=name == "W_dec" and self.model.unit_atoms,
                )  # fmt: skip
            if self.is_method:
                self.model.constrain_(self.generator)
                self.model.after_step_(outcome.found, self._now())
            elif "threshold" in self.weights:
                self.weights["threshold"].clamp_(min=0)
            self.since_fired += self.comm.rows(len(x))
            self.since_fired[outcome.fired] = 0
            if look:
                if self.model.unit_atoms:
                    unit_rows_(self.weights["W_dec"], generator=self.generator)
                self.dead = (self.since_fired >= self.plan.dead_after).nonzero().squeeze(1)
                self.some_dead = self.comm.total(len(self.dead)) > 0
                self.density = float(outcome.active) / (len(x) * len(self.since_fired))
            now = self._averaged() if self.average else {}
            for name, mean in self.average.items():
                mean.lerp_(now[name], 1 - self.config.ema)
            every = self.config.resample_every
            if every and self.done % every == every - 1 and self.done < self.plan.decay_start:
                rows = x[:, : self.weights["b_dec"].numel()]  # without gradients
                self._resample(rows, outcome.residual, every // 2 * self.comm.rows(len(x)))
        self.done += 1
        if logged:
            self._log(x, outcome, rate)

    def _gradient(self, x: torch.Tensor) -> Outcome | Taken:
        config = self.config
        if self.is_method:
            return by_autograd(self.model, x, self._now())
        wanted = self._wanted()
        full = config.architecture in ("relu", "jumprelu") and self.density > SWITCH and self.comm is ALONE
        if self.ops is None or full:
            self.model.requires_grad_(True)
            return dense(self.model, x, wanted)
        low = self.weights["W_enc"].bfloat16() if config.prefilter else None
        outcome = sparse(self.model, x, wanted, self.ops, low=low, comm=self.comm, room=self._room)
        self.guess = GUESS * outcome.cut
        return outcome

    def _wanted(self) -> Wanted:
        config, plan = self.config, self.plan
        weight = {"relu": config.l1, "jumprelu": config.l0_weight}.get(config.architecture, 0.0)
        return Wanted(
            k=k_at(plan, self.done), weight=weight * penalty_at(plan, self.done), dead=self.dead,
            some_dead=self.some_dead, aux_k=plan.aux_k, aux_alpha=config.aux_alpha, guess=self.guess,
        )  # fmt: skip

    def _now(self, generator: torch.Generator | None = None) -> Now:
        plan = self.plan
        return Now(
            k=k_at(plan, self.done), ramp=penalty_at(plan, self.done), dead=self.dead, aux_k=plan.aux_k,
            aux_alpha=self.config.aux_alpha, step=self.done, n_steps=plan.n_steps,
            generator=generator or self.generator,
        )  # fmt: skip

    def _reduced(self, outcome: Outcome | Taken) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
        """Gradients summed over processes, and their joint norm (float64 scalar)."""
        if self.is_method:
            return outcome.grads, sum(g.square().sum(dtype=torch.float64) for g in outcome.grads.values()).sqrt()
        found, comm = outcome.latents, self.comm
        grads = {"W_enc": found.enc, "b_enc": found.bias, "W_dec": found.dec, "b_dec": outcome.b_dec}
        if outcome.threshold is not None:
            grads["threshold"] = outcome.threshold
        square = found.square.sum()
        if comm.replicas > 1:
            grads = {name: comm.over_rows(grad) for name, grad in grads.items()}
            outcome.fired = comm.over_rows(outcome.fired.int()) > 0
            square = sum(grads[n].square().sum(dtype=torch.float64) for n in ("W_enc", "b_enc", "W_dec"))
        if outcome.threshold is not None:
            square = square + grads["threshold"].square().sum(dtype=torch.float64)
        square = comm.over_latents(square) + grads["b_dec"].square().sum(dtype=torch.float64)
        return grads, square.sqrt()

    def _resample(self, x: torch.Tensor, error: torch.Tensor, silent: int) -> None:
        """Give latents silent for ``silent`` rows the direction of badly reconstructed rows of this batch.

        Rows are drawn with probability in proportion to their squared error; the new encoder row has 0.2 of the mean
        norm of those in use, the bias and the moments start from 0 (Bricken et al. 2023).
        """
        comm = self.comm
        idle = (self.since_fired >= silent).nonzero().squeeze(1)
        chance = comm.all_rows(error.square().sum(1)).cpu().double()
        before, total = comm.place(len(idle))
        total = min(total, int((chance > 0).sum()))
        if not total:
            return
        drawn = comm.same(torch.multinomial(chance, total, generator=self.generator)).to(x.device)
        start = (comm.pick(x, drawn) - self.weights["b_dec"])[before : before + len(idle)]
        idle = idle[: len(start)]
        unit_rows_(start, generator=self.generator)
        used = torch.ones_like(self.since_fired, dtype=torch.bool)
        used[idle] = False
        norms = self.weights["W_enc"].norm(dim=1) * used
        norm, count = comm.over_latents(torch.stack([norms.sum(), used.sum().float()]))
        norm = norm / count if count > 0 else 1.0
        self.weights["W_dec"][idle] = start
        self.weights["W_enc"][idle] = 0.2 * norm * start
        for name in ("b_enc", *getattr(self.model, "from_zero", ())):
            self.weights[name][idle] = 0
        if "threshold" in self.weights:
            first = self.model.options if self.is_method else self.config
            self.weights["threshold"][idle] = first.threshold
        for name in self.weights.keys() - {"b_dec"}:
            for moment in self.moments[name]:
                moment[idle] = 0
        self.since_fired[idle] = 0

    @torch.no_grad()
    def _log(self, x: torch.Tensor, outcome: Outcome, rate: float) -> None:
        error, spread = self._sums(outcome.target if self.is_method else x, outcome.residual)
        rows = self.comm.rows(len(x))
        dead = (self.since_fired >= self.plan.dead_after).float().mean()
        found = {
            "loss": float(outcome.loss),
            "fvu": _ratio(error, spread),
            "l0": float(self.comm.over_latents(self.comm.over_rows(torch.as_tensor(float(outcome.active))))) / rows,
            "dead": float(self.comm.over_latents(dead)) / self.comm.shards,
        }
        if self.held is not None:
            found["fvu_val"] = _ratio(*self._sums(*self._held_out(), shared=False))
        if self.config.prefilter == "verify" and self.ops is not None and not self.is_method:
            found["missed"] = missed(self.model, x, self._wanted(), self.ops, comm=self.comm)
        self.history.append({"step": self.done, **found, "lr": rate})
        if self.config.verbose and self.comm.rank == 0:
            print("  ".join(f"{name} {value:.6g}" for name, value in self.history[-1].items()))
        if not self._stops_early:
            return
        self.waited += 1
        if found["fvu_val"] < self.best:
            self.best, self.waited = found["fvu_val"], 0
            self._keep()
        if self.waited >= self.config.patience:
            self.stopped = f"held-out FVU did not improve after step {self.done - self.waited * self.plan.log_every}"

    def _held_out(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Held-out rows (or their targets) and the residual that the training rule leaves."""
        if self.is_method:  # chance of its own, so that looking changes nothing
            found = self.model.loss(self.held, self._now(torch.Generator().manual_seed(0)))
            return self.held if found.target is None else found.target, found.residual
        comm = self.comm if self.comm.shards > 1 else ALONE  # every replica has all held-out rows
        x_hat = reconstruct(self.model, self.held, self._wanted(), self.ops or torch_any, comm=comm)
        return self.held, self.held - x_hat

    def tell(self) -> None:
        """Call the callbacks, in the first process, if the last step was a logged one."""
        if self.comm.rank == 0 and self.history and self.history[-1]["step"] == self.done:
            for callback in self.config.callbacks:
                callback(self.done, dict(self.history[-1]))

    def _sums(self, x: torch.Tensor, error: torch.Tensor, *, shared: bool = True) -> tuple[float, float]:
        """Squared error and squared spread about the mean of a batch, of which (``shared``) replicas hold parts."""
        over = self.comm.over_rows if shared else (lambda value: value)
        mean = over(x.sum(0)) / (self.comm.rows(len(x)) if shared else len(x))
        return float(over(error.square().sum())), float(over((x - mean).square().sum()))

    @property
    def _stops_early(self) -> bool:
        return self.config.early_stopping and self.held is not None

    @torch.no_grad()
    def _check(self, x: torch.Tensor, outcome: Outcome) -> None:
        """Keep the weights that this batch has shown to be sound."""
        over = self.comm.over_rows
        error, size = float(over(outcome.residual.square().sum())), float(over(x.square().sum()))
        if not error <= RUNAWAY * (size + self.comm.rows(len(x))):
            self._diverged()
        if not self._stops_early:
            self._keep()

    @torch.no_grad()
    def _keep(self) -> None:
        """Copy the weights as they are (the average where there is one) to those that are kept."""
        for name, weight in (self.average or self.weights).items():
            self.kept.setdefault(name, torch.empty_like(weight)).copy_(weight)
        if self.average and self.model.unit_atoms:
            unit_rows_(self.kept["W_dec"])
        self.kept |= {name: buffer.clone() for name, buffer in self.buffers.items() if name not in self.average}
        self.kept_at = self.done

    def _diverged(self) -> None:
        self.stopped = "diverged"
        raise DivergedError(
            f"training diverged at step {self.done + 1}; the model keeps its weights of step {self.kept_at}. Lower "
            f"learning_rate (now {self.plan.learning_rate:g}), or use normalise='centre_scale' and clip_norm=1"
        )

    @torch.no_grad()
    def finish(self) -> None:
        """Put the weights to keep into the model: the average, the best, or the last that were finite."""
        if not self.stopped and not self._stops_early and self.average:
            self._keep()
        if self.stopped or self._stops_early or self.average:
            for name, value in self.kept.items():
                if name in self.weights:
                    self.weights[name].copy_(value)
                else:
                    self.set_buffer(name, value)
            if self.is_method:
                self.model.constrain_(self.generator)
        self.model.eval().requires_grad_(False)

    def save(self, *, force: bool = False) -> None:
        """Write the state to the checkpoint folder when it is due."""
        folder = self.config.checkpoint
        if folder is None:
            return
        every = self.config.checkpoint_every
        if every:
            due = self.done % every == 0
        else:  # by the clock of the first process
            due = bool(self.comm.same(torch.tensor(time.monotonic() - self._saved > SAVE_SECONDS)))
        if due or force:
            state.write(folder, self)
            self._saved = time.monotonic()


def _ratio(error: float, spread: float) -> float:
    """Fraction of variance unexplained; of rows that are all alike 0 or infinity."""
    if spread > 0:
        return error / spread
    return math.inf if error > 0 else error
