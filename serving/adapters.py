"""Adapters by name on one base, which is held once: read at the start, and again while the server runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from architecture import Decoder
from modules.precision import choose_device
from pretrained import Pretrained
from serving.settings import ServeConfig
from tokenizer import Tokenizer
from training.run import open_base_of, with_adapter


class Variant(NamedTuple):
    """What a name of a client stands for.

    adapter: The name of the adapter in the model; empty for the base.
    """

    tokenizer: Tokenizer
    adapter: str = ""


class Adapters:
    """The adapters of a server, whose names and folders were given at its start.

    Args:
        source: What the base was opened from.
        folders: By the name for clients.

    Raises:
        ValueError: The base has no tokenizer.
    """

    def __init__(self, base: Pretrained, source: str, folders: Mapping[str, str]):
        if base.tokenizer is None:
            raise ValueError(
                f"{source} has no tokenizer; put the tokenizer.json of the model beside its weights"
            )
        self.base, self.source, self.folders, self.tokenizer = base, source, folders, base.tokenizer
        self.numbers = itertools.count()

    @property
    def model(self) -> Decoder:
        """The base, with all adapters on it."""
        return self.base.model

    def read(self, name: str) -> Variant:
        """Read an adapter's folder, which is then active. One that was read before is not touched.

        Raises:
            ValueError: The folder is broken, or of another base; the model is as it was.
        """
        key = f"adapter{next(self.numbers)}"
        found = with_adapter(self.base, self.source, self.folders[name], key, grows=False)
        found.model.eval()
        assert found.tokenizer is not None, "the base has one"
        return Variant(found.tokenizer, key)


def open_with_adapters(settings: ServeConfig) -> Adapters:
    """Open the base of --model as the adapters of --adapter were trained on it.

    Raises:
        ValueError: It cannot be opened, or has no tokenizer, or two adapters need two bases.
    """
    folders, folder = settings.adapters, Path(settings.model)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ValueError(f"{folder} is a run; --adapter is for published models")
    if settings.dtype != "auto" or settings.held == "int8":
        raise ValueError(
            "adapters' folders say which weights they were trained on, fp32, bf16 or nf4; leave --dtype and "
            "--held int8 out, or --adapter"
        )
    held = "auto" if settings.held == "full" else settings.held
    base = open_base_of(list(folders.values()), settings.model, held, choose_device(settings.device))
    return Adapters(base, settings.model, folders)
