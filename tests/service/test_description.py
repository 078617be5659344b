"""What the service says of itself: whether it is ready, and what it understands."""

from __future__ import annotations

from pathlib import Path

import httpx
import pytest
import torch

from multimodal.model import MultiModalModel
from multimodal.service import serving
from tests.service.conftest import NAME, QUESTION, asking


def test_a_closed_engine_is_not_ready(checkpoint: Path) -> None:
    model = MultiModalModel.from_pretrained(checkpoint, dtype=torch.float32)
    with serving(model, name=NAME) as url:
        place = url.removesuffix("/v1")
        assert httpx.get(f"{place}/ready").json() == {"status": "ready", "model": NAME}
        model.engine.close()
        said = httpx.post(f"{url}/chat/completions", json={"model": NAME, "messages": asking(QUESTION)})
        for response in (said, httpx.get(f"{place}/ready")):
            assert response.status_code == 503 and response.json()["error"]["type"] == "server_error"
            assert "ask again when the server is back" in response.json()["error"]["message"]
        assert httpx.get(f"{place}/health").status_code == 200  # the process lives


def test_openapi_tells_the_requests_form(url: str) -> None:
    said = httpx.get(url.removesuffix("/v1") + "/openapi.json").json()
    body = said["paths"]["/v1/chat/completions"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    assert body == {"$ref": "#/components/schemas/ChatRequest"}
    schemas = said["components"]["schemas"]
    assert {"model", "messages", "n", "top_logprobs", "seed"} <= schemas["ChatRequest"]["properties"].keys()
    assert {"Message", "Part", "ImageUrl"} <= schemas.keys()


@pytest.mark.parametrize("word", ["POST /v1/chat/completions", "GET /ready", "top_logprobs"])
def test_the_page_needs_no_other_host(url: str, word: str) -> None:
    page = httpx.get(url.removesuffix("/v1") + "/docs").text
    assert word in page and "http" not in page.replace("http-equiv", "")
