// The page asks the server as any client does, by /v1/completions, while somebody types.

import { Editor } from "/editor.js";

const PAUSE = 200; // milliseconds without a key before the model is asked
const BEFORE = 40_000, AFTER = 10_000; // the most characters that are sent
const LIKELIEST = 5;
const HINT = "Point at a coloured token, or move the cursor into one that was taken.";

const at = id => document.getElementById(id);
let token = ""; // what the server asks for; it is nowhere but here
let models = []; // as the server tells them
let running = null; // the AbortController of the request under way
let timer = 0;

const editor = new Editor(at("code"), at("mirror"), {
  changed() {
    stop();
    timer = setTimeout(ask, PAUSE);
  },
  asked: ask,
  dropped: stop,
  ghost(has) { at("take").disabled = !has; },
  token: showToken,
});

function stop() {
  clearTimeout(timer);
  running?.abort();
  running = null;
}

function send(path, more = {}) {
  const headers = { "Content-Type": "application/json" };
  if (token) headers.Authorization = `Bearer ${token}`;
  return fetch(path, { headers, cache: "no-store", credentials: "omit", ...more });
}

// Say in one sentence what is wrong, or nothing.
function say(problem) {
  at("problem").textContent = problem;
}

async function refusal(answer) {
  const told = await answer.json().catch(() => ({}));
  return told.error?.message ?? `The server answered ${answer.status}.`;
}

// --- a completion ---------------------------------------------------------------------------------------------

function request(model) {
  const before = editor.before.slice(-BEFORE).replace(/^[\udc00-\udfff]/, "");
  const after = editor.after.slice(0, AFTER).replace(/[\ud800-\udbff]$/, "");
  const body = {
    model: model.id,
    prompt: before,
    max_tokens: at("tokens").valueAsNumber,
    temperature: at("temperature").valueAsNumber,
    stream: true,
    stream_options: { include_usage: true },
    logprobs: LIKELIEST,
  };
  return model.gaps && after ? { ...body, suffix: after } : body;
}

async function ask() {
  stop();
  editor.drop();
  const model = models.find(one => one.id === at("model").value);
  if (!model || editor.selects || !(editor.before + editor.after)) return;
  const wrong = [at("temperature"), at("tokens")].find(field => !field.checkValidity());
  if (wrong) return say(`${wrong.labels[0].textContent.trim()} must be from ${wrong.min} to ${wrong.max}.`);
  const mine = running = new AbortController();
  const begun = performance.now();
  let first = 0, text = "", scores = null, usage = null;
  try {
    const answer = await send("/v1/completions",
      { method: "POST", body: JSON.stringify(request(model)), signal: mine.signal });
    if (answer.status === 401) return enter("The token is wrong.");
    if (!answer.ok) return say(await refusal(answer));
    for await (const part of events(answer.body)) {
      if (mine.signal.aborted) return;
      if (part.error) return say(part.error.message);
      usage = part.usage ?? usage;
      const choice = part.choices[0];
      if (choice?.text) {
        first ||= performance.now();
        text += choice.text;
        editor.grow(choice.text);
      }
      scores = choice?.logprobs ?? scores;
    }
    if (scores && text) editor.colour(pieces(text, scores));
    say("");
    figures(usage, first && first - begun, performance.now() - first);
    at("said").textContent = text ? `Proposed: ${text}` : "";
  } catch (error) {
    if (error.name !== "AbortError") say("The server does not answer; see whether it still runs.");
  } finally {
    if (running === mine) running = null;
  }
}

// Yield the objects of a stream of server-sent events.
async function* events(stream) {
  let rest = "";
  for (const reader = stream.pipeThrough(new TextDecoderStream()).getReader(); ;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts.map(part => part.replace(/^data: /, ""))) {
      if (part !== "[DONE]") yield JSON.parse(part);
    }
  }
}

// Return [text, token] for each token that has some of a text. Offsets count characters as Python does; below 0 is the
// end of what stands before the text, and beyond it what was cut off.
function pieces(text, { tokens, token_logprobs, top_logprobs, text_offset }) {
  const characters = Array.from(text), found = [];
  for (let i = 0; i < tokens.length; i++) {
    const own = characters.slice(Math.max(text_offset[i], 0), Math.max(text_offset[i + 1] ?? Infinity, 0)).join("");
    if (!own) continue;
    const others = Object.entries(top_logprobs[i]).map(([other, log]) => [other, Math.exp(log)]);
    others.sort((a, b) => b[1] - a[1]);
    found.push([own, { text: tokens[i], p: Math.exp(token_logprobs[i]), others }]);
  }
  return found;
}

