"""The program that process.py starts inside the sandbox. It imports little, as each import costs time.

Its standard input begins with one message, the job, which names one of three roles:

    run         one program, with the rest of the input as its own
    candidate   a program whose functions are called by data, over two pipes
    judge       tests, which call the candidate by data and report one verdict on the standard output

Judge and candidate never share a process. Plain data crosses the pipes, in the encoding below. Neither
process trusts the other: a decoded value consists of builtins, whatever was sent.
"""

from __future__ import annotations

import builtins
import os
import sys

TYPE_CHECKING = False  # Importing typing would cost more than the rest of the start.
if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

DEPTH = 200  # The deepest nesting of containers, far below Python's own recursion limit.
MESSAGE_BYTES = 16 << 20
ITERATOR_ITEMS = 100_000
TEXT = 500  # Characters of an error that are passed on.
# A guarded process takes this many keys of one container with the same hash, as (-1, -1) and (-2, -2) have.
SAME_HASH = 16
# The most parts that a key may have that shares its hash, as comparing may take the square of their number.
SAME_HASH_PARTS = 50


class NotData(Exception):
    """A value is no plain data; the text names its type."""


def encode(value: Any) -> bytes:
    """Encode plain data as bytes: None, bool, numbers, str, bytes, containers of these, and ranges.

    An instance of a subclass is sent as what its builtin base holds, so that its own methods have no effect.
    An iterator is used up, and sent as its items.

    Raises:
        NotData: The value is anything else, nests more than DEPTH containers, or holds an iterator of too
            many items.
    """
    parts: list[bytes] = []
    _put(value, parts.append, DEPTH)
    return b"".join(parts)


def _put(value: Any, put: Callable[[bytes], None], depth: int) -> None:
    payload = None
    if value is None or value is True or value is False:
        put(b"N" if value is None else b"T" if value else b"F")
    elif isinstance(value, int):
        payload = b"i", b"%x" % int.__index__(value)
    elif isinstance(value, float):
        payload = b"f", float.hex(float.__float__(value)).encode()
    elif isinstance(value, str):
        payload = b"s", str.encode(value, "utf-8", "surrogatepass")
    elif isinstance(value, bytes | bytearray):
        payload = b"b" if isinstance(value, bytes) else b"a", bytes(memoryview(value))
    else:
        if not depth:
            raise NotData(f"containers more than {DEPTH} deep in each other")
        tag, items = _items(value)
        put(b"%s%d;" % (tag, len(items)))
        for item in items:
            _put(item, put, depth - 1)
    if payload is not None:
        put(b"%s%d;%s" % (payload[0], len(payload[1]), payload[1]))


def _items(value: Any) -> tuple[bytes, list[Any]]:
    """Return the tag of a container and what it holds, read by the methods of its builtin base."""
    if isinstance(value, list):
        return b"l", list(list.__iter__(value))
    if isinstance(value, tuple):
        return b"t", list(tuple.__iter__(value))
    if isinstance(value, dict):
        return b"d", [part for pair in dict.items(value) for part in pair]
    if isinstance(value, set):
        return b"S", list(set.__iter__(value))
    if isinstance(value, frozenset):
        return b"z", list(frozenset.__iter__(value))
    if isinstance(value, complex):
        plain = complex.__complex__(value)
        return b"c", [plain.real, plain.imag]
    if isinstance(value, range):
        return b"r", [value.start, value.stop, value.step]
    if hasattr(type(value), "__next__"):
        items = [item for item, _ in zip(value, range(ITERATOR_ITEMS + 1), strict=False)]
        if len(items) > ITERATOR_ITEMS:
            raise NotData(f"{type(value).__name__} of more than {ITERATOR_ITEMS} items")
        return b"I", items
    raise NotData(str(type(value).__name__))


