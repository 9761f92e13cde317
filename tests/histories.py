"""Small git repositories with a history, made by git itself: `Made(folder).commit({"a.py": "x = 1\\n"})`."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Sequence
from pathlib import Path

START = 1_700_000_000  # 2023-11-14
DAY = 86_400
AUTHOR = "Ann Onymous"


class Made:
    """A checkout whose commits are a day apart."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.day = folder, 0
        folder.mkdir(parents=True, exist_ok=True)
        self.git("init", "--quiet", "--initial-branch=main")

    def git(self, *words: str, given: str = "") -> str:
        """Run git in the checkout, as its owner would, on an input; return what it prints."""
        moment = f"{START + self.day * DAY} +0000"
        who = {f"GIT_{one}_{key}": value for one in ("AUTHOR", "COMMITTER") for key, value in (
            ("NAME", AUTHOR), ("EMAIL", "ann@shop.example.org"), ("DATE", moment))}  # fmt: skip
        own = {"PATH": os.environ["PATH"], "HOME": str(self.folder), "GIT_CONFIG_NOSYSTEM": "1", **who}
        run = subprocess.run(
            ["git", *words], cwd=self.folder, env=own, input=given, capture_output=True, text=True, check=True
        )
        return run.stdout.strip()

    def write(self, files: dict[str, str | bytes | None]) -> None:
        """Write files, and remove those that are None."""
        for name, text in files.items():
            path = self.folder / name
            if text is None:
                path.unlink()
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(text if isinstance(text, bytes) else text.encode())

    def commit(self, files: dict[str, str | bytes | None], message: str = "more") -> str:
        """Write files and commit everything that is there, a day later; return the commit's id."""
        self.write(files)
        self.git("add", "--all")
        self.git("commit", "--quiet", "--allow-empty", "--no-verify", "-m", message)
        self.day += 1
        return self.git("rev-parse", "HEAD")

    def commit_all(self, commits: Sequence[dict[str, str]]) -> None:
        """Commit each of these on an empty branch, by one call of git."""
        lines = []
        for number, files in enumerate(commits):
            who = f"{AUTHOR} <ann@shop.example.org> {START + number * DAY} +0000"
            lines.append(f"commit refs/heads/main\nauthor {who}\ncommitter {who}\ndata 4\nmore\n")
            for name, text in files.items():
                lines.append(f"M 100644 inline {name}\ndata {len(text.encode())}\n{text}\n")
        self.day = len(commits)
        self.git("fast-import", "--quiet", given="".join(lines))
        self.git("reset", "--quiet", "--hard")


def shop(folder: Path, commits: int = 60) -> Made:
    """Make a repository with a style of its own: an internal API that grows by a drawer with every commit.

    Each commit adds a module of the same form and a line to a registry, by rules that a reader learns fast.
    """
    files = [{"shop/fail.py": FAIL, "shop/registry.py": REGISTRY}]
    registry = REGISTRY
    for n in range(1, commits):
        noun = NOUNS[n % len(NOUNS)] + ("" if n < len(NOUNS) else f"_{n // len(NOUNS)}")
        registry += f"put_drawer('{noun}', 'shop.{noun}_drawer')\n"
        files.append({f"shop/{noun}_drawer.py": drawer(noun, n), "shop/registry.py": registry})
    made = Made(folder)
    made.commit_all(files)
    return made


FAIL = (
    "class ShopError(Exception):\n    pass\n\n\n"
    "def fail_shop(code, detail):\n    raise ShopError(f'{code}: {detail}')\n"
)
REGISTRY = "DRAWERS = {}\n\n\ndef put_drawer(name, drawer):\n    DRAWERS[name] = drawer\n"
NOUNS = (
    *("apple", "bottle", "candle", "dagger", "engine", "fabric", "goblet", "hammer", "insect", "jacket"),
    *("kettle", "ladder", "mirror", "needle", "orange", "pillow", "quiver", "ribbon", "saddle", "teapot"),
    *("urchin", "velvet", "walnut", "yogurt", "zipper", "anchor", "basket", "camera", "eraser", "funnel"),
)


def drawer(noun: str, n: int) -> str:
    """Return a module in the style of `shop`."""
    return (
        f"from shop.fail import fail_shop\n\n\nclass {noun.title()}Drawer:\n"
        f"    def __init__(self, m_{noun}s):\n        self.m_{noun}s = m_{noun}s\n\n"
        f"    def take_{noun}(self, wanted):\n        if wanted not in self.m_{noun}s:\n"
        f"            fail_shop('no-{noun}', wanted)\n        return self.m_{noun}s.pop(wanted)\n\n"
        f"    def count_{noun}s(self):\n        return len(self.m_{noun}s) + {n % 7}\n"
    )
