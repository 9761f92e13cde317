"""An evaluation as one HTML file, to read beside its eval.json: `python eval.py --report RUN/eval.json`.

Tables, plots, and every sample with its reference and what each system made of it, to sort and filter. It
opens from the disk and asks for nothing: a content security policy allows this file's own script and style,
by their SHA-256, and no other, so that nothing in a prediction can run, and no address can be called. All
text goes through `markup`. Without JavaScript the page is whole, and only sorting and filtering are gone. No
torch.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from config import write_atomically
from metrics.registry import METRICS
from suites.markup import escaped, marked, shortened, tail
from suites.records import DAMAGED, not_whole, scored_again, texts_of
from suites.scoring import NAMED, SUITES, records_of

SAMPLES = 1_000  # The most samples on a page; eval.json has them all.
PROMPT_LINES = 14  # Lines of a prompt that are shown at first.
# Keys that are shown elsewhere on the page, or have a number for each sample or document.
NOT_SHOWN = {"suite", "more_suites", "prompts", "documents"}
FACTS = ("command", "run", "step", "side", "files", "bytes", "precision")
WIDTH, ROW, LABEL = 760, 22, 150  # The width of a plot, the height of a row, and the width of its labels.


def write_page(path: Path, record: dict[str, Any], printed: str) -> Path:
    """Write the page beside an eval.json, with the suffix .html, and return its path."""
    page = path.with_suffix(".html")
    write_atomically(page, page_of(record, printed))
    return page


def page_of(record: dict[str, Any], printed: str) -> str:
    """Return the page of an evaluation as HTML.

    Args:
        record: The contents of an eval.json, which may be a stranger's.
        printed: The tables, as the terminal has them.

    Raises:
        ValueError: It is no whole record.
    """
    try:
        suites = {SUITES[suite["suite"]].title + worded: suite for worded, suite in records_of(record)}
        facts = [f"<dt>{key}</dt><dd>{escaped(str(record[key]))}</dd>" for key in FACTS if key in record]
        parts = [f"<dl>{''.join(facts)}</dl>", f'<pre class="table">{escaped(printed)}</pre>']
        by_suite = {title: sample_scores(suite) for title, suite in suites.items()}
        parts += [_plots(escaped(title), suites[title], found) for title, found in by_suite.items()]
        if suites:
            parts.append(_samples(suites, by_suite))
        repeated = {key: value for key, value in record.items() if key not in NOT_SHOWN}
        repeated["signatures"] = {title: suite["signatures"] for title, suite in suites.items()}
        told = escaped(json.dumps(repeated, indent=1))
        parts.append(f"<details><summary>what repeats it</summary><pre>{told}</pre></details>")
        named = record["run"] or record.get("settings", {}).get("predictions") or "predictions made elsewhere"
        title = escaped(named if record["step"] is None else f"{named}, step {record['step']}")
    except DAMAGED as error:
        raise not_whole("this", error) from None
    policy = (
        f"default-src 'none'; script-src '{_hash(SCRIPT)}'; style-src '{_hash(STYLE)}'; "
        "base-uri 'none'; form-action 'none'"
    )
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="referrer" content="no-referrer">\n'
        '<meta name="viewport" content="width=device-width">\n'
        f"<title>{title}</title>\n<style>{STYLE}</style></head>\n<body>\n<h1>{title}</h1>\n"
        + "\n".join(parts)
        + f"\n<script>{SCRIPT}</script>\n</body></html>\n"
    )


def sample_scores(suite: dict[str, Any]) -> dict[str, dict[str, list[float]]]:
    """Score each of the first SAMPLES samples from its own predictions, by metric and system."""
    if SUITES[suite["suite"]].runs:  # Problems that cannot be judged have a row here too.
        return {
            "passed": {
                system: [
                    100.0 * (results := sample["results"][system]).count("passed") / max(1, len(results))
                    for sample in suite["samples"][:SAMPLES]
                ]
                for system in suite["scores"]
            }
        }
    found = scored_again(suite, most=SAMPLES)
    return {
        name: {
            system: [round(float(value), 2) for value in by_name[name].samples]
            for system, by_name in found.items()
        }
        for name in suite["signatures"]
    }


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# --- plots -------------------------------------------------------------------------------------------


def _plots(title: str, suite: dict[str, Any], by_sample: dict[str, dict[str, list[float]]]) -> str:
    plots = [_interval_plot(title, suite)]
    # The curve of a score that is all or nothing is a step that says no more than the interval.
    graded = [name for name in by_sample if name in METRICS and not METRICS[name].all_or_nothing]
    plots += [_curve_plot(title, name, by_sample[name]) for name in graded[:1]]
    return f'<div class="plots">{"".join(plots)}</div>'


def _interval_plot(title: str, suite: dict[str, Any]) -> str:
    """Draw a row for each metric and system: its score, with its 95% interval."""
    rows, systems = [], list(suite["scores"])
    top = 20
    for name in suite["signatures"]:
        rows.append(f'<text x="0" y="{top + 4}" class="name">{escaped(name)}</text>')
        for number, system in enumerate(systems):
            top += ROW
            one = suite["scores"][system][name]
            low, mean, high = (_across(one[key]) for key in ("low", "mean", "high"))
            said = escaped(f"{one['mean']:.1f} [{one['low']:.1f}, {one['high']:.1f}]")
            rows.append(
                f'<g class="s{number % 8}"><text x="{LABEL - 12}" y="{top + 4}" class="end">{escaped(system)}'
                f'</text><line x1="{low}" x2="{high}" y1="{top}" y2="{top}"/>'
                f'<circle cx="{mean}" cy="{top}" r="4.5"/><text x="{WIDTH - 130}" y="{top + 4}">{said}</text>'
                "</g>"
            )
        top += ROW + 10
    return _figure(f"{title}: scores, with 95% intervals", _axis(top - ROW) + "".join(rows), top)


def _curve_plot(title: str, name: str, by_system: dict[str, list[float]]) -> str:
    """Draw the scores of the samples from the best to the worst, a line for each system."""
    height, lines = 300, []
    for number, (system, values) in enumerate(by_system.items()):
        step = (WIDTH - LABEL - 140) / max(1, len(values) - 1)
        points = " ".join(
            f"{LABEL + i * step:.1f},{height - 20 - 2.6 * value:.1f}"
            for i, value in enumerate(sorted(values, reverse=True))
        )
        at = 24 + number * ROW
        lines.append(
            f'<g class="s{number % 8}"><polyline points="{points}"/>'
            f'<text x="{WIDTH - 120}" y="{at}">{escaped(system)}</text></g>'
        )
    ticks = "".join(
        f'<g class="grid"><line x1="{LABEL}" x2="{WIDTH - 140}" y1="{height - 20 - 2.6 * v}" '
        f'y2="{height - 20 - 2.6 * v}"/><text x="{LABEL - 12}" y="{height - 16 - 2.6 * v}" class="end">{v}'
        "</text></g>"
        for v in range(0, 101, 25)
    )
    return _figure(f"{title}: {escaped(name)} of each sample, best to worst", ticks + "".join(lines), height)


def _axis(height: int) -> str:
    return "".join(
        f'<g class="grid"><line x1="{_across(v)}" x2="{_across(v)}" y1="12" y2="{height}"/>'
        f'<text x="{_across(v)}" y="8" class="middle">{v}</text></g>'
        for v in range(0, 101, 25)
    )


def _across(value: float) -> float:
    return round(LABEL + min(max(float(value), 0.0), 100.0) / 100 * (WIDTH - LABEL - 160), 1)


def _figure(title: str, shapes: str, height: int) -> str:
    return (
        f"<figure><figcaption>{title}</figcaption>"
        f'<svg viewBox="0 -6 {WIDTH} {height + 6}" role="img">{shapes}</svg></figure>'
    )


# --- samples -----------------------------------------------------------------------------------------


def _samples(
    suites: dict[str, dict[str, Any]], by_suite: dict[str, dict[str, dict[str, list[float]]]]
) -> str:
    """Return the samples of all suites under one form, by which they are sorted and filtered."""
    systems = list(dict.fromkeys(system for suite in suites.values() for system in suite["scores"]))
    names = list(dict.fromkeys(name for found in by_suite.values() for name in found))
    articles, left_out = [], ""
    for title, found in by_suite.items():
        suite = suites[title]
        samples = suite["samples"]
        if len(samples) > SAMPLES:
            left_out = f" (the first {SAMPLES:,} of each suite)"
        for number, sample in enumerate(samples[:SAMPLES]):
            scores = {
                name: {system: values[number] for system, values in of_systems.items()}
                for name, of_systems in found.items()
            }
            articles.append(_article(number, title, sample, list(suite["scores"]), systems, scores))
    subject = systems[0]
    against = "".join(
        f'<option value="{escaped(one)}">over {escaped(NAMED.get(one) or one)}</option>'
        for one in systems
        if one != subject
    )
    named = "".join(f"<option>{escaped(name)}</option>" for name in names)
    titles = "".join(f"<option>{escaped(title)}</option>" for title in suites)
    shown = "".join(
        f'<label><input type="checkbox" class="system" value="{number}" checked> {escaped(system)}</label>'
        for number, system in enumerate(systems)
    )
    return f"""<h2>Samples{left_out}</h2>