BUILD: dict[bytes, Callable[[list[Any]], Any]] = {
    b"l": list,
    b"t": tuple,
    b"d": lambda items: dict(zip(items[::2], items[1::2], strict=True)),
    b"S": set,
    b"z": frozenset,
    b"c": lambda items: complex(*items),
    b"r": lambda items: range(*items),
    b"I": iter,
}
HASHED = (b"d", b"S", b"z")
SCALARS: dict[bytes, Callable[[bytes], Any]] = {
    b"i": lambda payload: int(payload, 16),
    b"f": lambda payload: float.fromhex(payload.decode("ascii")),
    b"s": lambda payload: payload.decode("utf-8", "surrogatepass"),
    b"b": bytes,
    b"a": bytearray,
}


def decode(data: bytes, guarded: bool = False) -> Any:
    """Decode a value that `encode` made bytes of; its types are exactly the builtin ones.

    Args:
        data: Bytes that `encode` made, or an attacker.
        guarded: Refuse sets and dicts whose members were chosen to have one hash, which Python needs time
            quadratic in their number to build. This is for a process that has no limits.

    Raises:
        ValueError: No `encode` made these bytes, or `guarded` refuses them.
    """
    try:
        value, end = _get(data, 0, DEPTH, guarded)
    except (TypeError, OverflowError) as error:  # It holds an unhashable key, or a range of floats.
        raise ValueError(f"malformed: {error}") from None
    if end != len(data):
        raise ValueError(f"malformed: {len(data) - end} bytes too many")
    return value


def _get(data: bytes, at: int, depth: int, guarded: bool) -> tuple[Any, int]:
    tag = data[at : at + 1]
    if tag in (b"N", b"T", b"F"):
        return (None if tag == b"N" else tag == b"T"), at + 1
    end = data.find(b";", at + 1, at + 20)
    size = data[at + 1 : end]
    if end < 0 or not size.isdigit():
        raise ValueError(f"malformed: no size after {tag!r}")
    count, at = int(size), end + 1
    if count > len(data) - at or depth < 0:
        raise ValueError(f"malformed: {count} after {tag!r}, and {len(data) - at} bytes follow")
    if tag in SCALARS:
        return SCALARS[tag](data[at : at + count]), at + count
    if tag not in BUILD:
        raise ValueError(f"malformed: {tag!r}")
    items = []
    for _ in range(count):
        item, at = _get(data, at, depth - 1, guarded)
        items.append(item)
    if guarded and tag in HASHED:
        _refuse_collisions(items[::2] if tag == b"d" else items)
    return BUILD[tag](items), at


def _refuse_collisions(keys: list[Any]) -> None:
    groups: dict[int, list[Any]] = {}
    for key in keys:
        groups.setdefault(hash(key), []).append(key)
    for group in groups.values():
        if len(group) > 1 and (len(group) > SAME_HASH or max(map(_parts, group)) > SAME_HASH_PARTS):
            raise ValueError(f"malformed: {len(group)} keys of one container have the same hash")


def _parts(key: Any) -> int:
    return 1 + sum(map(_parts, key)) if isinstance(key, tuple | frozenset) else 1


def send(fd: int, value: Any) -> None:
    """Write one message."""
    write(fd, encode(value))


def write(fd: int, data: bytes) -> None:
    """Write an encoding as one message, framed."""
    data = framed(data)
    while data:
        data = data[os.write(fd, data) :]


def framed(data: bytes) -> bytes:
    """Return the data with its length before it: 8 bytes, the most significant first."""
    return len(data).to_bytes(8, "big") + data


def receive(fd: int, most: int = MESSAGE_BYTES, guarded: bool = False) -> Any:
    """Read one message and decode it; `guarded` is that of `decode`.

    Raises:
        EOFError: The other process has ended.
        ValueError: The message is longer than `most` bytes, or no encoding.
    """
    size = int.from_bytes(_read(fd, 8), "big")
    if size > most:
        raise ValueError(f"a message of {size} bytes; at most {most} are read")
    return decode(_read(fd, size), guarded)


def _read(fd: int, size: int) -> bytes:
    parts = []
    while size:
        part = os.read(fd, min(size, 1 << 20))
        if not part:
            raise EOFError
        parts.append(part)
        size -= len(part)
    return b"".join(parts)


