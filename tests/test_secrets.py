"""scraping/stages/secrets.py: 1,000 planted secrets and 1,000 decoys, made from the issuers' own descriptions.

The generator knows no rule of the stage. It draws texts by the formats that the issuers publish and puts each
into a line of code as people write it.
"""

# ruff: noqa: E501 SIM905 (tables of cases, one a line)

from __future__ import annotations

import ast
import base64
import json
import random
import string
import uuid
import zlib
from collections import Counter
from collections.abc import Callable

from scraping.documents import Drop, ScrapedDocument
from scraping.stages import secrets

ALNUM = string.ascii_letters + string.digits
URL64 = ALNUM + "-_"
HEX = "0123456789abcdef"


def draw(rng: random.Random, alphabet: str, n: int) -> str:
    return "".join(rng.choice(alphabet) for _ in range(n))


def base62(n: int, width: int) -> str:
    digits = string.digits + string.ascii_uppercase + string.ascii_lowercase
    out = ""
    for _ in range(width):
        n, digit = divmod(n, 62)
        out = digits[digit] + out
    return out


def github(rng: random.Random, prefix: str) -> str:
    """30 characters and their CRC32 in base 62: "Behind GitHub's new authentication token formats", 2021."""
    body = draw(rng, ALNUM, 30)
    return f"{prefix}_{body}{base62(zlib.crc32(body.encode()), 6)}"


def jwt(rng: random.Random) -> str:
    head = json.dumps({"alg": rng.choice(["HS256", "RS256"]), "typ": "JWT"}).encode()
    claims = json.dumps({"sub": str(rng.randrange(10**9)), "iat": rng.randrange(1_600_000_000)}).encode()
    parts = [
        base64.urlsafe_b64encode(part).decode().rstrip("=") for part in (head, claims, rng.randbytes(32))
    ]
    return ".".join(parts)


def pem(rng: random.Random) -> str:
    kind = rng.choice(["RSA ", "EC ", "", "OPENSSH ", "ENCRYPTED "])
    body = base64.b64encode(rng.randbytes(rng.choice([160, 600, 1190]))).decode()
    lines = [body[i : i + 64] for i in range(0, len(body), 64)]
    return "\n".join([f"-----BEGIN {kind}PRIVATE KEY-----", *lines, f"-----END {kind}PRIVATE KEY-----"])


def password(rng: random.Random) -> str:
    """Sample a password as a password manager does: 12 to 24 characters of at least three kinds."""
    while True:
        text = draw(rng, ALNUM + "!#*-_.+=@^~", rng.randrange(12, 25))
        kinds = [string.ascii_lowercase, string.ascii_uppercase, string.digits]
        if all(any(c in kind for c in text) for kind in kinds):
            return text


def mail(rng: random.Random) -> str:
    first = rng.choice(
        "anna bob carlos dmitri elif fatima george hana ivan julia kenji lena mario nina".split()
    )
    last = rng.choice(
        "smith garcia petrov mueller tanaka rossi kowalski dubois jensen okafor silva lee".split()
    )
    site = rng.choice(
        ["gmail.com", "web.de", "mail.ru", "uni-bonn.de", "mit.edu", "qq.com", "proton.me", "free.fr"]
    )
    return (
        rng.choice(
            [f"{first}.{last}", f"{first[0]}{last}", f"{first}{rng.randrange(60, 99)}", f"{last}_{first}"]
        )
        + f"@{site}"
    )


def ip(rng: random.Random) -> str:
    """A routed address: the first byte of blocks that IANA gave to the registries."""
    first = rng.choice(
        [23, 31, 46, 52, 64, 78, 81, 91, 93, 104, 128, 138, 142, 151, 176, 185, 188, 194, 195, 212, 217]
    )
    return f"{first}.{rng.randrange(64, 256)}.{rng.randrange(256)}.{rng.randrange(1, 255)}"


NAMED = ("password", "passwd", "db_password", "secret", "client_secret", "api_key", "apiKey", "API_TOKEN", "auth_token",
         "SECRET_KEY", "accessToken", "private_key", "dbPassword", "credentials")  # fmt: skip
