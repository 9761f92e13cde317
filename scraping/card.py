"""The corpus's dataset card: Markdown with the front matter of the Hugging Face hub, and its pictures."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from config import write_atomically
from config.markdown import plain, table

FIELDS = {
    "text": "the file's text, as cleaned",
    "repository": "`owner/name`, or the name of a folder, site or package",
    "path": "inside the repository",
    "commit": "that it was read at",
    "licence": "SPDX expression",
    "cluster": "the least name among its near duplicates; its own if it has none. Split by it",
    "sha256": "of the text in UTF-8",
}


def write_card(folder: Path, title: str, corpus: dict[str, Any]) -> None:
    """Write `folder/README.md` and `folder/pictures/*.png` of what corpus.json holds."""
    pictures = folder / "pictures"
    pictures.mkdir(parents=True, exist_ok=True)
    sizes = {_size(int(bits)): count for bits, count in sorted(corpus["sizes"].items(), key=_by_bits)}
    reasons = {
        f"{stage['stage']}: {reason}": count
        for stage in corpus["stages"]
        for reason, count in stage["dropped"].items()
    }
    words = corpus["words"]["different words by occurrences"]
    _bars(pictures / "sizes.png", "documents by size", sizes)
    _bars(pictures / "licences.png", "documents by licence", _largest(corpus["licences"]))
    _bars(pictures / "reasons.png", "files that were dropped", _largest(reasons))
    _bars(pictures / "words.png", "different words by how often they occur", words)
    lines = [
        "---",
        "configs:",
        "- config_name: default",
        "  data_files: data/*",
        "tags: [code]",
        "---",
        f"# {plain(title)}",
        "",
        f"{corpus['documents']:,} documents, {corpus['bytes']:,} bytes of text, "
        f"fingerprint `{corpus['fingerprint']}`.",
        "",
        *table(("field", "what it holds"), [(f"`{name}`", what) for name, what in FIELDS.items()]),
        "",
        "## What became of every file",
        "",
        *table(("stage", "in", "out", "dropped"), _stage_rows(corpus["stages"])),
        "",
        "![files that were dropped](pictures/reasons.png)",
        "",
        "## Licences",
        "",
        *table(
            ("licence", "documents"), [(f"`{plain(n)}`", f"{c:,}") for n, c in corpus["licences"].items()]
        ),
        "",
        "![documents by licence](pictures/licences.png)",
        "",
        "## Sizes and words",
        "",
        f"{corpus['words']['occurrences']:,} words and marks; how many different ones occur so often:",
        "",
        *table(("occurrences", "different words"), [(name, f"{count:,}") for name, count in words.items()]),
        "",
        "![documents by size](pictures/sizes.png)",
        "![words by occurrences](pictures/words.png)",
        "",
    ]
    write_atomically(folder / "README.md", "\n".join(lines))


def _stage_rows(stages: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    rows = []
    for stage in stages:
        reasons = "; ".join(f"{plain(reason)}: {count:,}" for reason, count in stage["dropped"].items())
        rows.append((plain(stage["stage"]), f"{stage['in']:,}", f"{stage['out']:,}", reasons))
    return rows


def _by_bits(item: tuple[str, int]) -> int:
    return int(item[0])


def _size(bits: int) -> str:
    """Return the range of sizes that take this many bits, as in `4 to 8 KiB`; its end is excluded."""
    if bits == 0:
        return "0 B"
    least, unit = 2 ** (bits - 1), "B"
    if least >= 1024:
        least, unit = least // 1024, "KiB"
    return f"{least:,} to {2 * least:,} {unit}"


def _largest(counts: dict[str, int], most: int = 20) -> dict[str, int]:
    ordered = sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    rest = sum(count for _, count in ordered[most:])
    return dict(ordered[:most]) | ({f"{len(ordered) - most} more": rest} if rest else {})


def _bars(path: Path, title: str, counts: dict[str, int]) -> None:
    """Draw horizontal bars, the first on top."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 1 + 0.3 * max(1, len(counts))), layout="constrained")
    names = [name.replace("$", r"\$") for name in counts]  # Matplotlib reads $ as the beginning of a formula.
    bars = axes.barh(range(len(counts)), list(counts.values()), tick_label=names)
    axes.bar_label(bars, labels=[f"{count:,}" for count in counts.values()], padding=3, fontsize=8)
    axes.margins(x=0.15)
    axes.invert_yaxis()
    axes.set_title(title)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=120, metadata={"Software": None})
    pyplot.close(figure)
