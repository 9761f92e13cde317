"""What every request has to pass before it is read: where it comes from, whose it is, its type and its size.

A page in the user's browser can send a POST to 127.0.0.1, and by a name that it owns (DNS rebinding) read the
answer too; CORS stops neither. So a browser's request has to come from our own page (Origin), by an address
that no page's owner can choose (Host), as JSON, which no form can send.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import stat
from collections.abc import Collection, Mapping
from pathlib import Path
from urllib.parse import urlsplit

from serving.fields import Refused

OPEN_PATHS = ("/health", "/", "/page.css", "/page.js", "/editor.js")  # They need no token.


def read_token(token_file: str, environment: Mapping[str, str]) -> str:
    """Return the token of a file or of PLUMB_TOKEN, an empty one where there is neither.

    Raises:
        ValueError: Others may read the file, or it holds no token.
    """
    token = environment.get("PLUMB_TOKEN", "")
    if token_file:
        try:
            with open(token_file, encoding="utf-8") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
                if mode & 0o077:
                    raise ValueError(
                        f"{token_file} has mode {mode:o}, so that others may read it; run chmod 600 on it"
                    )
                token = file.read(4097).strip()
        except UnicodeDecodeError:
            raise ValueError(f"{token_file} is not UTF-8; write the token as plain text") from None
        if not token:
            raise ValueError(f"{Path(token_file)} holds no token; `openssl rand -hex 32` makes one")
    if token and (len(token) > 4096 or not token.isascii() or not token.isprintable() or " " in token):
        raise ValueError("the token must be at most 4,096 characters of ASCII without blanks")
    return token


def refuse_open_address(host: str, is_local: bool, token: str) -> None:
    """Refuse an address that other machines reach, where there is no token.

    Raises:
        ValueError: There is none.
    """
    if not is_local and not token:
        raise ValueError(
            f"--host {host} is reached by other machines, and there is no token; set PLUMB_TOKEN or "
            "--token_file, or leave --host out"
        )


class Gate:
    """The rules that hold for every path.

    Args:
        token: What clients have to send; empty where none is needed.
        names: Hosts by which clients may call the server, besides localhost and plain addresses.
    """

    def __init__(self, token: str, names: Collection[str]):
        self.token = hashlib.sha256(token.encode()).digest() if token else b""
        self.names = {"localhost", *(name.lower() for name in names)}

    def check(self, method: str, path: str, headers: Mapping[str, str]) -> None:
        """Let a request pass, or refuse it.

        Raises:
            Refused: With 400 or 403 for where it comes from, 401 for the token, 415 for its type.
        """
        host = headers.get("host", "")
        if not self.is_ours(host):
            raise Refused(
                403,
                "the Host of the request is no address of this server; if it is a name of yours, "
                "serve with --host_names",
            )
        origin = headers.get("origin")
        if origin is not None and origin not in (f"http://{host}", f"https://{host}"):
            raise Refused(403, "a page of another site (Origin) asks, and only our own may")
        if self.token and path not in OPEN_PATHS:
            sent = headers.get("authorization", "").partition(" ")
            given = hashlib.sha256(sent[2].strip().encode("utf-8", "replace")).digest()
            if not hmac.compare_digest(given, self.token) or sent[0].lower() != "bearer":
                raise Refused(401, "the token is missing or wrong; send Authorization: Bearer TOKEN")
        if method == "POST":
            kind = headers.get("content-type", "").partition(";")[0].strip().lower()
            if kind != "application/json":
                raise Refused(415, "the body must be JSON; send Content-Type: application/json")

    def is_ours(self, host: str) -> bool:
        """Whether a Host is an address, or a name that is known to be ours."""
        try:
            name = urlsplit(f"//{host}").hostname or ""
        except ValueError:
            return False
        if name in self.names:
            return True
        try:
            ipaddress.ip_address(name)
        except ValueError:
            return False
        return True
