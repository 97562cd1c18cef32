"""Taking the inputs and outputs of named modules during one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch
    from torch import nn


class Tap(NamedTuple):
    """One place to take: module path, what to keep of it, and which side.

    ``side`` is ``"output"`` (the first tensor of a tuple), ``"input"`` (the first argument) or ``"heads"`` (the
    concatenated heads of a ``torch.nn.MultiheadAttention`` before its output projection).
    """

    path: str
    reduce: Callable[[torch.Tensor], torch.Tensor]
    side: str = "output"


class _Enough(Exception):
    """Every wanted value was taken; the rest of the network need not run."""

    def __init__(self, taken: dict) -> None:
        self.taken = taken


def run_with_taps(
    root: nn.Module, sites: Mapping[str, Tap | tuple], call: Callable[[], Any], *, stop: bool
) -> tuple[dict[str, torch.Tensor], Any]:
    """Run ``call`` and reduce values inside ``root`` as they appear. Calls may be nested.

    Parameters
    ----------
    root
        Network that ``call`` runs.
    sites
        Name to :class:`Tap` (or its fields). The reduction is applied inside the hook, before any later module could
        change the value in place, so only what it returns is kept.
    stop
        Leave the network as soon as every site was seen.

    Returns
    -------
    dict
        Reduced value of each site.
    Any
        What ``call`` returned, or None if it was stopped.
    """
    taken: dict[str, torch.Tensor] = {}
    handles = []
    wanted: dict[tuple[str, str], dict[str, Callable]] = {}
    for name, site in sites.items():
        tap = Tap(*site)
        wanted.setdefault((tap.path, tap.side), {})[name] = tap.reduce

    def take(value: Any, reductions: Mapping[str, Callable]) -> None:
        for name, reduce in reductions.items():
            taken[name] = reduce(value)
        if stop and len(taken) == len(sites):
            raise _Enough(taken)

    def listen(module: nn.Module, side: str, reductions: Mapping[str, Callable]) -> Any:
        if side == "output":
            return module.register_forward_hook(
                lambda _m, _a, y: take(y[0] if isinstance(y, (tuple, list)) else y, reductions)
            )

        def before(_module: nn.Module, args: tuple, kwargs: dict) -> None:
            x = args[0] if args else next(iter(kwargs.values()))
            take(concatenated_heads(module, x) if side == "heads" else x, reductions)

        return module.register_forward_pre_hook(before, with_kwargs=True)

    try:
        for (path, side), reductions in wanted.items():
            handles.append(listen(root.get_submodule(path), side, reductions))
        result = call()
    except _Enough as enough:
        if enough.taken is not taken:  # of a call around this one
            raise
        result = None
    finally:
        for handle in handles:
            handle.remove()
    return taken, result


def concatenated_heads(attention: nn.MultiheadAttention, x: torch.Tensor) -> torch.Tensor:
    """Weighted values of every head, side by side ``(B, T, d)``, of self-attention without a mask.

    ``torch.nn.MultiheadAttention`` applies its projection inside a fused function that no hook sees, so they are
    computed again from the same input: ``softmax(q k^T / sqrt(d_h)) v`` for each head.
    """
    from torch.nn import functional

    batch, count, width = x.shape
    qkv = functional.linear(x, attention.in_proj_weight, attention.in_proj_bias)
    q, k, v = qkv.view(batch, count, 3, attention.num_heads, width // attention.num_heads).permute(2, 0, 3, 1, 4)
    return functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(batch, count, width)
