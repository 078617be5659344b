"""Distillation: a stronger model answers questions about a person's own pictures, and its answers become training data.

The teacher is a fused model of ours, any model of transformers' ``image-text-to-text`` pipeline, or a model behind an
OpenAI-compatible endpoint. What always holds: each answer is on disk before the next question is asked, so a labelling
that was stopped, or killed, goes on without asking anything twice; a picture leaves this machine only for an endpoint
that was named; nothing is left out silently.

The file is what ``multimodal.data.read_jsonl`` reads: its learner sees the question, not the instruction that told the
teacher how to answer.
"""

from __future__ import annotations

import base64
import json
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.client import HTTPException
from io import BytesIO
from pathlib import Path
from typing import IO, Any, Protocol
from urllib.error import HTTPError, URLError
from urllib.request import HTTPRedirectHandler, Request, build_opener

from PIL import Image
from tqdm import tqdm

from multimodal.data import DataError
from multimodal.images import ImageError, load_image

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".tif", ".tiff", ".bmp", ".dcm", ".dicom")
MAX_NEW_TOKENS = 64
TRIES = 5
FIRST_WAIT = 1.0  # seconds before the second try; twice as long before each further one
LONGEST_WAIT = 60.0
TIMEOUT = 120.0  # seconds for one answer
LONGEST_SIDE = 1536  # pixels that are sent: hosted models see no more, and charge for it
KEY = "OPENAI_API_KEY"
BUSY = (408, 409, 425, 429, 500, 502, 503, 504, 529)  # answers of a server that may be well a moment later


class TeacherError(RuntimeError):
    """A teacher that cannot be used; the message names it and the remedy."""


class Teacher(Protocol):
    """Answers a question about a picture.

    Attributes:
        name: Stands in the file beside each answer.
    """

    name: str

    def __call__(self, question: str, picture: Image.Image) -> str:
        """The answer, stripped; it may be empty."""


class FusedTeacher:
    """A fused model of ours.

    Args:
        name: As ``MultiModalModel.from_pretrained`` takes it.
        max_new_tokens: Length limit of an answer.
    """

    def __init__(self, name: str, *, max_new_tokens: int = MAX_NEW_TOKENS) -> None:
        from multimodal.model import MultiModalModel

        self.name, self.max_new_tokens = name, max_new_tokens
        self.model = MultiModalModel.from_pretrained(name)

    def __call__(self, question: str, picture: Image.Image) -> str:
        """Answer greedily."""
        return self.model(question, picture, max_new_tokens=self.max_new_tokens).text


class PipelineTeacher:
    """Any model that transformers' ``image-text-to-text`` pipeline runs.

    Args:
        name: A folder or a hub id.
        max_new_tokens: Length limit of an answer.

    Raises:
        TeacherError: If it cannot be loaded.
    """

    def __init__(self, name: str, *, max_new_tokens: int = MAX_NEW_TOKENS) -> None:
        from transformers import pipeline

        self.name, self.max_new_tokens = name, max_new_tokens
        try:
            self.pipeline = pipeline("image-text-to-text", model=name)
        except (OSError, ValueError, ImportError) as error:
            reason = str(error).strip().splitlines()[0]
            raise TeacherError(
                f"the teacher {name!r} cannot be loaded: {reason}: give a fused model, a folder or hub id that "
                "transformers' image-text-to-text pipeline runs, or the URL of an OpenAI-compatible endpoint"
            ) from error

    def __call__(self, question: str, picture: Image.Image) -> str:
        """Answer greedily."""
        content = [{"type": "image", "image": picture}, {"type": "text", "text": question}]
        said = self.pipeline(
            text=[{"role": "user", "content": content}],
            return_full_text=False,
            generate_kwargs={"max_new_tokens": self.max_new_tokens, "do_sample": False},
        )
        return str(said[0]["generated_text"]).strip()


