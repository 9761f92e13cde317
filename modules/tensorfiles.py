"""Files of tensors as they are written everywhere: safetensors, flushed to the disk."""

from __future__ import annotations

import os
import stat
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor


def save_tensors(tensors: dict[str, Tensor], path: Path, metadata: dict[str, str] | None = None) -> None:
    """Write a safetensors file and flush it to the disk; every such file is written here.

    Readable by whom the umask lets: safetensors itself writes a temporary file, for the owner alone.

    Args:
        metadata: What the file's header says besides its format.

    Raises:
        OSError: The disk is full or read-only; or SafetensorError.
    """
    with open(path, "wb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
    said = {"format": "pt"} | (metadata or {})
    save_file({key: t.detach().cpu().contiguous() for key, t in tensors.items()}, path, metadata=said)
    os.chmod(path, mode)
    flush(path)


def flush(path: Path) -> None:
    """Ask the system to put a file, or a folder's entries, on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
