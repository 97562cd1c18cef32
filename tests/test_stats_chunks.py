"""Codes larger than memory: the same numbers, block by block."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anndata
import numpy as np
import pandas as pd
import pytest
import scipy.sparse as sp

from biosae.stats import chunks
from biosae.stats.nested import pool

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
    monkeypatch.setattr(chunks, "BUDGET", 1_000)
    return backed(X, tmp_path / "x.h5ad") if request.param == "file" else dask_rows(X)


def test_what_is_in_memory_is_not_chunked(X: sp.csr_matrix, far: Any) -> None:
    assert chunks.is_chunked(far) and not chunks.is_chunked(X) and not chunks.is_chunked(X.toarray())


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