def confine(limits: dict[str, int], uid: int | None) -> None:
    """Set this process's resource limits, and change from root to a user id that owns nothing.

    The kernel's limit on processes does not bind root, not even in a user namespace that shows another id.
    """
    import resource

    for name, value in limits.items():
        kind = getattr(resource, name)
        hard = resource.getrlimit(kind)[1]
        most = value + 1 if name == "RLIMIT_CPU" else value
        pair = (value, most) if hard == resource.RLIM_INFINITY else (min(value, hard), min(most, hard))
        resource.setrlimit(kind, pair)
    if uid is not None:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def silence(*fds: int) -> None:
    """Connect standard streams to nothing."""
    null = os.open(os.devnull, os.O_RDWR)
    for fd in fds:
        os.dup2(null, fd)
    os.close(null)


def load(program: str, name: str) -> dict[str, Any]:
    """Run a program as a module of that name, and return its namespace."""
    module = type(sys)(name)
    sys.modules[name] = module
    exec(compile(program, f"<{name}>", "exec", dont_inherit=True), module.__dict__)
    return module.__dict__


def described(error: BaseException) -> tuple[str, str]:
    """Return the name of an error's type, and the first part of its text."""
    try:
        return type(error).__name__[:TEXT], str(error)[:TEXT]
    except Exception:  # An error may have a __str__ that raises.
        return type(error).__name__[:TEXT], ""


# --- the candidate


def serve(program: str, inbox: int, outbox: int) -> None:
    """Load the program and answer calls until the inbox is closed.

    An answer is ("returned", value, arguments), ("raised", type, text) or ("no data", text). The arguments
    are sent back only when the function returned None, as functions that work in place do.
    """
    try:
        names = load(program, "candidate")
        send(outbox, ("returned", True, None))
    except BaseException as error:
        send(outbox, ("raised", *described(error)))
        return
    while True:
        try:
            name, args, kwargs = receive(inbox)
        except EOFError:
            return
        try:
            value = names[name](*args, **kwargs) if name in names else _missing(name)
            answer = encode(("returned", value, (args, kwargs) if value is None else None))
        except NotData as error:
            answer = encode(("no data", str(error)))
        except BaseException as error:
            answer = encode(("raised", *described(error)))
        write(outbox, answer)


def _missing(name: str) -> None:
    raise NameError(f"name {name!r} is not defined")


# --- the judge


class CandidateError(Exception):
    """The candidate raised an exception whose type is no builtin one."""


class Over(Exception):
    """The candidate can no longer pass. A test may catch this: `Remote.fault` stays."""


