"""Pipelines by name, over a tiny model: what each is told and shown, what a first question takes, own classes."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from torch import nn

from multimodal.adapters import attach, save_adapter, weights_of
from multimodal.model import MultiModalModel
from multimodal.pipelines import (
    PIPELINES,
    Answer,
    ComposedPipeline,
    Parts,
    Pipeline,
    PipelineError,
    PipelineSettings,
    Question,
    Turn,
    make_pipelines,
)
from multimodal.pipelines.endpoint import Endpoint, Price
from multimodal.pipelines.prompts import ReadingPrompt
from multimodal.pipelines.protocol import Step
from multimodal.pipelines.readers import KeptReader
from tests.pipelines.endpoints import Scripted, refusing
from tests.training.tiny import draw

TUNED = ("text_only_tuned", "blind_tuned")
RED, BLUE = draw("red", 0), draw("blue", 1)


@pytest.fixture(scope="session")
def tuned(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Adapters of the decoder that change what it says, each in its own way."""
    found = {}
    for seed, name in enumerate(TUNED):
        model = MultiModalModel.from_pretrained(checkpoint, dtype=torch.float32).model
        linear = [key for key, each in model.named_modules() if isinstance(each, nn.Linear) and "mlp" in key]
        attach(model, [key for key in linear if "language_model" in key], name=name, rank=2, scale=1.0)
        for _, b in weights_of(model, name).pairs.values():
            nn.init.normal_(b, std=0.5, generator=torch.Generator().manual_seed(seed))
        found[name] = tmp_path_factory.mktemp("tuned") / name
        save_adapter(model, name, found[name], base="tiny")
    return found


@pytest.fixture(scope="session")
def settings(checkpoint: Path, tuned: dict[str, Path]) -> PipelineSettings:
    return PipelineSettings(model=str(checkpoint), precision="float32", tuned=tuned)


@pytest.fixture(scope="session")
def parts(settings: PipelineSettings) -> Iterator[Parts]:
    with Parts(settings) as parts:
        yield parts


def one(name: str, parts: Parts) -> Pipeline:
    (pipeline,) = make_pipelines([name], parts)
    return pipeline


def asked(*images: Image.Image, text: str = "What colour is this?") -> Question:
    return Question(text, images, max_new_tokens=6)


def test_every_pipeline_answers_and_says_what_it_did(parts: Parts) -> None:
    pipelines = make_pipelines(list(PIPELINES), parts)
    assert [each.name for each in pipelines] == list(PIPELINES)
    assert len({each.digest for each in pipelines}) == len(PIPELINES)
    steps = {each.name: [step.name for step in each.answer(asked(RED)).steps] for each in pipelines}
    assert steps == {
        "native": ["model"],
        "hybrid": ["ocr", "model"],
        "text_only": ["ocr", "tags", "llm"],
        "text_only_tuned": ["ocr", "tags", "model"],
        "blind": ["model"],
        "blind_tuned": ["model"],
        "hosted": ["llm"],
    }
    uses = {each.name for each in pipelines if each.uses_pictures}
    assert uses == set(PIPELINES) - {"blind", "blind_tuned"}
    assert not any(each.remote for each in pipelines)


def test_a_digest_holds_over_a_restart(settings: PipelineSettings, parts: Parts) -> None:
    before = {name: one(name, parts).digest for name in PIPELINES}
    with Parts(settings) as others:
        assert {name: one(name, others).digest for name in PIPELINES} == before


