"""The completion server with real clients, of which PLUMB_CLIENTS names a folder (docs/editors.md).

In Neovim a driver types, sees the ghost text by RPC, and takes it by the key that a person would press; in
Emacs it calls the commands.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from decoders import scrambled
from test_generate_command import STARCODER
from test_serving import CONFIG, PROMPT, SETTINGS, SUFFIX, Running, running, until

from architecture import Decoder
from generation.settings import GenerationConfig
from generation.text import generate
from serving.asking import Asked
from serving.service import Service

CLIENTS = Path(os.environ.get("PLUMB_CLIENTS", "/nowhere")).resolve()
pytestmark = pytest.mark.slow
BEFORE, AFTER = "def add(a, b):\n    return ", "\nprint(add(1, 2))\n"


def client(*names: str) -> list[Path]:
    """Return the paths of these files and folders of the clients; without one the test is left out."""
    paths = [CLIENTS / name for name in names]
    if missing := next((name for name, path in zip(names, paths, strict=True) if not path.exists()), None):
        pytest.skip(f"PLUMB_CLIENTS names no folder with {missing}")
    return paths


def plain() -> Decoder:
    """The small model, which writes printable ASCII."""
    model = scrambled(CONFIG)
    texts = [STARCODER.decode([id]) for id in range(CONFIG.vocab_size)]
    for id, text in enumerate(texts):
        if not (text.isascii() and text.isprintable() and text.strip()) or text.startswith("<"):
            model.head.weight[id] = 0
    return model


@pytest.fixture(scope="module")
def served() -> Iterator[Running]:
    with torch.no_grad(), running(service=Service(plain(), STARCODER, "tiny", SETTINGS)) as found:
        yield found


def written(prompt: str, suffix: str | None, n: int = 12) -> str:
    chosen = GenerationConfig(max_new_tokens=n)
    with torch.no_grad():
        return generate(plain(), STARCODER, [prompt], chosen, 0, suffix)[0].text


def said(*words: str | Path, **environment: str) -> str:
    """What a program prints; it has to end well."""
    words = tuple(map(str, words))
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=120, env=os.environ | environment, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def noted(served: Running, monkeypatch: pytest.MonkeyPatch) -> list[Asked]:
    """Return a list of what the server is asked from now on."""
    begin, asked = served.service.begin, list[Asked]()

    def begun(one: Asked, *rest: Any) -> Any:
        asked.append(one)
        return begin(one, *rest)

    monkeypatch.setattr(served.service, "begin", begun)
    return asked


# --- programs -------------------------------------------------------------------------------------------


def test_llm_writes_what_generate_does_whole_and_streamed(served: Running, tmp_path: Path) -> None:
    (program,) = client("llm/bin/llm")
    model = {
        "model_id": "plumb",
        "model_name": "plumb",
        "api_base": f"{served.url}/v1",
        "completion": True,
    }
    (tmp_path / "extra-openai-models.yaml").write_text(json.dumps([model]))
    asked = ("-m", "plumb", "-o", "max_tokens", "12", "-o", "temperature", "0", PROMPT)
    own = {"LLM_USER_PATH": str(tmp_path), "OPENAI_API_KEY": "none"}
    expected = written(PROMPT, None)
    for more in ((), ("--no-stream",)):
        assert said(program, *asked, *more, **own).removesuffix("\n") == expected


SCRIPT = """
import OpenAI from "openai";
const [baseURL, prompt, suffix] = process.argv.slice(2);
const client = new OpenAI({ baseURL, apiKey: "none", maxRetries: 0 });
const asked = { model: "plumb", prompt, suffix, max_tokens: 12, temperature: 0 };
const whole = await client.completions.create({ ...asked, logprobs: 2 });
let streamed = "", usage;
const options = { stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.completions.create({ ...asked, ...options })) {
  streamed += chunk.choices[0]?.text ?? "";
  usage = chunk.usage ?? usage;
}
const models = [];
for await (const model of client.models.list()) models.push(model.id);
let refused = "";
const told = error => { refused = error.constructor.name + error.message; };
await client.completions.create({ ...asked, n: 1000 }).catch(told);
const { text, logprobs } = whole.choices[0];
console.log(JSON.stringify([text, streamed, usage, models, refused, logprobs.tokens]));
"""


def test_openai_for_node_completes_streams_lists_and_is_refused(served: Running, tmp_path: Path) -> None:
    (modules,) = client("node_modules/openai")
    (tmp_path / "node_modules").symlink_to(modules.parent)
    (tmp_path / "script.mjs").write_text(SCRIPT)
    found = json.loads(said("node", tmp_path / "script.mjs", f"{served.url}/v1", PROMPT, SUFFIX))
    whole, streamed, usage, models, refused, tokens = found
    assert whole == streamed == written(PROMPT, SUFFIX) and whole
    assert (
        usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        and usage["prompt_tokens"] > 9
    )
    assert models == ["tiny"] and tokens
    assert refused.startswith("BadRequestError") and "n must be from 1 to 32" in refused


# --- Neovim ---------------------------------------------------------------------------------------------


class Neovim:
    """An editor without a window, that somebody types into.

    Args:
        words: Of its command line.
    """

    def __init__(self, folder: Path, words: Sequence[str | Path]):
        (self.program,) = client("nvim")
        self.socket = folder / "socket"
        (folder / "code.py").write_text("import sys\n\n\nprint(add(1, 2))\n")
        own = ["--clean", "--headless", "--listen", self.socket, *words, folder / "code.py"]
        with (folder / "nvim.log").open("w") as log:
            self.process = subprocess.Popen(
                [self.program, *own], stdin=subprocess.DEVNULL, stdout=log, stderr=log, cwd=folder
            )
        until(self.socket.exists)

    def keys(self, keys: str) -> None:
        """Type keys, written as in a mapping."""
        said(self.program, "--server", self.socket, "--remote-send", keys)

    def value(self, expression: str) -> Any:
        """Return the value of an expression of Vim's language."""
        return json.loads(
            said(self.program, "--server", self.socket, "--remote-expr", f"json_encode({expression})")
        )

    def lines(self) -> list[str]:
        return self.value("getline(1, '$')")

    def ghost(self) -> str:
        """The text that is shown and is no part of the buffer."""
        marks = self.value("nvim_buf_get_extmarks(0, -1, 0, -1, {'details': v:true})")
        texts = [mark[3]["virt_text"] for mark in marks if mark[3].get("virt_text")]
        return "".join(text for parts in texts for text, *_ in parts)


