"""Find e-mail and internet addresses that may be someone's."""

from __future__ import annotations

import io
import ipaddress
import re
import tokenize
from collections.abc import Iterator

from scraping.stages import Finding

LOCAL = re.compile(r"[A-Za-z0-9][\w.%+-]{0,63}$", re.ASCII)
DOMAIN = re.compile(
    r"((?:[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?\.){1,8})([A-Za-z]{2,24})(?![\w@-]|\.\w)", re.ASCII
)
# https://data.iana.org/TLD/tlds-alpha-by-domain.txt: two letters are countries; of the others, those in use.
_DOMAINS = """
    com org net edu gov mil int info biz name pro aero coop museum mobi jobs travel tel cat asia post xxx
    app dev io ai cloud online site tech store xyz blog email software systems solutions digital network
    page page team world life live agency academy company consulting design engineering group institute
    services studio technology tools zone berlin london paris tokyo nyc amsterdam wien hamburg koeln moscow
    swiss security science space website works work today social media news club chat codes computer
    foundation finance fund global guru host hosting international university school research google
    microsoft ibm apple amazon bmw sap bosch
"""
DOMAINS = frozenset(_DOMAINS.split())
# RFC 2606 and 6761, and what stands in manuals.
NOBODY = re.compile(
    r"(?:^|\.)(?:example|test|invalid|localhost|local|internal|lan|foo|bar|domain|yourdomain|mydomain|your-?company|company"
    r"|email|host|server|xyz|abc|acme|contoso|noreply\.github)(?:\.(?:com|org|net|edu|co|io|de|uk|xyz|py|invalid))*$",
    re.IGNORECASE,
)
NO_ONE = re.compile(
    r"(?:no|do-?not)[-_.]?reply.*|git|hg|svn|this|super|return|break|continue|user(?:name)?|youremail|x{2,}",
    re.I,
)
IPV4 = re.compile(r"(?<![\w.-])\d{1,3}(?:\.\d{1,3}){3}(?![\w-]|\.\w)", re.ASCII)
QUICK_4, QUICK_6 = (
    re.compile(r"\.\d{1,3}\.\d{1,3}\.\d"),
    re.compile(r":[0-9a-fA-F]{1,4}:"),
)  # a search for plain text is ten times as fast
IPV6 = re.compile(r"(?<![\w:.])[23][0-9a-fA-F]{3}(?::[0-9a-fA-F]{0,4}){2,7}(?![\w:]|\.\w)", re.ASCII)
# Names of services, not of people: public resolvers; and numbers that count up, which stand for any address.
_SERVICES = """
    8.8.8.8 8.8.4.4 1.1.1.1 1.0.0.1 9.9.9.9 149.112.112.112 208.67.222.222 208.67.220.220 4.2.2.1 4.2.2.2
    1.2.3.4 4.3.2.1 5.6.7.8 2.3.4.5 1.2.3.5 6.7.8.9 2001:4860:4860::8888 2001:4860:4860::8844
    2606:4700:4700::1111 2606:4700:4700::1001
"""
SERVICES = frozenset(_SERVICES.split())
VERSION_WORDS = re.compile(
    r"version|release|\bver\b|\brev\b|[=~<>]=|build|chrome|firefox|agent|section|\boid\b|rfc", re.I
)
ADDRESS_WORDS = re.compile(
    r"\bip|ip\b|_ip|addr|host|server|gateway|dns|remote|peer|inet|connect|ping|://|url|client", re.I
)


def _line(text: str, start: int, end: int) -> str:
    stop = text.find("\n", end, end + 200)
    return text[max(text.rfind("\n", 0, start) + 1, start - 200) : stop if stop >= 0 else end + 200]


ESCAPE = re.compile(r"\\(?:[abfnrtv]|x[0-9a-fA-F]{2}|u[0-9a-fA-F]{4}|[0-7]{3})")


def mails(text: str) -> Iterator[Finding]:
    """Yield e-mail addresses, without those that are nobody's."""
    at = text.find("@")
    while at >= 0:
        if at and text[at - 1] not in " \n\t" and (domain := DOMAIN.match(text, at + 1)):
            local = LOCAL.search(text, max(0, at - 65), at)
            if local and (len(domain[2]) == 2 or domain[2].lower() in DOMAINS):
                start = local.start()
                if start and (escape := ESCAPE.match(text, start - 1, at)):
                    start = escape.end()
                someone = not (NO_ONE.fullmatch(text, start, at) or NOBODY.search(domain[0]))
                if someone and start < at and not text.endswith("//", 0, start):
                    yield start, domain.end(), "EMAIL"
        at = text.find("@", at + 1)


def words_of_python(text: str) -> Iterator[tuple[int, int]]:
    """Yield the (start, end) of strings and comments of Python source."""
    starts = [0]
    for line in text.split("\n"):
        starts.append(starts[-1] + len(line) + 1)
    words = {tokenize.STRING, tokenize.COMMENT, getattr(tokenize, "FSTRING_MIDDLE", tokenize.STRING)}
    try:
        for token in tokenize.generate_tokens(io.StringIO(text).readline):
            if token.type in words:
                yield starts[token.start[0] - 1] + token.start[1], starts[token.end[0] - 1] + token.end[1]
    except (tokenize.TokenError, SyntaxError):
        return


def internet_addresses(text: str) -> Iterator[Finding]:
    """Yield routed addresses of IPv4 and IPv6, without well-known services and what looks like a version."""
    for match in IPV4.finditer(text) if QUICK_4.search(text) else ():
        if not _someones(match[0]):
            continue
        line = _line(text, *match.span())
        small = max(map(int, match[0].split("."))) < 32
        if ADDRESS_WORDS.search(line) or not (small or VERSION_WORDS.search(line)):
            yield *match.span(), "IP"
    for match in IPV6.finditer(text) if QUICK_6.search(text) else ():
        if _someones(match[0]):
            yield *match.span(), "IP"


def _someones(text: str) -> bool:
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return (
        address.is_global and not address.is_multicast and str(address) not in SERVICES and len(set(text)) > 2
    )
