"""Find secrets by their form, as their issuers document it, and private keys."""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from scraping.stages import Finding
from scraping.stages.randomness import COMMON, looks_random, made_up

_E = r"(?![A-Za-z0-9_])"  # the end of a word


@dataclass(frozen=True)
class Form:
    """A form of secrets.

    Args:
        kind: The kind that the placeholder names.
        pattern: Its group `s` is the secret; without such a group the whole match is, and must begin a word.
            A pattern that begins with plain letters is found ten times as fast as another.
        marks: For a pattern that does not: a text without one of these holds no such secret.
        check: Returns whether a match is a secret, if it is not made up.
    """

    kind: str
    pattern: re.Pattern[str]
    marks: tuple[str, ...] = ()
    check: Callable[[str], bool] = lambda secret: True

    def found(self, text: str) -> Iterator[Finding]:
        if self.marks and not any(mark in text for mark in self.marks):
            return
        group = "s" if "s" in self.pattern.groupindex else 0
        for match in self.pattern.finditer(text):
            start, end = match.span(group)
            if group == 0 and not _begins_word(text, start):
                continue
            if not made_up(match[group]) and self.check(match[group]):
                yield start, end, self.kind


def _begins_word(text: str, at: int) -> bool:
    """Return whether no word goes on at `at`; the letter of an escape like `\\n` does not count."""
    if not at or not (text[at - 1].isalnum() or text[at - 1] == "_"):
        return True
    return text[at - 2 : at] in ("\\n", "\\r", "\\t")


def _form(
    kind: str, pattern: str, marks: str = "", check: Callable[[str], bool] = lambda secret: True
) -> Form:
    return Form(kind, re.compile(pattern), tuple(marks.split()), check)


def _is_jwt(text: str) -> bool:
    """Return whether the first part of a text is base64 of a JSON object (RFC 7519, RFC 7515)."""
    part = text.split(".")[0]
    try:
        head = base64.urlsafe_b64decode(part + "=" * (-len(part) % 4))
    except (ValueError, binascii.Error):
        return False
    return head.lstrip().startswith(b"{") and b'"' in head


def _is_basic(text: str) -> bool:
    """Return whether a text is base64 of `user:password`, as in HTTP's Basic scheme (RFC 7617)."""
    try:
        plain = base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except (ValueError, binascii.Error):
        return False
    return b":" in plain and plain.isascii() and plain.decode().isprintable()


def _looks_random(text: str) -> bool:
    return looks_random(text, 12)


def _numbered(text: str) -> bool:
    return sum(c.isdigit() for c in text) >= 6