@contextmanager
def editing(folder: Path, words: Sequence[str | Path]) -> Iterator[Neovim]:
    """An editor where somebody is about to write the body of a function."""
    editor = Neovim(folder, words)
    try:
        editor.keys("2Gidef add(a, b):<CR>return ")
        until(lambda: editor.lines()[1:3] == BEFORE.split("\n"))
        yield editor
    finally:
        editor.process.kill()
        editor.process.wait()


def take(editor: Neovim, key: str, expected: str) -> None:
    """See the ghost text, take it, and see it in the buffer."""
    assert editor.ghost() == expected and expected
    assert editor.lines()[2] == "    return "
    editor.keys(key)
    until(lambda: editor.lines()[2] != "    return ")
    assert editor.lines() == [
        "import sys",
        "def add(a, b):",
        f"    return {expected}",
        "",
        "print(add(1, 2))",
    ]


def test_llama_vim_shows_ghost_text_and_tab_takes_it(served: Running, tmp_path: Path) -> None:
    """Its first request ends after 250 ms, so that on a slow machine the text is shorter."""
    (plugin,) = client("llama.vim")
    config = {
        "endpoint_fim": f"{served.url}/infill",
        "n_predict": 12,
        "show_info": 0,
    }
    words = ["--cmd", f"let g:llama_config = {json.dumps(config)}", "--cmd", f"set rtp+={plugin}"]
    with editing(tmp_path, words) as editor:
        until(editor.ghost)
        shown = editor.ghost()
        assert written(f"import sys\n{BEFORE}", f"\n{AFTER}").startswith(shown)
        take(editor, "<Tab>", shown)


