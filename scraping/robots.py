"""robots.txt by RFC 9309: the longest rule that fits wins, and `*` and `$` are wildcards.

`urllib.robotparser` takes the first rule that fits and knows no wildcards, and so allows what a site forbids.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from urllib.parse import quote, unquote_to_bytes

MAX_BYTES = 500 * 1024  # RFC 9309, 2.5: the rest of a longer file may be ignored


@dataclass(frozen=True)
class Robots:
    """The rules of a site for one user agent.

    Args:
        rules: (path pattern, whether it allows).
        delay: Seconds between requests, by the common Crawl-delay; 0 where there is none.
        sitemaps: Addresses of sitemaps.
    """

    rules: tuple[tuple[str, bool], ...] = ()
    delay: float = 0.0
    sitemaps: tuple[str, ...] = ()

    def allows(self, path: str) -> bool:
        """Return whether a path with its query may be fetched."""
        path = _spelled(path)
        fits = [(len(pattern), allow) for pattern, allow in self.rules if _fits(pattern, path)]
        return max(fits)[1] if fits else True  # among equally long rules, one that allows wins


def parse(text: str, agent: str) -> Robots:
    """Return the rules for the agent's product token, or else those for `*`."""
    groups: dict[str, list[tuple[str, bool]]] = {}
    delays: dict[str, float] = {}
    sitemaps: list[str] = []
    names: list[str] = []
    in_rules = True
    for line in text[:MAX_BYTES].removeprefix("\ufeff").splitlines():
        key, colon, value = line.split("#", 1)[0].partition(":")
        key, value = key.strip().lower(), value.strip()
        if not colon:
            continue
        if key == "user-agent":
            names = [value.lower()] if in_rules else [*names, value.lower()]
            in_rules = False
            groups.setdefault(value.lower(), [])
        elif key in ("allow", "disallow", "crawl-delay"):
            in_rules = True
            for name in names:
                if key == "crawl-delay":
                    if re.fullmatch(r"[0-9]{1,6}(\.[0-9]{1,6})?", value):
                        delays[name] = float(value)
                elif value:
                    groups[name].append((_spelled(value), key == "allow"))
        elif key == "sitemap" and value:
            sitemaps.append(value)
    name = agent.lower() if agent.lower() in groups else "*"
    return Robots(tuple(groups.get(name, ())), delays.get(name, 0.0), tuple(sitemaps))


def _spelled(path: str) -> str:
    """Return a path in one of the spellings of percent-encoding; reserved characters stay encoded."""
    kept = re.sub("%(2[Ff]|3[Ff]|23|25|2[Aa]|24)", lambda found: f"%25{found[1].upper()}", path)
    return quote(unquote_to_bytes(kept), safe="/?#[]@!$&'()*+,;=:%-._~")


def _fits(pattern: str, path: str) -> bool:
    """Return whether a path begins with a pattern, in time linear in the path for each `*`."""
    anchored = pattern.endswith("$")
    first, *rest = pattern.removesuffix("$").split("*")
    if not path.startswith(first):
        return False
    if not rest:
        return not anchored or path == first
    at = len(first)
    for piece in rest[:-1]:
        found = path.find(piece, at)
        if found < 0:
            return False
        at = found + len(piece)
    if anchored:
        return len(path) - len(rest[-1]) >= at and path.endswith(rest[-1])
    return path.find(rest[-1], at) >= 0
