"""Codes larger than memory: the same numbers, block by block."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

import biosae as bs
from biosae.errors import InputError
from biosae.stats import chunks
from biosae.stats.nested import is_chunked, pool

da = pytest.importorskip("dask.array", reason="dask comes with the extra biosae[scale]")


@pytest.fixture
def X() -> sp.csr_matrix:
    rng = np.random.default_rng(0)
    dense = rng.gamma(1.0, size=(120, 30)) * (rng.random((120, 30)) < 0.3) * rng.choice([1.0, -1.0], 30)
    codes = sp.csr_matrix(dense)
    codes.data[:5] = 0.0  # stored zeros
    return codes


def backed(X: sp.csr_matrix, path: Path) -> Any:
    obs = pd.DataFrame(index=[f"s{i}" for i in range(X.shape[0])])
    anndata.AnnData(X=X, obs=obs).write_h5ad(path)
    return anndata.read_h5ad(path, backed="r").X


def dask_rows(X: sp.csr_matrix, size: int = 17) -> Any:
    return da.concatenate(
        [
            da.from_array(X[a : a + size], chunks=-1, asarray=False)
            for a in range(0, X.shape[0], size)
        ]
    )  # fmt: skip


@pytest.fixture(params=["file", "dask"])
def far(request: pytest.FixtureRequest, X: sp.csr_matrix, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(chunks, "BUDGET", 12_000)
    return backed(X, tmp_path / "x.h5ad") if request.param == "file" else dask_rows(X)


def test_what_is_in_memory_is_not_chunked(X: sp.csr_matrix, far: Any) -> None:
    assert is_chunked(far) and not is_chunked(X) and not is_chunked(X.toarray())


@pytest.mark.parametrize("some", [False, True])
def test_blocks_put_together_are_the_whole(X: sp.csr_matrix, far: Any, some: bool) -> None:
    rows = np.flatnonzero(np.random.default_rng(1).random(120) < 0.4) if some else None
    wanted = X if rows is None else X[rows]
    blocks = list(chunks.row_blocks(far, rows=rows))
    assert len(blocks) > 2 and np.concatenate([places for places, _ in blocks]).tolist() == list(range(wanted.shape[0]))
    assert (sp.vstack([block for _, block in blocks]) != wanted).nnz == 0
    assert all(block.data.all() for _, block in blocks)
    count = chunks.n_active(far, rows=rows)
    assert count.tolist() == (wanted.toarray() != 0).sum(axis=0).tolist()
    ranges = chunks.column_blocks(count)
    assert len(ranges) > 2 and [j for r in ranges for j in range(r.start, r.stop)] == list(range(30))
    again = sp.hstack([chunks.columns_of(far, r, rows=rows) for r in ranges])
    assert (again != wanted).nnz == 0


@pytest.mark.parametrize("how", ["mean", "fraction_active", "max"])
def test_units_are_those_of_the_codes_in_memory(X: sp.csr_matrix, far: Any, how: str) -> None:
    codes = np.random.default_rng(2).integers(0, 9, 120)
    here = chunks.pool_rows(far, codes, 9, how=how)
    clean = X.copy()
    clean.eliminate_zeros()
    np.testing.assert_allclose(here.toarray(), sp.csr_matrix(pool(clean, codes, 9, how=how)).toarray(), rtol=1e-12)


@pytest.fixture
def cohort() -> anndata.AnnData:
    rng = np.random.default_rng(3)
    n, m = 240, 40
    patient = rng.integers(0, 24, n)
    site = patient % 3
    y = rng.normal(size=n) + rng.normal(size=24)[patient]
    Z = rng.gamma(1.0, size=(n, m)) * (rng.random((n, m)) < 0.3)
    Z[:, :3] += np.clip(0.6 * y[:, None] + rng.normal(size=(n, 3)), 0, None)
    Z[:, 3:6] += site[:, None]
    Z[:, 6] = 0.0
    obs = pd.DataFrame(
        {"patient": [f"P{p}" for p in patient], "site": [f"S{s}" for s in site], "y": y, "label": patient % 2,
         "late": np.where(rng.random(n) < 0.2, np.nan, y**2)},
        index=[f"s{i}" for i in range(n)],
    )  # fmt: skip
    adata = anndata.AnnData(X=sp.csr_matrix(Z.astype("f4")), obs=obs)
    adata.var_names = [f"L{j:04d}" for j in range(m)]
    adata.obsm["embedding"] = rng.normal(size=(n, 6)).astype("f4")
    return adata


@pytest.fixture(params=["file", "dask"])
def distant(
    request: pytest.FixtureRequest, cohort: anndata.AnnData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> anndata.AnnData:
    monkeypatch.setattr(chunks, "BUDGET", 20_000)
    if request.param == "file":
        cohort.write_h5ad(tmp_path / "c.h5ad")
        return anndata.read_h5ad(tmp_path / "c.h5ad", backed="r")
    out = anndata.AnnData(X=dask_rows(cohort.X, 50), obs=cohort.obs, var=cohort.var)
    out.obsm["embedding"] = cohort.obsm["embedding"]
    return out


@pytest.mark.parametrize(
    "how",
    [
        {"unit": "sample"},
        {"unit": "sample", "covariates": ["site"]},
        {"unit": "sample", "strata": "site"},
        {"unit": "patient", "n_permutations": 99},
        {"unit": "patient", "aggregate": "max"},
        {"unit": "patient", "method": "poisson", "controls": False, "n_fits": 0},
    ],
    ids=str,
)
def test_associate_gives_the_same_table(cohort: anndata.AnnData, distant: anndata.AnnData, how: dict) -> None:
    targets = ["label"] if how.get("method") == "poisson" else ["y", "late", "label"]
    wanted, found = (bs.stats.associate(a, targets, **how) for a in (cohort, distant))
    pd.testing.assert_frame_equal(found, wanted, rtol=1e-9)
    assert found.attrs["biosae"]["m_tested"] == wanted.attrs["biosae"]["m_tested"]


def test_max_t_over_parts_is_refused_with_a_way_out(distant: anndata.AnnData) -> None:
    with pytest.raises(InputError, match="pool them to patients"):
        bs.stats.associate(distant, "y", unit="sample", n_permutations=19)


def test_the_rest_of_the_room_takes_them_too(cohort: anndata.AnnData, distant: anndata.AnnData) -> None:
    for name in ("mean", "max", "fraction_active"):
        wanted, found = (bs.stats.aggregate(a, how=name) for a in (cohort, distant))
        np.testing.assert_allclose(found.X.toarray(), wanted.X.toarray(), rtol=1e-6)
        pd.testing.assert_frame_equal(found.obs, wanted.obs)
    how = {"biology": "y", "technical": "site", "n_permutations": 49, "n_bootstrap": 20}
    pd.testing.assert_frame_equal(
        bs.stats.confounders(distant, **how), bs.stats.confounders(cohort, **how), rtol=1e-7, check_like=True
    )
    wanted, found = (
        bs.stats.fit(a, "y", latents=["L0002", "L0009"], model="ols", unit="sample") for a in (cohort, distant)
    )
    pd.testing.assert_frame_equal(found, wanted, rtol=1e-9)
    wanted, found = (bs.stats.readout(a, "site") for a in (cohort, distant))
    pd.testing.assert_frame_equal(found, wanted, rtol=1e-6)


LIMITED = """
import resource, sys
import anndata, numpy as np, pandas as pd
import biosae as bs
from biosae.stats import chunks
bs.stats.associate  # imports and compiled kernels are not what is limited
small = anndata.AnnData(X=__import__("scipy.sparse").sparse.csr_matrix(np.eye(60, dtype="f4")[:, :20]),
                        obs=pd.DataFrame({"patient": [str(i % 20) for i in range(60)], "y": np.arange(60.0)}))
