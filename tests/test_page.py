"""The page of an evaluation: nothing in a prediction is markup, runs, or hides, and the page says it all."""

from __future__ import annotations

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from test_comparing import programs
from test_eval import command

from suites import evaluate as evaluation
from suites.markup import escaped, marked, shortened, tail
from suites.page import SCRIPT, page_of, write_page
from suites.scoring import SUITES, Example, Predictions, scored

HOSTILE = [
    "</script><img src=x onerror=\"document.title='ran'\">",
    "</pre></article></main><script>document.title='ran'</script>",
    '"><svg onload="document.title=\'ran\'"><style>*{display:none}</style>',
    "<!--<script>",
    "a\x00b\x07c\x1b[31md\x7fe",
    "half \ud800 of \udfff two",
    "if access \u202e\u2066// check\u2069 \u2066 {",
    "zero\u200bwidth\ufeff\u2028line\xa0",
    "&lt;b&gt; &amp;amp;",
    "\n\n  two line breaks first\r\n",
    "",
    "x" * 1_000_000,
]


def hostile_record(subject: str = "model") -> dict[str, Any]:
    examples = [
        Example(text[:60] or "empty", i, f"# {text}\ndef f():", f"return {i} # {text[60::-1]}")
        for i, text in enumerate(HOSTILE)
    ]
    predictions = {
        subject: Predictions(list(HOSTILE), 0),
        "copy": Predictions([e.prompt[:5000] for e in examples]),
        "<b onclick=1>": Predictions([e.reference for e in examples]),
    }
    suite = {
        "max_new_tokens": 8,
        **scored(SUITES["pairs"], examples, predictions, ["exact_match", "edit_similarity"]),
    }
    return {
        "command": "python eval.py '<script>'",
        "run": "<i>run</i>",
        "step": 3,
        "side": "test",
        "allowed faults": {"<x>": "</details><script>1</script>"},
        "versions": {"<y>": "\u202e"},
        "suite": suite,
    }


