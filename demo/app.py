"""Starts the demo: ``python -m demo.app``, or ``make demo``.

The page is served first and the model loads behind it, so that there is something to see while it does. All that the
page writes lies in a folder of its own, which goes when the demo ends.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from multimodal.model import MultiModalModel


def main(arguments: Sequence[str] | None = None) -> int:
    """Serve the page until interrupted; return 0, or 1 if there is no model to serve."""
    options = _parser().parse_args(arguments)
    print("Starting the demo \N{HORIZONTAL ELLIPSIS}", flush=True)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))  # so that the folder is deleted then, too
    with tempfile.TemporaryDirectory(prefix="multimodal-demo-") as folder:
        os.environ["GRADIO_TEMP_DIR"] = folder
        return _serve(options)


def _serve(options: argparse.Namespace) -> int:
    from demo.asking import Asking
    from demo.page import build, launch_options

    asking = Asking(lambda: _load(options.model))
    page = build(asking, model_name=Path(options.model).name)  # of a folder, visitors need not know where it lies
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
    return 0


def _load(name: str) -> MultiModalModel:
    from transformers.utils import logging

    from multimodal.model import MultiModalModel

    logging.disable_progress_bar()
    return MultiModalModel.from_pretrained(name)


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
        "--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1, this machine only)"
    )
    parser.add_argument("--port", type=int, help="port to listen on (default: the first free one from 7860)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
