"""Adapters by name on one base, which is held once: read at the start, and again while the server runs."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch

from architecture import Decoder
from lora import remove_adapter, use_adapters
from modules.precision import choose_device
from modules.products import speed_up
from pretrained import Pretrained
from serving.formats import refuse_other_format, token_losses
from serving.settings import ServeConfig
from tokenizer import Tokenizer
from training.run import open_base_of, trained_format, with_adapter


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
        held: The format that the base is stored in.

    Raises:
        ValueError: The base has no tokenizer.
    """

    def __init__(self, base: Pretrained, source: str, folders: Mapping[str, str], held: str = "fp32"):
        if base.tokenizer is None:
            raise ValueError(
                f"{source} has no tokenizer; put the tokenizer.json of the model beside its weights"
            )
        self.base, self.source, self.tokenizer = base, source, base.tokenizer
        self.folders = dict(folders)  # That of a learned repository changes with its updates.
        self.numbers = itertools.count()
        # The formats that each may have been trained on: another came in since the start, unmeasured.
        self.formats = {name: {None, held, trained_format(folder)} for name, folder in folders.items()}

    @property
    def model(self) -> Decoder:
        """The base, with all adapters on it."""
        return self.base.model

    def read(self, name: str) -> Variant:
        """Read an adapter's folder, which is then active. One that was read before is not touched.

        Raises:
            ValueError: The folder is broken, or of another base or format; the model is as it was.
        """
        folder = self.folders[name]
        if (trained := trained_format(folder)) not in self.formats[name]:
            raise ValueError(
                f"{folder} is now of a base stored as {trained}, which the server's start did not measure; "
                "start it again"
            )
        key = f"adapter{next(self.numbers)}"
        found = with_adapter(self.base, self.source, folder, key, grows=False)
        found.model.eval()
        assert found.tokenizer is not None, "the base has one"
        return Variant(found.tokenizer, key)


def open_with_adapters(settings: ServeConfig) -> Adapters:
    """Open the base of --model in the format that the adapters of --adapter were trained on, or in --held.

    Raises:
        ValueError: It cannot be opened, or has no tokenizer, or an adapter was trained on another format and
            --allow does not name it.
    """
    folders, folder = settings.adapters, Path(settings.model)
    if folder.is_dir() and not (folder / "config.json").exists():
        raise ValueError(f"{folder} is a run; --adapter is for published models")
    if settings.dtype != "auto":
        raise ValueError("adapters' folders and --held say in which type is computed; leave --dtype out")
    trained = {name: trained_format(folder) for name, folder in folders.items()}
    first = next(iter(folders))
    held = (trained[first] or "fp32") if settings.held == "full" else settings.held
    other = {name: form for name, form in trained.items() if form not in (None, held)}
    before = {name: _losses(settings, name, form) for name, form in other.items() if form}
    device = choose_device(settings.device)
    base = open_base_of(folders[first], settings.model, held, device)
    found = Adapters(base, settings.model, folders, held)
    for name, losses in before.items():
        variant = found.read(name)
        change = token_losses(found.model, variant.tokenizer) - losses
        use_adapters(found.model, {})
        remove_adapter(found.model, variant.adapter)
        served = f"{name} was trained on a base stored as {other[name]}, and is served on {held}"
        refuse_other_format(served, losses, change, settings)
    if device.type == "cpu":
        speed_up(found.model)
    return found


def _losses(settings: ServeConfig, name: str, weight_format: str) -> torch.Tensor:
    """Return the losses of an adapter on the format that it was trained on; its model is let go."""
    folder, device = settings.adapters[name], choose_device(settings.device)
    base = open_base_of(folder, settings.model, weight_format, device)
    found = with_adapter(base, settings.model, folder, grows=False)
    if found.tokenizer is None:
        raise ValueError(f"{settings.model} has no tokenizer; put its tokenizer.json beside its weights")
    return token_losses(found.model.eval(), found.tokenizer)