FORMS = (
    # https://docs.github.com/en/authentication, "GitHub's token formats": up to 255 characters
    _form("GITHUB_TOKEN", rf"gh[pousr]_[A-Za-z0-9]{{36,251}}{_E}"),
    _form("GITHUB_TOKEN", rf"github_pat_[A-Za-z0-9_]{{50,244}}{_E}"),
    # https://docs.gitlab.com/security/tokens/#token-prefixes
    _form("GITLAB_TOKEN", r"gl(?:pat|dt|rt|cbt|ptt|ft|soat|oas|agent)-[A-Za-z0-9_.-]{20,300}"),
    # https://docs.aws.amazon.com/IAM/latest/UserGuide/reference_identifiers.html#identifiers-unique-ids
    *(_form("AWS_KEY", rf"{prefix}[A-Z2-7]{{16}}{_E}") for prefix in ("AKIA", "ASIA", "ABIA", "ACCA")),
    _form(
        "AWS_SECRET",
        r"(?i:aws).{0,60}?[^A-Za-z0-9/+](?P<s>[A-Za-z0-9/+]{40})(?![A-Za-z0-9/+=])",
        "aws AWS Aws",
        lambda text: looks_random(text, 40) and not re.fullmatch(r"[0-9a-f]+|[0-9A-F]+", text),
    ),
    # https://api.slack.com/authentication/token-types and .../messaging/webhooks
    _form("SLACK_TOKEN", r"xox[abeoprs](?:\.xox[abp])?-[A-Za-z0-9-]{20,400}", check=_numbered),
    _form("SLACK_TOKEN", r"xapp-[A-Za-z0-9-]{20,400}", check=_numbered),
    _form(
        "SLACK_WEBHOOK",
        r"hooks\.slack\.com/(?:services|workflows)/(?P<s>T[A-Za-z0-9]{6,14}/[A-Za-z0-9/]{20,80})",
    ),
    # https://docs.stripe.com/keys
    _form("STRIPE_KEY", rf"sk_(?:live|test)_[A-Za-z0-9]{{16,250}}{_E}"),
    _form("STRIPE_KEY", rf"rk_(?:live|test)_[A-Za-z0-9]{{16,250}}{_E}"),
    _form("STRIPE_KEY", rf"whsec_[A-Za-z0-9]{{16,250}}{_E}"),
    # https://docs.cloud.google.com/docs/authentication/api-keys, https://developers.google.com/identity/protocols
    _form("GOOGLE_KEY", r"AIza[A-Za-z0-9_-]{35}(?![A-Za-z0-9_-])"),
    _form("GOOGLE_TOKEN", r"ya29\.[A-Za-z0-9_-]{30,400}"),
    _form("GOOGLE_TOKEN", r"GOCSPX-[A-Za-z0-9_-]{28}"),
    # https://docs.npmjs.com/about-access-tokens, https://pypi.org/help/#apitoken
    _form("NPM_TOKEN", rf"npm_[A-Za-z0-9]{{36}}{_E}"),
    _form("PYPI_TOKEN", r"pypi-[A-Za-z0-9_-]{50,400}"),
    # https://huggingface.co/docs/hub/security-tokens
    _form("HF_TOKEN", rf"hf_[A-Za-z0-9]{{30,50}}{_E}"),
    # https://docs.claude.com/en/api/overview, https://platform.openai.com/docs/api-reference/authentication
    _form("ANTHROPIC_KEY", r"sk-ant-[A-Za-z0-9_-]{40,300}"),
    _form("OPENAI_KEY", r"sk-(?:proj-|svcacct-|admin-|None-)?[A-Za-z0-9_-]{40,300}", check=_looks_random),
    # https://www.twilio.com/docs/sendgrid/ui/account-and-settings/api-keys, .../docs/iam/api-keys
    _form("SENDGRID_KEY", r"SG\.[A-Za-z0-9_-]{16,32}\.[A-Za-z0-9_-]{16,64}"),
    _form("TWILIO_KEY", rf"SK[0-9a-f]{{32}}{_E}"),
    # https://documentation.mailgun.com, https://mailchimp.com/developer/marketing/docs/fundamentals
    _form("MAILGUN_KEY", rf"key-[0-9a-f]{{32}}{_E}"),
    _form("MAILCHIMP_KEY", rf"[0-9a-f]{{32}}-us\d{{1,2}}{_E}", "-us"),
    # https://core.telegram.org/bots/api#authorizing-your-bot, https://docs.discord.com/developers/reference
    _form("TELEGRAM_TOKEN", r"\d{8,10}:AA[A-Za-z0-9_-]{33}(?![A-Za-z0-9_-])", ":AA"),
    _form(
        "DISCORD_TOKEN",
        r"[MNO][A-Za-z0-9_-]{23,27}\.[A-Za-z0-9_-]{6}\.[A-Za-z0-9_-]{27,38}(?![A-Za-z0-9_-])",
        "discord Discord DISCORD",
        _looks_random,
    ),
    _form("DISCORD_WEBHOOK", r"/api/webhooks/(?P<s>\d{17,20}/[A-Za-z0-9_-]{60,72})"),
    # https://learn.microsoft.com/azure/storage/common/storage-configure-connection-string
    _form("AZURE_KEY", r"(?:Account|Access)Key=(?P<s>[A-Za-z0-9+/]{43,88}={0,2})", "AccountKey= AccessKey="),
    # https://docs.digitalocean.com/reference/api/create-personal-access-token
    _form("DIGITALOCEAN_TOKEN", rf"do[opr]_v1_[a-f0-9]{{64}}{_E}"),
    # https://shopify.dev/docs/apps/build/authentication-authorization
    _form("SHOPIFY_TOKEN", rf"shp(?:at|ca|pa|ss)_[a-fA-F0-9]{{32}}{_E}"),
    # https://docs.databricks.com/dev-tools/auth/pat, https://developer.hashicorp.com/vault/docs/concepts/tokens
    _form("DATABRICKS_TOKEN", rf"dapi[a-f0-9]{{32}}(?:-\d)?{_E}"),
    _form("VAULT_TOKEN", r"hv[bs]\.[A-Za-z0-9_-]{24,250}"),
    # RFC 7519; RFC 6750 and 7617; RFC 3986, section 3.2.1
    _form("JWT", r"eyJ[A-Za-z0-9_-]{8,}\.eyJ[A-Za-z0-9_-]{8,}\.[A-Za-z0-9_-]{10,}", check=_is_jwt),
    _form("BEARER_TOKEN", r"earer (?P<s>[A-Za-z0-9._~+/-]{16,}=*)", check=_looks_random),
    _form("BASIC_AUTH", r"Basic (?P<s>[A-Za-z0-9+/]{12,}={0,2})", check=_is_basic),
    _form(
        "PASSWORD",
        r"://[^\s/:@\"'<>{}$%]{0,64}:(?P<s>[^\s/:@\"'<>{}$%]{3,128})@[A-Za-z0-9\[]",
        check=lambda text: not COMMON.fullmatch(text),
    ),
)
# RFC 7468 and RFC 4880, section 6.2; a key may also be in string literals, line by line.
PEM = re.compile(r"-----BEGIN (?:[A-Z0-9]+ ){0,3}PRIVATE KEY(?: BLOCK)?-----")
PEM_LONGEST = 20_000
PEM_CUT = re.compile(
    r"(?:[\s\"'`+,()]{0,40}(?:\\[nr]){0,2}[\s\"'`+,]{0,40}[A-Za-z0-9+/=]{16,}+)*+"
)  # a key whose end is missing
PEM_BODY = re.compile(r"[A-Za-z0-9+/=]{16,}|(?<=[\s\"'`])[A-Za-z0-9+/=]{2,15}(?=[\s\"'`\\])")


def private_keys(text: str) -> Iterator[Finding]:
    """Yield the bodies of private keys; each part of one that is in several string literals."""
    for begin in PEM.finditer(text):
        start = begin.end()
        stop = text.find("-----END ", start, start + PEM_LONGEST)
        again = text.find("-----BEGIN ", start, start + PEM_LONGEST)
        whole = stop >= 0 and not 0 <= again < stop
        if not whole:
            cut = PEM_CUT.match(text, start, start + PEM_LONGEST)
            stop = cut.end() if cut else start
        body = text[start:stop]
        if len(re.findall(r"[A-Za-z0-9+/=]", body)) < 64:
            continue
        kind = "PRIVATE_KEY"
        if not re.search(r"[\"'`]", body):
            yield start, stop, kind
            continue
        for part in PEM_BODY.finditer(text, start, stop):  # The literals' quotes are left out.
            yield *part.span(), kind
            kind = ""
