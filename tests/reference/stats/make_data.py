"""Write the small data sets that ``reference.R`` and the tests read. Seeds are fixed; run it only to remake the CSV.

``python make_data.py`` writes next to itself: patients.csv (independent units), cohort.csv (tiles in slides in
patients), zero_inflated.csv, few.csv (14 units), studies.csv (effects to be combined), p_values.csv, and the worked
vectors of the specification d1.csv, d2.csv, d3.csv, d7.csv.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

HERE = Path(__file__).parent


def latents(rng: np.random.Generator, signal: np.ndarray) -> pd.DataFrame:
    """Six columns of the kinds that codes have; ``signal`` (n,) enters four of them."""
    n = len(signal)
    sparse = np.where(rng.random(n) < 0.55, 0.0, np.exp(0.5 * signal + 0.6 * rng.normal(size=n)))
    tied = np.clip(np.round(1.0 + 0.8 * signal + rng.normal(size=n)), 0, 4)
    signed = np.where(rng.random(n) < 0.4, 0.0, rng.normal(size=n) + 0.4 * signal)
    rare = np.where(rng.random(n) < 0.17, rng.gamma(2.0, 1.0, size=n), 0.0)
    dense = 3.0 + rng.normal(size=n) + 0.6 * signal
    halves = np.maximum(np.round(2 * (rng.normal(size=n) + 0.2)) / 2, 0.0)
    columns = {"sparse": sparse, "tied": tied, "signed": signed, "rare": rare, "dense": dense, "halves": halves}
    return pd.DataFrame({f"z_{k}": v for k, v in columns.items()}).round(6)


def patients() -> pd.DataFrame:
    """120 independent units: two arms of 60, three sites, measurement, count in an area, grade, time to event."""
    rng, n = np.random.default_rng(11), 120
    signal = rng.normal(size=n)
    table = pd.DataFrame({"id": [f"u{i:03d}" for i in range(n)]})
    order = np.argsort(signal + 1.5 * rng.normal(size=n))
    table["arm"] = "a"
    table.loc[order[n // 2 :], "arm"] = "b"
    table["site"] = rng.choice(["north", "south", "west"], size=n, p=[0.5, 0.3, 0.2])
    table["sex"] = rng.choice(["f", "m"], size=n)
    table["age"] = np.round(rng.uniform(30, 85, size=n), 1)
    shift = table["site"].map({"north": 0.0, "south": 0.6, "west": -0.5}).to_numpy()
    table["score"] = np.round(signal + shift + 0.02 * (table["age"] - 55) + rng.normal(size=n), 6)
    table["area"] = np.round(rng.uniform(0.3, 2.5, size=n), 3)
    table["count"] = rng.poisson(table["area"] * np.exp(1.0 + 0.4 * signal) * rng.gamma(2.0, 0.5, size=n))
    level = signal + 0.3 * shift + rng.logistic(size=n)
    table["grade"] = np.searchsorted([-1.5, 0.2, 1.8], level)
    time = rng.exponential(size=n) * 24 * np.exp(-0.5 * signal - 0.015 * (table["age"] - 55))
    censored = rng.uniform(4, 60, size=n)
    table["time"] = np.maximum(np.ceil(np.minimum(time, censored)), 1).astype(int)
    table["event"] = (time <= censored).astype(int)
    return pd.concat([table, latents(rng, signal)], axis=1)


def cohort() -> pd.DataFrame:
    """Tiles of 30 patients, one to three slides each, 3 to 14 tiles a patient; labels vary within patients."""
    rng = np.random.default_rng(12)
    rows = []
    for p in range(30):
        own, age = rng.normal(), round(float(rng.uniform(35, 80)), 1)
        site, case = ["north", "south", "west"][p % 3], int(rng.random() < 0.5)
        n_slides = int(rng.integers(1, 4))
        slides = rng.normal(size=n_slides) * 0.5
        for t in range(int(rng.integers(3, 15))):
            s = t % n_slides
            rows.append((f"p{p:02d}", f"p{p:02d}s{s}", site, case, age, own, slides[s]))
    frame = pd.DataFrame(rows, columns=["patient", "slide", "site", "case", "age", "own", "slide_effect"])
    if len(frame) % 2:
        frame = frame.iloc[:-1].copy()
    n = len(frame)
    frame["scanner"] = np.where(rng.random(n) < 0.5, "x", "y")
    signal = rng.normal(size=n) + 0.7 * frame["own"].to_numpy()
    u, v = 0.8 * frame["own"].to_numpy(), frame["slide_effect"].to_numpy()
    frame["score"] = np.round(0.5 * signal + u + v + 0.02 * (frame["age"] - 55) + rng.normal(size=n), 6)
    frame["region"] = "edge"
    frame.loc[np.argsort(signal + u + 2.0 * rng.normal(size=n))[n // 2 :], "region"] = "core"
    frame["area"] = np.round(rng.uniform(0.5, 2.0, size=n), 3)
    frame["count"] = rng.poisson(frame["area"] * np.exp(0.6 + 0.3 * signal + 0.6 * u))
    z = latents(rng, signal)
    z.index = frame.index
    frame = pd.concat([frame.drop(columns=["own", "slide_effect"]), z], axis=1).reset_index(drop=True)
    frame.insert(0, "id", [f"t{i:03d}" for i in range(n)])
    return frame


def zero_inflated() -> pd.DataFrame:
    """Counts in an area, a third of them structural zeros: Poisson and negative binomial."""
    rng, n = np.random.default_rng(13), 300
    x, w = rng.normal(size=n), rng.normal(size=n)
    area = np.round(rng.uniform(0.5, 3.0, size=n), 3)
    mean = area * np.exp(0.8 + 0.45 * x - 0.2 * w)
    zero = rng.random(n) < 0.35
    table = pd.DataFrame({"x": x.round(6), "w": w.round(6), "area": area})
    table["zip"] = np.where(zero, 0, rng.poisson(mean))
    table["zinb"] = np.where(zero, 0, rng.poisson(mean * rng.gamma(1.8, 1 / 1.8, size=n)))
    return table


def few() -> pd.DataFrame:
    """14 units, 6 against 8, without ties and with: small enough to list every arrangement."""
    rng, n = np.random.default_rng(14), 14
    y = np.array([1] * 6 + [0] * 8)
    table = pd.DataFrame({"y": y, "value": rng.normal(size=n).round(4)})
    for j, effect in enumerate([1.8, 0.6, 0.0, -1.0]):
        table[f"z_{j}"] = np.maximum(rng.normal(size=n) + effect * y + 2.5, 0.01).round(3)
    table["z_tied"] = np.maximum(np.round(rng.normal(size=n) + y), 0)
    return table


def write(name: str, table: pd.DataFrame) -> None:
    table.to_csv(HERE / f"{name}.csv", index=False, lineterminator="\n")


if __name__ == "__main__":
    write("patients", patients())
    write("cohort", cohort())
    write("zero_inflated", zero_inflated())
    write("few", few())
    effects = [0.42, 0.11, 0.63, -0.05, 0.30, 0.58, 0.21, 0.80]
    variances = [0.020, 0.015, 0.050, 0.030, 0.012, 0.060, 0.025, 0.080]
    alike = [0.30, 0.28, 0.33, 0.31, 0.27, 0.35, 0.29, 0.32]
    write("studies", pd.DataFrame({"yi": effects, "vi": variances, "alike": alike}))
    p = [0.001, 0.008, 0.039, 0.041, 0.042, 0.06, 0.074, 0.205, 0.212, 0.216, 0.45, 0.6, 0.7, 0.85, 0.95]
    write("p_values", pd.DataFrame({"p": p}))
    write("d1", pd.DataFrame({"x": [0, 0, 0, 0, 1.5, 2, 0, 3], "y": [1, 0, 2, 1, 3, 5, 0, 4]}))
    write("d2", pd.DataFrame({
        "x": [1, 2, 3, 4, 6, 7, 8, 9], "y": [2, 1, 4, 3, 7, 9, 8, 10], "c": [0] * 4 + [1] * 4,
        "g": [1, 1, 2, 2, 3, 3, 4, 4],
    }))  # fmt: skip
    write("d3", pd.DataFrame({"group": list("aaabbbccc"), "value": [1, 2, 3, 2, 4, 6, 5, 7, 9]}))
    write("d7", pd.DataFrame({
        "time": [5, 8, 12, 3, 9, 15, 7, 11, 4, 10], "tied": [5, 8, 12, 3, 8, 15, 7, 11, 3, 10],
        "event": [1, 1, 0, 1, 1, 0, 1, 1, 1, 0], "z": [0, 2, 0.5, 2.5, 0, 0.1, 0, 1.6, 2.2, 0.9],
    }))  # fmt: skip
