"""A learned repository as it is served: what the recipe wrote, and the folder whose files are shown.

    settings, repository = as_repository(settings)  # the base with its adapter, of what the recipe wrote
    repository.watch(service.read_adapters_later)
    repository.prompt(tokenizer, asked, prompt)

A prompt is made by `recipes.repository.prompt_of`, by which training rows and test were made. The folder is
looked through every few seconds: a poll needs no package and works on any file system, and asks each file
only for its size and time. Nothing in the folder is written, run, or followed out of it.
"""

from __future__ import annotations

import os
import stat
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from config.yamlfile import read_yaml
from data.context import RepositoryFiles
from recipes.history import MOST_BYTES, Cleaner
from recipes.repository import (
    SAID,
    RepositorySettings,
    adapter_of,
    prompt_of,
    read_said,
)
from recipes.written import Written
from serving.asking import Asked
from serving.settings import ServeConfig
from tokenizer import Tokenizer

SECONDS = 2.0  # between two looks at the folder
SHARE = 20  # A look that takes long is followed by so many times its time without one.
MOST_FILES = 20_000  # of the folder
# Folders of programs and builds, beside those whose names begin with a dot.
LEFT_OUT = frozenset(("node_modules", "venv", "env", "build", "dist", "target", "out", "__pycache__"))


def as_repository(settings: ServeConfig) -> tuple[ServeConfig, LearnedRepository] | None:
    """Return the settings that open the base and the adapter of a learned repository, and the repository.

    None where --model is something else.

    Raises:
        ValueError: What the recipe wrote is not whole.
    """
    out = Path(settings.model)
    if not (out / SAID).is_file():
        return None
    found = LearnedRepository(out, settings.repository)
    name = settings.name or out.resolve().name
    config = read_yaml(out / "run" / "config.yaml")
    base = config.get("base")
    if not isinstance(base, str):
        raise ValueError(f"{out / 'run'} was not trained on a base, so that there is no adapter to serve")
    base_name = "base" if Path(base).resolve().name == name else Path(base).resolve().name
    adapters = (f"{name}={found.adapter}", *settings.adapter)
    return replace(settings, model=base, name=base_name, adapter=adapters), found.called(name)


