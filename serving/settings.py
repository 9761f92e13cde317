"""Settings of the server. No torch."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, fields
from typing import Literal

from config import option
from generation.settings import ExaminedConfig

ALIAS = "plumb"  # A name for whatever is served: settings of editors can be pasted as they are.
FORMAT_DIFFERS = "format-differs"  # What --allow takes besides the names of faults.


@dataclass(frozen=True, kw_only=True)
class ServeConfig(ExaminedConfig):
    """The command line of the server.

    Args:
        model: A run folder or checkpoint, a model folder, or a hub id; or what the recipe `repository` wrote,
            whose base is then served with its adapter. Not given, it is the newest run in `runs/`.
        repository: The checkout whose files are shown beside the cursor, of a model that has learned one; not
            given, the one that was learned.
        adapter: A name for clients and a PEFT folder, as `NAME=FOLDER`; several may be given, on one base.
        name: The model's name for clients; not given, that of its folder. It is called `plumb` too.
        host: The address to listen on. One that other machines reach needs a token.
        port: The port to listen on; 0 is one that is free.
        end: Where a completion ends besides the model's own end: with a `line`, with a `block` by indentation
            and brackets, or nowhere (`free`).
        host_names: Names by which clients may call the server, besides `localhost` and every plain address.
        token_file: A file that holds the token that clients send, which nobody else may read (mode 600). The
            environment variable PLUMB_TOKEN can hold it instead.
        tls_cert: A file with the certificate and its chain, for https.
        tls_key: A file with the certificate's key.
        most_rows: Texts under way at a time.
        most_waiting: Requests that wait for a place; one more is answered with 429.
        most_choices: Texts that one request may ask for: its prompts times its n.
        most_tokens: New tokens that a text may have.
        most_seconds: Seconds after which a text ends as it is, and in which a request must have come in.
        most_body: Bytes of a request.
        most_connections: Connections at a time; for one more, the oldest without a request is closed.
        most_cache: Bytes of keys and values of the texts under way, and as many again while texts join.
        prefix_cache: Bytes of keys and values that are kept for later requests; 0 keeps none.
        speculate: Verify several proposed tokens in one pass, which changes no text but by rounding: `lookup`
            proposes what followed the last tokens where they stood before; or `none`.
        log_prompts: Print prompts and completions.
    """

    model: str = option("", also=("run",))
    repository: str = ""
    adapter: tuple[str, ...] = ()
    name: str = ""
    host: str = "127.0.0.1"
    port: int = 8012
    end: Literal["line", "block", "free"] = "free"
    host_names: tuple[str, ...] = ()
    token_file: str = ""
    tls_cert: str = ""
    tls_key: str = ""
    most_rows: int = 32
    most_waiting: int = 64
    most_choices: int = 32
    most_tokens: int = 2048
    most_seconds: float = 60.0
    most_body: int = 1_000_000
    most_connections: int = 256
    most_cache: int = 2**31
    prefix_cache: int = 2**28
    speculate: Literal["none", "lookup"] = "none"
    log_prompts: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.port <= 65535:
            raise ValueError(f"port is {self.port}; it must be from 0 (one that is free) to 65535")
        for field in fields(self):
            value = getattr(self, field.name)
            if field.name.startswith("most_") and not 0 < value < float("inf"):
                raise ValueError(f"{field.name} is {value}; it must be above 0")
        if self.prefix_cache < 0:
            raise ValueError(f"prefix_cache is {self.prefix_cache}; it must be at least 0")
        if self.most_choices > self.most_rows:
            raise ValueError(
                f"most_choices is {self.most_choices} and most_rows {self.most_rows}; a request cannot have "
                "more texts than there are places"
            )
        if bool(self.tls_cert) != bool(self.tls_key):
            raise ValueError("tls_cert and tls_key belong together; give both, or none")

        for given in self.adapter:
            name, _, folder = given.partition("=")
            if not name or not folder or any(c in name for c in "/:") or not name.isprintable():
                raise ValueError(f"--adapter {given} is not NAME=FOLDER; give it a name without / and :")
        if len(self.adapters) < len(self.adapter) or {self.name, ALIAS} & self.adapters.keys():
            raise ValueError(
                f"two models would have one name; give each --adapter one of its own, not {ALIAS} or --name"
            )

    @property
    def adapters(self) -> dict[str, str]:
        """The folders of the adapters by name."""
        return {name: folder for name, _, folder in (one.partition("=") for one in self.adapter)}

    @property
    def is_local(self) -> bool:
        """Whether no other machine reaches the address."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False
