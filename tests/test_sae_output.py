"""Codes in pandas and polars containers, and SAEs inside scikit-learn's own tools."""

from __future__ import annotations

import importlib.util

import numpy as np
import pandas as pd
import pytest
import scipy.sparse
import sklearn
from sklearn.base import clone
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import Pipeline
from sklearn.preprocessing import StandardScaler

from biosae.errors import InputError, MissingExtraError
from biosae.sae import SAE, output


def rows(n: int, d: int) -> np.ndarray:
    """Correlated rows, always the same."""
    rng = np.random.default_rng(0)
    return (rng.standard_normal((n, d)) @ rng.standard_normal((d, d))).astype(np.float32)


def test_pandas_output_has_names_index_and_stays_sparse():
    table = pd.DataFrame(rows(400, 12), index=[f"tile{i}" for i in range(400)])
    sae = SAE(n_latents=32, k=3, n_steps=20, random_state=0).fit(table)
    codes = sae.transform(table)
    framed = sae.set_output(transform="pandas").transform(table)
    assert list(framed.columns) == list(sae.get_feature_names_out()) and list(framed.index) == list(table.index)
    assert all(isinstance(kind, pd.SparseDtype) for kind in framed.dtypes)
    assert (framed.sparse.to_coo() != codes).nnz == 0
    assert scipy.sparse.isspmatrix_csr(sae.codes(table))
    assert isinstance(clone(sae).fit(table).transform(table), pd.DataFrame)  # the choice is cloned too
    assert sae.set_output(transform="default").transform(table).format == "csr"
    with pytest.raises(InputError, match="did you mean 'pandas'"):
        sae.set_output(transform="panda")


def test_scikit_learns_own_configuration_counts():
    X = rows(300, 8)
    sae = SAE(n_latents=16, k=2, n_steps=10, random_state=0).fit(X)
    with sklearn.config_context(transform_output="pandas"):
        assert isinstance(sae.transform(X), pd.DataFrame)
    assert sae.transform(X).format == "csr"


def test_polars_output_or_how_to_get_it(monkeypatch):
    X = rows(300, 8)
    sae = SAE(n_latents=16, k=2, n_steps=10, random_state=0).fit(X).set_output(transform="polars")
    if importlib.util.find_spec("polars"):
        found = sae.transform(X)
        assert found.columns == list(sae.get_feature_names_out())
        np.testing.assert_array_equal(found.to_numpy(), sae.codes(X).toarray())
    else:
        with pytest.raises(MissingExtraError, match="pip install polars"):
            sae.transform(X)
    monkeypatch.setattr(output, "LARGEST_TABLE", 1000)
    with pytest.raises(InputError, match="GiB"):
        sae.transform(X)


def test_search_and_pipeline_choose_by_reconstruction():
    X = rows(600, 10)
    chain = Pipeline([("scale", StandardScaler()), ("sae", SAE(n_latents=32, k=2, n_steps=60, random_state=0))])
    search = GridSearchCV(chain, {"sae__k": [1, 6]}, cv=2).fit(X)
    assert search.best_params_ == {"sae__k": 6} and search.best_score_ < 0
    fitted = search.best_estimator_
    assert fitted.score(X) == pytest.approx(-fitted["sae"].evaluate(fitted["scale"].transform(X))["fvu"])
