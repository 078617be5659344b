"""The command line of the service: ``multimodal serve`` and ``multimodal keys``.

Heavy imports wait until a command needs them.
"""

from __future__ import annotations

import argparse
import signal
import sys
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multimodal.arguments import PRECISION_HELP, PRECISIONS, count, quiet
from multimodal.cli_cluster import add_ray, serve_on_ray

if TYPE_CHECKING:
    from starlette.applications import Starlette

    from multimodal.model import MultiModalModel

CLONE = Path(__file__).parent.parent  # from which the demo is run: it is not installed
STORE_HELP = "database of keys and sessions: a file for SQLite, or a URL such as postgresql+psycopg://..."


def add_serve(command: Any) -> None:
    """Add ``serve`` to the commands."""
    serve = command("serve", "serve a model to programs, as OpenAI's endpoint does")
    serve.add_argument("--model", default="embedded", help="'embedded', a folder or a hub id (default: embedded)")
    serve.add_argument("--name", help="what callers call the model (default: as its folder is called)")
    serve.add_argument(
        "--adapter",
        action="append",
        default=[],
        type=Path,
        metavar="FOLDER",
        help="also serve the model with this adapter, as MODEL:FOLDER; may be repeated",
    )
    serve.add_argument("--precision", choices=PRECISIONS, default="auto", help=PRECISION_HELP)
    serve.add_argument(
        "--host", default="127.0.0.1", help="an address of this machine; one that others reach needs keys"
    )
    serve.add_argument("--port", type=int, default=8000, help="0 takes a free one (default: 8000)")
    serve.add_argument("--store", metavar="DATABASE", help=f"{STORE_HELP} (default: none, and so neither)")
    serve.add_argument(
        "--allow-host",
        action="append",
        default=[],
        metavar="HOST",
        help="fetch pictures from this host, if it is on the public internet; may be repeated (default: none)",
    )
    serve.add_argument("--waiting", type=count, default=256, help="requests that wait for their turn (default: 256)")
    serve.add_argument(
        "--cache-answers",
        type=int,
        default=0,
        metavar="N",
        help="keep the last N answers for the same questions; not for medical ones (default: 0)",
    )
    serve.add_argument("--keep-days", type=float, default=30.0, help="of sessions and their pictures (default: 30)")
    serve.add_argument(
        "--grace", type=float, default=20.0, metavar="SECONDS", help="to finish at the end (default: 20)"
    )
    serve.add_argument(
        "--log", metavar="FILE", help="a JSON line for each request, no prompt, picture or key in it; - for stderr"
    )
    serve.add_argument("--log-said", action="store_true", help="write questions and answers into that log, too")
    serve.add_argument(
        "--audit",
        type=Path,
        metavar="FILE",
        help="a JSON line for each answer: who, when, digests of model, adapter, pictures and answer",
    )
    serve.add_argument(
        "--no-demo", action="store_true", help="leave out the page for people at / (also: with --audit or --ray)"
    )
    add_ray(serve, service=True)
    serve.set_defaults(run=_serve)


def add_keys(command: Any) -> None:
    """Add ``keys create``, ``keys list`` and ``keys revoke`` to the commands."""
    keys = command("keys", "make, list and revoke the keys of a service")
    actions = keys.add_subparsers(title="actions", required=True, metavar="ACTION")

    def action(name: str, about: str) -> Any:
        parser = actions.add_parser(name, help=about, description=f"{about[0].upper()}{about[1:]}.")
        parser.add_argument("--store", required=True, metavar="DATABASE", help=STORE_HELP)
        return parser

    create = action("create", "make a key, and print it: nobody can tell it again")
    create.add_argument("name", help="whom or what it is for")
    create.add_argument(
        "--scope",
        action="append",
        metavar="SCOPE",
        help="what it is for: chat, sessions, metrics or demo; may be repeated (default: chat and sessions)",
    )
    create.add_argument("--per-minute", type=count, metavar="N", help="answers that it may ask for (default: any)")
    create.set_defaults(run=_create_key)
    action("list", "list keys, but for what is secret of them").set_defaults(run=_list_keys)
    revoke = action("revoke", "end a key, at once and for good")
    revoke.add_argument("id", help="as `multimodal keys list` shows it")
    revoke.set_defaults(run=_revoke_key)


