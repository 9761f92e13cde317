"""Archives from strangers, read as a stream: tar (plain, gzip, bzip2, xz), zip and wheel.

    with open(path, "rb") as file:
        for member in read_archive(file, wanted.reason):
            member.path, member.size, member.data  # or member.reason

Nothing is written to the disk, no archive inside an archive is opened, and no name is trusted. Every member
comes with either its bytes or a reason. An archive that is truncated, damaged or past a limit raises an
error: a caller that reads it to its end before storing anything stores nothing of it.

`tarfile` and `zipfile` are not used: they decode names, keep headers of any size and whole directories in
memory, and follow chains of headers by recursion. Sources: POSIX pax interchange format, GNU tar manual
"Basic Tar Format", PKWARE APPNOTE 6.3.
"""

from __future__ import annotations

import bz2
import lzma
import os
import re
import stat
import struct
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, BinaryIO

from scraping.wanted import NO_FILE, SYMBOLIC_LINK, path_reason

BLOCK = 512  # bytes of a tar's block
CHUNK = 2**16
MAX_HEADER = 2**20  # bytes of a long name or of a pax header
MAX_NAMES = 2**27  # bytes of all names together, which are kept to find duplicates
MAX_DIRECTORY = 2**27  # bytes of a zip's directory, which is read whole
RATIO_FROM = 2**26  # bytes of output below which the ratio to the input is not checked
XZ_MEMORY = 2**27  # Bytes; a file made by `xz -9` needs 65 MiB.
DIRECTORY = "directory"


@dataclass(frozen=True)
class ArchiveLimits:
    """Limits on an archive.

    Args:
        members: Number of its members.
        total_bytes: Unpacked bytes of all members, wanted or not.
        ratio: Unpacked to packed bytes. Source code is compressed 3 to 15 times, a bomb of zeros 1,000 times.
        seconds: Time from the first to the last member, the caller's own included.
    """

    members: int = 500_000
    total_bytes: int = 2**33
    ratio: int = 200
    seconds: float = 3600.0


class BrokenArchive(ValueError):
    """Failure to read an archive that is truncated, damaged or none at all; another copy may be whole."""


@dataclass(frozen=True)
class ArchiveMember:
    """A member of an archive: its name, and its bytes or the reason why there are none.

    Args:
        path: Its name in the archive, without stripped folders. No two members of an archive have one path:
            the second of a name has the reason `duplicate member`, and NUL and its number after the name.
            Names that differ by case only are different.
        size: The size that the archive states.
        data: All of its bytes; None if there is a reason.
        reason: Why there are no bytes; "" if there are.
    """

    path: bytes
    size: int
    data: bytes | None
    reason: str = ""


def read_archive(
    file: BinaryIO, reason: Callable[[bytes, int], str], strip: int = 0, limits: ArchiveLimits | None = None
) -> Iterator[ArchiveMember]:
    """Yield every member of an archive that is not a directory, in the archive's order.

    Args:
        file: A seekable file, open for reading; it is read from its beginning.
        reason: Returns why the bytes of (path, size) are not wanted, "" if they are. Wanted bytes are in
            memory one member at a time.
        strip: Leading folders to take off each name; GitHub's tarballs have 1.
        limits: By default `ArchiveLimits()`.

    Raises:
        BrokenArchive: the archive is truncated or damaged. Members that came before are whole.
        ValueError: the archive is past a limit, or of a kind that is not read.
    """
    limits = limits or ArchiveLimits()
    count = _Count(limits)
    seen: dict[bytes, int] = {}  # name -> number of members so far
    file.seek(0)
    members = _zip_members if file.read(4) in (b"PK\3\4", b"PK\5\6") else _tar_members

    def judge(path: bytes, size: int, kind: str) -> tuple[bytes, str]:
        count.member(path)
        while path.startswith(b"./"):  # `tar c .` writes such names
            path = path[2:]
        if not kind and path.count(b"/") < strip:
            kind = "outside the top folder"
        kind = kind or path_reason(path)
        path = name = path.split(b"/", strip)[-1]
        if kind == DIRECTORY:
            return path, kind
        while path in seen:
            kind = "duplicate member"
            seen[name] += 1
            path = b"%b\0%d" % (name, seen[name])
        seen[path] = 1
        return path, kind or reason(path, size)

    return (member for member in members(file, judge, count) if member.reason != DIRECTORY)


