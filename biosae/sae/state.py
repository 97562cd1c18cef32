"""The state of an unfinished training on disk: everything that the next step depends on, in one safetensors file."""

from __future__ import annotations

import json
import os
import zlib
from pathlib import Path
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch

from biosae.errors import FormatError, InputError
from biosae.files import hash_json
from biosae.sae.checkpoint import write_log, write_tensors

if TYPE_CHECKING:
    from biosae.sae.train import Trainer

FORMAT, VERSION = "biosae-sae-training", "1"
NUMBERS = ("done", "guess", "density", "some_dead", "stopped", "history", "best", "waited", "kept_at")
FREE = ("device", "verbose", "checkpoint", "checkpoint_every", "callbacks", "warm_start", "random_state", "parallel")
"""Settings that may differ between the run that stopped and the one that goes on."""


def key(config: Any, plan: Any, data: dict[str, Any]) -> str:
    """Hash of all that must be equal for a training to go on: settings, numbers resolved from them, data, seed."""
    settings = {name: value for name, value in config.get_params().items() if name not in FREE}
    return hash_json({"settings": settings, "plan": vars(plan), "data": data})


def path(folder: str | os.PathLike) -> Path:
    """File of the state in a checkpoint folder."""
    return Path(folder) / "training.safetensors"


def part(folder: str | os.PathLike, rank: int, done: int) -> Path:
    """File of another process than the first, which has other latents (``parallel="latents"``)."""
    return Path(folder) / f"training.{rank}.{done}.safetensors"


def seed(folder: str | os.PathLike) -> int | None:
    """Seed of the training whose state is in ``folder``; None where there is none that can be read."""
    try:
        with safetensors.safe_open(path(folder), framework="pt") as opened:
            return int((opened.metadata() or {})["seed"])
    except (OSError, KeyError, ValueError, safetensors.SafetensorError):
        return None


def write(folder: str | os.PathLike, trainer: Trainer) -> None:
    """Write a trainer's state (atomically: a kill leaves the former one) and ``log.csv``.

    The first process writes ``training.safetensors``. Where the latents are shared, each other one has written its part
    before, under a name with the step; the first file names the step, and so makes the parts valid.
    """
    comm = trainer.comm
    if comm.rank and comm.shards > 1:
        _write(part(folder, comm.rank, trainer.done), trainer)
    comm.total(0)
    if comm.rank == 0:
        _write(path(folder), trainer)
        write_log(folder, trainer.history)
    comm.total(0)  # nobody leaves before the file is there
    if comm.rank and comm.shards > 1:
        for former in Path(folder).glob(f"training.{comm.rank}.*.safetensors"):
            if former != part(folder, comm.rank, trainer.done):
                former.unlink()


def _write(file: Path, trainer: Trainer) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    tensors = {f"weight.{name}": weight for name, weight in trainer.weights.items()}
    for name, pair in trainer.moments.items():
        tensors |= {f"moment{i}.{name}": moment for i, moment in enumerate(pair)}
    tensors |= {f"average.{name}": value for name, value in trainer.average.items()}
    tensors |= {f"kept.{name}": value for name, value in trainer.kept.items()}
    tensors |= {f"buffer.{name}": value for name, value in trainer.buffers.items()}
    tensors |= {
        "since_fired": trainer.since_fired,
        "dead": trainer.dead,
        "generator": trainer.generator.get_state(),
    }
    numbers = {name: getattr(trainer, name) for name in NUMBERS}
    header = {
        "format": FORMAT,
        "version": VERSION,
        "key": trainer.key,
        "seed": str(trainer.seed),
        "numbers": json.dumps(numbers),
    }
    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    header["sum"] = _sum(tensors, header["numbers"])
    write_tensors(file, tensors, header)


def _sum(tensors: dict[str, torch.Tensor], numbers: str) -> str:
    """CRC-32 of the whole state: safetensors itself would not notice a changed byte."""
    total = zlib.crc32(numbers.encode())
    for name in sorted(tensors):
        total = zlib.crc32(tensors[name].cpu().numpy(), zlib.crc32(name.encode(), total))
    return f"{total:08x}"


def read(folder: str | os.PathLike, trainer: Trainer) -> bool:
    """Bring a fresh trainer to the state in ``folder``; False if there is none. What a kill left half written goes.

    Raises
    ------
    FormatError
        If the file is corrupt, foreign or of another version.
    InputError
        If it is of other settings, data or seed.
    """
    file = path(folder)
    if trainer.comm.rank == 0:
        for stale in Path(folder).glob(".training.*.tmp.safetensors"):
            stale.unlink()
    if not file.is_file():
        return False
    if trainer.comm.rank and trainer.comm.shards > 1:
        _, first = _opened(file, trainer, tensors=False)
        file = part(folder, trainer.comm.rank, first["done"])
        if not file.is_file():
            raise FormatError(
                f"{file} is missing, which belongs to the state in {path(folder)}; remove that to start anew"
            )
    tensors, numbers = _opened(file, trainer)
    with torch.no_grad():
        for name, weight in trainer.weights.items():
            weight.copy_(tensors[f"weight.{name}"])
            for i, moment in enumerate(trainer.moments[name]):
                moment.copy_(tensors[f"moment{i}.{name}"])
        for name, value in trainer.average.items():
            value.copy_(tensors[f"average.{name}"])
    for name in trainer.buffers:
        trainer.set_buffer(name, tensors[f"buffer.{name}"])
    device = trainer.since_fired.device
    trainer.kept = {n.removeprefix("kept."): t.to(device) for n, t in tensors.items() if n.startswith("kept.")}
    trainer.since_fired, trainer.dead = tensors["since_fired"].to(device), tensors["dead"].to(device)
    trainer.generator.set_state(tensors["generator"])
    for name in NUMBERS:
        setattr(trainer, name, numbers[name])
    return True


def _opened(file: Path, trainer: Trainer, *, tensors: bool = True) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """Tensors and numbers of one file, which must be of this training."""
    try:
        with safetensors.safe_open(file, framework="pt") as opened:
            header = opened.metadata() or {}
            if header.get("format") != FORMAT or header.get("version") != VERSION:
                raise FormatError(
                    f"{file} is not a training state that this biosae reads; give another checkpoint folder"
                )
            if header.get("key") != trainer.key:
                raise InputError(
                    f"{file} belongs to a training with other settings, data or seed; give another checkpoint folder, "
                    "or remove this one to start anew"
                )
            if not tensors:
                return {}, json.loads(header["numbers"])
            found = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            if header.get("sum") != _sum(found, header.get("numbers", "")):
                raise FormatError(f"{file} is corrupt (its checksum is another); remove it to start anew")
            return found, json.loads(header["numbers"])
    except safetensors.SafetensorError as error:
        raise FormatError(f"{file} is corrupt ({error}); remove it to start anew") from None
