"""Tell mkdocs what mkdocs.yml cannot say: some pages of the site lie beside docs/, and not in it."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
BESIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md")


def on_files(files: Files, config: Any) -> Files:
    """Add the pages that lie beside docs/."""
    for name in BESIDE:
        files.append(File.generated(config, name, abs_src_path=str(ROOT / name)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links to these pages, and those in them, hold where all pages lie in one folder."""
    if page.file.src_uri in BESIDE:
        return markdown.replace("](docs/", "](")
    up = "../" * page.file.src_uri.count("/")
    for name in BESIDE:
        markdown = markdown.replace(f"]({up}../{name}", f"]({up}{name}")
    return markdown