def commit_of(file: BinaryIO) -> str:
    """Return the commit that `git archive`, and so GitHub, wrote into an archive; "" if there is none.

    It is in the first pax header of a tar, and in the comment of a zip.
    """
    file.seek(0)
    if file.read(4) in (b"PK\3\4", b"PK\5\6"):
        end = _zip_end(file)[1]
        comment = end[22:]
    else:
        stream = _TarStream(file, _Count(ArchiveLimits()))
        header = stream.read(BLOCK)
        if header[156:157] != b"g":
            return ""
        comment = _pax_records(stream.body(_number(header[124:136]))).get(b"comment", b"")
    return comment.decode() if re.fullmatch(rb"[0-9a-f]{40}|[0-9a-f]{64}", comment) else ""


class _Count:
    """A count of what an archive has cost so far, which raises a ValueError past a limit."""

    def __init__(self, limits: ArchiveLimits) -> None:
        self.limits = limits
        self.members = self.given = self.names = 0
        self.deadline = time.monotonic() + limits.seconds

    def member(self, path: bytes = b"") -> None:
        self.members += 1
        self.names += len(path)
        if self.members > self.limits.members:
            raise ValueError(f"the archive holds more than {self.limits.members:,} members")
        if self.names > MAX_NAMES:
            raise ValueError(f"the archive holds more than {MAX_NAMES:,} bytes of names")
        self._look_at_the_clock()

    def bytes(self, given: int, taken: int) -> None:
        """Count `given` more unpacked bytes, after `taken` packed bytes since the beginning."""
        self.given += given
        if self.given > self.limits.total_bytes:
            raise ValueError(f"the archive holds more than {self.limits.total_bytes:,} bytes")
        if self.given > RATIO_FROM and self.given > self.limits.ratio * taken:
            raise ValueError(f"the archive unpacks to more than {self.limits.ratio:,} times its size")
        self._look_at_the_clock()

    def _look_at_the_clock(self) -> None:
        if time.monotonic() > self.deadline:
            raise ValueError(f"the archive took more than {self.limits.seconds:g} seconds to read")


# `judge` takes a path, a size and the reason that the member's kind gives; it returns the path to show and
# the reason, "" for a member whose bytes are to be read.
Judge = Callable[[bytes, int, str], tuple[bytes, str]]


# ---------------------------------------------------------------------------------------------
# tar


class _Plain:
    """A decompressor of data that is not compressed."""

    eof, unused_data, unconsumed_tail = False, b"", b""

    def decompress(self, data: bytes, max_length: int) -> bytes:
        assert len(data) <= max_length
        return data


DECOMPRESSORS: tuple[tuple[bytes, Callable[[], Any]], ...] = (
    (b"\x1f\x8b", lambda: zlib.decompressobj(wbits=31)),
    (b"BZh", bz2.BZ2Decompressor),
    (b"\xfd7zXZ\0", lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=XZ_MEMORY)),
    (b"", _Plain),
)