# Kind of secret: how it is drawn, and its ways into code; {s} is the secret, {n} a name.
QUOTED = ('{n} = "{s}"', "{n} = '{s}'", 'client = Client("{s}")', '    return "{s}"', 'headers = {{"X-Auth": "{s}"}}',
          "# use {s} here", 'val key = "{s}"', 'print("key:\\n{s}")', "curl -H 'X-Key: {s}' $URL")  # fmt: skip
ASSIGNED = ('{n} = "{s}"', "{n}='{s}'", 'self.{n} = "{s}"', '{{"{n}": "{s}"}}', 'connect(host, {n}="{s}")',
            'os.environ["{n}"] = "{s}"', 'os.getenv("{n}", "{s}")', '{n}: str = "{s}"', 'private val {n} = "{s}"',
            'private static final String {n} = "{s}";', "if {n} == '{s}':", 'config.put("{n}", "{s}");')  # fmt: skip
PLANTED: dict[str, tuple[Callable[[random.Random], str], tuple[str, ...]]] = {
    **{p: (lambda rng, p=p: github(rng, p), QUOTED) for p in ("ghp", "gho", "ghs")},
    "github_pat": (lambda rng: f"github_pat_{draw(rng, ALNUM, 22)}_{draw(rng, ALNUM, 59)}", QUOTED),
    "gitlab": (lambda rng: f"glpat-{draw(rng, URL64, 20)}", QUOTED),
    "aws id": (
        lambda rng: f"{rng.choice(['AKIA', 'ASIA'])}{draw(rng, string.ascii_uppercase + '234567', 16)}",
        QUOTED,
    ),
    "aws secret": (
        lambda rng: draw(rng, ALNUM + "+/", 40),
        (
            'aws_secret_access_key = "{s}"',
            "# AWS_SECRET_ACCESS_KEY={s}",
            'awsSecretKey = "{s}"',
            'aws_secret="{s}"',
        ),
    ),
    "slack": (
        lambda rng: f"xoxb-{draw(rng, '123456789', 12)}-{draw(rng, '123456789', 13)}-{draw(rng, ALNUM, 24)}",
        QUOTED,
    ),
    "slack hook": (
        lambda rng: (
            f"T{draw(rng, string.ascii_uppercase, 8)}/B{draw(rng, string.ascii_uppercase, 8)}/{draw(rng, ALNUM, 24)}"
        ),
        ('url = "https://hooks.slack.com/services/{s}"', "# https://hooks.slack.com/services/{s}"),
    ),
    "stripe": (lambda rng: f"{rng.choice(['sk', 'rk'])}_live_{draw(rng, ALNUM, 24)}", QUOTED),
    "google": (lambda rng: f"AIza{draw(rng, URL64, 35)}", QUOTED),
    "npm": (lambda rng: f"npm_{draw(rng, ALNUM, 36)}", QUOTED),
    "pypi": (lambda rng: f"pypi-AgEIcHlwaS5vcmc{draw(rng, URL64, 120)}", QUOTED),
    "hub": (lambda rng: f"hf_{draw(rng, string.ascii_letters, 34)}", QUOTED),
    "openai": (lambda rng: f"sk-{draw(rng, ALNUM, 20)}T3BlbkFJ{draw(rng, ALNUM, 20)}", QUOTED),
    "openai project": (lambda rng: f"sk-proj-{draw(rng, URL64, 74)}T3BlbkFJ{draw(rng, URL64, 74)}", QUOTED),
    "anthropic": (lambda rng: f"sk-ant-api03-{draw(rng, URL64, 93)}AA", QUOTED),
    "sendgrid": (lambda rng: f"SG.{draw(rng, URL64, 22)}.{draw(rng, URL64, 43)}", QUOTED),
    "telegram": (lambda rng: f"{rng.randrange(10**8, 10**10)}:AA{draw(rng, URL64, 33)}", QUOTED),
    "digitalocean": (lambda rng: f"dop_v1_{draw(rng, HEX, 64)}", QUOTED),
    "azure": (
        lambda rng: base64.b64encode(rng.randbytes(64)).decode(),
        (
            'cs = "DefaultEndpointsProtocol=https;AccountName=shop;AccountKey={s};EndpointSuffix=core.windows.net"',
        ),
    ),
    "jwt": (jwt, (*QUOTED, 'headers["Authorization"] = "Bearer {s}"')),
    "bearer": (
        lambda rng: draw(rng, ALNUM, 40),
        ('headers = {{"Authorization": "Bearer {s}"}}', "-H 'Authorization: Bearer {s}'"),
    ),
    "basic": (
        lambda rng: base64.b64encode(f"admin:{password(rng)}".encode()).decode(),
        ('headers = {{"Authorization": "Basic {s}"}}',),
    ),
    "url": (
        lambda rng: draw(rng, ALNUM, rng.randrange(8, 20)),
        (
            'engine = create_engine("postgresql://shop:{s}@db.shop.internal:5432/shop")',
            "git clone https://deploy:{s}@git.shop.io/shop.git",
            'val url = "redis://:{s}@cache:6379/0"',
        ),
    ),
    "pem": (pem, ('KEY = """{s}"""', "KEY = '''\\\n{s}\n'''", "/*\n{s}\n*/")),
    "pem in one line": (lambda rng: pem(rng).replace("\n", "\\n"), ('KEY = "{s}"', 'val key = "{s}\\n"')),
    "pem in lines": (
        lambda rng: "".join(f'    "{line}\\n"\n' for line in pem(rng).split("\n")),
        ("KEY = (\n{s})",),
    ),
    "password": (password, ASSIGNED),
    "password ": (password, ASSIGNED),
    "hex": (lambda rng: draw(rng, HEX, rng.choice([32, 40, 64])), ASSIGNED),
    "base64": (lambda rng: base64.b64encode(rng.randbytes(rng.choice([24, 32]))).decode(), ASSIGNED),
    "lower": (lambda rng: draw(rng, string.ascii_lowercase + string.digits, 24), ASSIGNED),
    "uuid": (
        lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
        ('api_key = "{s}"', 'HEROKU_API_KEY="{s}"'),
    ),
    "settings": (
        lambda rng: draw(rng, ALNUM, 32),
        ("export API_KEY={s}", "?access_token={s}&page=2", "# token: {s}"),
    ),
    "mail": (
        mail,
        ("# Author: Someone <{s}>", '__email__ = "{s}"', " * @author {s}", 'send(to="{s}")', "# mailto:{s}"),
    ),
    "mail ": (mail, ('"""Write to {s}, please."""', "// {s}: fix this", 'User("x", "{s}")')),
    "ip": (
        ip,
        (
            'HOST = "{s}"',
            'connect("{s}", 8080)',
            'url = "http://{s}:8080/x"',
            "# server at {s}",
            'ping("{s}")',
        ),
    ),
    "ipv6": (
        lambda rng: (
            f"2a0{rng.randrange(1, 9)}:{draw(rng, '123456789abcdef', 4)}:{draw(rng, HEX, 4)}::{draw(rng, '123456789abcdef', 3)}"
        ),
        ('HOST = "{s}"', 'url = "http://[{s}]:8080/"'),
    ),
}


