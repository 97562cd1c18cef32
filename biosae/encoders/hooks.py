"""Taking the outputs of named modules during one forward pass."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from torch import nn


class _Enough(Exception):
    """Every wanted output was taken; the rest of the network need not run."""


def run_with_taps(
    root: nn.Module,
    sites: Mapping[str, tuple[str, Callable[[torch.Tensor], torch.Tensor]]],
    call: Callable[[], Any],
    *,
    stop: bool,
) -> tuple[dict[str, torch.Tensor], Any]:
    """Run ``call`` and reduce the outputs of submodules of ``root`` as they appear.

    Parameters
    ----------
    root
        Network that ``call`` runs.
    sites
        Name to (module path under ``root``, reduction). The reduction is applied inside the hook, before any later
        module could change the output in place, so only what it returns is kept.
    stop
        Leave the network as soon as every site was seen.

    Returns
    -------
    dict
        Reduced output of each site.
    Any
        What ``call`` returned, or None if it was stopped.
    """
    taken: dict[str, torch.Tensor] = {}
    handles = []

    def listener(name: str, reduce: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            taken[name] = reduce(output)
            if stop and len(taken) == len(sites):
                raise _Enough

        return hook

    try:
        for name, (path, reduce) in sites.items():
            handles.append(root.get_submodule(path).register_forward_hook(listener(name, reduce)))
        result = call()
    except _Enough:
        result = None
    finally:
        for handle in handles:
            handle.remove()
    return taken, result