def _chunks(file: BinaryIO, count: _Count) -> Iterator[bytes]:
    """Yield a file's content, decompressed as its first bytes tell, in pieces of at most CHUNK."""
    file.seek(0)
    data = file.read(CHUNK)
    taken = len(data)
    magic, make = next(pair for pair in DECOMPRESSORS if data.startswith(pair[0]))
    engine = make()
    while True:
        try:
            piece = engine.decompress(data, CHUNK)
        except lzma.LZMAError as error:
            if "memory" in str(error).lower():
                raise ValueError(f"the archive asks for more than {XZ_MEMORY:,} bytes of memory") from error
            raise BrokenArchive("the archive is damaged") from error
        except (zlib.error, OSError) as error:
            raise BrokenArchive("the archive is damaged") from error
        if piece:
            count.bytes(len(piece), taken)
            yield piece
        if engine.eof:  # Another compressed stream may follow, or zeros as padding.
            data = engine.unused_data.lstrip(b"\0")
            while not data and (more := file.read(CHUNK)):
                taken += len(more)
                data = more.lstrip(b"\0")
            if not data:
                return
            while len(data) < len(magic) and (more := file.read(CHUNK)):
                taken += len(more)
                data += more
            if not data.startswith(magic):
                raise BrokenArchive("the archive is followed by other bytes")
            engine = make()
            count.bytes(0, taken)
            continue
        # zlib returns the input that it did not read; the other two keep it, and say whether they need more.
        data = getattr(engine, "unconsumed_tail", b"")
        if data or not getattr(engine, "needs_input", True):
            continue
        data = file.read(CHUNK)
        taken += len(data)
        if not data:
            if magic:
                raise BrokenArchive("the archive is cut short")
            return


class _TarStream:
    """The decompressed stream of a tar, read in any sizes."""

    def __init__(self, file: BinaryIO, count: _Count) -> None:
        self._chunks = _chunks(file, count)
        self._piece = b""
        self._at = 0

    def _some(self, size: int) -> bytes:
        if self._at == len(self._piece):
            self._piece, self._at = next(self._chunks, b""), 0
        found = self._piece[self._at : self._at + size]
        self._at += len(found)
        return found

    def read(self, size: int) -> bytes:
        """Return exactly `size` bytes."""
        parts = []
        while size:
            part = self._some(size)
            if not part:
                raise BrokenArchive("the archive is cut short")
            parts.append(part)
            size -= len(part)
        return b"".join(parts)

    def skip(self, size: int) -> None:
        while size:
            part = self._some(min(size, CHUNK))
            if not part:
                raise BrokenArchive("the archive is cut short")
            size -= len(part)

    def body(self, size: int) -> bytes:
        """Return a header's own data, and skip its padding."""
        if size > MAX_HEADER:
            raise ValueError(f"the archive has a name or header of {size:,} bytes, over {MAX_HEADER:,}")
        data = self.read(size)
        self.skip(-size % BLOCK)
        return data

    def end(self) -> None:
        """Check that nothing but zeros is left."""
        while part := self._some(CHUNK):
            if part.count(0) != len(part):
                raise BrokenArchive("the archive is followed by other bytes")


TAR_KINDS = {
    **dict.fromkeys((b"0", b"\0", b"7"), ""),
    b"1": "hard link",
    b"2": SYMBOLIC_LINK,
    **dict.fromkeys((b"3", b"4", b"6"), NO_FILE),
    b"5": DIRECTORY,
    b"S": "sparse file",
}


def _tar_members(file: BinaryIO, judge: Judge, count: _Count) -> Iterator[ArchiveMember]:
    """Yield the members of a tar file, compressed or not, which is read once, from its beginning."""
    stream = _TarStream(file, count)
    shared: dict[bytes, bytes] = {}
    own: dict[bytes, bytes] = {}
    name = None
    header = stream.read(BLOCK)
    while header.count(0) != BLOCK:
        if _checksum(header) != _number(header[148:156]):
            raise BrokenArchive(
                "the archive is damaged, or of a kind that is not read: tar, gzip, bzip2, xz, zip"
            )
        flag = header[156:157]
        size = _number(header[124:136])
        if flag in (b"x", b"X", b"g"):
            count.member()
            records = _pax_records(stream.body(size))
            if flag == b"g":
                shared |= records
            else:
                own = records
        elif flag == b"L":
            count.member()
            name = stream.body(size).rstrip(b"\0")
        elif flag == b"K":
            count.member()
            stream.body(size)
        else:
            records = shared | own
            path = records.get(b"path") or name or _tar_name(header)
            if b"size" in records:
                size = _decimal(records[b"size"])
            kind = TAR_KINDS.get(flag, "unknown kind of member")
            if any(key.startswith(b"GNU.sparse.") for key in records):
                kind = "sparse file"
            if not kind and path.endswith(b"/"):
                kind = DIRECTORY
            if flag == b"S" and header[482]:  # The old GNU form has more blocks of header.
                while stream.read(BLOCK)[504]:
                    count.member()
            # POSIX: links, devices, pipes and folders have no data, whatever their size says.
            size = 0 if flag in (b"1", b"2", b"3", b"4", b"5", b"6") else size
            path, why = judge(path, size, kind)
            data = None
            if why:
                stream.skip(size)
            else:
                data = stream.read(size)
            stream.skip(-size % BLOCK)
            yield ArchiveMember(path, size, data, why)
            own, name = {}, None
        header = stream.read(BLOCK)
    stream.end()