MINUET = """
vim.opt.rtp:append("{plenary}")
vim.opt.rtp:append("{minuet}")
require("minuet").setup {{
  provider = "openai_fim_compatible",
  n_completions = 1,
  context_window = 4000,
  virtualtext = {{ auto_trigger_ft = {{ "*" }}, keymap = {{ accept = "<A-A>" }} }},
  provider_options = {{
    openai_fim_compatible = {{
      name = "Plumb",
      end_point = "{url}/v1/completions",
      model = "plumb",
      api_key = "TERM",
      optional = {{ max_tokens = 12, temperature = 0 }},
    }},
  }},
}}
"""


def test_minuet_shows_ghost_text_and_its_key_takes_it(
    served: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it puts before the text, language and indentation as comments, is its own."""
    minuet, plenary = client("minuet-ai.nvim", "plenary.nvim")
    asked = noted(served, monkeypatch)
    monkeypatch.setenv("TERM", "xterm")
    (tmp_path / "init.lua").write_text(MINUET.format(minuet=minuet, plenary=plenary, url=served.url))
    with editing(tmp_path, ["-u", tmp_path / "init.lua"]) as editor:
        until(editor.ghost)
        (prompt,), suffix = asked[0].prompts, asked[0].suffix
        assert isinstance(prompt, str) and prompt.startswith("# language: python\n")
        assert (
            prompt.endswith(f"\nimport sys\n{BEFORE}") and suffix and suffix.strip("\n") == AFTER.strip("\n")
        )
        take(editor, "<A-A>", written(prompt, suffix))


# --- Emacs ----------------------------------------------------------------------------------------------

MINUET_EL = """(progn
  (add-to-list 'load-path "{minuet}")
  (require 'minuet)
  (setq minuet-provider 'openai-fim-compatible)
  (setq minuet-n-completions 1)
  (plist-put minuet-openai-fim-compatible-options :end-point "{url}/v1/completions")
  (plist-put minuet-openai-fim-compatible-options :name "Plumb")
  (plist-put minuet-openai-fim-compatible-options :model "plumb")
  (plist-put minuet-openai-fim-compatible-options :api-key "TERM")
  (minuet-set-optional-options minuet-openai-fim-compatible-options :max_tokens 12)
  (minuet-set-optional-options minuet-openai-fim-compatible-options :temperature 0))"""
WRITING = """(progn
  (switch-to-buffer (get-buffer-create "code.py"))
  (python-mode)
  (insert {before})
  (save-excursion (insert {after}))
  (minuet-show-suggestion))"""
BUFFER = '(with-current-buffer "code.py" {})'
SHOWN = BUFFER.format(
    """(substring-no-properties (mapconcat
  (lambda (one) (or (overlay-get one 'after-string) "")) (overlays-in (point-min) (point-max))))"""
)
TEXT = BUFFER.format("(buffer-substring-no-properties (point-min) (point-max))")


def test_minuet_in_emacs_shows_ghost_text_and_takes_it(
    served: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    emacs, emacsclient, minuet = client("emacs", "emacsclient", "minuet-ai.el")
    name, asked = f"plumb-{os.getpid()}", noted(served, monkeypatch)
    monkeypatch.setenv("TERM", "xterm")

    def done(expression: str) -> str:
        return said(emacsclient, "-s", name, "--eval", expression)

    def value(expression: str) -> str:
        return json.loads(json.loads(done(f"(progn (require 'json) (json-encode {expression}))")))

    said(emacs, "-q", f"--daemon={name}")
    try:
        done(MINUET_EL.format(minuet=minuet, url=served.url))
        done(WRITING.format(before=json.dumps(f"import sys\n{BEFORE}"), after=json.dumps(AFTER)))
        until(lambda: value(SHOWN))
        (prompt,), suffix = asked[0].prompts, asked[0].suffix
        assert isinstance(prompt, str) and prompt.endswith(f"import sys\n{BEFORE}") and suffix == AFTER
        shown = value(SHOWN)
        assert shown == written(prompt, suffix).strip() and shown
        done(BUFFER.format("(minuet-accept-suggestion)"))
        assert value(TEXT) == f"import sys\n{BEFORE}{shown}{AFTER}"
    finally:
        done("(kill-emacs)")