<p>The reference has <del>what {escaped(subject)} lacks</del>, a prediction <ins>what the reference does not
have</ins>.</p>
<form id="controls" hidden>
<label>find <input id="find" type="search" placeholder="text of any column"></label>
<label>in <select id="suite"><option value="">all suites</option>{titles}</select></label>
<label>by <select id="metric">{named}</select></label>
<label>of <select id="gain"><option value="">{escaped(subject)} itself</option>{against}</select></label>
<label>from <input id="low" type="number" value="-100" min="-100" max="100" step="any"></label>
<label>to <input id="high" type="number" value="100" min="-100" max="100" step="any"></label>
<label>order <select id="order"><option value="0">as sampled</option><option value="1">worst first</option>
<option value="-1">best first</option></select></label>
<span>{shown}</span> <output id="count"></output>
</form>
<main data-subject="{escaped(subject)}">
{"".join(articles)}</main>"""


def _article(
    number: int,
    suite: str,
    sample: dict[str, Any],
    own: Sequence[str],
    systems: Sequence[str],
    scores: dict[str, dict[str, float]],
) -> str:
    """Return one sample: its prompt to the left, its reference and each system's predictions to the right.

    Args:
        suite: The title of its suite.
        own: The systems of this suite.
        systems: The systems of all suites, by whose numbers columns are coloured and shown.
    """
    prompt, reference = sample["prompt"], sample["reference"]
    draws = {system: texts_of(sample, system) for system in own}
    end = tail(prompt, PROMPT_LINES)
    whole = ""
    if end != prompt:
        # The end of a prompt matters most: the beginning of a long one is left to eval.json.
        kept, rest = shortened(prompt[::-1])
        note = f"<i>{rest}</i>" if rest else ""
        whole = f"<details><summary>all of it</summary>{note}<pre>\n{escaped(kept[::-1])}</pre></details>"
    shown = [_column("prompt", "", escaped(end), whole)]
    if sample.get("suffix") is not None:
        text, note = shortened(sample["suffix"], 2_000)
        shown.append(_column("suffix", "", escaped(text), f"<i>{note}</i>" if note else ""))
    columns = [_column("reference", "", *_text_and_note(reference, draws[own[0]][0], "del"))]
    for system in own:
        i = systems.index(system)
        badges = " ".join(f"<b>{escaped(name)}</b> {values[system]:.1f}" for name, values in scores.items())
        results = sample.get("results", {}).get(system, [])  # The results of programs, one for each draw.
        for n, text in enumerate(draws[system]):
            name = system if len(draws[system]) == 1 else f"{system}, draw {n + 1}"
            said = [*([] if n else [badges]), *map(escaped, results[n : n + 1])]
            body, note = _text_and_note(text, reference, "ins")
            columns.append(_column(name, " ".join(said), body, note, f"system s{i % 8}", i))
    told, name = escaped(json.dumps(scores)), escaped(str(sample["id"]))
    return (
        f'<article data-suite="{escaped(suite)}" data-scores="{told}">'
        f"<h3>{number + 1} <small>{name}</small></h3>"
        f'<div class="columns"><div>{"".join(shown)}</div><div>{"".join(columns)}</div></div></article>\n'
    )


def _text_and_note(text: str, other: str, tag: str) -> tuple[str, str]:
    text, note = shortened(text)
    return marked(text, shortened(other)[0], tag), f"<i>{note}</i>" if note else ""


def _column(name: str, badges: str, body: str, note: str = "", kind: str = "", number: int = -1) -> str:
    # HTML drops a line break that comes right after <pre>, and a text may begin with one.
    return (
        f'<section class="{kind}" data-system="{number}"><h4>{escaped(name)} <small>{badges}</small></h4>'
        f"<pre>\n{body}</pre>{note}</section>"
    )


# --- style and script --------------------------------------------------------------------------------

STYLE = """
:root { --ink: #1c2530; --soft: #5d6b7a; --line: #d8dee6; --back: #fff; --cell: #f6f8fa; --ins: #ffd8d3;
  --del: #cdebd2; --s0: #0a6cbd; --s1: #b3541e; --s2: #3b7d3b; --s3: #8b4aa8; --s4: #8a7a00; --s5: #1f8a8a;
  --s6: #b03060; --s7: #666; }
@media (prefers-color-scheme: dark) { :root { --ink: #e3e8ee; --soft: #97a5b5; --line: #333d49;
  --back: #12171d; --cell: #1a2129; --ins: #6b2a26; --del: #1f5330; --s0: #61aeee; --s1: #e59866;
  --s2: #7cc47c; --s3: #c58be0; --s4: #d3c04a; --s5: #5fc9c9; --s6: #ec7ba5; --s7: #aaa; } }
body { font: 15px/1.45 system-ui, sans-serif; color: var(--ink); background: var(--back); margin: 1.5rem auto;
  max-width: 110rem; padding: 0 1.5rem; }
h1 { font-size: 1.35rem; } h2 { font-size: 1.15rem; margin-top: 2rem; }
h3 { font-size: .95rem; margin: 0 0 .4rem; } h4 { font-size: .85rem; margin: 0 0 .2rem; }
small { color: var(--soft); font-weight: normal; } small b { font-weight: 600; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .1rem 1rem; font-size: .85rem; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
pre { font: 12.5px/1.4 ui-monospace, Menlo, Consolas, monospace; background: var(--cell); margin: 0;
  padding: .5rem .6rem; border-radius: 4px; overflow: auto; white-space: pre-wrap; overflow-wrap: anywhere;
  direction: ltr; unicode-bidi: isolate; max-height: 24rem; tab-size: 4; }
pre.table { max-height: none; white-space: pre; } pre:empty::before { content: "(empty)"; opacity: .5; }
ins { background: var(--ins); text-decoration: none; } del { background: var(--del); text-decoration: none; }
u { color: var(--s6); border: 1px solid; border-radius: 3px; font-size: .8em; padding: 0 2px; margin: 0 1px;
  text-decoration: none; }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(30rem, 1fr)); gap: 1.5rem;
  margin-top: 1.2rem; align-items: start; }
figure { margin: 0; } figcaption { font-size: .85rem; color: var(--soft); margin-bottom: .4rem; }
svg { width: 100%; font-size: 13px; } svg text { fill: var(--ink); } svg .name { font-weight: 600; }
svg .end { text-anchor: end; } svg .middle { text-anchor: middle; }
svg g line { stroke: currentColor; stroke-width: 2; } svg circle { fill: currentColor; }
svg polyline { fill: none; stroke: currentColor; stroke-width: 1.8; }
svg .grid line { stroke: var(--line); stroke-width: 1; }
svg .grid text { fill: var(--soft); font-size: 11px; }
svg g:not(.grid) > text { fill: currentColor; } svg g > text.name { fill: var(--ink); }
.s0 { color: var(--s0); } .s1 { color: var(--s1); } .s2 { color: var(--s2); } .s3 { color: var(--s3); }
.s4 { color: var(--s4); } .s5 { color: var(--s5); } .s6 { color: var(--s6); } .s7 { color: var(--s7); }
#controls { position: sticky; top: 0; z-index: 1; background: var(--back);
  border-bottom: 1px solid var(--line); padding: .6rem 0;
  display: flex; flex-wrap: wrap; gap: .4rem 1rem; font-size: .85rem; align-items: center; }
#controls[hidden] { display: none; } #low, #high { width: 5rem; } #controls label { white-space: nowrap; }
article { border-top: 1px solid var(--line); padding: .8rem 0; content-visibility: auto;
  contain-intrinsic-size: auto 22rem; }
.columns { display: grid; grid-template-columns: minmax(0, 2fr) minmax(0, 3fr); gap: .9rem; }
.columns > div + div { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); gap: .7rem;
  align-content: start; }
