"""What notebooks share, so that their cells stay short: limits, data sets, pictures with alt text, tables.

It needs IPython and Matplotlib only when something is shown, and knows nothing of the model.
"""

from __future__ import annotations

import base64
import contextlib
import html
import io
import json
import logging
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from PIL import Image

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Value = TypeVar("Value")

# M. Okabe and K. Ito, "Color universal design", 2008: told apart with every kind of colour vision.
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#000000")
DOTS_PER_INCH = 110
NUMBER = re.compile(r"([-+]?[\d.,]+( ?%)?|\N{EN DASH})$")  # a dash stands for a number that there is not
# Right answers about the sample pictures, for who has no data set: what we drew, and what the headers of scans say.
SAMPLE_QUESTIONS: Mapping[str, Mapping[str, Mapping[str, str]]] = {
    "slake": {
        name: {
            "What modality is used to take this image?": modality,
            **{
                f"Is this {article} {kind}?": "Yes" if kind == modality else "No"
                for article, kind in (("an", "X-Ray"), ("a", "CT"), ("an", "MRI"))
            },
            **more,
        }
        for name, modality, more in (
            ("chest-film", "X-Ray", {
                "Which part of the body does this image belong to?": "Chest",
                "Does the picture contain lung?": "Yes",
                "Does the picture contain heart?": "Yes",
                "Is the heart enlarged?": "Yes",
            }),
            ("ct-small", "CT", {}),
            ("mr-small", "MRI", {}),
        )
    },
    "grocery": {
        "product-shot": {
            "What product is this?": "Orange Juice",
            "Which brand is printed on this package?": "Sunny",
            "How much is in the carton?": "1 litre",
            "What is its price?": "2.49",
        },
        "label": {"What product is this?": "Oat Biscuits", "How much is in the packet?": "200 g"},
    },
}  # fmt: skip
DATA, LIMITS, COMMITTED = "MULTIMODAL_DATA", "MULTIMODAL_NOTEBOOKS", "MULTIMODAL_COMMITTED"


def is_quick() -> bool:
    """Whether notebooks shall be short: ``MULTIMODAL_NOTEBOOKS=quick``, as the tests run them."""
    return os.environ.get(LIMITS) == "quick"


def limit(full: Value, quick: Value) -> Value:
    """The first value for a reader, the second for a quick run."""
    return quick if is_quick() else full


def data_set(name: str) -> Path | None:
    """The folder of a public data set, ``"slake"`` or ``"grocery"``, if it is here; None if not.

    Looked for in the folder that ``MULTIMODAL_DATA`` names, else in ``shared/data`` beside the clone. With
    ``MULTIMODAL_DATA=none`` there is none.
    """
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get(DATA) or default).expanduser() / name
    return folder if folder.is_dir() and any(folder.iterdir()) else None


def write_questions(path: Path, questions: Iterable[tuple[Path, str, str]]) -> str:
    """Write a task for a comparison, one picture, question and right answer after another; gives back its name."""
    with path.open("w", encoding="utf-8") as file:
        for picture, question, answer in questions:
            chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            kind = "CLOSED" if answer in ("Yes", "No") else "OPEN"
            print(json.dumps({"messages": chat, "images": [str(picture)], "answer_type": kind}), file=file)
    return str(path)


def task_of(name: str, folder: Path) -> str:
    """The name of a task for a comparison, and says which it is: a public data set where it is here, else ours.

    Args:
        name: As :func:`data_set` takes it.
        folder: Where a task of sample pictures is written.
    """
    from multimodal.samples import sample_images

    found = data_set(name)
    if found is not None:
        print(f"Data: the validation split of the public data set {found.name}.")
        return f"{name}:{found}"
    pictures = {sample.name: sample.path for sample in sample_images()}
    asked = [
        (pictures[picture], question, answer)
        for picture, questions in SAMPLE_QUESTIONS[name].items()
        if picture in pictures
        for question, answer in questions.items()
    ]
    many = len({picture for picture, _, _ in asked})
    print(f"Data: {len(asked)} questions about {many} sample pictures, since the data set {name} is not here.")
    print("They show how it works. They are far too few to decide anything.")
    print(f"To use it, let {DATA} name the folder that holds {name}/: notebooks/README.md says where it comes from.")
    return write_questions(folder / f"sample-{name}.jsonl", asked)


def show(picture: Figure | Image.Image, alt: str, *, width: int | None = None, source: str = "") -> None:
    """Show a Matplotlib figure or a picture, with its alt text, which is also the line under it.

    Args:
        picture: A figure, which is closed; or a picture of Pillow's.
        alt: What it shows, for who cannot see it.
        width: In pixels, as it is to be displayed.
        source: Whose pictures can be seen in it, if not ours. It is then left out of outputs that are committed: this
            repository holds no picture of a data set or of another package.
    """
    from IPython.display import display

    if source and os.environ.get(COMMITTED):
        data = f"{alt} (Here you see a picture of {source} when you run this cell; the repository holds none.)"
        display({"text/markdown": f"*{data}*"}, raw=True)
        if not isinstance(picture, Image.Image):
            import matplotlib.pyplot as plt

            plt.close(picture)  # else Jupyter shows it at the cell's end, pixels and all
        return
    file, kind = io.BytesIO(), "png"
    if not isinstance(picture, Image.Image):
        import matplotlib.pyplot as plt

        picture.savefig(file, format=kind, dpi=DOTS_PER_INCH, bbox_inches="tight", facecolor="white")
        plt.close(picture)
    else:
        kind = "webp"
        picture.convert("RGB").save(file, format=kind, quality=85)
    # HTML, since neither JupyterLab nor nbconvert gives the alt text of an image/png to a screen reader.
    encoded = base64.b64encode(file.getvalue()).decode()
    size = f' width="{width}"' if width else ""
    image = f'<img alt="{html.escape(alt)}"{size} style="max-width: 100%" src="data:image/{kind};base64,{encoded}">'
    markup = f'<figure style="margin: 0">{image}<figcaption><em>{html.escape(alt)}</em></figcaption></figure>'
    display({"text/html": markup, "text/plain": alt}, raw=True)


def table(rows: Sequence[Mapping[str, Any]], *, caption: str = "") -> None:
    """Show rows with the same keys as a table; columns of numbers stand to the right, as they are given."""
    from IPython.display import display

    def line(tag: str, values: Iterable[Any]) -> str:
        cells = zip(values, sides, strict=True)
        filled = (f'<{tag} style="text-align: {side}">{html.escape(str(value))}</{tag}>' for value, side in cells)
        return f"<tr>{''.join(filled)}</tr>"

    sides = ["right" if all(NUMBER.match(str(row[key])) for row in rows) else "left" for key in rows[0]]
    head, body = line("th", rows[0]), "\n".join(line("td", row.values()) for row in rows)
    title = f"<caption>{html.escape(caption)}</caption>" if caption else ""
    plain = "\n".join("\t".join(map(str, values)) for values in (rows[0], *(row.values() for row in rows)))
    markup = f"<table>{title}\n<thead>{head}</thead>\n<tbody>\n{body}\n</tbody></table>"
    display({"text/html": markup, "text/plain": f"{caption}\n{plain}".strip()}, raw=True)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep what chatters (progress bars, warnings) out of outputs that are committed; a reader sees it.

    Nothing that is printed, logged, displayed or warned of inside appears then. Errors are raised as ever.
    """
    if not (os.environ.get(COMMITTED) or is_quick()):
        yield
        return
    from IPython.utils.capture import capture_output

    before = logging.root.manager.disable
    with capture_output(), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.ERROR)
        try:
            yield
        finally:
            logging.disable(before)
