"""Questions to a collection: what is like this item, what has this property, what fits these words."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import numpy as np
import pandas as pd
import scipy.sparse as sp

from biosae.errors import InputError, nearest
from biosae.search.index import Index
from biosae.search.rows import group_names, unnamed

WORDS = {
    "high": "the stronger the latent fires the better", "negative": "the more negative its code the better",
    "active": "it fires", "no": "it is silent",
}  # fmt: skip
SYNONYMS = {"strong": "high", "with": "active", "without": "no", "not": "no"}
THROUGH = ("embedding", "latents")
PIECES = r"""\"([^"]*)\"|(?<!\S)'([^']*)'(?![^\s,;])|([,;])|([^\s,;"]+|\")"""
"""Of a phrase: text in quotes of either kind (an apostrophe within a word is none), a mark, a word."""


def by_item(
    adata: Any, items: Any, *, n: int = 10, exclude: str | Sequence[str] = (), use_rep: str = "X",
    metric: str = "cosine",
) -> pd.DataFrame:  # fmt: skip
    """Items most like one or several others.

    Parameters
    ----------
    adata
        Latents of :func:`biosae.encode`.
    items
        Ids of rows, or AnnData of new items from the same encoder and dictionary.
    n, exclude, use_rep, metric
        As in :class:`Index`.

    Returns
    -------
    DataFrame
        ``query, rank, sample_id, score``, and for codes ``shared``: the three latents that add most to the scalar
        product.

    Raises
    ------
    InputError
        If an id or column is unknown.
    """
    index = Index(adata, use_rep=use_rep, metric=metric)
    found = index.search(items, n=n, exclude=exclude)
    table = found.to_frame()
    if use_rep == "X" and len(table):
        query, place = np.nonzero(found.rows >= 0)
        asked, held = (sp.csr_matrix(rows) for rows in (index.vectors(items), index.vectors()))
        shared = sp.csr_matrix(asked[query].multiply(held[found.rows[query, place]]))
        table["shared"] = _largest(shared, adata.var_names, 3)
    return table


def by_weights(
    adata: Any, weights: Mapping[str, float], *, n: int = 10, exclude: Mapping[str, Any] | None = None,
    scale: bool = True,
) -> pd.DataFrame:  # fmt: skip
    """Items by a weighted sum of latents: ``s_i = sum_j w_j z_ij / max_i |z_ij|``.

    Parameters
    ----------
    adata
        Latents of :func:`biosae.encode`.
    weights
        Latent (name in ``var_names``, or a name given to it in ``var["name"]``) to weight; may be negative.
    n
        Items wanted.
    exclude
        Column of ``obs`` to the value, or values, that are not to be found, such as ``{"camera": "c2"}``. The column
        must have no gaps, and hold these values: what is not there was hardly meant, and would exclude nothing.
    scale
        Divide each latent by its largest absolute value in ``adata``; False adds the codes as they are.

    Returns
    -------
    DataFrame
        ``rank, sample_id, score`` and the codes of the named latents; equal scores in the order of rows.

    Raises
    ------
    InputError
        If a latent, column or excluded value is unknown, no weight is given, one is not finite, or a latent has two.
    """
    if not weights or not np.isfinite(list(weights.values())).all():
        raise InputError("weights must name at least one latent and be finite, such as {'L0042': 1.0}")
    latents = [_latent(adata, name) for name in weights]
    if len(set(latents)) < len(latents):
        raise InputError(f"weights name a latent twice, by its number and by its name: {', '.join(latents)}")
    part = _codes(adata, latents)
    factor = _largest_absolute(part) if scale else np.ones(len(latents))
    scores = part @ (np.array(list(weights.values()), np.float64) / factor)
    return _table(adata, scores, _allowed(adata, exclude), n, latents)


