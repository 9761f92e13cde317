"""A folder of a published model, read as if a stranger had written it.

Nothing in it is run, no name in it leads out of it, and no memory is taken for what it merely claims: headers
are checked against the size of the file before a tensor is made. Each fault is one sentence (ValueError).

A safetensors file is 8 bytes with the header's length, the header (JSON: key -> dtype, shape, place), then
the tensors' bytes without gap or overlap (https://github.com/huggingface/safetensors).
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import re
import reprlib
import stat
import sys
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from config import unrepeated

CONFIG, INDEX, SINGLE = "config.json", "model.safetensors.index.json", "model.safetensors"
BIN, BIN_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
SHARD = re.compile(r"model-\d+-of-\d+\.safetensors|pytorch_model-\d+-of-\d+\.bin")
LONGEST_JSON = 2**24  # Bytes; the header of a model with 100,000 tensors has about 12 million.
CHUNK = 2**22  # bytes read at a time

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}
_SIZES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "U16": 2, "I32": 4, "U32": 4}
_SIZES |= {"I64": 8, "U64": 8} | {name: dtype.itemsize for name, dtype in DTYPES.items()}

_repr = reprlib.Repr()
_repr.maxstring = 160
shown = _repr.repr  # shortens what a stranger wrote, for an error


class TensorEntry(NamedTuple):
    """A tensor in a file: its bytes from `start` on, in their order unless `strides` say else."""

    file: Path
    dtype: str  # BF16 and so on, as safetensors spells it
    shape: tuple[int, ...]
    start: int
    strides: tuple[int, ...] | None = None  # A tensor in a pickle may be a view, such as a transposed one.

    def read(self, dtype: torch.dtype, device: torch.device | str) -> Tensor:
        """Return the tensor.

        It is read and not mapped: to touch a mapped file that was cut meanwhile kills the process, and one
        that is written to changes the weights in silence.
        """
        tensor = torch.empty(self.shape, dtype=dtype, device=device)
        if self.strides is None and dtype == DTYPES[self.dtype] and tensor.device.type == "cpu":
            with open(self.file, "rb", buffering=0) as file:
                file.seek(self.start)
                _read_fully(file, tensor.view(-1).view(torch.uint8).numpy().data, self.file)
            return tensor
        for first, chunk in self.chunks():
            tensor.view(-1)[first : first + len(chunk)].copy_(chunk)
        return tensor

    def digest(self) -> str:
        """Return the SHA-256 of the elements as they are stored, in hexadecimal."""
        hashed = hashlib.sha256()
        for _, chunk in self.chunks():
            hashed.update(chunk.contiguous().view(torch.uint8).numpy().data)
        return hashed.hexdigest()

    def chunks(self) -> Iterator[tuple[int, Tensor]]:
        """Yield (first element, elements) from front to back, in one memory that the next overwrites."""
        dtype = DTYPES[self.dtype]
        total = math.prod(self.shape)
        if self.strides is not None:
            if total:
                yield 0, self._view(dtype, self.strides).flatten()
            return
        buffer = bytearray(min(CHUNK, total * dtype.itemsize))
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.start)
            for first in range(0, total, CHUNK // dtype.itemsize):
                count = min(CHUNK // dtype.itemsize, total - first)
                _read_fully(file, memoryview(buffer)[: count * dtype.itemsize], self.file)
                yield first, torch.frombuffer(buffer, dtype=dtype, count=count)

    def _view(self, dtype: torch.dtype, strides: tuple[int, ...]) -> Tensor:
        """Read at once what the strides span, and return the view."""
        memory = torch.empty(_span(self.shape, strides), dtype=dtype)
        with open(self.file, "rb", buffering=0) as file:
            file.seek(self.start)
            _read_fully(file, memory.view(torch.uint8).numpy().data, self.file)
        return memory.as_strided(self.shape, strides)


def _span(shape: tuple[int, ...], strides: tuple[int, ...]) -> int:
    """Return the elements of memory from the first to the last of a tensor that has some."""
    return 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))


def _read_fully(file: io.FileIO, view: memoryview, path: Path) -> None:
    while view:
        n = file.readinto(view)
        if not n:
            raise ValueError(f"{path} ends early; it was cut while it was read")
        view = view[n:]


def stamp(path: Path) -> tuple[int, ...]:
    """Return numbers that change when a file is written to or replaced."""
    try:
        found = path.stat()
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror}") from None
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns


def read_json(folder: Path, name: str, linked: bool) -> dict[str, Any]:
    """Read a JSON object of at most LONGEST_JSON bytes, without repeated keys or NaN."""
    path = inner_path(folder, name, linked)
    size = path.stat().st_size
    if size > LONGEST_JSON:
        raise ValueError(f"{path} has {size} bytes; at most {LONGEST_JSON} are read")
    try:
        return parse_json(path.read_bytes())
    except ValueError as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


def parse_json(text: bytes) -> dict[str, Any]:
    """Parse a JSON object; ValueError if it is none, or one that two readers could understand differently."""

    def refuse(number: str) -> NoReturn:
        raise ValueError(f"{number} is no JSON number")

    try:
        value = json.loads(text.decode("utf-8"), object_pairs_hook=unrepeated, parse_constant=refuse)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(value, dict):
        raise ValueError(f"it holds {shown(value)}; it must be an object")
    return value


def inner_path(folder: Path, name: Any, linked: bool) -> Path:
    """Return the path of a regular file of the folder.

    Args:
        name: A plain file name; one with a folder in it is refused.
        linked: Links may lead out of the folder, as they do in the hub's cache.
    """
    if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+", name) or name.strip(".") == "":
        raise ValueError(f"{folder} names the file {shown(name)}; only files of the folder itself are read")
    path = folder / name
    if not folder.exists():
        raise ValueError(f"the folder {folder} does not exist")
    if not path.exists() and (folder / "config.yaml").exists():
        raise ValueError(f"{folder} is a run; export it first: python export.py --run {folder} --out FOLDER")
    if not path.exists():
        raise ValueError(f"{path} is missing; fetch the whole folder again")
    if not linked and path.resolve().parent != folder.resolve():
        raise ValueError(f"{path} is a link out of its folder; put the file itself there")
    if not stat.S_ISREG(path.stat().st_mode):
        raise ValueError(f"{path} is no regular file; put the file itself there")
    return path


# --- safetensors ----------------------------------------------------------------------------------


def read_header(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a safetensors file; ValueError if its header and its size do not agree."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8 or length > LONGEST_JSON:
            most = min(max(size - 8, 0), LONGEST_JSON)
            raise ValueError(f"{path} says that its header has {length} bytes; at most {most} are possible")
        header = file.read(length)
    try:
        return parse_header(header, size - 8 - length, path)
    except ValueError as error:
        raise ValueError(f"{path} is no sound safetensors file: {error}") from None


def parse_header(header: bytes, n_data: int, path: Path = Path()) -> dict[str, TensorEntry]:
    """Return the entries of a header before `n_data` bytes; ValueError if they do not fill these exactly."""
    values = parse_json(header)
    metadata = values.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise ValueError("its __metadata__ must hold texts only")
    entries, places = {}, []
    for key, value in values.items():
        if not isinstance(value, dict) or value.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{shown(key)} must have a dtype, a shape and data_offsets, and nothing else")
        dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
        if not isinstance(dtype, str) or dtype not in _SIZES:
            raise ValueError(f"{shown(key)} has the unknown dtype {shown(dtype)}")
        if not _whole(shape) or len(shape) > 8:
            raise ValueError(f"{shown(key)} has the shape {shown(shape)}; up to 8 sizes are known")
        if not _whole(offsets) or len(offsets) != 2:
            raise ValueError(f"{shown(key)} has the data_offsets {shown(offsets)}; two are needed")
        start, end = offsets
        n_bytes = math.prod(shape) * _SIZES[dtype]
        if end - start != n_bytes:
            raise ValueError(
                f"{shown(key)} of dtype {dtype} and shape {shown(shape)} needs "
                f"{shown(n_bytes)} bytes, its data_offsets hold {shown(end - start)}"
            )
        places.append((start, end))
        entries[key] = TensorEntry(path, dtype, tuple(shape), 8 + len(header) + start)
    filled = 0
    for start, end in sorted(places):
        if start != filled:
            raise ValueError(f"a tensor starts at byte {start} of the data where {filled} was expected")
        filled = end
    if filled != n_data:
        raise ValueError(f"its tensors fill {filled} bytes, and {n_data} follow the header")
    return entries


def _whole(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)


# --- pickles --------------------------------------------------------------------------------------


def read_bin(path: Path) -> dict[str, TensorEntry]:
    """Return the tensors of a `pytorch_model.bin`; other objects in its pickle are refused, not run."""
    try:
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
    except Exception as error:  # Zipfile raises its own error and those of whatever the fields hold.
        reason = " ".join(str(error).split())
        raise ValueError(
            f"{path} is no zip file as torch.save writes it ({reason}); save it again, as safetensors best"
        ) from None
    if any(info.compress_type != zipfile.ZIP_STORED for info in infos):
        raise ValueError(
            f"{path} is compressed, which torch.save never does; save it again, as safetensors best"
        )
    try:
        values = _unpickled(path)
        order = _byte_order(path)
    except Exception as error:  # The file decides what goes wrong, and where.
        # What follows in torch's message advises how to run it all the same.
        asked = re.search(r"GLOBAL ([\w.]{1,100})", str(error))
        reason = f"it asks for {asked[1]}" if asked else type(error).__name__
        raise ValueError(
            f"{path} holds more than tensors, or is damaged; nothing in it was run ({reason})"
        ) from None
    if not isinstance(values, dict) or not all(isinstance(value, Tensor) for value in values.values()):
        raise ValueError(f"{path} holds {type(values).__name__}; it must be a dict of tensors by name")
    if order != sys.byteorder:
        raise ValueError(f"{path} has its bytes in another order; save it again on a machine like this one")
    return {str(key): _entry(path, str(key), tensor) for key, tensor in values.items()}


def _unpickled(path: Path) -> Any:
    """Return what the pickle says, with tensors that take no memory and know their places in the file.

    A mapped file that is cut meanwhile kills the process, and tensors that are read here would be in memory
    twice.
    """
    # Imported here: it takes a second, and few folders hold a pickle.
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        return torch.load(path, map_location="cpu", weights_only=True)


def _byte_order(path: Path) -> str:
    with zipfile.ZipFile(path) as archive:
        names = [name for name in archive.namelist() if name.endswith("/byteorder")]
        if not names:  # torch before 2.1 wrote no byte order.
            return sys.byteorder
        with archive.open(names[0]) as file:
            return file.read(16).decode()


def _entry(path: Path, key: str, tensor: Tensor) -> TensorEntry:
    """Return the place of a tensor of a pickle; ValueError if that is not within its file."""
    names = {dtype: name for name, dtype in DTYPES.items()}
    dtype, shape = names.get(tensor.dtype, str(tensor.dtype)), tuple(tensor.shape)
    first = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
    if tensor.layout != torch.strided or first is None:
        raise ValueError(f"{path} holds {shown(key)} in a layout that is not known; save it again, dense")
    start = first + tensor.storage_offset() * tensor.element_size()
    strides = None if tensor.is_contiguous() else tensor.stride()
    span = (_span(shape, tensor.stride()) if tensor.numel() else 0) * tensor.element_size()
    if start + span > path.stat().st_size:
        raise ValueError(f"{path} holds {shown(key)} of {span} bytes, more than it has; fetch it again")
    return TensorEntry(path, dtype, shape, start, strides)


# --- the whole folder -----------------------------------------------------------------------------


def read_tensors(folder: Path, linked: bool) -> dict[str, TensorEntry]:
    """Return every tensor of a model folder by key: one file, or exactly the shards of an index."""
    present = {path.name for path in folder.iterdir()}
    shards = {name for name in present if SHARD.fullmatch(name)}
    found = [name for name in (SINGLE, INDEX) if name in present] or [
        name for name in (BIN, BIN_INDEX) if name in present
    ]
    if not found:
        raise ValueError(f"{folder} holds neither {SINGLE} nor {INDEX}; give the folder of a whole model")
    if len(found) == 2:
        raise ValueError(f"{folder} holds both {found[0]} and {found[1]}; remove the one that is not meant")
    read = read_bin if found[0] in (BIN, BIN_INDEX) else read_header
    if found[0] in (SINGLE, BIN):
        return read(inner_path(folder, found[0], linked))
    where = read_json(folder, found[0], linked).get("weight_map")
    if not isinstance(where, dict) or not where:
        raise ValueError(f"{folder / found[0]} has no weight_map of keys to files; fetch it again")
    for name in where.values():
        if not isinstance(name, str) or not SHARD.fullmatch(name):
            raise ValueError(
                f"{folder / found[0]} names the file {shown(name)}; a shard is called "
                "model-00001-of-00002.safetensors and lies in the folder itself"
            )
    extra = {name for name in shards if name.endswith(Path(next(iter(where.values()))).suffix)} - set(
        where.values()
    )
    if extra:
        raise ValueError(f"{folder / found[0]} does not name {_some(extra)}, which lies beside it; remove it")
    entries: dict[str, TensorEntry] = {}
    for name in sorted(set(where.values())):
        inside = read(inner_path(folder, name, linked))
        wanted = {key for key, file in where.items() if file == name}
        if inside.keys() != wanted:
            raise ValueError(
                f"{folder / name} and {found[0]} disagree about {_some(inside.keys() ^ wanted)}; "
                "fetch the whole folder again"
            )
        entries |= inside
    return entries


def _some(names: set[str]) -> str:
    first = sorted(names)[:4]
    return ", ".join(shown(name) for name in first) + (" and others" if len(names) > 4 else "")


def wrong_tensors(
    shapes: Mapping[str, tuple[int, ...]], entries: Mapping[str, TensorEntry], extra: str, most: int
) -> str:
    """Say which tensors of a file are not as expected; "" where all are.

    Args:
        shapes: The expected tensors, all of floats.
        entries: The tensors of the file.
        extra: The words for a tensor that is not expected.
        most: How many are named; the others are counted.
    """
    wrong = [f"{key} is missing" for key in shapes if key not in entries]
    wrong += [f"{shown(key)} is {extra}" for key in entries if key not in shapes]
    wrong += [
        f"{key} is {entries[key].dtype}{list(entries[key].shape)}, {list(shape)} of floats is expected"
        for key, shape in shapes.items()
        if key in entries and (entries[key].shape != shape or entries[key].dtype not in DTYPES)
    ]
    more = f"; and {len(wrong) - most} more" if len(wrong) > most else ""
    return "; ".join(wrong[:most]) + more
