"""Packages that tests compare with and that take seconds to import: only the process that uses one does."""

from __future__ import annotations

import importlib
from typing import Any


def peft() -> Any:
    return importlib.import_module("peft")


def bitsandbytes() -> Any:
    return importlib.import_module("bitsandbytes")