def by_property(adata: Any, query: str, *, n: int = 10, exclude: Mapping[str, Any] | None = None) -> pd.DataFrame:
    """Items that fit a phrase such as ``"high L0042, active L0007, no L0107"``.

    Parameters
    ----------
    adata
        Latents of :func:`biosae.encode`.
    query
        Terms separated by commas, semicolons or ``and``; each is a word and a latent (``L0042``, or a name from
        ``var["name"]``, in quotes if it holds one of those or begins with such a word). ``high`` (and ``negative``, for
        codes with two signs) orders the items, by ``z_ij / max_i z_ij`` added up; ``active`` and ``no`` are conditions:
        what does not meet them is not found. A latent alone means ``high``.
    n, exclude
        As in :func:`by_weights`.

    Returns
    -------
    DataFrame
        ``rank, sample_id, score`` and the codes of the named latents. Fewer than n rows where fewer meet the
        conditions, or where no more have any of the wanted latents. A query of conditions alone gives score 0 to all.

    Raises
    ------
    InputError
        For a phrase that cannot be read or has two readings, an unknown latent or excluded value, or ``negative`` of
        codes without negative values.
    """
    terms = [_term(adata, text) for text in _split(query)]
    latents = list(dict.fromkeys(latent for _, latent in terms))
    part = _codes(adata, latents)
    scores = np.zeros(adata.n_obs)
    allowed = _allowed(adata, exclude)
    ordered = [term for term in terms if term[0] in ("high", "negative")]
    for word, latent in terms:
        code = part[:, latents.index(latent)]
        if word == "active":
            allowed &= code != 0
        elif word == "no":
            allowed &= code == 0
        else:
            code = -code if word == "negative" else code
            if word == "negative" and code.max(initial=0) <= 0:
                raise InputError(f"{latent} is never negative here, so nothing can be 'negative {latent}'")
            scores += np.maximum(code, 0) / max(code.max(initial=0), np.finfo(np.float64).tiny)
    if ordered:
        allowed &= scores > 0
    return _table(adata, scores, allowed, n, latents)