class _NoRedirect(HTTPRedirectHandler):
    """urllib would send the key along to wherever a redirect leads."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        """Follow none."""
        return


class EndpointTeacher:
    """A model behind an OpenAI-compatible endpoint. The key, if there is one, comes from ``OPENAI_API_KEY``.

    Args:
        url: Such as ``https://host/v1``.
        model: What the endpoint calls the model.
        max_new_tokens: Length limit of an answer.

    Raises:
        TeacherError: If no model is named.
    """

    def __init__(self, url: str, *, model: str | None, max_new_tokens: int = MAX_NEW_TOKENS) -> None:
        if not model:
            raise TeacherError(f"{url} may have many models: name one with --teacher-model")
        self.url, self.model, self.max_new_tokens = url.rstrip("/"), model, max_new_tokens
        self.name = f"{model} at {self.url}"
        self._opener = build_opener(_NoRedirect)
        self._odd = f"{url} answers, but not as an OpenAI-compatible endpoint does: check the address; most end in /v1"

    def __call__(self, question: str, picture: Image.Image) -> str:
        """Ask; a server that does not answer is asked again, after a while.

        Raises:
            TeacherError: If it refuses, or does not answer at all.
        """
        body = {
            "model": self.model,
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "image_url", "image_url": {"url": _data_uri(picture)}},
                        {"type": "text", "text": question},
                    ],
                }
            ],
            "max_tokens": self.max_new_tokens,
            "temperature": 0,
        }
        answer = self._post("/chat/completions", json.dumps(body).encode())
        try:
            return str(answer["choices"][0]["message"]["content"] or "").strip()
        except (KeyError, IndexError, TypeError):
            raise TeacherError(f"{self._odd} ({_shortened(json.dumps(answer))})") from None

    def _post(self, path: str, body: bytes) -> Any:
        headers = {"Content-Type": "application/json", "User-Agent": "multimodal"}
        if key := os.environ.get(KEY):
            headers["Authorization"] = f"Bearer {key}"
        request = Request(self.url + path, data=body, headers=headers)
        wait, problem = FIRST_WAIT, ""
        for attempt in range(TRIES):
            if attempt:
                time.sleep(min(wait, LONGEST_WAIT))
                wait *= 2
            try:
                with self._opener.open(request, timeout=TIMEOUT) as response:
                    return json.load(response)
            except HTTPError as error:
                with error:
                    problem = f"{error.code} {error.reason}: {_shortened(error.read(2000).decode(errors='replace'))}"
                if error.code not in BUSY:
                    raise TeacherError(self._refusal(error.code, problem)) from None
                asked_for = error.headers.get("Retry-After", "")
                if asked_for.isdigit():
                    wait = max(wait, float(asked_for))
            except (URLError, HTTPException, TimeoutError, ConnectionError) as error:
                problem = str(getattr(error, "reason", "") or error or type(error).__name__)
            except ValueError:  # no JSON
                raise TeacherError(self._odd) from None
        raise TeacherError(
            f"{self.url} did not answer in {TRIES} tries ({problem}): check the address and the network; the same "
            "command then goes on where it stopped"
        )

    def _refusal(self, code: int, problem: str) -> str:
        remedy = "check what the message says"
        if code in (401, 403):
            remedy = f"set the environment variable {KEY} to a key that it knows"
        elif code == 404:
            remedy = f"check the address (most end in /v1) and that it has a model {self.model!r}"
        elif 300 <= code < 400:
            remedy = "give the address that it leads to: a key is not sent along"
        return f"{self.url} refuses ({problem}): {remedy}"


def teacher_of(name: str, *, model: str | None = None, max_new_tokens: int = MAX_NEW_TOKENS) -> Teacher:
    """Find out what kind of teacher a name means.

    Args:
        name: ``"embedded"`` or another fused model, a folder or hub id for the pipeline, or an endpoint's URL.
        model: The model's name at an endpoint.
        max_new_tokens: Length limit of an answer.

    Raises:
        TeacherError: If there is no such teacher.
        ModelError: If it is a fused model that cannot be loaded.
    """
    if name.startswith(("http://", "https://")):
        return EndpointTeacher(name, model=model, max_new_tokens=max_new_tokens)
    if "://" in name:
        raise TeacherError(f"{name!r} is not the URL of an endpoint: it begins with https:// or http://")
    if model is not None:
        raise TeacherError(f"--teacher-model belongs to an endpoint's URL, and {name!r} is none")
    if _is_fused(name):
        return FusedTeacher(name, max_new_tokens=max_new_tokens)
    return PipelineTeacher(name, max_new_tokens=max_new_tokens)


def _is_fused(name: str) -> bool:
    from transformers import PreTrainedConfig

    from multimodal.fusion import FusionConfig
    from multimodal.presets import PRESETS

    if name in PRESETS:
        return True
    try:
        return PreTrainedConfig.get_config_dict(name)[0].get("model_type") == FusionConfig.model_type
    except OSError:
        return False  # the pipeline says what is wrong


@dataclass(frozen=True)
class Labelling:
    """What a call did.

    Attributes:
        written: Answers that were added to the file.
        there: Answers that an earlier call had written.
        bad: Pictures that cannot be used, and questions that got no answer.
    """

    written: int
    there: int
    bad: tuple[DataError, ...]


def pictures_in(folder: Path) -> list[Path]:
    """All pictures in a folder and the folders in it, by their names' ends, in the order of their names.

    Raises:
        DataError: If there is none.
    """
    found = sorted(
        path
        for path in folder.rglob("*")
        if path.suffix.lower() in PICTURES and path.is_file() and not path.name.startswith(".")
    )
    if not found:
        ends = ", ".join(PICTURES)
        raise DataError("no picture is here", file=folder, remedy=f"Give a folder with files that end in {ends}")
    return found


def label(
    pictures: Sequence[Path],
    questions: Sequence[str],
    teacher: Teacher,
    output: Path,
    *,
    instruction: str = "",
    progress: bool = True,
) -> Labelling:
    """Ask a teacher every question about every picture, and append its answers to a JSONL file.

    Args:
        pictures: Their paths.
        questions: What to ask about each.
        teacher: Who answers.
        output: The file; what it has already is not asked again.
        instruction: Told to the teacher in front of each question, and not written down: how to answer.
        progress: Show a bar.

    Raises:
        TeacherError: If the teacher fails.
        ValueError: If the file holds answers of another teacher, or is no file of this kind.
    """
    output.parent.mkdir(parents=True, exist_ok=True)
    done = _done(output, teacher.name)
    bad: list[DataError] = []
    written = there = 0
    with output.open("ab") as file, tqdm(total=len(pictures) * len(questions), disable=not progress) as bar:
        for path in pictures:
            named = Path(os.path.relpath(path, output.parent)).as_posix()
            left = [question for question in questions if (named, question) not in done]
            there += len(questions) - len(left)
            bar.update(len(questions) - len(left))
            try:
                picture = load_image(path) if left else None
            except ImageError as error:
                bad.append(DataError(f"this picture {error.problem}", file=path, remedy=error.remedy))
                bar.update(len(left))
                continue
            for question in left:
                assert picture is not None
                bar.set_description(path.name[:24])
                answer = teacher(f"{instruction}\n{question}" if instruction else question, picture)
                if answer:
                    _append(file, named, question, answer, teacher.name)
                    written += 1
                else:
                    bad.append(DataError(f"no answer to {question!r}", file=path, remedy="Ask it in other words"))
                bar.update()
    return Labelling(written, there, tuple(bad))


def _append(file: IO[bytes], picture: str, question: str, answer: str, teacher: str) -> None:
    content = [{"type": "image", "path": picture}, {"type": "text", "text": question}]
    turns = [{"role": "user", "content": content}, {"role": "assistant", "content": answer}]
    file.write(json.dumps({"messages": turns, "teacher": teacher}, ensure_ascii=False).encode() + b"\n")
    file.flush()


def _done(output: Path, teacher: str) -> set[tuple[str, str]]:
    """Pictures and questions that the file has; half a line, as a kill leaves it, is cut off."""
    if not output.exists():
        return set()
    content = output.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        with output.open("ab") as file:
            file.truncate(len(whole))
    done = set()
    for number, line in enumerate(whole.splitlines(), start=1):
        try:
            record = json.loads(line)
            picture, text = record["messages"][0]["content"]
            before = record["teacher"]
            done.add((picture["path"], text["text"]))
        except (ValueError, KeyError, IndexError, TypeError):
            raise ValueError(f"{output}, line {number}: not a line of this command: give another output file") from None
        if before != teacher:
            raise ValueError(f"{output} holds answers of another teacher ({before}): give another output file")
    return done


def _data_uri(picture: Image.Image) -> str:
    picture = picture.copy()
    picture.thumbnail((LONGEST_SIDE, LONGEST_SIDE))
    stream = BytesIO()
    picture.save(stream, format="PNG")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _shortened(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 200 else f"{text[:200]}..."
