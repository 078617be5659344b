"""A user's own questions: JSONL in the `messages` format that hosted models and training libraries share.

One line is one conversation of one question and one answer. Pictures stand inside the question as typed parts, as in
OpenAI's and Hugging Face's chat format:

    {"messages": [{"role": "user", "content": [{"type": "image", "path": "xray.png"},
                                               {"type": "text", "text": "What is abnormal?"}]},
                  {"role": "assistant", "content": "Cardiomegaly"}]}

or in a list at the top level, as TRL and LLaMA-Factory have it, with or without placeholders in the question
(`{"type": "image"}` or `<image>`, paired in order):

    {"messages": [{"role": "user", "content": "<image>What is abnormal?"},
                  {"role": "assistant", "content": "Cardiomegaly"}], "images": ["xray.png"]}

or with question and answer at the top level, as in a table:

    {"image": "xray.png", "question": "What is abnormal?", "answer": "Cardiomegaly"}

Whatever else a line says at its top level, and a system message, is kept in `Sample.meta`. What a `Sample` can't hold
(a second turn, text between two pictures, a part that is neither text nor picture) is an error, never left out.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from multimodal.data.sample import DataError, RowError, Sample, local_picture, read_lines, row

PLACEHOLDER = "<image>"
PICTURE_KEYS = ("image", "path", "url", "image_url")
READ_KEYS = ("messages", "images", "image", "id")
ROLES = {"question": "user", "answer": "assistant"}  # of a line without messages
EXAMPLE = (
    '{"messages": [{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}], "images": ["..."]}'
)


def read_jsonl(
    path: str | Path, image_folder: str | Path | None = None, *, skip_bad: list[DataError] | None = None
) -> list[Sample]:
    """Reads a JSONL file of questions about pictures.

    Args:
        path: The file, UTF-8, one JSON object a line. Empty lines are allowed.
        image_folder: What relative picture paths are relative to; the file's own folder where not given.
        skip_bad: Where given, lines that can't be read are put here, as errors, instead of being raised.

    Returns:
        One sample per line, in the file's order, with the line's own `id` or else `name:line`.

    Raises:
        DataError: The file is missing or isn't UTF-8, or (without `skip_bad`) a line is broken JSON, lacks a key, names
            a picture that isn't there, or has more or fewer placeholders than pictures.
    """
    return list(iterate_jsonl(path, image_folder, skip_bad=skip_bad))


def iterate_jsonl(
    path: str | Path, image_folder: str | Path | None = None, *, skip_bad: list[DataError] | None = None
) -> Iterator[Sample]:
    """Yields what `read_jsonl` returns, line by line: the file may be larger than memory."""
    file = Path(path)
    folder = file.parent if image_folder is None else Path(image_folder)
    for line, content in enumerate(read_lines(file, remedy="Give the path of a JSONL file"), start=1):
        if not content.strip():
            continue
        sample = None
        with row(file, line, skip_bad):
            sample = sample_of(parsed(content), folder=folder, default_id=f"{file.stem}:{line}")
        if sample is not None:
            yield sample


def parsed(content: str) -> dict[str, Any]:
    """Parses one line, which must be a JSON object."""
    try:
        record = json.loads(content)
    except json.JSONDecodeError as error:
        raise RowError(f"broken JSON: {error.msg} (column {error.colno})", "Write one JSON object a line") from None
    if not isinstance(record, dict):
        raise RowError(f"the line should be an object, not {type(record).__name__}", f"Write it like {EXAMPLE}")
    return record


def sample_of(record: dict[str, Any], *, folder: Path, default_id: str) -> Sample:
    """Makes a sample of one line."""
    if "messages" not in record and all(key in record for key in ROLES):
        messages = [{"role": role, "content": record[key]} for key, role in ROLES.items()]
        record = {**{key: value for key, value in record.items() if key not in ROLES}, "messages": messages}
    system, user, assistant = turns(record)
    question, placed = text_and_pictures(user)
    answer = text_only(assistant)
    for name, value in (("question", question), ("answer", answer)):
        if not value:
            raise RowError(f"the {name} is empty", "Write it, or delete the line")
    listed = [source_of(item) for key in ("images", "image") for item in as_list(record.get(key))]
    return Sample(
        question=question,
        answer=answer,
        images=tuple(local_picture(source, folder) for source in paired(placed, listed)),
        id=as_text(record.get("id", default_id)),
        meta={key: as_text(value) for key, value in record.items() if key not in READ_KEYS} | system,
    )


def turns(record: dict[str, Any]) -> tuple[dict[str, str], Any, Any]:
    """Returns the system message, as an entry for `meta`, and what the user and the assistant say."""
    messages = record.get("messages")
    if not isinstance(messages, list) or not all(isinstance(message, dict) for message in messages):
        raise RowError(f"no list of 'messages' among the keys {sorted(record)}", f"Write the line like {EXAMPLE}")
    roles = [message.get("role") for message in messages]
    if roles not in (["user", "assistant"], ["system", "user", "assistant"]):
        found = ", ".join(map(str, roles)) or "nothing"
        raise RowError(f"expected one user and one assistant turn, found {found}", "Write one line for each question")
    if lacking := [message["role"] for message in messages if message.get("content") is None]:
        raise RowError(f"the {lacking[0]}'s message has no 'content'", "Write it, or delete the line")
    says = {message["role"]: message["content"] for message in messages}
    system = {"system": text_only(says["system"])} if "system" in says else {}
    return system, says["user"], says["assistant"]


def text_only(content: Any) -> str:
    """Returns the text of a message that must not hold a picture."""
    text, pictures = text_and_pictures(content)
    if pictures:
        raise RowError("a message that is not the user's holds a picture", "Move the picture into the user's message")
    return text


def text_and_pictures(content: Any) -> tuple[str, list[str | None]]:
    """Splits a message's content into its text and its pictures' paths, `None` for a placeholder."""
    found = [piece for piece in pieces(content) if piece != ("text", "")]
    inner = "".join(kind[0] for kind, _ in found).strip("t")
    if "t" in inner:
        raise RowError("text stands between two pictures", "Put the pictures before the question and number them in it")
    text = " ".join(str(value) for kind, value in found if kind == "text")
    return text, [value for kind, value in found if kind == "image"]


def pieces(content: Any) -> Iterator[tuple[Literal["text", "image"], str | None]]:
    """Yields the pieces of a message's content: a text, or a picture's path (`None` for a placeholder)."""
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else as_list(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text" and isinstance(part.get("text"), str):
            before, *after = part["text"].split(PLACEHOLDER)
            yield "text", before.strip()
            for text in after:
                yield "image", None
                yield "text", text.strip()
        elif kind in ("image", "image_url"):
            given = [part[key] for key in PICTURE_KEYS if part.get(key) is not None]
            yield "image", source_of(given[0]) if given else None
        else:
            raise RowError(f"can't read the content part {part!r}", 'Use {"type": "text"} and {"type": "image"} parts')


def source_of(item: Any) -> str:
    """Returns the path that a picture's entry gives: the entry itself, or its `path` or `url`."""
    source = next((item[key] for key in ("path", "url") if item.get(key)), None) if isinstance(item, dict) else item
    if not isinstance(source, str) or not source:
        raise RowError(f"can't read the picture entry {item!r}", "Give the path of the picture's file")
    return source


def paired(placed: list[str | None], listed: list[str]) -> list[str]:
    """Gives each placeholder of the question its picture from the top-level list, in order.

    A question without any picture takes the whole list.
    """
    if not placed:
        return listed
    if placed.count(None) != len(listed):
        raise RowError(
            f"the question has {placed.count(None)} placeholders but {len(listed)} pictures are listed",
            "Give each placeholder one path in 'images', in order",
        )
    rest = iter(listed)
    return [next(rest) if source is None else source for source in placed]


def as_list(value: Any) -> list[Any]:
    """Returns a list as it is, nothing as an empty list, and a single value as a list of one."""
    if isinstance(value, list):
        return value
    return [] if value is None else [value]


def as_text(value: Any) -> str:
    """Returns a value of the line as text: strings as they are, anything else as JSON."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
