"""What is installed, what is missing, and what would go wrong: the answers that a bug report needs."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import platform
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from biosae.provenance import versions
from biosae.settings import settings

# extra -> modules that it brings, by import name
EXTRAS = {
    "wsi": ("openslide", "tifffile", "imagecodecs", "pydicom"),
    "dicom": ("pydicom", "pylibjpeg", "openjpeg", "imagecodecs"),
    "signals": ("soundfile", "mne"),
    "eeg": ("mne", "pyedflib"),
    "eegmodels": ("braindecode",),
    "index": ("faiss",),
    "scale": ("dask",),
    "cluster": ("igraph",),
    "data": ("pooch", "nibabel", "h5py"),
    "interactive": ("jupyterlab", "ipywidgets"),
    "test": ("pytest", "hypothesis", "nbclient"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the doctor's report."""

    topic: str
    state: str
    """``ok``, ``note`` (works, worth knowing) or ``problem`` (something will fail)."""
    text: str


def examine() -> list[Finding]:
    """Look at Python, packages, extras, torch and torchvision, device, cache and network settings."""
    return [*_packages(), *_torch(), *_extras(), *_places()]


def _packages() -> list[Finding]:
    found = [Finding("python", "ok", f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    for name, version in versions().items():
        if version is None:
            found.append(Finding(name, "problem", f"not installed; run: pip install {name}"))
        else:
            found.append(Finding(name, "ok", version))
    neighbours = versions(("pynndescent",))["pynndescent"]
    if neighbours is not None and _major_minor(neighbours) >= (0, 7):
        text = f"{neighbours}: scanpy's pp.neighbors breaks with 0.7; run: pip install 'pynndescent<0.7'"
        found.append(Finding("pynndescent", "problem", text))
    return found


def _major_minor(version: str) -> tuple[int, int]:
    numbers = [int(n) for n in re.findall(r"\d+", version)[:2]]
    return (numbers[0], numbers[1] if len(numbers) > 1 else 0)


def torchvision_mismatch(error: BaseException, torch_version: str, cuda_build: str | None) -> str:
    """Plain words for a torchvision that does not import beside the installed torch.

    The usual cause is torch's CPU-only wheel beside the torchvision wheel that was built for CUDA.
    """
    kind = f"built for CUDA {cuda_build}" if cuda_build else "a CPU-only build"
    return (
        f"torchvision does not import ({type(error).__name__}: {error}). torch {torch_version} is {kind}; "
        "the two wheels must come from the same index. Either reinstall both plainly (pip install --force-reinstall "
        "torch torchvision), or, for CPU only, take both from PyTorch's CPU index. "
        "Until then timm and open_clip encoders cannot be loaded."
    )


def _torch() -> list[Finding]:
    try:
        import torch
    except Exception as error:
        return [Finding("torch", "problem", f"does not import ({error}); run: pip install --force-reinstall torch")]
    found = []
    try:
        importlib.import_module("torchvision")
        found.append(Finding("torchvision", "ok", "imports beside this torch"))
    except Exception as error:  # a broken wheel raises RuntimeError, OSError or ImportError
        found.append(
            Finding("torchvision", "problem", torchvision_mismatch(error, torch.__version__, torch.version.cuda))
        )
    if torch.cuda.is_available():
        names = ", ".join(torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count()))
        found.append(Finding("device", "ok", f"CUDA {torch.version.cuda}: {names}"))
    elif torch.backends.mps.is_available():
        found.append(Finding("device", "ok", "Apple MPS"))
    else:
        found.append(Finding("device", "note", f"no GPU; CPU with {torch.get_num_threads()} threads"))
    return found


def _extras() -> list[Finding]:
    found = []
    for extra, modules in EXTRAS.items():
        missing = [m for m in modules if importlib.util.find_spec(m) is None]
        if missing:
            text = f"missing {', '.join(missing)}; run: pip install 'biosae[{extra}]'"
            found.append(Finding(f"extra {extra}", "note", text))
        else:
            found.append(Finding(f"extra {extra}", "ok", ", ".join(modules)))
    return found


def _places() -> list[Finding]:
    found = [Finding("cache", "ok", _folder(settings.cache_dir)), Finding("data", "ok", _folder(settings.data_dir))]
    for folder in settings.weights_dirs:
        state = "ok" if folder.is_dir() else "problem"
        found.append(Finding("weights", state, _folder(folder)))
    if settings.offline:
        found.append(
            Finding("network", "note", "offline: nothing is downloaded (unset BIOSAE_OFFLINE, HF_HUB_OFFLINE)")
        )
    else:
        found.append(Finding("network", "ok", "downloads allowed when asked for (BIOSAE_OFFLINE=1 forbids them)"))
    return found


def _folder(path: Path) -> str:
    return f"{path} ({'exists' if path.is_dir() else 'not made yet'})"


def report(findings: list[Finding]) -> str:
    """The findings as aligned lines, problems marked."""
    marks = {"ok": "  ", "note": "- ", "problem": "! "}
    width = max(len(f.topic) for f in findings)
    lines = [f"{marks[f.state]}{f.topic:<{width}}  {f.text}" for f in findings]
    problems = sum(f.state == "problem" for f in findings)
    lines.append(f"\n{problems} problem{'s' if problems != 1 else ''} found." if problems else "\nNo problem found.")
    return "\n".join(lines)


def main() -> int:
    """Print the report; exit status 1 where something will fail."""
    findings = examine()
    sys.stdout.write(report(findings) + "\n")
    return int(any(f.state == "problem" for f in findings))
