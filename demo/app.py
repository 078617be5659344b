"""Starts the demo: ``python -m demo.app``, or ``make demo``.

The page is served first and the model loads behind it, so that there is something to see while it does. All that the
page writes lies in a folder of its own, which goes when the demo ends.
"""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from demo.ask_tab import Choice
    from multimodal.model import MultiModalModel

ADAPTER = "adapter_config.json"  # what makes a folder one of an adapter


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the page until interrupted; return 0, or 1 if there is no model to serve."""
    options = _parser().parse_args(arguments)
    try:
        options.adapters = _adapters(options.adapter, os.environ.get("MULTIMODAL_ADAPTERS"))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print("Starting the demo \N{HORIZONTAL ELLIPSIS}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder is deleted then, too
    with tempfile.TemporaryDirectory(prefix="multimodal-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        return _serve(options)


def _serve(options: argparse.Namespace) -> int:
    from demo.asking import Asking
    from demo.choosing import Choosing
    from demo.comparing import Comparing
    from demo.page import build, launch_options
    from multimodal.store import StoreError
    from multimodal.store.feedback import Feedback

    try:
        feedback = Feedback(options.feedback)
    except StoreError as error:
        print(f"feedback can't be kept: {error}", file=sys.stderr)
        return 1
    asking = Asking(
        lambda: _load(options.model, options.adapters), *(partial(_load, name, {}) for name in options.also)
    )
    comparing = Comparing(asking, model_name=options.model, feedback=feedback)
    page = build(
        asking,
        feedback,
        comparing=comparing,
        choosing=Choosing(options.comparisons, anywhere=_is_here(options.host)),
        choices=_choices(options),
    )
    try:
        _, address, _ = page.launch(
            server_name=options.host, server_port=options.port, prevent_thread_lock=True, **launch_options()
        )
    except OSError as error:
        print(f"the demo can't listen on {options.host}: {error}", file=sys.stderr)
        return 1
    print(f"Open {address} (the model {options.model!r} is loading; Ctrl-C ends the demo)", flush=True)
    asking.start()
    try:
        asking.wait()
        print("The model is ready", flush=True)
        page.block_thread()
    except KeyboardInterrupt:
        pass
    except (ValueError, RuntimeError, OSError) as error:
        print(f"the model can't be loaded: {error}", file=sys.stderr)
        return 1
    finally:
        page.close(verbose=False)
        comparing.close()
    return 0


def _choices(options: argparse.Namespace) -> list[Choice]:
    """Models and adapters by the last part of their names: visitors need not know where they lie."""
    from demo.ask_tab import Choice

    first, *others = (Path(name).name for name in (options.model, *options.also))
    adapted = [Choice(f"{first} + {adapter}", adapter=adapter) for adapter in options.adapters]
    return [Choice(first), *adapted, *(Choice(name, model=place) for place, name in enumerate(others, start=1))]


def _is_here(host: str) -> bool:
    """Whether only this machine's own people reach the host."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:  # another name: who knows where it leads
        return False


def _adapters(said: Sequence[Path], shelf: str | None) -> dict[str, Path]:
    """Adapters' folders by name: those that were said, and those that lie in the folder ``shelf`` or are it.

    Raises:
        ValueError: If one is not there, or two have the same name.
    """
    folders = [folder.expanduser().resolve() for folder in said]
    if shelf:
        place = Path(shelf).expanduser().resolve()
        lying = sorted(file.parent for file in [*place.glob(ADAPTER), *place.glob(f"*/{ADAPTER}")])
        folders += [folder for folder in lying if folder not in folders]
        if not lying:
            raise ValueError(f"MULTIMODAL_ADAPTERS={shelf}: no adapter lies there; `multimodal adapt` makes one")
    found: dict[str, Path] = {}
    for folder in folders:
        if not (folder / ADAPTER).is_file():
            raise ValueError(f"--adapter {folder}: there is no adapter; `multimodal adapt` makes one")
        if folder.name in found:
            raise ValueError(f"{folder} and {found[folder.name]}: two adapters of one name; rename a folder")
        found[folder.name] = folder
    return found


def _load(name: str, adapters: Mapping[str, Path]) -> MultiModalModel:
    from transformers.utils import logging

    from multimodal.model import MultiModalModel

    logging.disable_progress_bar()
    model = MultiModalModel.from_pretrained(name)
    for adapter, folder in adapters.items():
        model.load_adapter(folder, adapter)
    model.engine.prepare()  # with the loading, which people see going on, not with somebody's first question
    return model


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m demo.app", description="A page to ask a fused model about pictures."
    )
    parser.add_argument(
        "--model",
        default=os.environ.get("MULTIMODAL_MODEL", "embedded"),
        help="'embedded', a folder or a hub id (default: $MULTIMODAL_MODEL, or embedded)",
    )
    parser.add_argument(
        "--adapter",
        action="append",
        default=[],
        type=Path,
        metavar="FOLDER",
        help="an adapter that `multimodal adapt` made, to choose on the page; may be repeated (default: those in the "
        "folder $MULTIMODAL_ADAPTERS)",
    )
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="MODEL",
        help="a further model to choose on the page, which is loaded when it is first asked; may be repeated",
    )
    parser.add_argument(
        "--feedback",
        type=Path,
        metavar="FOLDER",
        help="where feedback and the pictures that it is about are kept (default: ~/.local/share/multimodal)",
    )
    parser.add_argument(
        "--comparisons",
        type=Path,
        default=Path(),
        metavar="FOLDER",
        help="where comparisons lie, in folders named comparison* (default: .)",
    )
    parser.add_argument(
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