class Read(HTMLParser):
    """A page as a browser reads it: tags with their attributes, and the text of each <pre>."""

    def __init__(self, page: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.pre: list[str] = []
        self.open = 0
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag == "pre":
            self.pre.append("")
            self.open = 1

    def handle_endtag(self, tag: str) -> None:
        if tag == "pre":
            self.open = 0

    def handle_data(self, data: str) -> None:
        if self.open:
            self.pre[-1] += data


@pytest.fixture(scope="module")
def page() -> str:
    return page_of(hostile_record(), "a table")


def test_nothing_in_a_record_becomes_markup(page):
    read = Read(page)
    names = [tag for tag, _ in read.tags]
    assert names.count("script") == 1
    assert names.count("style") == 1
    assert names.count("meta") == 4
    assert not {"img", "iframe", "link", "object", "embed", "base", "a", "b onclick"} & set(names)
    for _, attributes in read.tags:
        assert not [key for key in attributes if key.startswith("on") or key in ("src", "href", "style")]
    assert names.count("article") == len(HOSTILE)
    assert "".join(page.split()).endswith("</script></body></html>")


def test_the_policy_names_the_one_script_and_the_one_style_by_hash(page):
    policy = next(a["content"] for t, a in Read(page).tags if a.get("http-equiv"))
    assert policy is not None
    for tag in ("script", "style"):
        text = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert text is not None
        digest = base64.b64encode(hashlib.sha256(text[1].encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none'")
    assert "unsafe" not in policy
    assert not re.search(r"https?://|//\w+\.\w", page.replace("http-equiv", ""))


def test_nothing_on_the_page_is_invisible_or_turns_a_line(page):
    page.encode("utf-8")  # no lone surrogate
    unseen = {c for c in page if not c.isprintable()} - {"\n", "\t"}
    assert unseen == set()
    for code in ("U+202E", "U+2066", "U+200B", "U+FEFF", "U+D800", "U+0000", "U+001B", "U+000D", "U+00A0"):
        assert f"<u>{code}</u>" in page


def test_every_prediction_is_on_the_page_to_the_character(page):
    """The browser shows the text, with names in the place of characters that cannot be seen."""
    shown = Read(page).pre
    for text in HOSTILE[:-1]:
        named = "".join(c if c.isprintable() or c in "\n\t" else f"U+{ord(c):04X}" for c in text)
        assert named in [one.removeprefix("\n") for one in shown]
    assert "980,000 more characters are in eval.json" in page
    assert len(page) < 3_000_000  # The texts have several megabytes.


def test_differences_are_marked_on_words():
    assert marked("a = b + c", "a = d + c", "ins") == "a = <ins>b</ins> + c"
    assert marked("same", "same", "ins") == "same"
    assert marked("<a>", "", "ins") == "<ins>&lt;a&gt;</ins>"
    assert marked("", "x", "del") == ""
    joined = marked("f(x, yy)\n", "g(yy, x)\n", "ins")
    assert html.unescape(re.sub("</?ins>", "", joined)) == "f(x, yy)\n"


def test_pieces_of_texts():
    assert shortened("abc", 3) == ("abc", "")
    assert shortened("abcd", 3) == ("abc", "1 more characters are in eval.json")
    assert tail("a\nb\nc", 2) == "b\nc"
    assert tail("abcdef", 2, 3) == "def"
    assert escaped("a\u202eb<") == "a<u>U+202E</u>b&lt;"


def test_scores_of_samples_stand_in_the_page_and_are_those_of_the_registry(page):
    record = hostile_record()
    articles = [a for t, a in Read(page).tags if t == "article"]
    scores = [json.loads(a["data-scores"] or "") for a in articles]
    wanted = record["suite"]["scores"]["model"]["exact_match"]["mean"]
    assert sum(s["exact_match"]["model"] for s in scores) / len(scores) == pytest.approx(wanted)
    assert scores[0]["edit_similarity"]["<b onclick=1>"] == 100


def test_samples_of_other_wordings_and_results_of_programs_stand_in_the_page():
    record = hostile_record()
    worded = hostile_record()["suite"]
    for number, sample in enumerate(worded["samples"]):
        sample["prompt"] = f"</option>{number}, in a few words"
    record["prompts"] = {"</option><script>simple": worded}
    read = Read(page := page_of(record, "a table"))
    suites = [a["data-suite"] for t, a in read.tags if t == "article"]
    titles = ["completions", "completions, </option><script>simple prompts"]
    assert suites == [title for title in titles for _ in HOSTILE]
    assert "</option>3, in a few words" in [one.removeprefix("\n") for one in read.pre]
    assert [tag for tag, _ in read.tags].count("script") == 1
    assert page.count("completions, &lt;/option&gt;&lt;script&gt;simple prompts: scores, with 95%") == 1
    found = programs(np.array([[True, False], [False, False]]))
    page = page_of(found, "a table")
    assert "<b>passed</b> 50.0 passed</small>" in page
    assert "model, draw 2 <small>failed: &lt;0&gt;</small>" in page
    assert "<h4>stub <small><b>passed</b> 0.0 failed</small>" in page


def test_a_page_of_no_suite_and_a_record_that_is_not_whole():
    bare = {"run": "r", "step": 1, "command": "c"}
    assert "<article" not in page_of(bare, "t")
    with pytest.raises(ValueError, match="no whole evaluation"):
        page_of({"run": "r"}, "t")
    record = hostile_record()
    del record["suite"]["samples"][2]["predictions"]["copy"]
    with pytest.raises(ValueError, match="no whole evaluation"):
        page_of(record, "t")


def test_the_command_writes_the_page_of_an_old_file(tmp_path):
    path = tmp_path / "eval.json"
    path.write_text(json.dumps(hostile_record()), "utf-8")
    done = command("--report", path)
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "eval.html") in done.stdout
    record = json.loads(path.read_text("utf-8"))
    assert (tmp_path / "eval.html").read_text("utf-8") == page_of(record, evaluation.table(record))
    path.write_text('{"suite": {"scores": 3}, "side": "test", "allowed faults": {}}', "utf-8")
    done = command("--report", path)
    assert done.returncode == 2
    assert len(done.stderr.splitlines()) == 1
    assert "no whole evaluation" in done.stderr


CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="no chromium to open it with")
def test_in_a_browser_nothing_runs_and_the_filters_work(tmp_path):
    record = hostile_record()
    page = write_page(tmp_path / "eval.json", record, evaluation.table(record))

    def dom(path: Path, fragment: str = "") -> str:
        words = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom"]
        words += [f"--user-data-dir={tmp_path / 'browser'}", f"file://{path}{fragment}"]
        return subprocess.run(words, capture_output=True, text=True, timeout=120, check=True).stdout

    shown = dom(page)
    assert re.search(r'<output id="count">(.*?)<', shown)[1] == f"{len(HOSTILE)} of {len(HOSTILE)}"  # pyright: ignore
    title = html.unescape(re.search("<title>(.*?)</title>", shown)[1])  # pyright: ignore
    assert title == "<i>run</i>, step 3"
    found = dom(page, "#find=onerror&metric=edit_similarity&order=1")
    assert '<output id="count">1 of 12' in found
    assert len(re.findall("<article[^>]* hidden", found)) == len(HOSTILE) - 1
    ordered = re.findall("<h3>([0-9]+)", dom(page, "#metric=edit_similarity&order=1"))
    assert ordered != [str(i + 1) for i in range(len(HOSTILE))]
    assert sorted(map(int, ordered)) == list(range(1, len(HOSTILE) + 1))
    # The policy holds by itself: a script that got into the page all the same does not run.
    broken = tmp_path / "broken.html"
    planted = "<script>document.title='ran'</script><img src=x onerror=\"document.title='ran'\"></body>"
    broken.write_text(page.read_text("utf-8").replace("</body>", planted), "utf-8")
    assert "<title>ran" not in dom(broken)
    without = broken.read_text("utf-8").replace("Content-Security-Policy", "x")
    broken.write_text(without, "utf-8")
    assert "<title>ran" in dom(broken)
    assert SCRIPT in without