def by_relevance(
    adata: Any, relevance: Any, *, n: int = 10, n_latents: int = 10, temperature: float = 0.1,
    exclude: Mapping[str, Any] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Items by the latents most relevant to a query: ``s_i = sum_j pi_j z_ij / max_i z_ij``.

    ``pi = softmax(relevance / T)`` over the K most relevant latents; negative codes count as 0.

    Parameters
    ----------
    adata
        Latents of :func:`biosae.encode`.
    relevance
        A number for each latent: array (m,), or Series or mapping by name (absent: not considered). NaN is not
        considered. For instance the AUROC of labelled examples, or the similarity of a text to the latents' names.
    n_latents, temperature
        K and T.
    n, exclude
        As in :func:`by_weights`.

    Returns
    -------
    DataFrame
        ``rank, sample_id, score``; ``attrs["weights"]`` holds ``pi`` by latent.

    Raises
    ------
    InputError
        If relevance does not fit the latents, or nothing is relevant.

    References
    ----------
    Jiang, Sun, Dunlap, Smith, Nanda 2025, arXiv 2512.10092. The score is ours.
    """
    weights = softmax_weights(adata.var_names, relevance, n_latents=n_latents, temperature=temperature)
    part = np.maximum(_codes(adata, list(weights.index)), 0)
    top = part.max(axis=0, initial=0)
    scores = part @ (weights.to_numpy() / np.where(top > 0, top, 1))
    table = _table(adata, scores, _allowed(adata, exclude), n, [])
    table.attrs["weights"] = weights.to_dict()
    return table


def softmax_weights(
    latents: Sequence[str], relevance: Any, *, n_latents: int = 10, temperature: float = 0.1
) -> pd.Series:
    """``softmax(relevance / T)`` over the K most relevant latents, largest first; ties by the order of latents.

    >>> softmax_weights(["L0", "L1", "L2"], [0.9, 0.1, 1.0], n_latents=2).round(4).to_dict()
    {'L2': 0.7311, 'L0': 0.2689}
    """
    latents = pd.Index(latents)
    if n_latents < 1 or not temperature > 0:
        raise InputError(f"n_latents={n_latents} and temperature={temperature} must be positive")
    if isinstance(relevance, (pd.Series, Mapping)):
        series = pd.Series(relevance, dtype=np.float64)
        if series.index.has_duplicates:
            raise InputError("relevance names a latent more than once; give one number for each")
        if not series.index.isin(latents).all():
            stranger = series.index[~series.index.isin(latents)][0]
            raise InputError(f"relevance of {stranger!r}: no such latent; {nearest(stranger, latents)}")
        relevance = series.reindex(latents).to_numpy()
    values = np.asarray(relevance, np.float64)
    if values.shape != (len(latents),):
        raise InputError(f"relevance has shape {values.shape}; give one number for each of {len(latents)} latents")
    values = np.where(np.isfinite(values), values, -np.inf)
    top = [j for j in np.argsort(-values, kind="stable")[:n_latents] if np.isfinite(values[j])]
    if not top:
        raise InputError("no latent has a relevance; give at least one number that is not NaN")
    power = np.exp((values[top] - values[top[0]]) / temperature)
    return pd.Series(power / power.sum(), index=latents[top])


def by_text(
    adata: Any, text: str, tower: Any, *, templates: Sequence[str] = ("{}",), through: str = "embedding", n: int = 10,
    n_latents: int = 10, temperature: float = 0.1, exclude: Mapping[str, Any] | None = None,
) -> pd.DataFrame:  # fmt: skip
    """Items that fit a text, where the embeddings come from an encoder of images and texts.

    Parameters
    ----------
    adata
        Latents of projected image features (``embed(..., layer=-1, pool="head")`` of an open_clip encoder).
    text
        A phrase such as ``"lymphocytes"``.
    tower
        :func:`biosae.encoders.text_tower` of the same model.
    templates
        Sentences around the text, such as ``"an H&E image of {}"``; their mean is taken.
    through
        ``"embedding"``: cosine of text and embedding. ``"latents"``: cosine of text and decoder rows is the relevance
        for :func:`by_relevance`, so that the answer says through which latents it came about.
    n, n_latents, temperature, exclude
        As in :func:`by_relevance`.

    Returns
    -------
    DataFrame
        ``rank, sample_id, score``; through latents also ``attrs["weights"]``.

    Raises
    ------
    IdentityError
        If the embeddings are not the projected image features of the tower's model.
    InputError
        If the latents hold no embeddings.
    """
    if through not in THROUGH:
        raise InputError(f"through={through!r} is unknown; {nearest(through, THROUGH)}")
    if through == "embedding" and "embedding" not in adata.obsm:
        raise InputError("these latents hold no embeddings; encode with keep_embedding=True, or take through='latents'")
    tower.check(SimpleNamespace(identity=adata.uns.get("biosae", {}).get("identity")))
    vector = np.asarray(tower.embed([text], templates=templates), np.float64)[0]
    space = np.asarray(adata.obsm["embedding"] if through == "embedding" else adata.varm["decoder"], np.float64)
    scale = np.linalg.norm(space, axis=1) * np.linalg.norm(vector)
    similar = np.divide(space @ vector, scale, out=np.zeros(len(space)), where=scale > 0)
    if through == "latents":
        return by_relevance(adata, similar, n=n, n_latents=n_latents, temperature=temperature, exclude=exclude)
    return _table(adata, similar, _allowed(adata, exclude), n, [])


def _called(adata: Any, name: str) -> list[str]:
    """Latents that are called so, by their own name or by one given to them in ``var["name"]``."""
    if name in adata.var_names:
        return [name]
    return list(_names(adata).index[_names(adata).str.casefold() == str(name).casefold()])


def _names(adata: Any) -> pd.Series:
    """Names given to latents; those without one are left out."""
    if "name" not in adata.var:
        return pd.Series(dtype=str)
    return adata.var.loc[~unnamed(adata.var["name"]), "name"].astype(str).str.strip()


def _latent(adata: Any, name: str) -> str:
    called = _called(adata, name)
    if len(called) > 1:
        raise InputError(f"{name!r} is the name of {', '.join(called[:8])}; say which one")
    if not called:
        raise InputError(f"no latent is called {name!r}; {nearest(name, [*_names(adata), *adata.var_names])}")
    return str(called[0])


def _split(query: str) -> list[list[tuple[str, bool]]]:
    """Terms of a phrase, each a list of words and whether they stood in quotes, where all is one word."""
    terms: list[list[tuple[str, bool]]] = [[]]
    for double, single, mark, word in re.findall(PIECES, query):
        if mark or word.casefold() == "and":
            terms.append([])
        elif word == '"':
            raise InputError(f"a quotation mark is not closed in {query!r}")
        else:
            terms[-1].append((double or single or word, not word))
    terms = [term for term in terms if term]
    if not terms:
        raise InputError("the query is empty; write for instance 'high L0042, no L0107'")
    return terms


def _term(adata: Any, term: list[tuple[str, bool]]) -> tuple[str, str]:
    words = [text for text, _ in term]
    word = SYNONYMS.get(words[0].casefold(), words[0].casefold())
    known = word in WORDS and len(term) > 1 and not term[0][1]
    whole, rest = " ".join(words), " ".join(words[1:])
    if known and _called(adata, whole) and _called(adata, rest) and not any(quoted for _, quoted in term):
        raise InputError(
            f'{whole!r} is the name of a latent, and may also mean {words[0]!r} of {rest!r}; write "{whole}" in '
            f'quotes for the first, {words[0]} "{rest}" for the second'
        )
    try:
        return (word, _latent(adata, rest)) if known else ("high", _latent(adata, whole))
    except InputError as error:
        meanings = "; ".join(f"{name!r}: {meaning}" for name, meaning in WORDS.items())
        raise InputError(
            f"cannot read {whole!r}: {error}. A term is a word and a latent. Words are {meanings}"
        ) from None


def _codes(adata: Any, latents: Sequence[str]) -> np.ndarray:
    from biosae.stats.nested import in_memory

    part = in_memory(adata, list(latents)).X
    return np.asarray(part.toarray() if sp.issparse(part) else part, np.float64)


def _largest_absolute(part: np.ndarray) -> np.ndarray:
    top = np.abs(part).max(axis=0, initial=0)
    return np.where(top > 0, top, 1)


def _allowed(adata: Any, exclude: Mapping[str, Any] | None) -> np.ndarray:
    allowed = np.ones(adata.n_obs, bool)
    for column, values in (exclude or {}).items():
        if column not in adata.obs:
            raise InputError(f"exclude: {column!r} is not a column of obs; {nearest(column, adata.obs.columns)}")
        if missing := int(unnamed(adata.obs[column]).sum()):
            raise InputError(
                f"exclude: {missing} rows have no {column!r}, so nobody can say that they are others; drop these rows "
                "or fill the column"
            )
        values = [values] if isinstance(values, str) or not isinstance(values, (Sequence, set, np.ndarray)) else values
        barred, held = group_names(pd.Series(list(values), dtype=object)), group_names(adata.obs[column])
        if absent := [value for value in barred if value not in set(held)]:
            raise InputError(
                f"exclude: no row has {absent[0]!r} in {column!r}, so it would exclude nothing; correct it"
            )
        allowed &= ~np.isin(held, barred)
    return allowed


def _table(adata: Any, scores: np.ndarray, allowed: np.ndarray, n: int, latents: Sequence[str]) -> pd.DataFrame:
    if n < 1:
        raise InputError(f"n={n}: ask for at least one item")
    order = np.argsort(-scores, kind="stable")
    rows = order[allowed[order]][:n]
    table = pd.DataFrame(
        {"rank": np.arange(1, len(rows) + 1), "sample_id": adata.obs_names[rows], "score": scores[rows]}
    )
    if latents:
        table[list(latents)] = _codes(adata, latents)[rows]
    return table


def _largest(products: sp.csr_matrix, names: Sequence[str], n: int) -> list[str]:
    """Names of the n largest positive entries of each row."""
    names, out = np.asarray(names), []
    for start, end in zip(products.indptr, products.indptr[1:]):
        value, column = products.data[start:end], products.indices[start:end]
        best = np.lexsort((column, -value))[:n]
        out.append(" ".join(names[column[best[value[best] > 0]]]))
    return out
