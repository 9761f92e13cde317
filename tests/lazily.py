"""Packages that tests compare with and that take seconds to import: only the process that uses one does."""

from __future__ import annotations

import importlib
from typing import Any


class Lazily:
    """Stands for a package; `Lazily("peft").LoraConfig` imports it."""

    def __init__(self, package: str):
        self._package = package

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module(self._package), name)
