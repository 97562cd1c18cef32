"""Imports single modules of a package of others without running its ``__init__`` (which wants language models)."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import sys
import types
from pathlib import Path
from unittest.mock import MagicMock

import torch


class StandIns(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Gives an empty module for every import from the packages named."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names

    def find_spec(self, name: str, path: object = None, target: object = None) -> importlib.machinery.ModuleSpec | None:
        wanted = any(f"{name}.".startswith(f"{other}.") for other in self.names)
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if wanted else None

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> types.ModuleType:
        return MagicMock(name=spec.name)

    def exec_module(self, module: types.ModuleType) -> None:
        module.HookedRootModule, module.HookPoint = torch.nn.Module, torch.nn.Identity  # base classes must be classes


class Shell(types.ModuleType):
    """A package of which only the modules inside are real."""

    def __getattr__(self, name: str) -> MagicMock:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=name)


def module(name: str, folder: str, *, stand_ins: tuple[str, ...] = ()) -> types.ModuleType:
    """Module ``name`` from the sources under ``folder``; ``stand_ins``: packages it imports but does not need here."""
    sys.meta_path.insert(0, StandIns(stand_ins))
    sys.path.insert(0, folder)
    parts = name.split(".")[:-1]
    for end in range(1, len(parts) + 1):
        package = Shell(".".join(parts[:end]))
        package.__path__ = [str(Path(folder, *parts[:end]))]
        package.__version__ = ""
        sys.modules.setdefault(package.__name__, package)
    return importlib.import_module(name)