function figures(usage, first, rest) {
  const n = usage?.completion_tokens ?? 0;
  const rate = n > 1 && first && rest > 0 ? `, ${((1000 * (n - 1)) / rest).toFixed(0)} tokens/s` : "";
  at("figures").textContent = first ? `first token after ${first.toFixed(0)} ms${rate}` : "the model writes nothing here";
}

// --- a token, and what could have stood there -------------------------------------------------------------------

const named = text => text ? JSON.stringify(text).slice(1, -1).replaceAll('\\"', '"').replaceAll(" ", "\u00b7") : "(no text)";
const percent = p => `${(100 * p).toFixed(p < 0.0995 ? 1 : 0)}%`;

function showToken(token) {
  at("token").textContent = token ? `${named(token.text)} has ${percent(token.p)}.` : HINT;
  const rows = (token?.others ?? []).map(([text, p]) => {
    const row = document.createElement("tr");
    const [name, bar, number] = [0, 1, 2].map(() => row.insertCell());
    const meter = document.createElement("meter");
    [meter.value, meter.ariaLabel] = [p, "probability"];
    name.textContent = named(text);
    name.title = named(text);
    number.textContent = percent(p);
    bar.append(meter);
    row.classList.toggle("own", text === token.text);
    return row;
  });
  at("others").replaceChildren(...rows);
}

// --- what the server says of itself -----------------------------------------------------------------------------

async function open() {
  let told;
  try {
    const answer = await send("/page.json");
    if (answer.status === 401) return enter(token ? "The token is wrong." : "");
    if (!answer.ok) return say(await refusal(answer));
    told = await answer.json();
  } catch {
    return say("The server does not answer; see whether it still runs.");
  }
  models = told.models;
  at("tokens").max = told.most_tokens;
  at("tokens").value = Math.min(at("tokens").value, told.most_tokens);
  at("model").replaceChildren(...models.map(one => new Option(one.id)));
  describe();
  editor.focus();
}

function describe() {
  const model = models.find(one => one.id === at("model").value);
  const gaps = model.gaps ? "text after the cursor is read too" : "it fills no gaps: text after the cursor is not read";
  document.title = `${model.id} in Plumb`;
  at("about").textContent =
    `${model.parameters.toLocaleString("en")} parameters, ${model.positions.toLocaleString("en")} positions; ${gaps}`;
  at("scores").replaceChildren(...marked(model.scores.replace(/^## Scores\n/, "")));
}

// Return the elements of a model card's Markdown: headings, lists, tables and paragraphs, and nothing else.
function marked(text) {
  const found = [], plain = line => line.replace(/&#(\d+);/g, (_, code) => String.fromCodePoint(Math.min(code, 0x10ffff)));
  const make = (name, text = "") => Object.assign(document.createElement(name), { textContent: plain(text) });
  const inside = name => found.at(-1)?.localName === name ? found.at(-1) : found[found.push(make(name)) - 1];
  for (const line of text.split("\n")) {
    if (line.startsWith("- ")) inside("ul").append(make("li", line.slice(2)));
    else if (/^\|[-|]*$/.test(line)) continue;
    else if (line.startsWith("|")) {
      const table = inside("table"), cells = line.split("|").slice(1, -1), head = !table.rows.length;
      const scope = i => head ? "col" : i ? "" : "row";
      const made = (cell, i) => scope(i) && cell.trim() ? Object.assign(make("th", cell.trim()), { scope: scope(i) })
        : make("td", cell.trim());
      table.insertRow().append(...cells.map(made));
    } else if (line.startsWith("#")) found.push(make("h3", line.replace(/^#+ /, "")));
    else if (line) found.push(make("p", line));
    else if (found.length) found.push(make("hr"));
  }
  return found.filter(element => element.localName !== "hr"); // They only ended what stood before.
}

function enter(problem) {
  at("refused").textContent = problem;
  if (!at("entrance").open) at("entrance").showModal();
  at("secret").focus();
}

at("entrance").addEventListener("submit", event => {
  event.preventDefault();
  [token, at("secret").value] = [at("secret").value.trim(), ""];
  at("entrance").close();
  open();
});
at("entrance").addEventListener("cancel", () => say("Without the token the server does not answer; load the page anew."));
at("settings").addEventListener("submit", event => event.preventDefault());
at("model").addEventListener("change", () => { describe(); ask(); });
at("temperature").addEventListener("change", ask);
at("tokens").addEventListener("change", ask);
at("take").addEventListener("click", () => editor.take());
at("again").addEventListener("click", () => { editor.focus(); ask(); });
open();
