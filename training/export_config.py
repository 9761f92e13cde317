"""The settings of an export: what is written of a model, and where."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class ExportConfig:
    """The settings of `python export.py`.

    Args:
        out: Folder to write; new or empty.
        run: Run folder, or one checkpoint inside it.
        which: The checkpoint of a run folder: `best` by validation loss, or `last`.
        base: Instead of a run: folder or hub id of a published model. With `gguf` it may stand alone.
        adapter: With `base`: folder of an adapter for it.
        base_format: How the weights of `base` were stored when the adapter was trained: `fp32`, `bf16` or
            `nf4`; a run and an adapter written here know.
        gguf: Instead of a folder: a new file for llama.cpp.
        type: How `gguf` stores matrices: in 16 bits (`f16`), or in blocks of 32 numbers of 8 bits (`q8_0`) or
            4 bits (`q4_0`).
        merge: Put the adapters into the weights, which are merged and written in fp32.
        requantise: Round the merged matrices of a base in nf4 to nf4 again, and write all in bf16.
        tolerance: The largest logit gap that a merge may have.
        text: A file of real text that judges a merge, and what rounding to `type` does to the loss; by
            default a file of the interpreter's own library.
        allow: Names of faults that may pass.
        push: Send what was written to this model of the Hugging Face hub, OWNER/NAME; a new one is private.
    """

    out: str | None = None
    run: str | None = None
    which: Literal["best", "last"] = "best"
    base: str | None = None
    adapter: str | None = None
    base_format: Literal["auto", "fp32", "bf16", "nf4"] = "auto"
    gguf: str | None = None
    type: Literal["f16", "q8_0", "q4_0"] = "f16"
    merge: bool = False
    requantise: bool = False
    tolerance: float = 1e-3
    text: str | None = None
    allow: tuple[str, ...] = ()
    push: str | None = None
