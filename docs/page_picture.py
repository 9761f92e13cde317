"""Draw the page of the completion server for the manual, as chromium shows it:

    python docs/page_picture.py runs/NAME docs/pictures/page.png [--narrow] [--dark]

It serves the run, types the beginning of a function, takes what the model proposes and looks at a token.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT / "tests")]

from browser import CHROMIUM, CONTROL, WITHOUT, Browser, Page  # noqa: E402 # pyright: ignore[reportMissingImports]

TEXT = "import os\n\n\ndef find(path, name):\n    if not os.path."
GHOST = "document.querySelector('#mirror .ghost.p0, .ghost.p1, .ghost.p2, .ghost.p3, .ghost.p4')"
SIZES = {False: (1120, 800), True: (390, 940)}


def show(page: Page) -> None:
    """Bring the page to where the picture is taken: a text taken, the next proposed, a token looked at."""
    page.until("document.getElementById('model').value")
    page.value("document.getElementById('tokens').value = 16")
    page.type(TEXT)
    page.until(GHOST)
    page.press("Tab")
    page.press(" ", CONTROL)
    page.until(GHOST)
    page.point(*page.middle("document.querySelectorAll('#mirror .ghost')[2]"))
    page.until("document.querySelector('#mirror .shown')")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("run")
    parser.add_argument("picture", type=Path)
    parser.add_argument("--narrow", action="store_true")
    parser.add_argument("--dark", action="store_true")
    asked = parser.parse_args()
    if CHROMIUM is None:
        sys.exit(f"error: {WITHOUT}; install it by your package manager")
    words = [
        sys.executable,
        str(ROOT / "serve.py"),
        "--model",
        asked.run,
        "--port",
        "0",
        "--name",
        "my-model",
    ]
    with (
        tempfile.TemporaryDirectory() as folder,
        subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as server,
    ):
        try:
            assert server.stdout is not None
            found = (re.search(r"listening at (\S+);", line) for line in server.stdout)
            url = next(one[1] for one in found if one)
            with Browser(Path(folder)) as browser:
                page = browser.page(f"{url}/", *SIZES[asked.narrow], asked.dark)
                show(page)
                page.picture(asked.picture)
        finally:
            server.terminate()


if __name__ == "__main__":
    main()