def _tar_name(header: bytes) -> bytes:
    name, prefix = header[:100].split(b"\0")[0], header[345:500].split(b"\0")[0]
    # GNU's own form, `ustar  `, has other fields where POSIX has the prefix.
    return prefix + b"/" + name if prefix and header[257:263] == b"ustar\0" else name


def _checksum(header: bytes) -> int:
    return sum(header) - sum(header[148:156]) + 8 * ord(" ")


def _number(field: bytes) -> int:
    """Return a number of a tar header: octal digits, or GNU's binary form."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0")[0].strip()
    if not re.fullmatch(rb"[0-7]*", digits):
        raise BrokenArchive(
            "the archive is damaged, or of a kind that is not read: tar, gzip, bzip2, xz, zip"
        )
    return int(digits or b"0", 8)


def _decimal(digits: bytes) -> int:
    if not re.fullmatch(rb"[0-9]{1,19}", digits):
        raise BrokenArchive("the archive has a damaged header")
    return int(digits)


def _pax_records(data: bytes) -> dict[bytes, bytes]:
    """Return the records of a pax header, `25 path=some/very/long/name\\n`; the number is their length."""
    records: dict[bytes, bytes] = {}
    at = 0
    while at < len(data):
        space = data.find(b" ", at, at + 20)
        if space < 0:
            raise BrokenArchive("the archive has a damaged header")
        end = at + _decimal(data[at:space])
        key, equals, value = data[space + 1 : max(end - 1, 0)].partition(b"=")
        if end <= space + 1 or data[end - 1 : end] != b"\n" or not equals:
            raise BrokenArchive("the archive has a damaged header")
        records[key] = value
        at = end
    return records


# ---------------------------------------------------------------------------------------------
# zip

END = struct.Struct("<4s4H2LH")
END64 = struct.Struct("<4sQ2H2L4Q")
END64_AT = struct.Struct("<4sLQL")
ENTRY = struct.Struct("<4s4x2H4x3L3H4x2L")
LOCAL = struct.Struct("<4s22x2H")


def _zip_end(file: BinaryIO) -> tuple[int, bytes]:
    """Return the place of a zip's end record, and the record with its comment."""
    size = file.seek(0, os.SEEK_END)
    start = max(size - END.size - 65_535, 0)
    file.seek(start)
    tail = file.read()
    at = tail.rfind(b"PK\5\6")
    while at >= 0:
        if len(tail) - at >= END.size and len(tail) - at == END.size + END.unpack_from(tail, at)[-1]:
            return start + at, tail[at:]
        at = tail.rfind(b"PK\5\6", 0, at)
    raise BrokenArchive("the archive is cut short")


def _zip_directory(file: BinaryIO) -> tuple[int, int, int]:
    """Return where the entries begin, their size in bytes, and their number."""
    at, end = _zip_end(file)
    _, disk, first, here, entries, size, start, _ = END.unpack_from(end)
    file.seek(max(at - END64_AT.size, 0))
    where = file.read(END64_AT.size)
    if where[:4] == b"PK\6\7":
        at = min(END64_AT.unpack(where)[2], at)
        file.seek(at)
        record = file.read(END64.size)
        if len(record) < END64.size or record[:4] != b"PK\6\6":
            raise BrokenArchive("the archive is damaged")
        *_, disk, first, here, entries, size, start = END64.unpack(record)
    if (disk, first, here) != (0, 0, entries) or start + size != at:
        raise BrokenArchive("the archive is damaged, or one part of several")
    return start, size, entries


