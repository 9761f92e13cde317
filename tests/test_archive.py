"""scraping/archive.py: what libraries wrote comes back; what strangers made costs little."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import random
import struct
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from scraping.archive import ArchiveLimits, ArchiveMember, BrokenArchive, commit_of, read_archive
from scraping.wanted import Wanted

ALL = Wanted(extensions=(".py",), min_bytes=0, max_bytes=10_000)
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "plain": bytes,
    "gz": gzip.compress,
    "bz2": bz2.compress,
    "xz": lzma.compress,
}


def read(data: bytes, wanted: Wanted = ALL, **options) -> list[ArchiveMember]:
    return list(read_archive(io.BytesIO(data), wanted.reason, **options))


def reasons(data: bytes, **options) -> dict[bytes, str]:
    members = read(data, **options)
    assert len({m.path for m in members}) == len(members)
    return {member.path: member.reason for member in members}


def tar_of(files: dict[str, bytes], kind: int = tarfile.PAX_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=kind) as tar:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def tar_block(name: bytes, size: int = 0, flag: bytes = b"0", data: bytes = b"") -> bytes:
    """One member as the format has it, so that what no library writes can be written."""
    header = bytearray(512)
    header[: len(name)] = name
    header[100:108] = b"0000644\0"
    header[124:136] = b"%011o\0" % size
    header[156:157] = flag
    header[257:265] = b"ustar\x0000"
    header[148:156] = b"%06o\0 " % (sum(header) + 8 * 32)
    return bytes(header) + data + b"\0" * (-len(data) % 512)


TAR_END = b"\0" * 1024


def zip_of(files: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", method) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


FILES = {
    "a.py": b"x = 1\n",
    "empty.py": b"",
    "pkg/b.py": bytes(range(256)) * 9,
    "pkg/note.txt": b"hello",
    "pkg/" + "long" * 60 + "/" + "name" * 40 + ".py": b"long",
    "pkg/\xe9.py": b"e",
    "big.py": b"#" * 10_001,
}
EXPECTED = [
    (name.encode(), data, "")
    if name.endswith(".py") and len(data) <= 10_000
    else (name.encode(), None, "too large" if name == "big.py" else "other extension")
    for name, data in FILES.items()
]


@pytest.mark.parametrize("kind", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
@pytest.mark.parametrize("compression", COMPRESSIONS)
def test_a_tar_comes_back(compression: str, kind: int) -> None:
    members = read(COMPRESSIONS[compression](tar_of(FILES, kind)))
    assert [(m.path, m.data, m.reason) for m in members] == EXPECTED
    assert [m.size for m in members] == [len(data) for data in FILES.values()]


@pytest.mark.parametrize("method", [zipfile.ZIP_DEFLATED, zipfile.ZIP_STORED])
def test_a_zip_comes_back(method: int) -> None:
    members = read(zip_of(FILES, method))
    assert [(m.path, m.data, m.reason) for m in members] == EXPECTED


def test_a_zip_with_64_bit_fields_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 3)
    monkeypatch.setattr(zipfile, "ZIP_FILECOUNT_LIMIT", 2)
    data = zip_of(FILES)
    assert b"PK\6\6" in data
    assert [(m.path, m.data, m.reason) for m in read(data)] == EXPECTED


names = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=150)
paths = st.lists(names.filter(lambda n: n not in (".", "..")), min_size=1, max_size=3).map("/".join)


@settings(max_examples=30, deadline=None)
@given(st.dictionaries(paths, st.binary(max_size=700), max_size=5), st.sampled_from(["pax", "gnu", "zip"]))
def test_any_names_and_bytes_come_back(files: dict[str, bytes], kind: str) -> None:
    if kind == "zip":
        data = zip_of(files)
    else:
        data = tar_of(files, tarfile.PAX_FORMAT if kind == "pax" else tarfile.GNU_FORMAT)
    found = list(read_archive(io.BytesIO(data), lambda path, size: ""))
    assert [(m.path, m.data) for m in found] == [(name.encode(), body) for name, body in files.items()]


def test_strange_names_are_bytes_like_others() -> None:
    strange = [b"new\nline.py", b"\x1b[31mred.py", b"\xff\xfe.py", b"-rf.py", b"back\\slash.py", b"CON.py"]
    long = b"/".join([b"d" * 200] * 20) + b"/" + b"x" * 70 + b".py"
    assert len(long) > 4_000
    record = b"%d path=%b\n" % (len(long) + 11, long)
    data = b"".join(tar_block(name, 1, data=b"1") for name in strange)
    data += tar_block(b"pax", len(record), b"x", record) + tar_block(b"short", 1, data=b"1") + TAR_END
    assert reasons(data) == dict.fromkeys([*strange, long], "")


def test_links_devices_and_names_that_lead_out_are_reasons() -> None:
    kinds = {
        b"1": "hard link",
        b"2": "symbolic link",
        b"3": "device, pipe or socket",
        b"6": "device, pipe or socket",
    }
    data = b"".join(tar_block(b"kind%b.py" % flag, 0o7777, flag) for flag in kinds)
    leading = [b"../up.py", b"/etc/abs.py", b"a/../../up.py", b"a//b.py", b"a/./b.py", b"C/../.py"]
    data += b"".join(tar_block(name, 1, data=b"1") for name in leading)
    data += tar_block(b"folder", 0, b"5") + tar_block(b"./plain.py", 1, data=b"1") + TAR_END
    assert reasons(data) == {
        **{b"kind%b.py" % flag: reason for flag, reason in kinds.items()},
        **dict.fromkeys(leading, "path leaves the repository"),
        b"plain.py": "",
    }


def test_links_encrypted_and_unknown_members_of_a_zip_are_reasons() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, mode in (("link.py", 0o120777), ("pipe.py", 0o010644), ("file.py", 0o100644)):
            info = zipfile.ZipInfo(name)
            info.external_attr = mode << 16
            archive.writestr(info, b"x" * 9)
        archive.writestr("../up.py", b"x" * 9)
        archive.writestr("old.py", b"x" * 9, compress_type=zipfile.ZIP_BZIP2)
        archive.writestr("folder/", b"")
        archive.writestr("secret.py", b"x" * 9)
    data = bytearray(out.getvalue())
    entry = data.rindex(b"secret.py") - 46
    data[entry + 8] |= 1
    assert reasons(bytes(data)) == {
        b"link.py": "symbolic link",
        b"pipe.py": "device, pipe or socket",
        b"file.py": "",
        b"../up.py": "path leaves the repository",
        b"old.py": "unknown compression",
        b"secret.py": "encrypted",
    }


def test_the_first_of_two_equal_names_stands_and_case_tells_names_apart() -> None:
    data = b"".join(
        tar_block(name, 1, data=b"%d" % i) for i, name in enumerate([b"a.py", b"A.py", b"a.py", b"./a.py"])
    )
    assert [(m.path, m.data, m.reason) for m in read(data + TAR_END)] == [
        (b"a.py", b"0", ""),
        (b"A.py", b"1", ""),
        (b"a.py\x002", None, "duplicate member"),
        (b"a.py\x003", None, "duplicate member"),
    ]


def test_leading_folders_are_taken_off_after_the_whole_name_is_judged() -> None:
    names = [b"top/a.py", b"top/in/b.py", b"alone.py", b"/top/c.py", b"../d.py"]
    data = b"".join(tar_block(name, 1, data=b"1") for name in names) + TAR_END
    assert list(reasons(data, strip=1).items()) == [
        (b"a.py", ""),
        (b"in/b.py", ""),
        (b"alone.py", "outside the top folder"),
        (b"top/c.py", "path leaves the repository"),
        (b"d.py", "path leaves the repository"),
    ]


def test_an_archive_inside_is_a_file_like_others() -> None:
    inner = tar_of({"x.py": b"1"})
    members = read(tar_of({"inner.tar": inner, "inner.py": inner}), Wanted((".py",), 0, 10**6))
    assert [(m.path, m.data, m.reason) for m in members] == [
        (b"inner.tar", None, "other extension"),
        (b"inner.py", inner, ""),
    ]


def test_the_commit_that_git_wrote_is_found() -> None:
    commit = "0123456789abcdef0123456789abcdef01234567"
    record = b"52 comment=" + commit.encode() + b"\n"
    tar = tar_block(b"pax_global_header", len(record), b"g", record) + tar_block(b"a.py") + TAR_END
    assert commit_of(io.BytesIO(gzip.compress(tar))) == commit
    assert reasons(tar) == {b"a.py": ""}
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        archive.comment = commit.encode()
    assert commit_of(io.BytesIO(out.getvalue())) == commit
    assert commit_of(io.BytesIO(tar_of(FILES))) == commit_of(io.BytesIO(zip_of(FILES))) == ""


# ---------------------------------------------------------------------------------------------
# Cut and damaged


@pytest.mark.parametrize("compression", [*COMPRESSIONS, "zip"])
def test_an_archive_cut_anywhere_is_broken(compression: str) -> None:
    files = {f"{i}.py": random.Random(i).randbytes(700) for i in range(9)}
    whole = zip_of(files) if compression == "zip" else COMPRESSIONS[compression](tar_of(files))
    assert len(read(whole)) == 9
    # A plain tar ends in zeros of no fixed number: two blocks of them are its end.
    end = 9 * (512 + 1024) if compression == "plain" else len(whole) - 1
    for at in random.Random(0).sample(range(end), 30):
        with pytest.raises(BrokenArchive):
            read(whole[:at])


@pytest.mark.parametrize("kind", ["gz", "xz", "plain", "zip"])
def test_a_damaged_archive_raises_or_says_so_and_never_gives_other_bytes(kind: str) -> None:
    files = {f"{i}.py": random.Random(i).randbytes(300) for i in range(9)}
    whole = zip_of(files) if kind == "zip" else COMPRESSIONS[kind](tar_of(files))
    rng = random.Random(1)
    for _ in range(150):
        data = bytearray(whole)
        data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        try:
            members = read(bytes(data))
        except ValueError:
            continue
        if kind != "plain":  # a tar has no checksum over a file's bytes
            assert all(
                m.data == files[m.path.decode()] for m in members if m.path.decode() in files and not m.reason
            )


def test_bytes_after_the_end_are_not_passed_over() -> None:
    for data in (tar_of(FILES) + b"x", gzip.compress(tar_of(FILES)) + b"xyz", zip_of(FILES) + b"x"):
        with pytest.raises(BrokenArchive):
            read(data)
    assert len(read(gzip.compress(tar_of(FILES)) + b"\0" * 99)) == len(FILES)
    halves = tar_of(FILES)[:4000], tar_of(FILES)[4000:]
    assert len(read(b"".join(map(gzip.compress, halves)))) == len(FILES)  # streams one after another


@pytest.mark.parametrize(
    "data",
    [b"", b"hello" * 400, b"PK\3\4" + b"x" * 60, b"\x1f\x8b" + b"x" * 60, b"\x28\xb5\x2f\xfd" * 300],
)
def test_what_is_no_archive_is_broken(data: bytes) -> None:
    with pytest.raises(BrokenArchive, match="the archive is"):
        read(data)


@pytest.mark.parametrize(
    "record",
    [b"9999999999 path=x\n", b"5 path=x\n", b"0 path=x\n", b"x path=x\n", b"9" * 30, b"11 path=abc", b"3 \n"],
)
def test_a_pax_header_that_lies_is_broken(record: bytes) -> None:
    with pytest.raises(BrokenArchive, match="damaged header"):
        read(tar_block(b"p", len(record), b"x", record) + tar_block(b"a.py") + TAR_END)


# ---------------------------------------------------------------------------------------------
# Made to cost much


def repeated(data: bytes, times: int) -> bytes:
    """Repeat bytes, each time as a gzip stream of its own, which is quick to make."""
    return gzip.compress(data) * times


def zeros(n: int) -> bytes:
    """gzip of `n` zeros after one tar header that claims them."""
    return (
        gzip.compress(tar_block(b"zeros.py", n)) + repeated(bytes(2**20), n // 2**20) + gzip.compress(TAR_END)
    )


def zip_of_entries(n: int, claimed: int, size: int = 9) -> bytes:
    """A central directory of `n` entries, each with its own name, that all point at one member."""
    one = zip_of({"0000000.py": b"\0" * size})
    start, end = one.index(b"PK\1\2"), one.index(b"PK\5\6")
    head, tail = one[start:end].split(b"0000000.py")
    entries = b"".join(b"%b%07d.py%b" % (head, i, tail) for i in range(n))
    end64 = struct.pack("<4sQ2H2L4Q", b"PK\6\6", 44, 45, 45, 0, 0, claimed, claimed, len(entries), start)
    locator = struct.pack("<4sLQL", b"PK\6\7", 0, start + len(entries), 1)
    last = b"PK\5\6" + b"\0\0\0\0" + b"\xff" * 12 + b"\0\0"
    return one[:start] + entries + end64 + locator + last


def chain(flag: bytes) -> bytes:
    """Headers, each about the next."""
    return repeated(tar_block(b"h", 9, flag, b"9 path=x\n") * 1000, 100)


def long_names() -> bytes:
    noise = random.Random(0).randbytes(20_000)  # Noise does not pack too well.
    return repeated(tar_block(b"l", 10**6, b"L", b"n" * (10**6 - 20_000) + noise) + tar_block(b"x"), 150)


# What it is made by, and what is said.
BOMBS: dict[str, tuple[Callable[[], bytes], str]] = {
    "zeros": (lambda: zeros(2**28), "unpacks to more than 200 times its size"),
    "zeros twice": (lambda: gzip.compress(zeros(2**25)), "damaged, or of a kind"),
    "members": (lambda: repeated(tar_block(b"a.py") * 1000, 100), "more than 20,000 members"),
    "entries": (lambda: zip_of_entries(100_000, 100_000), "holds 100,000 members, over 20,000"),
    "entries that are denied": (lambda: zip_of_entries(30_000, 3), "more than 20,000 members"),
    "one member many times": (
        lambda: zip_of_entries(20_000, 20_000, 90_000),
        "unpacks to more than 200 times its size",
    ),
    "pax headers": (lambda: chain(b"x"), "more than 20,000 members"),
    "long names": (lambda: chain(b"L"), "more than 20,000 members"),
    "names of a megabyte": (long_names, "more than 134,217,728 bytes of names"),
    "a header of a gigabyte": (lambda: tar_block(b"l", 2**30, b"L"), "over 1,048,576"),
    "a long file": (lambda: tar_block(b"a.py", 2**33 - 1) + zeros(2**20), "cut short"),
}

READER = """
import resource, sys, time
resource.setrlimit(resource.RLIMIT_AS, (2**29, 2**29))
from scraping.archive import ArchiveLimits, read_archive
from scraping.wanted import Wanted
began = time.process_time()
try:
    with open(sys.argv[1], "rb") as file:
        wanted = Wanted((".py",), 0, 100_000)
        members = read_archive(file, wanted.reason, limits=ArchiveLimits(members=20_000))
        print("read", sum(1 for _ in members))
except ValueError as error:
    print(error)
print(f"{time.process_time() - began:.1f}", file=sys.stderr)
"""


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_one_sentence_within_half_a_gigabyte(name: str, tmp_path: Path) -> None:
    make, sentence = BOMBS[name]
    path = tmp_path / "bomb"
    path.write_bytes(make())
    done = subprocess.run(
        [sys.executable, "-c", READER, str(path)], capture_output=True, text=True, timeout=60, check=True
    )
    assert sentence in done.stdout, done.stdout
    assert float(done.stderr) < 10


def test_the_clock_ends_a_slow_reading() -> None:
    with pytest.raises(ValueError, match=r"took more than 0\.05 seconds"):
        for _ in read_archive(io.BytesIO(tar_of(FILES)), ALL.reason, limits=ArchiveLimits(seconds=0.05)):
            time.sleep(0.03)


def test_total_bytes_have_a_limit() -> None:
    data = tar_of({f"{i}.py": bytes(5000) for i in range(99)})
    assert len(read(data)) == 99
    with pytest.raises(ValueError, match="more than 400,000 bytes"):
        read(data, limits=ArchiveLimits(total_bytes=400_000))