def test_blind_is_the_bare_decoder(parts: Parts) -> None:
    said = one("blind", parts).answer(asked(RED))
    model = parts.model
    chat = [{"role": "user", "content": [{"type": "text", "text": "What colour is this?"}]}]
    inputs = model.processor.apply_chat_template(
        [chat], add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
    )
    decoder = model.model
    tokens = decoder.generate(input_ids=inputs["input_ids"], max_new_tokens=6, do_sample=False)
    bare = model.processor.tokenizer.decode(tokens[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert said.text == bare.strip() != ""
    assert said.text == one("blind", parts).answer(asked(BLUE)).text and said.usage.images == 0


def test_native_sees(parts: Parts) -> None:
    native = one("native", parts)
    assert len({native.answer(asked(*shown)).text for shown in ((), (RED,), (BLUE,))}) == 3
    assert native.answer(asked()).text == one("blind", parts).answer(asked(RED)).text


def test_the_same_model_says_the_same_over_http(parts: Parts) -> None:
    native, hosted = make_pipelines(["native", "hosted"], parts)
    for images in ((), (RED,), (BLUE,), (RED, BLUE)):
        here, there = native.answer(asked(*images)), hosted.answer(asked(*images))
        assert (there.text, there.usage) == (here.text, here.usage)
        assert there.cost == 0


def test_history_is_the_same_here_and_over_http(parts: Parts) -> None:
    native, hosted = make_pipelines(["native", "hosted"], parts)
    history = (Turn("What colour is this?", "red", (RED,)), Turn("Is it red?", "yes"))
    question = Question("And this?", (BLUE,), history, max_new_tokens=6)
    here, there = native.answer(question), hosted.answer(question)
    assert here.text == there.text and here.usage == there.usage and here.usage.images == 2
    assert here.usage.prompt_tokens > native.answer(Question("And this?", (BLUE,))).usage.prompt_tokens


def test_text_only_over_http_is_the_decoder_in_this_process(parts: Parts) -> None:
    over_http = one("text_only", parts)
    here = ComposedPipeline("here", parts.fused(), prompt=parts.text_prompt, sees=False)
    assert over_http.answer(asked(RED)).text == here.answer(asked(RED)).text
    assert over_http.answer(asked(RED)).usage.images == 0


def test_tuned_decoders_are_their_adapters(parts: Parts, settings: PipelineSettings) -> None:
    texts = {name: one(name, parts).answer(asked()).text for name in ("blind", *TUNED)}
    assert texts["blind"] != texts["blind_tuned"]
    swapped = PipelineSettings(**{**vars(settings), "tuned": {"blind_tuned": settings.tuned["text_only_tuned"]}})
    with Parts(swapped) as others:
        blind = one("blind_tuned", others)
        assert blind.digest != one("blind_tuned", parts).digest
        assert blind.answer(asked()).text != texts["blind_tuned"]


def test_native_with_an_adapter(settings: PipelineSettings, parts: Parts) -> None:
    with Parts(PipelineSettings(**{**vars(settings), "adapter": settings.tuned["blind_tuned"]})) as others:
        adapted = one("native", others)
        assert adapted.digest != one("native", parts).digest
        assert adapted.answer(asked(RED)).text != one("native", parts).answer(asked(RED)).text


def test_an_adapter_that_is_not_there(checkpoint: Path, tmp_path: Path) -> None:
    settings = PipelineSettings(model=str(checkpoint), tuned={"blind_tuned": tmp_path / "none"})
    with Parts(settings) as parts, pytest.raises(PipelineError, match="none holds no adapter"):
        one("blind_tuned", parts)


class Slowly:
    """Takes half a second, as it says."""

    name = digest = "ocr"

    def prepare(self) -> None:
        """Nothing to load."""

    def read(self, picture: Image.Image) -> Step:
        return Step(self.name, 0.5, str(picture.getpixel((20, 18))))


def told(endpoint: Scripted, reader: KeptReader, tmp_path: Path, name: str = "told") -> ComposedPipeline:
    (tmp_path / "p.j2").write_text("{{ ocr }}: {{ question }}")
    chat = Endpoint(endpoint.url, model="m")
    return ComposedPipeline(name, chat, prompt=ReadingPrompt([reader], tmp_path / "p.j2"), sees=False)


def reading(answer: Answer) -> float:
    """Seconds of an answer that the model did not take."""
    return answer.total - answer.steps[-1].seconds


def test_the_first_question_about_a_picture_pays_for_its_reading(endpoint: Scripted, tmp_path: Path) -> None:
    reader = KeptReader(Slowly())
    pipeline = told(endpoint, reader, tmp_path)
    first, second, other = (pipeline.answer(asked(shown)) for shown in (RED, RED, BLUE))
    assert [answer.steps[0].cached for answer in (first, second, other)] == [False, True, False]
    assert [reading(answer) for answer in (first, second, other)] == pytest.approx([0.5, 0.0, 0.5])
    assert first.first_token >= 0.5 and first.first_token <= first.total

    another = told(endpoint, reader, tmp_path).answer(asked(RED))
    assert reading(another) == pytest.approx(0.5) and not another.steps[0].cached and another.steps[0].details["kept"]

    pipeline.forget()
    assert [reading(pipeline.answer(asked(RED))) for _ in range(2)] == pytest.approx([0.5, 0.0])


def test_a_failed_question_does_not_pay_for_the_next_one(endpoint: Scripted, tmp_path: Path) -> None:
    pipeline = told(endpoint, KeptReader(Slowly()), tmp_path)
    endpoint.script(refusing(503, "busy"), "red")
    with pytest.raises(PipelineError):
        pipeline.answer(asked(RED))
    assert reading(pipeline.answer(asked(RED))) == pytest.approx(0.5)


def test_an_endpoint_that_sees_nothing_gets_no_picture(endpoint: Scripted, tmp_path: Path) -> None:
    question = Question("Why?", (RED,), (Turn("What?", "That.", (BLUE,)),))
    told(endpoint, KeptReader(Slowly()), tmp_path).answer(question)
    (sent,) = endpoint.chats
    assert "image" not in str(sent)
    assert [each["content"] for each in sent["messages"]] == ["What?", "That.", f"{RED.getpixel((20, 18))}: Why?"]


def test_an_endpoint_that_sees_gets_every_picture_before_its_question(endpoint: Scripted) -> None:
    question = Question("Why?", (RED, BLUE), (Turn("What?", "That.", (BLUE,)),))
    answer = ComposedPipeline("sees", Endpoint(endpoint.url, model="m"), sees=True).answer(question)
    kinds = [
        [part["type"] for part in each["content"]] if isinstance(each["content"], list) else each["content"]
        for each in endpoint.chats[0]["messages"]
    ]
    assert kinds == [["image_url", "text"], "That.", ["image_url", "image_url", "text"]]
    assert answer.usage.images == 3


def test_endpoints_by_name_and_address(endpoint: Scripted, checkpoint: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    prices = {"deepseek-v4-flash": Price(1, 2), "m": Price(3, 4)}
    with Parts(PipelineSettings(model=str(checkpoint), prices=prices)) as parts:
        named = parts.endpoint("deepseek", "")
        assert (named.model, named.key, named.price, named.remote) == (
            "deepseek-v4-flash",
            "DEEPSEEK_API_KEY",
            Price(1, 2),
            True,
        )
        assert parts.endpoint("vllm", "any").price == Price(0, 0)
        here = parts.endpoint(endpoint.url, "m")
        assert (here.key, here.price) == ("", Price(3, 4))
        assert parts.endpoint("https://elsewhere.example/v1", "other").key == "OPENAI_API_KEY"
        assert parts.endpoint("https://elsewhere.example/v1", "other").price is None


def test_no_such_pipeline(parts: Parts) -> None:
    with pytest.raises(
        PipelineError, match=r"there is no pipeline 'naive': use native, hybrid, .* my_file\.py:MyClass"
    ):
        make_pipelines(["naive"], parts)


OWN = """
from __future__ import annotations
from dataclasses import dataclass
from multimodal.pipelines import Answer, Question

@dataclass
class Noted:
    text: str

class Mine:
    name, digest = "mine", "1"
    def answer(self, question: Question) -> Answer:
        return Answer(Noted(question.text.upper()).text)
    def forget(self) -> None:
        pass

class Other(Mine):
    name = "other"

class Mute:
    name, digest = "mute", "1"
    def forget(self): pass

class Picky(Mine):
    def __init__(self, needed): pass

class Broken(Mine):
    def __init__(self): raise ValueError("no weights here")
"""


@pytest.fixture
def own(tmp_path: Path) -> Path:
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path / "own.py"


def test_a_class_of_ones_own_from_a_file(own: Path, parts: Parts) -> None:
    mine, other = make_pipelines([f"{own}:Mine", "own.py:Other"], parts)
    assert (mine.name, other.name) == ("mine", "other")
    assert mine.answer(Question("why?")).text == "WHY?"


def test_a_file_that_was_changed_is_read_again(own: Path, parts: Parts) -> None:
    assert one(f"{own}:Mine", parts).answer(Question("why?")).text == "WHY?"
    own.write_text(OWN.replace("upper()", "title()"))
    assert one(f"{own}:Mine", parts).answer(Question("why?")).text == "Why?"


def test_a_file_hides_no_module_of_the_same_name(own: Path, parts: Parts, tmp_path: Path) -> None:
    import json

    (tmp_path / "json.py").write_text(OWN)
    one(f"{tmp_path / 'json.py'}:Mine", parts)
    assert sys.modules["json"] is json


def test_a_class_of_ones_own_from_a_module(own: Path, parts: Parts, monkeypatch: pytest.MonkeyPatch) -> None:
    own.rename(own.with_name("my_own_module.py"))
    monkeypatch.syspath_prepend(str(own.parent))
    assert one("my_own_module:Mine", parts).name == "mine"


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("own.py:Mute", "'own.py:Mute' has no answer"),
        ("own.py:Nobody", "cannot be made .*Nobody"),
        ("own.py:Picky", "cannot be made .*needed"),
        ("own.py:Broken", "cannot be made .*no weights here"),
        ("gone.py:Mine", "cannot be made .*gone.py"),
        ("no.such.module:Mine", "cannot be made .*no"),
        ("wrong.py:Mine", "cannot be made .*SyntaxError"),
        ("unknown.py:Mine", "cannot be made .*NameError"),
    ],
)
def test_a_class_that_cannot_be_used(own: Path, parts: Parts, name: str, said: str) -> None:
    own.with_name("wrong.py").write_text("class Mine(:\n")
    own.with_name("unknown.py").write_text("class Mine(Missing):\n    pass\n")
    with pytest.raises(PipelineError, match=said):
        make_pipelines([name], parts)


def test_two_of_one_name(own: Path, parts: Parts) -> None:
    with pytest.raises(PipelineError, match="two pipelines are called mine: give each a name of its own"):
        make_pipelines(["own.py:Mine", "blind", f"{own}:Mine"], parts)


def test_nobody_reads_by_that_name(checkpoint: Path) -> None:
    said = "nobody reads text by 'eyes': use rapidocr or tesseract"
    settings = PipelineSettings(model=str(checkpoint), ocr="eyes")
    with Parts(settings) as parts, pytest.raises(PipelineError, match=said):
        one("hybrid", parts)


def test_nothing_is_loaded_that_no_pipeline_needs(own: Path) -> None:
    with Parts(PipelineSettings(model="/no/such/model", ocr="eyes")) as parts:
        assert one("own.py:Mine", parts).name == "mine"


def test_the_local_endpoint_ends_with_the_parts(settings: PipelineSettings) -> None:
    with Parts(settings) as parts:
        url = parts.local_url
        assert Endpoint(url).model == parts.model.name
    with pytest.raises(PipelineError, match="does not answer"):
        _ = Endpoint(url).model
