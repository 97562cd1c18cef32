"""Samples a second of the reader, of the encoder and of the whole way, for every modality; which of them is slowest.

Reader: every item read and preprocessed, one after the other in one thread. Encoder: the forward pass on the same
tensors, in memory. Whole: ``embed`` from files to a finished folder, reading in threads. All three alternate in one
run, so that their ratios hold on a machine that others use; rates depend on the machine.

    python benchmarks/modalities.py --data DATA --weights WEIGHTS [--docs docs/benchmarks.md] [--only ecg eeg]
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from pages import insert

import biosae as bs
from biosae.settings import settings

N_ITEMS = {"image": 128, "signal": 2048}  # at most; signals are many so that the fixed cost of a folder is small
BATCH, REPEATS = 32, 3

# modality -> (encoder, function of the data folder that gives samples)
CASES: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "tiles, 256 px JPEG": (
        "mobilenetv2-imagenet",
        lambda d: bs.read.tiles(d / "her2st_spots/manifest.csv", patient="patient_id", mpp=0.775),
    ),
    "whole slide, SVS, 256 px at 0.5 um/px": (
        "mobilenetv2-imagenet",
        lambda d: bs.read.wsi(
            d / "wsi_small/cmu1_small_region.svs", patient=None, tile=256, mpp=0.5, overlap=192, tissue=None
        ),
    ),
    "DICOM, single frames": (
        "mobilenetv2-imagenet",
        lambda d: bs.read.dicom(d / "dicom_zoo/files", patient=None, frames="first", max_failures=1.0),
    ),
    "radiographs, 320 px JPEG": (
        "mobilenetv2-imagenet",
        lambda d: bs.read.images(d / "covid_cxr/manifest.csv", patient="patient_id"),
    ),
    "camera trap, 256 px JPEG": (
        "mobilenetv2-inat-bird",
        lambda d: bs.read.images(d / "camera_trap_small_mammals/manifest.csv", patient=None, location="camera_id"),
    ),
    "EEG, 64 channels, EDF+, windows of 2 s": (
        "eeg-bandpower",
        lambda d: bs.read.edf(
            d / "eeg_eegbci_s001/manifest.csv", patient="subject_id", window=2.0, step=0.25, unit="uV", quality=False
        ),
    ),
    "EEG, 2 channels at 60 Hz, epochs of 30 s": (
        "robustsleepnet-eeg",
        lambda d: bs.read.edf(
            d / "eeg_eegbci_s001/manifest.csv", patient="subject_id", channels=["Cz", "Oz"], rate=60.0, window=30.0,
            step=0.5, unit="uV", quality=False,
        ),
    ),
    "ECG, 1 lead at 100 Hz, WFDB 16, windows of 10 s": (
        "wildecg-resnet1d",
        lambda d: bs.read.wfdb(
            d / "ecg_cpsc2021_af/manifest.csv", patient="patient_id", channels=["II"], rate=100.0, window=10.0,
            step=1.0, quality=False,
        ),
    ),
    "ECG, 12 leads, WFDB MATLAB, 10 s": (
        "ecg-morphology",
        lambda d: bs.read.wfdb(d / "ecg_cinc2021/manifest.csv", patient="patient_id", quality=False),
    ),
}  # fmt: skip


def seconds(work: Callable[[], Any]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def measure(encoder: Any, samples: Any) -> dict[str, float]:
    """Median samples a second of reader, encoder and whole, over alternated repeats."""
    samples = samples.select(slice(0, N_ITEMS[samples.item]))
    encoder = encoder.suited(samples)
    good = []
    for i in range(len(samples)):
        try:
            good.append(encoder.preprocess(samples[i]))
        except Exception:  # damaged on purpose, or too small for this encoder
            continue
    shape = max({t.shape for t in good}, key=[t.shape for t in good].count)
    stacked = torch.stack([t for t in good if t.shape == shape])

    def read() -> None:
        for i in range(len(samples)):
            try:
                encoder.preprocess(samples[i])
            except Exception:
                continue

    def forward() -> None:
        for start in range(0, len(stacked), BATCH):
            encoder.forward(stacked[start : start + BATCH])

    def whole() -> None:
        with tempfile.TemporaryDirectory() as out, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            bs.embeddings.embed(samples, encoder, out=out, batch_size=BATCH, max_failures=1.0)

    forward()
    times: dict[str, list[float]] = {"reader": [], "encoder": [], "whole": []}
    for _ in range(REPEATS):
        for name, work, n in (
            ("reader", read, len(good)), ("encoder", forward, len(stacked)), ("whole", whole, len(good)),
        ):  # fmt: skip
            times[name].append(n / seconds(work))
    return {name: median(rates) for name, rates in times.items()} | {"n": len(good)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of the data packs")
    parser.add_argument("--weights", type=Path, required=True, help="folder of the encoders' weights")
    parser.add_argument("--docs", type=Path, help="page whose section between the markers is replaced")
    parser.add_argument("--only", nargs="*", help="cases whose name holds one of these words")
    options = parser.parse_args()
    settings.progress, settings.weights_dirs = False, (options.weights,)
    lines = [
        "| modality | encoder | items | reader, items/s | encoder, items/s | whole, items/s | whole : encoder | slow |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for name, (encoder, read) in CASES.items():
        if options.only and not any(word.lower() in name.lower() for word in options.only):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            rates = measure(bs.encoders.load(encoder), read(options.data))
        slowest = "reader" if rates["reader"] < rates["encoder"] else "encoder"
        lines.append(
            f"| {name} | {encoder} | {rates['n']} | {rates['reader']:.3g} | {rates['encoder']:.3g} | "
            f"{rates['whole']:.3g} | {rates['whole'] / rates['encoder']:.2f} | {slowest} |"
        )
        print(lines[-1], flush=True)
    if options.docs:
        insert(options.docs, "modalities", "\n".join(lines))


if __name__ == "__main__":
    main()