class LearnedRepository:
    """What the recipe `repository` wrote, and the files of the folder as they are now.

    Args:
        out: The recipe's folder.
        folder: The checkout that is watched; "" is the one that was learned.

    Attributes:
        name: The adapter's name for clients.
        adapter: The folder of the adapter that is served.
        threshold: How sure a completion is at least that is shown; 0 shows all.

    Raises:
        ValueError: `out` is not whole.
    """

    def __init__(self, out: Path, folder: str = ""):
        self.out, self.name = out, ""
        self.read()
        said = self.said
        self.folder = Path(folder or said["source"]).expanduser()
        if folder and not self.folder.is_dir():
            raise ValueError(f"--repository {folder} is no folder; give the top folder of the checkout")
        together = {path: Counter(found) for path, found in said.get("together", {}).items()}
        self.settings = RepositorySettings(
            context_tokens=said["context_tokens"], row_tokens=said["row_tokens"]
        )
        self.files = RepositoryFiles(together)
        self.lock = threading.Lock()  # of `files`
        self._states: dict[str, tuple[int, int, int]] = {}
        self._cleaner = Cleaner()
        self._ended = threading.Event()

    def called(self, name: str) -> LearnedRepository:
        """Set the adapter's name for clients; returns itself."""
        self.name = name
        return self

    def read(self) -> None:
        """Read which adapter and which threshold are now the repository's."""
        self.state = _state(self.out / SAID)
        self.said: dict[str, Any] = read_said(self.out)
        self.adapter = adapter_of(self.out, self.said)
        self.threshold = float(self.said.get("threshold") or 0.0)

    # --- prompts -------------------------------------------------------------------------------------

    def prompt(self, tokenizer: Tokenizer, asked: Asked, prompt: str) -> tuple[str, str]:
        """Return prefix and suffix with other files before the prefix, as in training."""
        suffix = asked.suffix or ""
        with self.lock:
            path = self._own(asked.path) or self.files.path_of(prompt, suffix)
            place = Written(path, "", 0, "line", prompt, "", suffix)
            return prompt_of(self.files, place, tokenizer, self.settings, more=asked.pieces)

    def _own(self, path: str) -> str:
        """Return an editor's path as one inside of the folder; "" where it is not known there."""
        path = path.replace("\\", "/").removeprefix("./")
        return path.removeprefix(f"{self.folder.resolve().as_posix()}/")

    # --- the folder ----------------------------------------------------------------------------------

    def watch(self, on_adapter: Callable[[], None]) -> None:
        """Begin a thread that keeps `files` as the folder is, until `end`.

        Args:
            on_adapter: Called when another adapter, or another threshold, is the repository's.
        """
        if not (self.folder / ".git").exists():
            told = "is not a checkout here, so only what editors send of other files is shown"
            print(f"{self.folder} {told}; give its folder by --repository", file=sys.stderr)
        threading.Thread(target=self._watch, args=(on_adapter,), daemon=True, name="repository").start()

    def end(self) -> None:
        """Let the thread end."""
        self._ended.set()

    def _watch(self, on_adapter: Callable[[], None]) -> None:
        is_first = True
        while not self._ended.is_set():
            begun = time.monotonic()
            if (self.folder / ".git").exists():
                self.look()
                if is_first:
                    took = time.monotonic() - begun
                    print(f"{self.folder}: {len(self.files.texts)} files are read ({took:.1f} s)", flush=True)
                    is_first = False
            if _state(self.out / SAID) not in (self.state, None):
                on_adapter()
            self._ended.wait(max(SECONDS, SHARE * (time.monotonic() - begun)))

    def look(self) -> int:
        """Read what has changed in the folder since the last look; return the number of files that had."""
        found = dict(self._listed())
        changed = [path for path, state in found.items() if self._states.get(path) != state]
        gone = self._states.keys() - found.keys()
        for path in gone:
            with self.lock:
                self.files.put(path, None)
        for path in changed:
            text = self._text(path)
            with self.lock:
                if text is not None or path in self.files.texts:
                    self.files.put(path, text)
        self._states = found
        return len(changed) + len(gone)

    def _listed(self) -> Iterator[tuple[str, tuple[int, int, int]]]:
        """Yield the path and state of each file that may be read; links are not followed."""
        waiting, n = [""], 0
        while waiting:
            inside = waiting.pop()
            try:
                entries = sorted(os.scandir(self.folder / inside), key=lambda entry: entry.name)
            except OSError:  # It is gone, or nobody may read it.
                continue
            for entry in entries:
                path = f"{inside}{entry.name}"
                try:
                    if entry.is_dir(follow_symlinks=False):
                        if not entry.name.startswith(".") and entry.name not in LEFT_OUT:
                            waiting.append(path + "/")
                        continue
                    state = entry.stat(follow_symlinks=False)
                except OSError:
                    continue
                raw = os.fsencode(path)
                if not stat.S_ISREG(state.st_mode) or self._cleaner.reason(raw, state.st_size):
                    continue
                n += 1
                if n > MOST_FILES:
                    return
                yield path, (state.st_size, state.st_mtime_ns, state.st_ino)

    def _text(self, path: str) -> str | None:
        """Return a file's cleaned text; None where it is left out, or gone since it was listed."""
        try:
            opened = os.open(self.folder / path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            with open(opened, "rb") as file:
                data = file.read(MOST_BYTES + 1)
        except OSError:
            return None
        if len(data) > MOST_BYTES:
            return None
        text = self._cleaner.cleaned(os.fsencode(path), data)
        return text if isinstance(text, str) else None


def _state(path: Path) -> tuple[int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_ino
