"""The program of the child process that renders chat templates; `tokenization/chat.py` starts it.

Its standard input has one JSON value a line: the settings, then a conversation a line. For each conversation
it writes a line, ["text", TEXT] or ["error", SENTENCE]. A template is a program that nobody has read: it runs
in jinja2's sandbox, and what it may take of time and memory is bounded by the kernel.
"""

from __future__ import annotations

import datetime
import json
import resource
import signal
import sys
from collections.abc import Callable
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment


class Generation(Extension):
    """`{% generation %}` ... `{% endgeneration %}`, which marks what the assistant writes, is its content."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Any) -> nodes.Node | list[nodes.Node]:
        """Return the statements between the two tags."""
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body).set_lineno(line)


class Refusal(TemplateError):
    """What a template says where it does not take a conversation."""


def refuse(message: object) -> None:
    """Raise, for a template that calls `raise_exception`."""
    raise Refusal(str(message))


def to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Return JSON; jinja2's own filter would escape the signs of HTML."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def environment(today: datetime.datetime) -> ImmutableSandboxedEnvironment:
    """Return the environment that published templates are written for."""
    made = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, loopcontrols]
    )
    made.filters["tojson"] = to_json
    made.globals["raise_exception"] = refuse
    made.globals["strftime_now"] = today.strftime
    return made


def rendered(
    make: Callable[[], Any], conversation: dict[str, Any], most: int, memory: int
) -> tuple[str, str]:
    """Render one conversation.

    Args:
        make: Returns the compiled template.
        conversation: The variables of the template.
        most: Bytes of the text.
        memory: Mebibytes of memory, for the sentence.
    """
    try:
        parts, size = [], 0
        for part in make().generate(conversation):
            parts.append(part)
            size += len(part.encode("utf-8", "surrogatepass"))
            if size > most:
                return "error", f"wrote more than {most:,} bytes"
        return "text", "".join(parts)
    except Refusal as error:
        return "error", f"refuses the conversation: {error}"
    except SecurityError as error:
        return "error", f"asks for what is closed to templates: {error}"
    except TemplateSyntaxError as error:
        return "error", f"cannot be read: line {error.lineno}: {error}"
    except MemoryError:
        return "error", f"took more than {memory} MiB of memory"
    except Exception as error:
        return "error", f"failed: {type(error).__name__}: {error}"


def main() -> None:
    """Answer the standard input."""
    settings = json.loads(sys.stdin.readline())
    memory, most = settings["memory"], settings["most"]
    limits = {
        resource.RLIMIT_AS: memory << 20,
        resource.RLIMIT_CORE: 0,
        resource.RLIMIT_FSIZE: 0,
        resource.RLIMIT_NOFILE: 8,
    }
    for kind, value in limits.items():
        resource.setrlimit(kind, (value, value))
    made: list[Any] = []

    def make() -> Any:
        if not made:
            today = datetime.datetime.fromisoformat(settings["today"])
            made.append(environment(today).from_string(settings["template"]))
        return made[0]

    signal.signal(signal.SIGPROF, signal.SIG_DFL)
    for line in sys.stdin:
        conversation = settings["variables"] | json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, settings["seconds"])
        answer = rendered(make, conversation, most, memory)
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main()
