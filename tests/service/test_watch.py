"""What is told of requests: metrics, the log, the audit; and answers that are kept."""

from __future__ import annotations

import hashlib
import json
import re
from base64 import b64decode
from io import StringIO
from pathlib import Path
from typing import Any

import httpx
import pytest
import torch
from openai import OpenAI

from multimodal.model import MultiModalModel
from multimodal.service import AuditLog, RequestLog, ServiceSettings, serving
from tests.service.conftest import NAME, QUESTION, asking, client_of, uri
from tests.training.tiny import draw

SETTINGS = ServiceSettings(grace_seconds=0)


def ask(client: OpenAI, messages: Any, **options: Any) -> Any:
    said = client.chat.completions.create(**{"model": NAME, "messages": messages, "max_tokens": 5, **options})
    return list(said) if options.get("stream") else said


def figures(url: str) -> dict[str, float]:
    page = httpx.get(url.removesuffix("/v1") + "/metrics")
    assert page.headers["content-type"].startswith("text/plain")
    return {name: float(value) for name, value in re.findall(r"^([a-z].*) (\S+)$", page.text, re.MULTILINE)}


def test_metrics_count(model: MultiModalModel) -> None:
    model.forget()
    with serving(model, name=NAME) as url, client_of(url) as client:
        before = figures(url)
        for text in (QUESTION, "Is it red?"):
            ask(client, asking(text, draw("red", 0)), stream=text == QUESTION)
        httpx.get(f"{url}/no/such/address")
        found = figures(url)
    got = {name: value - before.get(name, 0) for name, value in found.items()}
    assert got['multimodal_requests_total{endpoint="/v1/chat/completions",status="200"}'] == 2
    assert got['multimodal_requests_total{endpoint="other",status="404"}'] == 1
    assert got["multimodal_time_to_first_token_seconds_count"] == got["multimodal_tokens_per_second_count"] == 2
    assert got['multimodal_tokens_total{kind="completion"}'] == 10
    assert 0 < got['multimodal_tokens_total{kind="reused"}'] < got['multimodal_tokens_total{kind="prompt"}']
    assert got['multimodal_cache_hits_total{cache="decoded_pictures"}'] == 1
    assert got['multimodal_cache_misses_total{cache="decoded_pictures"}'] == 1
    assert found["multimodal_queue_waiting"] == found["multimodal_queue_running"] == 0


@pytest.mark.parametrize("said", [False, True])
def test_the_log_holds_what_it_is_asked_to(model: MultiModalModel, said: bool) -> None:
    file = StringIO()
    secret = "a very private question"
    picture = uri(draw("red", 0))
    with serving(model, name=NAME, log=RequestLog(file, said=said)) as url, client_of(url) as client:
        answer = ask(client, asking(secret, picture)).choices[0].message.content
        httpx.post(f"{url}/chat/completions", content=secret)
    first, second = [json.loads(line) for line in file.getvalue().splitlines()]
    assert (first["status"], first["endpoint"], first["pictures"], first["completion_tokens"]) == (
        200,
        "/v1/chat/completions",
        1,
        5,
    )
    assert second["status"] == 400 and first["id"] != second["id"] and first["timestamp"].endswith("Z")
    assert picture[30:90] not in file.getvalue()
    assert (secret in file.getvalue()) is said
    if said:
        assert first["said"] == [[secret]] and first["answers"] == [answer]


def test_the_audit_accounts_for_answers(checkpoint: Path, adapter: Path, tmp_path: Path) -> None:
    model = MultiModalModel.from_pretrained(checkpoint, adapter=adapter, dtype=torch.float32)
    path = tmp_path / "audit" / "log.jsonl"
    picture = uri(draw("red", 0))
    with serving(model, name=NAME, audit=AuditLog(path)) as url, client_of(url) as client:
        said = [ask(client, asking(QUESTION, picture), model=name) for name in (NAME, f"{NAME}:mine")]
        text = "".join(c.choices[0].delta.content or "" for c in ask(client, asking(QUESTION), stream=True))
    plain, adapted, streamed = [json.loads(line) for line in path.read_text().splitlines()]
    assert plain["adapter_digest"] is None and re.fullmatch(r"[0-9a-f]{64}", adapted["adapter_digest"])
    assert len({line["model_digest"] for line in (plain, adapted, streamed)}) == 1
    file = hashlib.sha256(b64decode(picture.partition(",")[2])).hexdigest()
    for line, its in zip((plain, adapted), said, strict=True):
        assert line["pictures_sha256"] == [file] and line["key"] == "local" and line["model"] == its.model
        assert line["answers_sha256"] == [hashlib.sha256(its.choices[0].message.content.encode()).hexdigest()]
    assert streamed["answers_sha256"] == [hashlib.sha256(text.encode()).hexdigest()]
    assert QUESTION not in path.read_text()


class TestAnswerCache:
    def test_the_same_question_is_computed_once(self, model: MultiModalModel) -> None:
        image = draw("red", 0)
        with serving(model, name=NAME, settings=ServiceSettings(cached_answers=10)) as url, client_of(url) as client:
            first = ask(client, asking(QUESTION, image), logprobs=True)
            computed = figures(url)['multimodal_tokens_total{kind="completion"}']
            again = ask(client, asking("  What  colour is\nthis? ", image), logprobs=True)
            chunks = ask(client, asking(QUESTION, image), logprobs=True, stream=True)
            assert again.choices == first.choices and again.usage == first.usage
            text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks)
            assert text == first.choices[0].message.content
            found = figures(url)
            assert found['multimodal_tokens_total{kind="completion"}'] == computed
            assert found['multimodal_cache_hits_total{cache="answers"}'] == 2
            assert found['multimodal_cache_misses_total{cache="answers"}'] == 1

    @pytest.mark.parametrize(
        "other",
        [{"messages": asking(QUESTION, draw("blue", 0))}, {"max_tokens": 4}, {"stop": "x"}, {"seed": 1, "n": 2}],
    )
    def test_another_question_is_another_one(self, model: MultiModalModel, other: dict[str, Any]) -> None:
        with serving(model, name=NAME, settings=ServiceSettings(cached_answers=10)) as url, client_of(url) as client:
            ask(client, asking(QUESTION, draw("red", 0)))
            ask(client, **{"messages": asking(QUESTION, draw("red", 0)), **other})
            assert figures(url)['multimodal_cache_hits_total{cache="answers"}'] == 0

    def test_chance_is_not_kept(self, model: MultiModalModel) -> None:
        with serving(model, name=NAME, settings=ServiceSettings(cached_answers=10)) as url, client_of(url) as client:
            said = {ask(client, asking(QUESTION), temperature=5.0).choices[0].message.content for _ in range(4)}
            assert len(said) > 1

    def test_it_is_off_unless_asked_for(self, url: str, client: OpenAI) -> None:
        for _ in range(2):
            ask(client, asking(QUESTION, draw("red", 0)))
        found = figures(url)
        assert found['multimodal_cache_hits_total{cache="answers"}'] == 0

    def test_the_oldest_goes(self, model: MultiModalModel) -> None:
        with serving(model, name=NAME, settings=ServiceSettings(cached_answers=1)) as url, client_of(url) as client:
            for text in (QUESTION, "Is it red?", QUESTION):
                ask(client, asking(text))
            assert figures(url)['multimodal_cache_hits_total{cache="answers"}'] == 0
