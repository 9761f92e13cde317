"""The page at `/`, on which the model is tried: its files, what they may do, and what the page is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from data.fim import known_markers
from serving.protocol import compact
from serving.service import Service

FILES = {  # by path; the page is loaded before it can ask for a token, so these need none (`gate.OPEN_PATHS`)
    "/": ("page.html", "text/html"),
    "/page.css": ("page.css", "text/css"),
    "/page.js": ("page.js", "text/javascript"),
    "/editor.js": ("editor.js", "text/javascript"),
}
FACTS = "/page.json"
# A page that shows what a model wrote: it loads its own three files, asks this server, and no other.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Cache-Control": "no-cache",
}


def page_routes(service: Service) -> list[Route]:
    """Return the routes of the page of a service."""
    kept = {path: (Path(__file__).parent / "web" / name).read_bytes() for path, (name, _) in FILES.items()}

    async def file(request: Request) -> Response:
        path = request.url.path
        return Response(kept[path], media_type=FILES[path][1], headers=HEADERS)

    async def facts(request: Request) -> Response:
        return Response(compact(facts_of(service)), media_type="application/json", headers=HEADERS)

    return [*[Route(path, file) for path in FILES], Route(FACTS, facts)]


def facts_of(service: Service) -> dict[str, Any]:
    """Return what the page says of the model and of each adapter, in the order in which it offers them."""
    model = service.model
    of_all = {"parameters": sum(p.numel() for p in model.parameters()), "positions": model.config.block_size}
    models = [
        {
            "id": name,
            **of_all,
            "gaps": known_markers(one.tokenizer) is not None,
            "scores": service.scores.get(name, ""),
        }
        for name, one in service.variants.items()
    ]
    return {"models": models, "most_tokens": service.settings.most_tokens}