@media (max-width: 50rem) { .columns { grid-template-columns: minmax(0, 1fr); } }
section { min-width: 0; } section pre { color: var(--ink); } details { margin-top: 1rem; }
section details { margin-top: .2rem; font-size: .8rem; }
article[hidden], section[hidden] { display: none; }
"""

SCRIPT = """
"use strict";
const one = (id) => document.getElementById(id);
const form = one("controls"), main = document.querySelector("main");
if (form && main) {
  const subject = main.dataset.subject;
  const all = [...main.querySelectorAll("article")].map((article, number) => ({
    article, number, scores: JSON.parse(article.dataset.scores),
    text: article.textContent.toLowerCase(), systems: [...article.querySelectorAll(".system")],
  }));
  const update = () => {
    const wanted = one("find").value.toLowerCase(), metric = one("metric").value, over = one("gain").value;
    const low = parseFloat(one("low").value), high = parseFloat(one("high").value);
    const order = Number(one("order").value), suite = one("suite").value;
    const value = (sample) => {
      const by = sample.scores[metric];
      return by ? by[subject] - (over ? by[over] : 0) : 0;
    };
    const sorted = [...all].sort((a, b) => order * (value(a) - value(b)) || a.number - b.number);
    const shown = document.querySelectorAll("input.system");
    let count = 0;
    for (const sample of sorted) {
      const fits = (!suite || sample.article.dataset.suite === suite) && !(value(sample) < low)
        && !(value(sample) > high) && sample.text.includes(wanted);
      sample.article.hidden = !fits;
      count += fits;
      for (const section of sample.systems) section.hidden = !shown[section.dataset.system].checked;
      main.append(sample.article);
    }
    one("count").textContent = count + " of " + all.length;
  };
  // A filtered view has an address: eval.html#find=import&order=1
  for (const [id, value] of new URLSearchParams(location.hash.slice(1))) {
    if (form.elements[id]) form.elements[id].value = value;
  }
  form.hidden = false;
  form.addEventListener("input", update);
  form.addEventListener("submit", (event) => event.preventDefault());
  update();
}
"""