class Remote:
    """The candidate, called by data. `fault` is the kind and text of what ended it; then it stays ended."""

    def __init__(self, inbox: int, outbox: int, most: int = MESSAGE_BYTES, guarded: bool = False) -> None:
        self.inbox, self.outbox, self.most, self.guarded = inbox, outbox, most, guarded
        self.fault: tuple[str, str] | None = None
        self.calls = 0

    def end(self, kind: str, text: str) -> Over:
        self.fault = self.fault or (kind, text[:TEXT])
        return Over(text)

    def hear(self) -> tuple[Any, Any]:
        """Return the next answer: the value, and the arguments afterwards if they may have changed."""
        try:
            answer = receive(self.inbox, self.most, self.guarded)
        except EOFError:
            raise self.end("ended", "the program ended") from None
        except ValueError as error:
            raise self.end("failed", f"the answer of the program is {error}") from None
        match answer:
            case ("returned", value, after):
                return value, after
            case ("raised", str(name), str(text)):
                raise self.error(name, text)
            case ("no data", str(text)):
                raise self.end("no data", f"the program returned a {text}, which is no plain data")
        raise self.end("failed", "the answer of the program is of no known form")

    def error(self, name: str, text: str) -> BaseException:
        """Return the exception that the candidate raised; SystemExit and its like end the candidate."""
        kind = vars(builtins).get(name)
        if not (isinstance(kind, type) and issubclass(kind, BaseException)) or kind is StopIteration:
            # A StopIteration would end a `map` of the test as if all were well.
            return CandidateError(f"{name}: {text}")
        if not issubclass(kind, Exception):
            return self.end("failed", f"{name}: {text}")
        try:
            return kind(text)
        except TypeError:  # UnicodeDecodeError and others need more arguments.
            return CandidateError(f"{name}: {text}")

    def call(self, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.fault:
            raise Over(self.fault[1])
        self.calls += 1
        try:
            send(self.outbox, (name, args, kwargs))
        except NotData as error:
            raise self.end("not judged", f"the test passes a {error}, which is no plain data") from None
        except BrokenPipeError:
            raise self.end("ended", "the program ended") from None
        value, after = self.hear()
        if value is None:
            try:
                new_args, new_kwargs = after
                pairs = [
                    *zip(args, new_args, strict=True),
                    *((kwargs[key], new_kwargs[key]) for key in kwargs),
                ]
            except (TypeError, ValueError, KeyError):
                raise self.end("failed", "the answer of the program is of no known form") from None
            for old, new in pairs:
                _replace(old, new)
        return value


def _replace(old: Any, new: Any) -> None:
    """Give a container of the test what the candidate's copy of it holds."""
    if isinstance(old, list | bytearray) and type(new) is type(old):
        old[:] = new
    elif isinstance(old, dict | set) and type(new) is type(old):
        old.clear()
        old.update(new)


class Function:
    """A name of the candidate in the tests, which can be called and passed on, and nothing else."""

    def __init__(self, remote: Remote, name: str) -> None:
        self._remote, self._name = remote, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._remote.call(self._name, args, kwargs)

    def _refuse(self, *_: Any) -> Any:
        raise self._remote.end("not judged", f"the test uses {self._name} in another way than by calling it")

    __getattr__ = __eq__ = __ne__ = __lt__ = __gt__ = __le__ = __ge__ = _refuse
    __iter__ = __len__ = __getitem__ = __contains__ = __bool__ = _refuse
    __hash__ = object.__hash__


def free_names(code: Any) -> set[str]:
    """Return every name that the code or a function in it looks up, attributes among them."""
    inner = [const for const in code.co_consts if isinstance(const, type(code))]
    return set(code.co_names).union(*map(free_names, inner))


def judge(job: dict[str, Any], remote: Remote) -> tuple[str, str]:
    """Return the verdict on one program: "passed", "failed", "ended", "no data" or "not judged", and why.

    The candidate's only name is `entry`; without it, its names are those that the test looks up and nobody
    else defines. A builtin's name is the candidate's only where the reference solution defines it: a
    candidate that has a `set` of its own does not change what the test's `set` is.
    """
    names = load("", "judge")
    try:
        exec(compile(job["setup"], "<setup>", "exec", dont_inherit=True), names)
        test = compile(job["test"], "<test>", "exec", dont_inherit=True)
    except BaseException as error:
        return "not judged", "the test itself cannot be run: {}: {}".format(*described(error))
    reference = "\n" + job["reference"]
    for name in {job["entry"]} if job["entry"] else free_names(test) - set(names):
        if name == job["entry"] or name not in vars(builtins) or f"\ndef {name}(" in reference:
            names[name] = Function(remote, name)
    try:
        remote.hear()
        exec(test, names)
    except BaseException as error:
        return remote.fault or ("failed", ": ".join(filter(None, described(error))))
    if remote.fault or remote.calls:
        return remote.fault or ("passed", "")
    return "not judged", "the test never calls the program"


def main(role: str, *fds: str) -> None:
    job = receive(0, 1 << 40)
    confine(job["limits"], job["uid"])
    if role == "run":
        sys.argv = ["program"]
        load(job["program"], "__main__")
        return
    report = os.dup(1)
    silence(0, 1, 2)
    inbox, outbox = map(int, fds)
    if role == "candidate":
        os.close(report)
        serve(job["program"], inbox, outbox)
    else:
        send(report, judge(job, Remote(inbox, outbox)))
    os._exit(0)


if __name__ == "__main__":
    main(*sys.argv[1:])
