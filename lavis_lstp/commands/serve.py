"""`lavis-lstp serve`: a page for browsers and an OpenAI-compatible API for programs, from one process.

In: a checkpoint or a model's name. Out: http://127.0.0.1:8000/ (the page) and http://127.0.0.1:8000/v1 (the API). Keys
of clients stand in LAVIS_LSTP_API_KEY, several with commas between them, and on no command line, which others can read.
"""

from __future__ import annotations

import argparse
import ipaddress
import logging
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lavis_lstp.commands.cli import add_model_options, built_predictor, check_model_options
from lavis_lstp.data.store import default_store
from lavis_lstp.errors import ConfigError
from lavis_lstp.files import cache_folder
from lavis_lstp.redaction import printable

KEY = "LAVIS_LSTP_API_KEY"
SHORTEST_KEY = 16  # characters
GRACE_S = 5
SWITCH_S = 0.0005  # Python's own is ten times as long
MISSING = "lavis-lstp serve needs the extra `serve`: pip install 'lavis_lstp[serve]' (missing: {name})"


def is_loopback(host: str) -> bool:
    """Return whether an address reaches this machine alone."""
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


def api_keys() -> list[str]:
    """Return the keys in the environment. Raises ConfigError for one that is easily guessed."""
    keys = [key.strip() for key in os.environ.get(KEY, "").split(",") if key.strip()]
    for key in keys:
        if len(key) < SHORTEST_KEY or not key.isascii():
            raise ConfigError(
                f"a key in {KEY} has less than {SHORTEST_KEY} characters, or others than ASCII; make one with "
                '`python -c "import secrets; print(secrets.token_urlsafe(24))"`'
            )
    return keys


def default_folder() -> Path:
    """Return the folder that keeps uploads where --files names none."""
    return cache_folder() / "uploads"


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="lavis-lstp serve", description=__doc__.splitlines()[0])
    add_model_options(made)
    made.add_argument("--host", default="127.0.0.1", help="address to listen at (default: this machine alone)")
    made.add_argument("--port", type=int, default=8000, help="default: 8000; 0 takes a free one")
    made.add_argument("--insecure", action="store_true", help=f"listen beyond this machine without {KEY}")
    made.add_argument("--allow-hosts", nargs="*", default=[], metavar="HOST", help="fetch video URLs from these hosts")
    made.add_argument("--files", type=Path, help="folder of uploads (default: ~/.cache/lavis_lstp/uploads)")
    made.add_argument("--keep-hours", type=float, default=24, help="delete uploads after so long (default: 24)")
    made.add_argument("--max-upload-mb", type=float, default=512, help="largest file (default: 512)")
    made.add_argument("--max-seconds", type=float, default=10800, help="longest video (default: 10800)")
    made.add_argument("--max-megapixels", type=float, default=16, help="largest frame (default: 16)")
    made.add_argument("--queue", type=int, default=64, help="questions that wait or are answered (default: 64)")
    made.add_argument("--batch", type=int, default=8, help="questions answered together (default: 8)")
    made.add_argument("--cache-mb", type=float, default=1024, help="decoded frames and flow in memory (default: 1024)")
    made.add_argument("--store", action="store_true", help="keep them on disk, too, uploads' included; see `cache`")
    made.add_argument("--feedback", type=Path, metavar="FILE", help="store thumbs of the page as JSON lines")
    made.add_argument("--no-page", action="store_true", help="the API alone")
    return made


def limits_of(args: argparse.Namespace) -> Any:
    """Limits of a server. Raises ConfigError for a bound that admits nothing."""
    from lavis_lstp.serving.limits import Limits

    for name in ("keep_hours", "max_upload_mb", "max_seconds", "max_megapixels", "queue", "batch", "cache_mb"):
        if not 0 < getattr(args, name) < float("inf"):
            raise ConfigError(f"--{name.replace('_', '-')} must be a number above 0, got {getattr(args, name)}")
    upload = int(args.max_upload_mb * 2**20)
    return Limits(
        most_waiting=args.queue,
        most_in_batch=args.batch,
        upload_bytes=upload,
        inline_bytes=min(Limits.inline_bytes, upload * 4 // 3 + 2**20),
        max_seconds=args.max_seconds,
        max_megapixels=args.max_megapixels,
        keep_hours=args.keep_hours,
    )


def main(argv: Sequence[str] | None = None) -> int:
    args = parser().parse_args(argv)
    keys = api_keys()
    check_model_options(args)
    if not (is_loopback(args.host) or keys or args.insecure):
        raise ConfigError(f"--host {args.host} lets other machines ask; set a key for them in {KEY}, or add --insecure")
    try:
        import uvicorn

        from lavis_lstp.serving.app import Server, build_app
    except ModuleNotFoundError as error:
        if (error.name or "").startswith("lavis_lstp"):
            raise
        raise ConfigError(MISSING.format(name=error.name)) from None
    limits = limits_of(args)
    predictor = built_predictor(
        args,
        cache_bytes=int(args.cache_mb * 2**20),
        max_seconds=limits.max_seconds,
        max_megapixels=limits.max_megapixels,
        decoders=limits.decoders,
        store=default_store() if args.store else None,
    )
    name = "lstp-example" if args.example else Path(args.checkpoint).name if args.checkpoint else args.model
    server = Server(
        predictor,
        name=name,
        files=args.files or default_folder(),
        keys=keys,
        hosts=args.allow_hosts,
        limits=limits,
    )
    page = None
    if not args.no_page:
        from lavis_lstp.serving.page import mounted

        page = mounted(server, example=args.example, feedback=args.feedback)
    app = build_app(server, loopback=is_loopback(args.host), with_page=page)

    class Stoppable(uvicorn.Server):
        """Ends open questions with one line before connections are waited for."""

        async def shutdown(self, sockets: Any = None) -> None:
            await server.line.stop()
            await super().shutdown(sockets)

        async def startup(self, sockets: Any = None) -> None:
            await super().startup(sockets)
            for one in self.servers:
                for bound in one.sockets:
                    host, port = bound.getsockname()[:2]
                    shown = f"[{host}]" if ":" in host else host
                    what = "API: http://{0}:{1}/v1" if args.no_page else "page: http://{0}:{1}/  API: http://{0}:{1}/v1"
                    print(printable(what.format(shown, port)), flush=True)

    logging.getLogger("uvicorn.access").setLevel(logging.WARNING)
    config = uvicorn.Config(
        app,
        host=args.host,
        port=args.port,
        log_level="warning",
        server_header=False,
        timeout_graceful_shutdown=GRACE_S,
    )
    # the model's thread gives the interpreter away at each operation, and waits so long for it beside a busy event loop
    sys.setswitchinterval(SWITCH_S)
    # uvicorn ends what is under way and then raises the signal again: temporary files go only if Python ends by itself
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    try:
        Stoppable(config).run()
    finally:
        predictor.close()
    return 0