bs.stats.associate(small, "y", unit="sample")
used = next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmData")) * 1024
limit = used + int(sys.argv[2])
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
adata = anndata.read_h5ad(sys.argv[1], backed="r")
if sys.argv[3] == "whole":
    adata = adata.to_memory()
chunks.BUDGET = 2**26
r = bs.stats.associate(adata, ["y", "label"], unit=sys.argv[4])
r.to_csv(sys.argv[5], index=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize("unit", ["sample", "patient"])
def test_a_set_that_does_not_fit_into_the_memory_it_is_given(tmp_path: Path, unit: str) -> None:
    """160 MB of codes (five times that while they are tested), 260 MB of memory beyond what importing takes."""
    rng = np.random.default_rng(0)
    n, m, k = 400_000, 512, 50
    columns = np.argpartition(rng.random((n // 100, m)), k, axis=1)[:, :k].astype(np.int32)
    columns = np.tile(np.sort(columns, axis=1), (100, 1))
    data = rng.gamma(1.0, size=n * k).astype("f4")
    X = sp.csr_matrix((data, columns.ravel(), np.arange(0, n * k + 1, k)), shape=(n, m))
    patient = np.arange(n) % 40
    obs = pd.DataFrame(
        {"patient": [f"P{p}" for p in patient], "y": rng.normal(size=n) + X[:, 7].toarray().ravel(),
         "label": patient % 2},
        index=[str(i) for i in range(n)],
    )  # fmt: skip
    adata = anndata.AnnData(X=X, obs=obs)
    adata.write_h5ad(tmp_path / "big.h5ad")
    script = tmp_path / "limited.py"
    script.write_text(LIMITED)

    def run(how: str) -> subprocess.CompletedProcess:
        out = tmp_path / f"{how}.csv"
        arguments = [str(tmp_path / "big.h5ad"), str(260 * 2**20), how, unit, str(out)]
        return subprocess.run([sys.executable, str(script), *arguments], capture_output=True, text=True, check=False)

    assert run("whole").returncode != 0, "the whole set must not fit, or the test shows nothing"
    done = run("chunked")
    assert done.returncode == 0, done.stderr[-2000:]
    found = pd.read_csv(tmp_path / "chunked.csv")
    wanted = bs.stats.associate(adata, ["y", "label"], unit=unit)
    np.testing.assert_allclose(found["estimate"], wanted["estimate"], rtol=1e-9)
    np.testing.assert_allclose(found["p"], wanted["p"], rtol=1e-9)
    assert found["latent"][found[found["target"] == "y"]["p"].idxmin()] == 7
