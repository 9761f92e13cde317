"""The command: it opens the model, refuses what is unsafe, and serves until a signal ends it."""

from __future__ import annotations

import os
import signal
import socket
import threading
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from architecture import Decoder
from generation.command import Opened, opened
from serving.gate import Gate, read_token, refuse_open_address
from serving.scores import known_scores
from serving.settings import FORMAT_DIFFERS, ServeConfig
from tokenizer import Tokenizer

if TYPE_CHECKING:
    from serving.service import Service

T = TypeVar("T")
RUNS = Path("runs")
MISSING = (
    "{} is not installed; `./plumb serve` installs what serving needs, and so does "
    "`pip install -r requirements-serve.txt`"
)


def newest_run(runs: Path = RUNS) -> str:
    """Return the run that was begun last and has a checkpoint.

    Raises:
        ValueError: There is none.
    """
    found = [path.parent.parent for path in runs.glob("*/checkpoints/*") if path.is_dir()]
    found = [path for path in set(found) if (path / "config.yaml").is_file()]
    if not found:
        raise ValueError(f"there is no run in {runs}/ to serve; train one by ./plumb train, or give --model")
    return str(max(found, key=lambda path: ((path / "config.yaml").stat().st_mtime, path.name)))


def make_server(service: Any, gate: Gate, settings: ServeConfig) -> Any:
    """Return uvicorn's server of a service; a signal closes the service before it.

    Raises:
        ValueError: A package is missing.
    """
    try:
        import uvicorn

        from serving.api import Server
        from serving.connections import BoundedConnection
    except ModuleNotFoundError as error:
        raise ValueError(MISSING.format(error.name)) from None
    bounds = {"most": settings.most_connections, "seconds": min(settings.most_seconds, 10.0)}

    class Closing(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            service.close()
            super().handle_exit(sig, frame)

    config = uvicorn.Config(
        Server(service, gate),
        http=type("Connection", (BoundedConnection,), bounds),
        ws="none",
        lifespan="off",
        loop="asyncio",
        log_config=None,
        log_level="critical",
        access_log=False,
        server_header=False,
        proxy_headers=False,
        ssl_certfile=settings.tls_cert or None,
        ssl_keyfile=settings.tls_key or None,
    )
    return Closing(config)


def listen(settings: ServeConfig) -> socket.socket:
    """Return the socket that listens.

    Raises:
        ValueError: The address cannot be had.
    """
    try:
        family, *_, address = socket.getaddrinfo(
            settings.host, settings.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, socket.SOCK_STREAM)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        raise ValueError(
            f"{settings.host} port {settings.port} cannot be had ({error.strerror}); choose another by "
            "--host and --port, where 0 is a port that is free"
        ) from None
    listener.listen(512)
    return listener


def apart(work: Callable[[], T]) -> T:
    """Return what `work` returns, done in a thread that is gone afterwards.

    Each thread that computes has helpers of its own. Where all of them together are more than the processors,
    OpenMP lets them sleep between two products instead of waiting awake: a step of the engine's thread took
    1.5 times as long while the main thread, which had opened the model, kept helpers too.
    """
    done = Future[T]()

    def run() -> None:
        try:
            done.set_result(work())
        except BaseException as error:
            done.set_exception(error)

    thread = threading.Thread(target=run, daemon=True)  # Ctrl-C does not wait for it.
    thread.start()
    found = done.result()
    thread.join()
    return found


def open_service(
    settings: ServeConfig, examine: Callable[[ServeConfig, Decoder, Tokenizer, list[str]], None]
) -> Service:
    """Open what is served, and begin its engine.

    Raises:
        ValueError: It cannot be opened.
    """
    from serving.adapters import open_with_adapters
    from serving.repository import as_repository
    from serving.service import Service

    learned = as_repository(settings)
    settings, repository = learned or (settings, None)
    if repository is None and settings.repository:
        raise ValueError(
            f"--repository is for a model that has learned one, and {settings.model} is none; learn it by "
            "python -m recipes repository, or leave the flag out"
        )
    adapters = open_with_adapters(settings) if settings.adapters else None
    found = Opened(adapters.model, adapters.tokenizer) if adapters else opened(settings)
    model, tokenizer, run = found
    faults = tuple(name for name in settings.allow if not adapters or name != FORMAT_DIFFERS)
    examine(replace(settings, allow=faults), model, tokenizer, [])
    service = Service(
        model, tokenizer, settings.name or name_of(settings.model), settings, adapters, repository
    )
    service.scores[service.name] = known_scores(settings.model, run, settings.held)
    service.scores |= {name: known_scores(folder) for name, folder in settings.adapters.items()}
    if repository is not None:
        repository.watch(service.read_adapters_later)
    return service


def serve(
    settings: ServeConfig,
    examine: Callable[[ServeConfig, Decoder, Tokenizer, list[str]], None] = lambda *_: None,
) -> None:
    """Serve until SIGTERM or SIGINT, which finish what runs.

    Args:
        examine: Called with the settings, the opened model and no prompts, before the first request.
    """
    token = read_token(settings.token_file, os.environ)
    refuse_open_address(settings.host, settings.is_local, token)
    listener = listen(settings)  # A port in use is told before the model is opened.
    settings = settings if settings.model else replace(settings, model=newest_run())
    service = apart(lambda: open_service(settings, examine))
    model = service.model
    server = make_server(service, Gate(token, [settings.host, *settings.host_names]), settings)
    host, port = listener.getsockname()[:2]
    scheme = "https" if settings.tls_cert else "http"
    shown = f"[{host}]" if ":" in host else host
    n = sum(p.numel() for p in model.parameters())
    device, size = model.embed.weight.device, model.config.block_size
    print(f"serving {', '.join(service.variants)}: {n:,} parameters on {device}, {size} positions")
    if not settings.is_local and scheme == "http":
        told = "other machines reach it, and the token goes over the network as it is"
        print(f"warning: {told}; give --tls_cert and --tls_key")
    print(f"listening at {scheme}://{shown}:{port}; a page to try it is there; Ctrl-C ends it", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: None)  # uvicorn raises it again at its end.
    if service.adapters is not None:
        signal.signal(signal.SIGHUP, lambda *_: service.read_adapters_later())
    server.run(sockets=[listener])
    service.end()


def name_of(model: str) -> str:
    """Return the name of a model for clients: that of its folder; of a checkpoint, that of its run."""
    path = Path(model).resolve()
    return path.parent.parent.name if path.parent.name == "checkpoints" else path.name
