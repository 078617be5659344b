"""A teacher labels a folder of pictures: ours, a pipeline's, or one behind an endpoint that has its bad days."""

from __future__ import annotations

import base64
import json
import os
import signal
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from multimodal.cli import main
from multimodal.data import DataError, read
from multimodal.pipelines import patience
from multimodal.pipelines.chats import FusedChat, TransformersChat
from multimodal.pipelines.endpoint import Endpoint
from multimodal.training.teacher import Teacher, TeacherError, label, pictures_in, teacher_of
from tests.training.tiny import draw, save_checkpoint

QUESTIONS = ["What colour is this?", "Is it red?"]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three pictures, one of them deeper and one that is none, and other files."""
    folder = tmp_path / "my pictures"
    (folder / "more").mkdir(parents=True)
    draw("red", 0).save(folder / "a.png")
    draw("blue", 1).save(folder / "more" / "b.JPG", format="JPEG")
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "notes.txt").write_text("not a picture")
    (folder / ".hidden.png").write_bytes(b"")
    return folder


class Scripted:
    """Answers with what it was asked, and dies or falls silent when told to."""

    name = "scripted"

    def __init__(self, fail_at: int = 10**9, silent: str = "") -> None:
        self.asked: list[str] = []
        self.fail_at, self.silent = fail_at, silent

    def __call__(self, question: str, picture: Image.Image) -> str:
        assert picture.mode == "RGB"
        if len(self.asked) == self.fail_at:
            raise KeyboardInterrupt
        self.asked.append(question)
        return "" if question == self.silent else f"{len(self.asked)}"


class TestLabel:
    def test_the_file_is_one_to_train_on(self, folder: Path, tmp_path: Path) -> None:
        output = tmp_path / "labels" / "labels.jsonl"
        done = label(pictures_in(folder), QUESTIONS, Scripted(), output, progress=False)
        assert (done.written, done.there) == (4, 0)
        samples = read(str(output))
        assert [(s.question, s.answer, s.images[0].name) for s in samples] == [
            (QUESTIONS[0], "1", "a.png"),
            (QUESTIONS[1], "2", "a.png"),
            (QUESTIONS[0], "3", "b.JPG"),
            (QUESTIONS[1], "4", "b.JPG"),
        ]
        assert all(sample.images[0].resolve().is_relative_to(folder) for sample in samples)
        assert {sample.meta["teacher"] for sample in samples} == {"scripted"}
        assert not any(str(tmp_path) in line for line in output.read_text().splitlines())  # both may move together

    def test_broken_pictures_and_silence_are_listed(self, folder: Path, tmp_path: Path) -> None:
        teacher = Scripted(silent=QUESTIONS[1])
        done = label(pictures_in(folder), QUESTIONS, teacher, tmp_path / "labels.jsonl", progress=False)
        assert done.written == 2
        assert [error.file.name for error in done.bad] == ["a.png", "broken.png", "b.JPG"]
        assert "no answer to 'Is it red?'" in str(done.bad[0]) and "this picture" in str(done.bad[1])

    def test_the_instruction_is_for_the_teacher_alone(self, folder: Path, tmp_path: Path) -> None:
        teacher, output = Scripted(), tmp_path / "labels.jsonl"
        label(pictures_in(folder), QUESTIONS[:1], teacher, output, instruction="Be brief.", progress=False)
        assert teacher.asked == ["Be brief.\nWhat colour is this?"] * 2
        assert {sample.question for sample in read(str(output))} == {QUESTIONS[0]}

    @pytest.mark.parametrize("fail_at", [0, 1, 3])
    def test_nothing_is_asked_twice(self, folder: Path, tmp_path: Path, fail_at: int) -> None:
        pictures, output = pictures_in(folder), tmp_path / "labels.jsonl"
        with pytest.raises(KeyboardInterrupt):
            label(pictures, QUESTIONS, Scripted(fail_at), output, progress=False)
        assert len(output.read_text().splitlines()) == fail_at
        second = Scripted()
        done = label(pictures, QUESTIONS, second, output, progress=False)
        assert (done.written, done.there, len(second.asked)) == (4 - fail_at, fail_at, 4 - fail_at)
        third = Scripted()
        done = label(pictures, [*QUESTIONS, "Is it new?"], third, output, progress=False)
        assert (done.written, done.there) == (2, 4) and set(third.asked) == {"Is it new?"}

    def test_a_line_that_was_cut_by_a_kill_is_asked_again(self, folder: Path, tmp_path: Path) -> None:
        pictures, output = pictures_in(folder), tmp_path / "labels.jsonl"
        label(pictures, QUESTIONS, Scripted(), output, progress=False)
        whole = output.read_bytes()
        for cut in (3, len(whole) // 2, len(whole) - 1):
            output.write_bytes(whole[:cut])
            label(pictures, QUESTIONS, Scripted(), output, progress=False)
            assert [(s.question, s.images[0].name) for s in read(str(output))] == [
                (question, name) for name in ("a.png", "b.JPG") for question in QUESTIONS
            ]

    def test_a_killed_process_keeps_what_was_said(self, folder: Path, tmp_path: Path) -> None:
        pid = os.fork()
        if pid == 0:
            teacher = Scripted(fail_at=3)
            kill = type("Kill", (), {"__call__": lambda *_: os.kill(os.getpid(), signal.SIGKILL)})()
            pictures = pictures_in(folder)
            label(pictures, QUESTIONS[:1], teacher, tmp_path / "labels.jsonl", progress=False)
            kill.name = teacher.name
            label(pictures, QUESTIONS, kill, tmp_path / "labels.jsonl", progress=False)
            os._exit(0)
        assert os.waitpid(pid, 0)[1] == signal.SIGKILL
        assert len(read(str(tmp_path / "labels.jsonl"))) == 2

    def test_files_that_hold_something_else_stay_as_they_are(self, folder: Path, tmp_path: Path) -> None:
        output = tmp_path / "labels.jsonl"
        label(pictures_in(folder), QUESTIONS[:1], Scripted(), output, progress=False)
        other = Scripted()
        other.name = "another"
        before = output.read_bytes()
        with pytest.raises(ValueError, match=r"holds answers of another teacher \(scripted\): give another output"):
            label(pictures_in(folder), QUESTIONS, other, output, progress=False)
        output.write_text('{"messages": []}\n')
        with pytest.raises(ValueError, match="line 1: not a line of this command: give another output file"):
            label(pictures_in(folder), QUESTIONS, other, output, progress=False)
        assert output.read_text() == '{"messages": []}\n' and before
        output.write_text("a diary\nof mine")
        with pytest.raises(ValueError, match="line 1: not a record of ours: move the file away"):
            label(pictures_in(folder), QUESTIONS, other, output, progress=False)
        assert output.read_text() == "a diary\nof mine" and not other.asked

    def test_pictures_are_found_by_name(self, folder: Path, tmp_path: Path) -> None:
        assert [path.name for path in pictures_in(folder)] == ["a.png", "broken.png", "b.JPG"]
        (tmp_path / "empty").mkdir()
        with pytest.raises(DataError, match=r"no picture is here\. Give a folder with files that end in \.png"):
            pictures_in(tmp_path / "empty")


EVENTS = {"Content-Type": "text/event-stream"}
HALF = b'data: {"choices": [{"index": 0, "delta": {"role": "assistant", "content": " red"}}]}\n\n'
STREAM = HALF + b'data: {"choices": [{"index": 0, "delta": {"content": " \\n"}, "finish_reason": "stop"}]}\n\n'


class Server(ThreadingHTTPServer):
    """A stub of an OpenAI-compatible server: answers in turn with what it is given to."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests: list[tuple[str, dict[str, str], Any]] = []
        self.replies: list[tuple[int, Any, dict[str, str]]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        headers = {name.title(): value for name, value in self.headers.items()}
        self.server.requests.append((self.path, headers, body))
        code, content, headers = self.server.replies.pop(0) if self.server.replies else (200, STREAM, EVENTS)
        content = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def endpoint(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    server = Server()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    found: list[float] = []
    monkeypatch.setattr(patience.time, "sleep", found.append)
    return found


class TestEndpoint:
    def test_it_is_asked_as_openai_is(self, endpoint: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
        teacher = teacher_of(endpoint.url + "/", model="large", max_new_tokens=9)
        assert isinstance(teacher.chat, Endpoint) and "sk-secret" not in teacher.name
        assert teacher("What colour?", draw("red", 0)) == "red"
        ((path, headers, body),) = endpoint.requests
        assert path == "/v1/chat/completions" and headers["Authorization"] == "Bearer sk-secret"
        assert (body["model"], body["max_tokens"], body["temperature"]) == ("large", 9, 0)
        picture, text = body["messages"][0]["content"]
        assert text == {"type": "text", "text": "What colour?"}
        kind, encoded = picture["image_url"]["url"].split(",")
        assert kind == "data:image/png;base64"
        with Image.open(BytesIO(base64.b64decode(encoded))) as sent:
            assert sent.tobytes() == draw("red", 0).tobytes()

    def test_large_pictures_are_made_smaller_and_no_key_is_made_up(self, endpoint: Server) -> None:
        teacher_of(endpoint.url, model="m")("?", Image.new("RGB", (4000, 1000)))
        ((_, headers, body),) = endpoint.requests
        assert "Authorization" not in headers
        encoded = body["messages"][0]["content"][0]["image_url"]["url"].split(",")[1]
        with Image.open(BytesIO(base64.b64decode(encoded))) as sent:
            assert sent.size == (1536, 384)

    def test_a_busy_server_is_asked_again(self, endpoint: Server, waits: list[float]) -> None:
        endpoint.replies = [(503, b"", {}), (429, b"slow down", {"Retry-After": "7"}), (500, b"", {})]
        assert teacher_of(endpoint.url, model="m")("?", draw("red", 0)) == "red"
        assert waits == [1, 7, 14] and len(endpoint.requests) == 4

    def test_a_broken_connection_is_made_again(self, endpoint: Server, waits: list[float]) -> None:
        endpoint.replies = [(200, HALF, EVENTS), (200, STREAM, {**EVENTS, "Content-Length": "9999"})]
        assert teacher_of(endpoint.url, model="m")("?", draw("red", 0)) == "red"
        assert waits == [1, 2] and len(endpoint.requests) == 3

    def test_one_that_does_not_stream(self, endpoint: Server) -> None:
        endpoint.replies = [(200, {"choices": [{"message": {"role": "assistant", "content": " red \n"}}]}, {})]
        assert teacher_of(endpoint.url, model="m")("?", draw("red", 0)) == "red"

    def test_neither_key_nor_picture_goes_where_a_redirect_leads(
        self, endpoint: Server, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-secret")
        with Server() as other:
            threading.Thread(target=other.serve_forever, daemon=True).start()
            endpoint.replies = [(code, b"", {"Location": other.url}) for code in (301, 302, 303, 307, 308)]
            for _ in range(5):
                with pytest.raises(TeacherError, match="give the address that it leads to: a key is not sent along"):
                    teacher_of(endpoint.url, model="m")("?", draw("red", 0))
            other.shutdown()
        assert not other.requests

    def test_no_part_of_the_key_is_in_a_message(self, endpoint: Server, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("OPENAI_API_KEY", "sk-abcdefghijklmnop")
        endpoint.replies = [(401, {"error": {"message": "Wrong key: sk-abc****mnop, not sk-abcdefghijklmnop."}}, {})]
        with pytest.raises(
            TeacherError, match=r"Wrong key: \(the key\), not \(the key\).*set OPENAI_API_KEY"
        ) as caught:
            teacher_of(endpoint.url, model="m")("?", draw("red", 0))
        assert "abc" not in str(caught.value) and "nop" not in str(caught.value)

    def test_a_dead_one_is_told(self, endpoint: Server, waits: list[float]) -> None:
        teacher = teacher_of(endpoint.url, model="m")
        endpoint.shutdown()
        endpoint.server_close()
        with pytest.raises(TeacherError, match=r"/v1 did not answer in 5 tries \(.*refused.*\): check the address"):
            teacher("?", draw("red", 0))
        assert waits == [1, 2, 4, 8]

    @pytest.mark.parametrize(
        ("reply", "message"),
        [
            (
                (401, {"error": "no key"}, {}),
                r"refuses \(401: .*no key.*\): set OPENAI_API_KEY to a key",
            ),
            ((404, b"", {}), r"refuses \(404.*most end in /v1.* it has a model 'm'"),
            ((400, b"too many pictures", {}), r"refuses \(400: too many pictures\): check what"),
            ((307, b"", {"Location": "http://127.0.0.1:1/v1"}), r"refuses \(307.*a key is not sent along"),
            ((200, b"<html>", {}), r"answers, but not as an OpenAI-compatible endpoint does: .* most end in /v1"),
            ((200, {"detail": "hm"}, {}), r"answers, but not as .* \(\{\"detail\": \"hm\"\}\)"),
        ],
    )
    def test_what_asking_again_does_not_mend(
        self, reply: Any, message: str, endpoint: Server, waits: list[float]
    ) -> None:
        endpoint.replies = [reply]
        with pytest.raises(TeacherError, match=message):
            teacher_of(endpoint.url, model="m")("?", draw("red", 0))
        assert not waits and len(endpoint.requests) == 1


class TestModels:
    @pytest.fixture(scope="class")
    @staticmethod
    def fused_folder(tmp_path_factory: pytest.TempPathFactory) -> str:
        return str(save_checkpoint(tmp_path_factory.mktemp("teacher")))

    def test_a_fused_model(self, fused_folder: str) -> None:
        teacher = teacher_of(fused_folder, max_new_tokens=3)
        assert isinstance(teacher.chat, FusedChat)
        said = teacher("Is it red?", draw("red", 0))
        assert said == teacher.chat.model("Is it red?", draw("red", 0), max_new_tokens=3).text

    def test_the_pipeline(self, fused_folder: str) -> None:
        """Ours runs in it, too: both ways say the same."""
        teacher = Teacher("pipeline", TransformersChat(fused_folder), max_new_tokens=3)
        assert teacher("Is it red?", draw("red", 0)) == teacher_of(fused_folder, max_new_tokens=3)(
            "Is it red?", draw("red", 0)
        )

    def test_what_is_no_teacher(self, tmp_path: Path) -> None:
        with pytest.raises(TeacherError, match=r"'nonsense/model' cannot be loaded: .*give a fused model, a folder"):
            teacher_of("nonsense/model")
        with pytest.raises(TeacherError, match="name one with --teacher-model"):
            teacher_of("https://host/v1")
        with pytest.raises(TeacherError, match="begins with https:// or http://"):
            teacher_of("ftp://host/v1", model="m")
        with pytest.raises(TeacherError, match="--teacher-model belongs to an endpoint's URL"):
            teacher_of("embedded", model="m")


class TestCommand:
    def words(self, folder: Path, endpoint: Server, output: Path, *more: str) -> list[str]:
        asked = [word for question in QUESTIONS for word in ("--question", question)]
        return ["label", str(folder), "--teacher", endpoint.url, "--output", str(output), *asked, *more]

    def test_it_labels_and_says_how_to_train(
        self, folder: Path, tmp_path: Path, endpoint: Server, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = tmp_path / "my labels.jsonl"
        assert main(self.words(folder, endpoint, output, "--teacher-model", "large")) == 0
        printed = capsys.readouterr().out
        assert "1 could not be read:" in printed and "broken.png: this picture" in printed
        assert f"4 answers of large at {endpoint.url} added to {output}; to train on them:" in printed
        assert f"multimodal train --data '{output}' --output FOLDER" in printed
        assert len(read(str(output))) == 4
        assert main(self.words(folder, endpoint, output, "--teacher-model", "large")) == 0
        assert "0 answers of large" in (again := capsys.readouterr().out) and ", 4 were there" in again

    def test_errors_are_one_line(
        self, folder: Path, tmp_path: Path, endpoint: Server, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = tmp_path / "labels.jsonl"
        assert main(self.words(folder, endpoint, output)) == 1
        assert "name one with --teacher-model" in capsys.readouterr().err
        (tmp_path / "empty").mkdir()
        assert main(self.words(tmp_path / "empty", endpoint, output)) == 1
        assert "no picture is here" in capsys.readouterr().err
        endpoint.replies = [(200, {"choices": [{"message": {"content": "red"}}]}, {}), (401, b"", {})]
        assert main(self.words(folder, endpoint, output, "--teacher-model", "m")) == 1
        assert capsys.readouterr().err.strip().splitlines()[-1].startswith("multimodal: http://127.0.0.1")
        assert len(read(str(output))) == 1