def words(rng: random.Random) -> str:
    vocabulary = "user order item parse handle request response default value buffer cache index node".split()
    return "_".join(rng.choice(vocabulary) for _ in range(rng.randrange(2, 5)))


def camel(rng: random.Random) -> str:
    first, *rest = words(rng).split("_")
    return first + "".join(word.title() for word in rest)


NAMES = ("commit", "checksum", "request_id", "digest", "etag", "revision", "sha", "key", "value", "name")
SECRET_NAMES = ("password", "api_key", "token", "secret", "access_token", "client_secret")
DECOYS: dict[str, tuple[Callable[[random.Random], str], tuple[str, ...]]] = {
    "uuid": (
        lambda rng: str(uuid.UUID(int=rng.getrandbits(128), version=4)),
        ('{n} = "{s}"', "# see {s}", 'f("{s}")'),
    ),
    "git": (lambda rng: draw(rng, HEX, 40), ('{n} = "{s}"', "# fixed in {s}", "rev: {s}", '@pin("{s}")')),
    "hash": (
        lambda rng: draw(rng, HEX, rng.choice([32, 64])),
        ('{n} = "{s}"', 'assert md5(x) == "{s}"', "sha256:{s}"),
    ),
    "version": (
        lambda rng: ".".join(str(rng.randrange(30)) for _ in range(4)),
        ('__version__ = "{s}"', "# version {s}", 'VERSION = "{s}"', "pkg=={s}", "lib-{s}.tar.gz", "v{s}"),
    ),
    "big version": (
        lambda rng: f"{rng.randrange(60, 130)}.0.{rng.randrange(1000, 9999)}.{rng.randrange(200)}",
        ('agent = "Mozilla/5.0 Chrome/{s} Safari/537.36"', "chrome {s}"),
    ),
    "oid": (lambda rng: "1.3.6.1.4.1." + str(rng.randrange(10**5)) + ".2", ('OID = "{s}"', "# {s}")),
    "local ip": (
        lambda rng: rng.choice(
            [
                "127.0.0.1",
                "0.0.0.0",
                "255.255.255.0",
                "169.254.169.254",
                "192.0.2.7",
                "198.51.100.9",
                "203.0.113.5",
                f"10.{rng.randrange(256)}.0.{rng.randrange(256)}",
                f"192.168.{rng.randrange(256)}.1",
                f"172.{rng.randrange(16, 32)}.0.1",
            ]
        ),
        ('HOST = "{s}"', 'url = "http://{s}:8080/"', "# {s}"),
    ),
    "local ipv6": (
        lambda rng: rng.choice(["::1", "fe80::1", "2001:db8::8a2e:370:7334", "fd00::1"]),
        ('HOST = "{s}"', "http://[{s}]:80/"),
    ),
    "nobody": (
        lambda rng: rng.choice(
            [
                "user@example.com",
                "noreply@github.com",
                "no-reply@shop.io",
                "me@example.org",
                "a@b.example",
                "x@localhost.local",
                "12345+me@users.noreply.github.com",
                "git@github.com",
                "a@test.invalid",
            ]
        ),
        ('mail = "{s}"', "# {s}", "clone {s}:owner/name.git"),
    ),
    "not mail": (
        lambda rng: rng.choice(
            ["left@right.value", "icon@2x.png", "pkg@1.2.3", "x@w.mean", "this@Outer.name", "@app.route"]
        ),
        ("y = z + {s}", 'load("{s}")', "{s}"),
    ),
    "environment": (
        lambda rng: rng.choice(
            [
                'os.environ["API_KEY"]',
                'os.getenv("DB_PASSWORD")',
                'System.getenv("SECRET_TOKEN")',
                "settings.SECRET_KEY",
                "config.get('client_secret')",
                "${SECRET_TOKEN}",
                "request.headers['X-Auth-Token']",
            ]
        ),
        ("token = {s}", "password={s}", "api_key: {s}"),
    ),
    "placeholder": (
        lambda rng: rng.choice(
            [
                "X" * 20,
                "xxxxxxxxxxxxxxxx",
                "your-api-key-here",
                "YOUR_API_KEY",
                "<your token>",
                "changeme",
                "change-me-please",
                "${API_KEY}",
                "{{ api_key }}",
                "%(password)s",
                "...",
                "****************",
                "insert_token_here",
                "placeholder-123",
                "example-secret-1234",
                "AKIAIOSFODNN7EXAMPLE",
                "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY",
                "ghp_" + "x" * 36,
                "sk-" + "0" * 48,
                "1234567890abcdef",
                "abcdefghijklmnop",
                "0123456789",
                "TODO: set me",
            ]
        ),
        ('{k} = "{s}"', '{{"{k}": "{s}"}}', "{k}: '{s}'"),
    ),
    "plain words": (
        lambda rng: rng.choice(
            [
                "password",
                "secret",
                "test",
                "admin",
                "hunter",
                "token",
                "mysecretpassword",
                "password123",
                "Bearer",
                "oauth2",
                "access_token",
                "refresh-token",
                "client_credentials",
                "X-Api-Key",
                "user_password",
                "OAuth2Token",
                "Enter password:",
                "application/json",
                "https://auth.shop.io/token",
                "/run/secrets/db",
                "secrets.yaml",
                "Base64UrlEncodedToken1",
            ]
        ),
        ('{k} = "{s}"', '{{"{k}": "{s}"}}', 'f({k}="{s}")'),
    ),
    "names": (words, ('{k} = "{s}"', "{k} = {s}", "{k}={s}_2,", 'TOKEN_TYPE = "{s}"', "def {s}(): pass")),
    "camel": (lambda rng: camel(rng) + camel(rng).title(), ("{k} = {s}()", '{k} = "{s}"', "class {s}:")),
    "regex": (
        lambda rng: rng.choice([r"[a-zA-Z_]\w*", r"(?P<name>\d+)", r"\s*=\s*['\"]", "[0-9a-f]{40}"]),
        ('token = r"{s}"', "TOKEN_RE = re.compile(r'{s}')"),
    ),
    "picture": (
        lambda rng: base64.b64encode(rng.randbytes(60)).decode(),
        ('ICON = "data:image/png;base64,{s}"', 'img = b64decode("{s}")'),
    ),
    "public key": (
        lambda rng: base64.b64encode(rng.randbytes(48)).decode(),
        (
            'KEY = """-----BEGIN PUBLIC KEY-----\n{s}\n-----END PUBLIC KEY-----"""',
            'ssh = "ssh-rsa {s}"',
            'public_key = "{s}"',
        ),
    ),
    "assembly": (lambda rng: draw(rng, HEX, 16), ("System.Web, Version=4.0.0.0, PublicKeyToken={s}",)),
    "time": (
        lambda rng: (
            f"2024-{rng.randrange(10, 13)}-{rng.randrange(10, 29)}T12:{rng.randrange(10, 60)}:33.123456Z"
        ),
        ('t = "{s}"', "# {s}"),
    ),
    "mac": (lambda rng: ":".join(draw(rng, HEX, 2) for _ in range(6)), ('MAC = "{s}"', "# {s}")),
    "port url": (
        lambda rng: f"http://shop.io:{rng.randrange(1000, 9999)}/a",
        ('url = "{s}"', "# {s} or git@x"),
    ),
}

