"""What mkdocs is told beside mkdocs.yml: SECURITY.md, which lies beside docs/, is a page of the site too."""

from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

SECURITY = Path(__file__).resolve().parent.parent / "SECURITY.md"


def on_files(files: Files, config: Any) -> Files:
    """Add SECURITY.md to the pages."""
    files.append(File.generated(config, SECURITY.name, abs_src_path=str(SECURITY)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Let links to SECURITY.md, and those in it, hold where all pages lie in one folder."""
    if page.file.src_uri == SECURITY.name:
        return markdown.replace("](docs/", "](")
    return markdown.replace("](../SECURITY.md", "](SECURITY.md")
