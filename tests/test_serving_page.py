"""The page of the completion server: what it may load and tell, and what is seen in a browser."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable, Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from browser import CHROMIUM, CONTROL, SHIFT, WITHOUT, Browser, Page
from decoders import scrambled
from test_serving import CONFIG, PROMPT, SUFFIX, Running, running, until, written

from serving.gate import OPEN_PATHS
from serving.page import FILES, POLICY

WEB = Path(__file__).parent.parent / "serving" / "web"
HOSTILE = """## Scores

On 3 files <img src=x onerror="document.title='ran'"> [link](javascript:alert), &#60;b&#62;.

|  | model |
|---|---|
| loss | <b>1.25</b> |

- worse </script><script>document.title='ran'</script>
"""


# --- the files ------------------------------------------------------------------------------------------


def test_the_page_is_whole_without_a_token_and_says_nothing_of_the_model() -> None:
    with running(token="s3cret", scores="secret scores") as served:
        for path, (name, media) in FILES.items():
            answered = httpx.get(served.url + path)
            assert answered.status_code == 200 and answered.content == (WEB / name).read_bytes()
            assert answered.headers["content-type"] == f"{media}; charset=utf-8"
            assert answered.headers["content-security-policy"] == POLICY
            assert answered.headers["x-content-type-options"] == "nosniff"
        assert {*FILES} == {*OPEN_PATHS} - {"/health"}
        for path in ("/page.json", "/page.html", "/web/page.js", "/page.js/../../api.py"):
            assert httpx.get(served.url + path).status_code == 401
        told = httpx.get(f"{served.url}/page.json", headers={"Authorization": "Bearer s3cret"})
        (model,) = told.json()["models"]
        assert model["id"] == "tiny" and model["gaps"] and model["scores"] == "secret scores"
        for path in (*FILES, "/page.json"):  # By another name they are refused as everything is.
            assert httpx.get(served.url + path, headers={"Host": "evil.example"}).status_code == 403


class Links(HTMLParser):
    """What a page loads, and what in it would be a script or a style of its own."""

    def __init__(self, text: str):
        super().__init__()
        self.loads: list[str] = []
        self.ids: list[str] = []
        self.inline: list[str] = []
        self.labelled, self.fields, self.inside = 0, 0, 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.loads += [str(found[key]) for key in ("src", "href") if key in found]
        self.ids += [str(found["id"])] if "id" in found else []
        self.inline += [key for key in found if key.startswith("on") or key == "style"]
        self.inline += [tag] if tag == "style" or (tag == "script" and "src" not in found) else []
        self.inside += tag == "label"
        if tag in ("input", "select", "textarea"):
            self.fields += 1
            self.labelled += bool(self.inside) or "aria-label" in found

    def handle_endtag(self, tag: str) -> None:
        self.inside -= tag == "label"


def test_the_page_loads_its_own_files_only_and_every_field_has_a_label() -> None:
    page = (WEB / "page.html").read_text("utf-8")
    found = Links(page)
    assert {*found.loads} <= {*FILES, "data:,"} and found.inline == []
    assert found.labelled == found.fields == 5 and len(found.ids) == len({*found.ids})
    scripts = "".join((WEB / name).read_text("utf-8") for name in ("page.js", "editor.js"))
    assert {*re.findall(r'\bat\("([\w-]+)"\)', scripts)} <= {*found.ids}
    assert not re.search(r"https?:|innerHTML|eval\(|localStorage|sessionStorage|cookie", page + scripts)
    assert "unsafe" not in POLICY and POLICY.startswith("default-src 'none'")
    assert len((WEB / "editor.js").read_text("utf-8").splitlines()) < 300


# --- in a browser ---------------------------------------------------------------------------------------


def in_a_browser(test: Callable[..., None]) -> Any:
    """Mark a test that needs one."""
    return pytest.mark.slow(pytest.mark.skipif(CHROMIUM is None, reason=WITHOUT)(test))


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("browser")) as found:
        yield found


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with running(scores=HOSTILE) as found:
        yield found


GHOST = "[...document.querySelectorAll('#mirror .ghost')].map(span => span.textContent).join('')"
COLOURED = "document.querySelector('#mirror .ghost.p0, .ghost.p1, .ghost.p2, .ghost.p3, .ghost.p4')"
CODE = "document.getElementById('code').value"
# What moved without a key or a click, and how.
SHIFTED = """new Promise(told => {
    const said = box => [box.x, box.y, box.width, box.height];
    const moved = one => [one.node?.textContent, said(one.previousRect), said(one.currentRect)];
    new PerformanceObserver(list => told(
        list.getEntries().filter(one => !one.hadRecentInput).flatMap(one => one.sources.map(moved))
    )).observe({type: 'layout-shift', buffered: true});
    setTimeout(() => told([]), 300);
})"""


def opened(browser: Browser, served: Running, width: int = 1200, height: int = 900) -> Page:
    page = browser.page(f"{served.url}/", width, height)
    page.until("document.getElementById('model').value == 'tiny' && document.activeElement.id == 'code'")
    return page


def ghost_of(page: Page) -> str:
    """The ghost, once it has its colours."""
    page.until(COLOURED)
    return page.value(GHOST)


@in_a_browser
@pytest.mark.parametrize("width", [1200, 360])
def test_a_ghost_is_seen_and_tab_takes_it(browser: Browser, served: Running, width: int) -> None:
    page = opened(browser, served, width)
    (expected,) = written(scrambled(CONFIG), PROMPT, max_new_tokens=32)
    page.type(PROMPT)
    assert ghost_of(page) == expected and page.value(CODE) == PROMPT
    assert page.text("#mirror") == PROMPT + expected
    assert re.fullmatch(r"first token after \d+ ms, \d+ tokens/s", page.text("#figures"))
    # Another token is pointed at: what could have stood there is told, the likeliest first.
    page.point(*page.middle("document.querySelectorAll('#mirror .ghost')[1]"))
    page.until("document.querySelectorAll('#mirror .ghost')[1].classList.contains('shown')")
    rows = page.value("[...document.querySelectorAll('#others tr')].map(row => row.innerText.split('\\n'))")
    shares = [float(row[-1].strip().rstrip("%")) for row in rows]
    assert 1 < len(rows) <= 5 and shares == sorted(shares, reverse=True) and sum(shares) <= 101
    page.press("Tab")
    assert page.value(CODE) == PROMPT + expected
    assert page.value("document.activeElement.id") == "code"
    assert page.value("document.querySelectorAll('#mirror [class*=p]:not(.ghost)').length") > 3
    assert page.value("document.scrollingElement.scrollWidth <= innerWidth")
    assert page.value(SHIFTED) == []
    assert page.complaints() == []


@in_a_browser
def test_a_gap_is_filled_and_what_is_typed_of_a_ghost_stays_of_it(browser: Browser, served: Running) -> None:
    page = opened(browser, served)
    page.type(PROMPT[:-1] + SUFFIX.strip("\n"))
    for _ in SUFFIX.strip("\n"):
        page.press("ArrowLeft")
    page.type(" ")
    (expected,) = written(scrambled(CONFIG), PROMPT, suffix=SUFFIX.strip("\n"), max_new_tokens=32)
    first = ghost_of(page)
    assert expected.startswith(first) and first
    asked = served.service.created, page.value("performance.getEntriesByType('resource').length")
    page.call("Input.insertText", text=first[0])
    page.until(f"{GHOST} == {json.dumps(first[1:])}")
    time.sleep(0.4)  # It would have asked by now.
    assert asked[1] == page.value("performance.getEntriesByType('resource').length")
    page.press("Tab")
    assert page.value(CODE) == PROMPT + first + SUFFIX.strip("\n")
    # A click on text that a ghost has moved goes where it is seen.
    page.press(" ", CONTROL)
    page.until(COLOURED)
    page.until("document.getElementById('mirror').lastChild.previousSibling.nodeType == 3")
    place = """(() => { const text = document.getElementById('mirror').lastChild.previousSibling;
        const range = document.createRange(); const at = text.data.indexOf('(add');
        range.setStart(text, at); range.setEnd(text, at + 1); return range; })()"""
    x, y = page.middle(place)
    page.click(x - 3, y)
    page.until(f"{CODE}.slice(document.getElementById('code').selectionStart).startsWith('(add')")
    page.until(f"{GHOST} == ''")
    assert page.complaints() == []


@in_a_browser
def test_it_works_by_keyboard_alone_and_tab_can_leave(browser: Browser, served: Running) -> None:
    page = opened(browser, served)
    focus = "document.activeElement.id"
    page.press("Tab")
    assert page.value(CODE) == "    " and page.value(focus) == "code"
    page.press("Escape")
    page.press("Tab")
    assert page.value(focus) == "again" and page.value(CODE) == "    "
    page.press("Tab", SHIFT)
    assert page.value(focus) == "code"
    page.type("x")
    ghost_of(page)
    page.press("Escape")
    assert page.value(GHOST) == ""
    page.press(" ", CONTROL)
    assert ghost_of(page)
    page.press("Escape")
    found = []
    for _ in range(5):
        page.press("Tab", SHIFT)
        found.append(page.value(focus))
    assert found[:3] == ["tokens", "temperature", "model"]
    page.press("Tab")
    # What was taken is looked at by moving the cursor into it.
    page.value("document.getElementById('code').focus()")
    page.press(" ", CONTROL)
    ghost_of(page)
    page.press("Tab")
    page.press("ArrowLeft")
    page.until("document.querySelector('#mirror .shown:not(.ghost)')")
    assert " has " in page.text("#token") and page.complaints() == []


@in_a_browser
def test_what_nobody_waits_for_is_cancelled(
    browser: Browser, served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = served.service.loop.engine
    step, seen = engine.step, list[Any]()

    def slow() -> bool:
        goes_on = step()
        seen.extend(handle for handle in engine.under_way if handle not in seen)
        time.sleep(0.1)
        return goes_on

    page = opened(browser, served)
    page.value("document.getElementById('tokens').value = 200")
    monkeypatch.setattr(engine, "step", slow)
    page.type("def f")
    page.until(GHOST)
    assert not seen[-1].done
    page.type("(")
    until(lambda: len(seen) > 1)
    page.until(GHOST)
    page.press("Escape")
    until(lambda: served.texts() == 0)
    reasons = [one.finish_reason for handle in seen for one in handle.result()]
    assert reasons == ["cancelled"] * len(seen) and len(seen) > 1
    assert page.text("#problem") == "" and page.value(GHOST) == ""


@in_a_browser
def test_the_token_is_typed_on_the_page_and_kept_in_memory_only(browser: Browser) -> None:
    with running(token="s3cret") as served:
        page = browser.page(f"{served.url}/", 1200, 900)
        page.until("document.getElementById('entrance').open && document.activeElement.id == 'secret'")
        page.type("wrong\n")
        page.until("document.getElementById('refused').textContent == 'The token is wrong.'")
        page.type("s3cret\n")
        page.until("!document.getElementById('entrance').open && document.activeElement.id == 'code'")
        page.type(PROMPT)
        assert ghost_of(page)
        kept = "JSON.stringify([localStorage, sessionStorage, document.cookie, location.href])"
        html = "document.documentElement.outerHTML + document.getElementById('secret').value"
        assert "s3cret" not in page.value(kept) + page.value(html)
        page.call("Page.reload")
        page.until("document.getElementById('entrance').open && !document.getElementById('model').value")


@in_a_browser
def test_scores_are_text_and_no_other_script_runs(browser: Browser, served: Running) -> None:
    page = opened(browser, served)
    cells = page.value("[...document.querySelectorAll('#scores td')].map(cell => cell.textContent)")
    assert "<b>1.25</b>" in cells and "<b>." in page.text("#scores p")
    assert (
        page.value(
            "document.querySelectorAll('#scores :not(h3, p, ul, li, table, tbody, tr, th, td)').length"
        )
        == 0
    )
    planted = """(() => { const script = document.createElement('script');
        try { script.textContent = "document.title = 'ran'"; document.body.append(script); } catch {} })()"""
    page.value(planted)
    page.value("fetch('http://127.0.0.1:9/').catch(() => 0)")
    assert page.value("document.title") == "tiny in Plumb"
    refused = " ".join(page.complaints())
    assert "Content Security Policy" in refused and "127.0.0.1:9" in refused


@in_a_browser
def test_mistakes_and_a_server_that_is_gone_are_one_sentence(browser: Browser) -> None:
    problem = "document.getElementById('problem').textContent"
    with running() as served:
        page = opened(browser, served)
        page.type("x")
        ghost_of(page)
        page.value("document.getElementById('temperature').value = '9'")
        page.press(" ", CONTROL)
        page.until(f"{problem} == 'Temperature must be from 0 to 2.'")
        page.value("document.getElementById('temperature').value = '0'")
        page.value(f"{CODE} = 'x = 1\\n'.repeat(5000)")
        page.press("Enter")
        page.until(f"{problem}.includes('the body is larger than 20,000 bytes')")
    page.press(" ", CONTROL)
    page.until(f"{problem} == 'The server does not answer; see whether it still runs.'")