def _serve(options: argparse.Namespace) -> int:
    quiet()
    try:
        from multimodal.service import AuditLog, RequestLog, ServiceSettings, check_address, serve
    except ImportError as error:  # it says what to install
        raise RuntimeError(str(error)) from None
    from multimodal.model import MultiModalModel

    limits = {
        "waiting": options.waiting,
        "grace_seconds": options.grace,
        "allowed_hosts": frozenset(host.lower() for host in options.allow_host),
        "cached_answers": options.cache_answers,
        "keep_days": options.keep_days,
    }
    if options.update and not options.ray:
        raise ValueError("--update is for a service on a cluster: give --ray, too")
    if options.ray:
        return serve_on_ray(options, limits)
    database = None if options.store is None else _open(options.store)
    check_address(options.host, options.port, database=database)  # told before the model is loaded
    audit = None if options.audit is None else AuditLog(options.audit)
    log = None
    if options.log is not None:
        file = sys.stderr if options.log == "-" else open(options.log, "a", encoding="utf-8")  # noqa: SIM115
        log = RequestLog(file, said=options.log_said)
    model = MultiModalModel.from_pretrained(options.model, precision=options.precision)
    for folder in options.adapter:
        model.load_adapter(folder)
    with _demo(options, model) as front:
        serve(
            model,
            name=options.name or model.name,
            host=options.host,
            port=options.port,
            settings=ServiceSettings(**limits),
            database=database,
            log=log,
            audit=audit,
            front=front,
        )
    return 0


def _demo(options: argparse.Namespace, model: MultiModalModel) -> AbstractContextManager[Starlette | None]:
    """The demo as an application; None where it is unwanted, or cannot be had, which is told."""
    if options.no_demo:
        return nullcontext()
    if options.audit is not None:
        missing = "answers in it would not be in the --audit"
    elif not (CLONE / "demo" / "mounted.py").is_file():
        missing = "it is part of a clone of the repository alone"
    else:
        sys.path.append(str(CLONE))
        try:
            from demo.mounted import mounted
        except ModuleNotFoundError as error:
            missing = f"it needs {error.name}: pip install 'multimodal[demo]'"
        else:
            from multimodal.service.doors import is_loopback

            signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that its folder is deleted then, too
            return mounted(model, name=options.model, anywhere=is_loopback(options.host))
    print(f"no demo at /: {missing} (--no-demo leaves it out without a word)", file=sys.stderr)
    return nullcontext()


def _create_key(options: argparse.Namespace) -> int:
    chosen = {} if options.scope is None else {"scopes": options.scope}
    secret, key = _keys(options).create(options.name, per_minute=options.per_minute, **chosen)
    print(secret)
    print(f"the key {key.id} is for {key.scopes}; keep it now, it is stored nowhere", file=sys.stderr)
    return 0


def _list_keys(options: argparse.Namespace) -> int:
    for key in _keys(options).list():
        rate = "any number" if key.per_minute is None else str(key.per_minute)
        state = "holds" if key.revoked is None else f"revoked {key.revoked:%Y-%m-%d}"
        print(f"{key.id}  {key.name}  {key.scopes.replace(' ', ',')}  {rate} a minute  {key.created:%Y-%m-%d}  {state}")
    return 0


def _revoke_key(options: argparse.Namespace) -> int:
    key = _keys(options).revoke(options.id)
    print(f"the key {key.id} ({key.name}) is revoked")
    return 0


def _open(place: str) -> Any:
    try:
        from multimodal.store import open_database
    except ModuleNotFoundError as error:
        raise RuntimeError(
            f"this needs {error.name}, which is not installed: pip install 'multimodal[service]'"
        ) from None
    return open_database(place)


def _keys(options: argparse.Namespace) -> Any:
    database = _open(options.store)
    from multimodal.store.keys import KeyStore

    return KeyStore(database)