AROUND = '''"""A module of the shop."""

import os


def total(items, rate=0.19):
    """Sum of the items with tax."""
    return sum(item.price for item in items) * (1 + rate)


{line}


class Cart:
    items: list = []

    def __repr__(self):
        return f"Cart({len(self.items)} items)"
'''


def lines_of(table: dict, count: int, seed: int) -> list[tuple[str, str, str]]:
    """`count` of (kind, text, line of code with it), each kind as often as any other."""
    rng = random.Random(seed)
    kinds = list(table)
    rows = []
    for at in range(count):
        kind = kinds[at % len(kinds)]
        make, ways = table[kind]
        text = make(rng)
        way = ways[(at // len(kinds)) % len(ways)]
        line = way.format(
            s=text, n=rng.choice(NAMED if table is PLANTED else NAMES), k=rng.choice(SECRET_NAMES)
        )
        rows.append((kind, text, line))
    return rows


def pieces(text: str) -> list[str]:
    """Return the parts of a secret that may not remain: lines of a key, or half of it."""
    if "PRIVATE KEY" in text:
        lines = [line.strip(' "') for line in text.replace("\\n", "\n").split("\n")]
        return [line for line in lines if line and "----" not in line]
    return [text[: len(text) // 2 + 1], text[len(text) // 2 - 1 :]]


def stage_of(path: str) -> Callable[[str], str]:
    stage = secrets.build(True, lambda name: None)

    def run(text: str) -> str:
        result = stage(ScrapedDocument(text, "o/r", path, "c", "MIT"))
        assert not isinstance(result, Drop)
        return result.text

    return run


def parses(text: str) -> bool:
    try:
        ast.parse(text)
    except SyntaxError:
        return False
    return True


def test_of_1000_planted_secrets_at_least_990_go_and_what_parsed_still_does() -> None:
    redact = stage_of("shop.py")
    missed = Counter()
    parsed = 0
    for kind, text, line in lines_of(PLANTED, 1000, seed=1):
        source = AROUND.replace("{line}", line)
        result = redact(source)
        if any(piece in result for piece in pieces(text)):
            missed[kind] += 1
        elif parses(source):
            parsed += 1
            assert parses(result), result
        assert "class Cart:" in result
    assert missed.total() <= 10, missed
    assert parsed > 500  # the check of the syntax has had something to check


def test_of_1000_decoys_at_most_10_are_touched() -> None:
    redact = stage_of("shop.py")
    touched = Counter()
    for kind, _, line in lines_of(DECOYS, 1000, seed=2):
        source = AROUND.replace("{line}", line)
        touched[kind] += redact(source) != source
    assert touched.total() <= 10, +touched


def test_placeholders_say_what_stood_there_and_are_left_alone_themselves() -> None:
    redact = stage_of("shop.py")
    rng = random.Random(3)
    kinds = {"ghp": "GITHUB_TOKEN", "aws id": "AWS_KEY", "jwt": "JWT", "pem": "PRIVATE_KEY", "password": "SECRET",
             "mail": "EMAIL", "ip": "IP", "stripe": "STRIPE_KEY", "google": "GOOGLE_KEY"}  # fmt: skip
    for kind, placeholder in kinds.items():
        make, ways = PLANTED[kind]
        once = redact(AROUND.replace("{line}", ways[0].format(s=make(rng), n="password")))
        assert f"<{placeholder}>" in once, kind
        assert redact(once) == once


def test_a_key_over_string_literals_or_without_its_end_leaves_nothing_and_still_parses() -> None:
    redact = stage_of("shop.py")
    key = pem(random.Random(4))
    lines = key.split("\n")
    sources = [
        "KEY = (\n" + "".join(f"    '{line}\\n'\n" for line in lines) + ")\n",
        "KEY = (\n    b'" + lines[0] + "\\n'\n" + "".join(f'    b"{line}"\n' for line in lines[1:]) + ")\n",
        'KEY = """' + "\n".join(lines[:-1]) + '"""\nx = compute(1)\n',
        f'A = """{key}"""\nB = """{key}"""\nx = compute(1)\n',
    ]
    for source in sources:
        result = redact(source)
        assert not any(line in result for line in lines[1:-1])
        assert "<PRIVATE_KEY>" in result
        assert parses(source)
        assert parses(result)
        assert ("compute(1)" in result) == ("compute(1)" in source)


def test_a_product_of_matrices_is_no_address() -> None:
    redact = stage_of("model.py")
    source = "def f(x, w, me):\n    if x@w.to:\n        return me@w.me  # anna.smith@web.de\n    return 'm@web.de'\n"
    assert redact(source) == source.replace("anna.smith@web.de", "<EMAIL>").replace("m@web.de", "<EMAIL>")


def test_an_escape_before_a_secret_stays_whole() -> None:
    redact = stage_of("a.py")
    token = github(random.Random(5), "ghp")
    assert redact(f"x = 'a\\n{token}'\n") == "x = 'a\\n<GITHUB_TOKEN>'\n"
    assert redact("x = 'a\\nanna@web.de \\u00e9va@web.de'\n") == "x = 'a\\n<EMAIL> \\u00e9<EMAIL>'\n"


def test_what_detect_secrets_finds_among_the_planted_is_found_here_too() -> None:
    """The plugins of github.com/Yelp/detect-secrets that know a form, without those that guess by entropy."""
    from detect_secrets.core.scan import scan_line
    from detect_secrets.settings import transient_settings

    names = ["AWSKeyDetector", "AzureStorageKeyDetector", "GitHubTokenDetector", "GitLabTokenDetector", "JwtTokenDetector",
             "BasicAuthDetector", "NpmDetector", "OpenAIDetector", "PypiTokenDetector", "SendGridDetector", "SlackDetector",
             "StripeDetector", "TelegramBotTokenDetector", "TwilioKeyDetector", "DiscordBotTokenDetector"]  # fmt: skip
    redact = stage_of("shop.py")
    theirs = 0
    with transient_settings({"plugins_used": [{"name": name} for name in names]}):
        for kind, text, line in lines_of(PLANTED, 400, seed=6):
            if any(True for row in line.split("\n") for _ in scan_line(row)):
                theirs += 1
                assert text not in redact(line), (kind, line)
    assert theirs > 100