def _zip_members(file: BinaryIO, judge: Judge, count: _Count) -> Iterator[ArchiveMember]:
    """Yield the members of a zip file, in the order of the directory at its end."""
    start, size, entries = _zip_directory(file)
    taken = file.seek(0, os.SEEK_END)
    if entries > count.limits.members:
        raise ValueError(f"the archive holds {entries:,} members, over {count.limits.members:,}")
    if size > MAX_DIRECTORY:
        raise ValueError(f"the archive has a directory of {size:,} bytes, over {MAX_DIRECTORY:,}")
    file.seek(start)
    directory = file.read(size)
    at = found = 0
    while at < size:
        if size - at < ENTRY.size or directory[at : at + 4] != b"PK\1\2":
            raise BrokenArchive("the archive is damaged")
        _, flags, method, crc, packed, unpacked, n_name, n_extra, n_comment, mode, local = ENTRY.unpack_from(
            directory, at
        )
        at += ENTRY.size
        path, extra = directory[at : at + n_name], directory[at + n_name : at + n_name + n_extra]
        at += n_name + n_extra + n_comment
        if at > size:
            raise BrokenArchive("the archive is damaged")
        found += 1
        unpacked, packed, local = _zip64(extra, unpacked, packed, local)
        path, why = judge(path, unpacked, _zip_kind(path, flags, method, mode >> 16))
        data = None
        if not why:
            data = _zip_data(file, local, method, packed, unpacked, crc)
            count.bytes(unpacked, taken)
            why = "damaged member" if data is None else ""
        yield ArchiveMember(path, unpacked, data, why)
    if found != entries:
        raise BrokenArchive("the archive is damaged")


def _zip_kind(path: bytes, flags: int, method: int, mode: int) -> str:
    if path.endswith(b"/"):
        return DIRECTORY
    kind = stat.S_IFMT(mode)
    if kind == stat.S_IFLNK:
        return SYMBOLIC_LINK
    if kind not in (0, stat.S_IFREG):
        return NO_FILE
    if flags & 1:
        return "encrypted"
    return "" if method in (0, 8) else "unknown compression"


def _zip64(extra: bytes, *values: int) -> list[int]:
    """Return sizes and offset, taken from the zip64 extra field where they did not fit their own fields."""
    found = list(values)
    while len(extra) >= 4:
        tag, size = struct.unpack_from("<2H", extra)
        body, extra = extra[4 : 4 + size], extra[4 + size :]
        if tag == 1:
            for i, value in enumerate(found):
                if value == 0xFFFFFFFF and len(body) >= 8:
                    found[i], body = min(int.from_bytes(body[:8], "little"), 2**63 - 1), body[8:]
    return found


def _zip_data(file: BinaryIO, local: int, method: int, packed: int, unpacked: int, crc: int) -> bytes | None:
    """Return the bytes of a member, or None if they are not as its entry says."""
    file.seek(local)
    header = file.read(LOCAL.size)
    if len(header) < LOCAL.size or header[:4] != b"PK\3\4":
        return None
    _, n_name, n_extra = LOCAL.unpack(header)
    file.seek(n_name + n_extra, os.SEEK_CUR)
    if method == 0:
        data = file.read(unpacked) if packed == unpacked else b""
    else:
        engine = zlib.decompressobj(wbits=-15)
        parts, room = [], unpacked + 1
        try:
            while packed and room and not engine.eof and (piece := file.read(min(packed, CHUNK))):
                packed -= len(piece)
                parts.append(engine.decompress(piece, room))
                room -= len(parts[-1])
        except zlib.error:
            return None
        data = b"".join(parts) if engine.eof else b""
    return data if len(data) == unpacked and zlib.crc32(data) == crc else None
