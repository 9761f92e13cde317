"""Draw which folder imports which, as docs/architecture.md shows it: `python docs/generated.py` writes it.

The imports are those that tests/test_floors.py checks. (Libraries that draw imports, such as grimp, read
packages only; here the model, the tokenizer, the rows and the adapters are single files at the top level.)
"""

from __future__ import annotations

from test_floors import FLOORS, arrows, floor_of  # pyright: ignore[reportMissingImports] generated.py adds tests/

CELL, LETTER, MARGIN = 20, 7.5, 10  # pixels; a letter is as wide as that on average
DOORS = "the commands"
UPPER = "/ (upper floor)"


def places() -> list[tuple[str, int]]:
    """Return the name and the floor of each row of the picture, from the ground up; the doors share one.

    Files of one folder that lie above the rest of it share a row too.
    """
    lower = [(place_of(name), number) for number, floor in enumerate(FLOORS[:-1]) for name in floor.split()]
    return [*dict.fromkeys(lower), (DOORS, len(FLOORS) - 1)]


def place_of(module: str) -> str:
    """Return the row to which a module belongs."""
    floor = floor_of(module)
    if floor == len(FLOORS) - 1:
        return DOORS
    while module not in FLOORS[floor].split():
        module = module.rpartition(".")[0]
    folder, dot, _ = module.partition(".")
    return f"{folder}{UPPER}" if dot else module


def imports() -> set[tuple[str, str]]:
    """Return each pair of different rows of which the first imports the second."""
    found = {(place_of(name), place_of(to)) for name, known in arrows().items() for to in known}
    return {(one, other) for one, other in found if one != other}


def label(place: str, modules: set[str]) -> str:
    """Return a place as a path: of a folder with a slash, of a file with its ending."""
    if place == DOORS or place.endswith(UPPER):
        return place
    return place + ("/" if any(module.startswith(f"{place}.") for module in modules) else ".py")


def import_picture() -> str:
    """Return the picture: a row for each folder, the lowest at the bottom, and a dot for what it imports."""
    modules = set(arrows())
    rows = [(name, label(name, modules), floor) for name, floor in places()]
    before = round(LETTER * max(len(text) for _, text, _ in rows)) + 2 * MARGIN  # room for the labels
    column = {name: number for number, (name, _, _) in enumerate(rows)}
    side = CELL * len(rows)
    width = height = before + side + MARGIN
    shapes = [f'<rect width="{width}" height="{height}" rx="8" fill="#fff"/>']
    for number, (_, text, floor) in enumerate(rows):
        x, y = before + CELL * number, before + side - CELL * (number + 1)
        if floor % 2 == 0:
            shapes.append(
                f'<rect x="{MARGIN}" y="{y}" width="{width - 2 * MARGIN}" height="{CELL}" fill="#f0f2f4"/>'
            )
        shapes.append(f'<text x="{before - 8}" y="{y + 14}" text-anchor="end">{text}</text>')
        shapes.append(f'<text transform="translate({x + 14} {before - 6}) rotate(-90)">{text}</text>')
    for number in range(len(rows)):
        x, y = before + CELL * number, before + side - CELL * (number + 1)
        shapes.append(f'<rect x="{x}" y="{y}" width="{CELL}" height="{CELL}" fill="#8c959f"/>')
    for one, other in sorted(imports()):
        x, y = before + CELL * column[other] + CELL // 2, before + side - CELL * column[one] - CELL // 2
        shapes.append(f'<circle cx="{x}" cy="{y}" r="5" fill="#0969da"/>')
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" role="img" aria-label="Which folder imports which" font-family="sans-serif" '
        'font-size="13" fill="#1f2328">'
    )
    return "\n".join([head, *shapes, "</svg>"]) + "\n"
