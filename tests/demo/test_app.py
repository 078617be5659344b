"""The demo without a browser: how questions begin and end, what is said of an answer, and what the page promises."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Generator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from PIL import Image

import demo
from demo.asking import Asking, Step
from multimodal.adapters import AdapterError
from multimodal.answer import Answer
from multimodal.model import ModelError, MultiModalModel

pytest.importorskip("gradio", reason="the demo needs Gradio: pip install -e '.[demo]'")

import gradio as gr

from demo import app, page, shared
from demo.ask_tab import Choice, _looked
from demo.batch_tab import batch_tab
from demo.choosing import Choosing
from demo.comparing import Comparing
from demo.conversation import Turn
from demo.explanation import attention_picture, doing, figures, heat_legend, unsure_notice, word_buttons
from demo.wording import WORDS
from multimodal.drawing import Word
from multimodal.model import conversation as chat_about
from multimodal.store.feedback import Feedback
from tests.demo.tiny import free_port

ROOT = Path(demo.__file__).parent.parent
LONG = 400  # tokens; the tiny model never ends by itself


@pytest.fixture(scope="module")
def model(tiny_folder: Path) -> MultiModalModel:
    return MultiModalModel.from_pretrained(tiny_folder, dtype=torch.float32)


@pytest.fixture
def asking(model: MultiModalModel) -> Iterator[Asking]:
    """One whose model counts the tokens that it makes, in ``asking.made``."""
    asking = Asking(lambda: model)
    asking.made = 0

    runner: Any = model.engine.runner

    def made_one(run: Callable[..., Any], *args: Any, **options: Any) -> Any:
        asking.made += 1
        return run(*args, **options)

    for step in ("read", "step"):  # each gives a token
        setattr(runner, step, partial(made_one, getattr(runner, step)))
    asking.start()
    asking.wait()
    yield asking
    del runner.read, runner.step


@pytest.fixture
def picture() -> Image.Image:
    return Image.linear_gradient("L").convert("RGB")


def ask(asking: Asking, picture: Image.Image, *, session: str = "me", tokens: int = LONG) -> Generator[Step]:
    number = asking.new_question(session)
    return asking.ask(session, number, chat_about("What is this?", [picture]), max_new_tokens=tokens)


def read(steps: Iterator[Step], *, words: int) -> Step:
    """Read until so many words are there."""
    return next(step for step in steps if len(step.text.split()) >= words)


def generating(asking: Asking) -> bool:
    """Whether any answer is still being written, or waits to be."""
    engine = asking._models[0].result().engine
    return bool(engine._waiting) or any(slot.job is not None for slot in engine.slots)


# ---- asking


def test_an_answer_grows_and_comes_with_its_trace(asking: Asking, picture: Image.Image) -> None:
    steps = list(ask(asking, picture, tokens=12))
    texts = [step.text for step in steps]
    assert texts == sorted(texts, key=len) and len(set(texts)) > 5
    answer = steps[-1].answer
    assert answer is not None and answer.trace is not None
    assert answer.usage.completion_tokens == 12 and not answer.finished
    assert all(step.answer is None for step in steps[:-1])


def test_stop_ends_generation_and_gives_what_was_written(asking: Asking, picture: Image.Image) -> None:
    steps = ask(asking, picture)
    text = read(steps, words=3).text
    answer = asking.stop("me")
    assert answer is not None and answer.text.startswith(text.strip()) and not answer.finished
    assert 3 <= answer.usage.completion_tokens < LONG
    assert not generating(asking)
    assert list(steps) == [], "a question that was stopped says nothing more"
    assert asking.stop("me") is None


def test_a_new_question_ends_the_one_before(asking: Asking, picture: Image.Image) -> None:
    first = ask(asking, picture)
    read(first, words=3)
    second = ask(asking, picture, tokens=8)
    assert not generating(asking)
    assert asking.made < LONG
    assert list(first) == []
    assert list(second)[-1].answer is not None


def test_somebody_who_goes_away_ends_their_own_answer_only(asking: Asking, picture: Image.Image) -> None:
    mine, yours = ask(asking, picture, session="me"), ask(asking, picture, session="you", tokens=40)
    read(mine, words=3)
    read(yours, words=3)
    mine.close()  # as Gradio does when the browser has gone
    assert list(yours)[-1].answer is not None
    assert not generating(asking)


def test_a_question_that_is_withdrawn_before_its_turn_generates_nothing(asking: Asking, picture: Image.Image) -> None:
    steps = ask(asking, picture)
    assert asking.stop("me") is None
    assert list(steps) == []
    assert list(asking.ask("me", 0, chat_about("What is this?", [picture]), max_new_tokens=8)) == []
    assert asking.made == 0


def test_asking_while_the_model_loads_says_so(model: MultiModalModel, picture: Image.Image) -> None:
    loaded = threading.Event()

    def load() -> MultiModalModel:
        loaded.wait(60)
        return model

    asking = Asking(load)
    asking.start()
    steps = ask(asking, picture, tokens=4)
    assert next(steps).doing == "loading"
    loaded.set()
    assert list(steps)[-1].answer is not None


def test_a_question_can_be_withdrawn_while_the_model_loads(picture: Image.Image) -> None:
    asking = Asking(MultiModalModel.from_pretrained)  # never started
    steps = ask(asking, picture)
    assert next(steps).doing == "loading"
    asking.stop("me")
    assert list(steps) == []


def test_errors_reach_the_asker(model: MultiModalModel, picture: Image.Image) -> None:
    def fail() -> MultiModalModel:
        raise ModelError("there is no such model")

    asking = Asking(fail)
    asking.start()
    with pytest.raises(ModelError, match="no such model"):
        asking.wait()
    with pytest.raises(ModelError, match="no such model"):
        list(ask(asking, picture))
    working = Asking(lambda: model)
    working.start()
    with pytest.raises(ModelError, match="exceeds"):
        list(ask(working, picture, tokens=10**6))
    assert list(ask(working, picture, tokens=4))[-1].answer is not None


# ---- what is said of an answer


@pytest.fixture(scope="module")
def answer(model: MultiModalModel) -> Answer:
    return model("What is this?", Image.linear_gradient("L"), max_new_tokens=6, trace=True)


def test_figures_say_what_confidence_is(answer: Answer) -> None:
    text = figures(replace(answer, confidence=0.615))
    assert "62 %" in text or "61 %" in text
    assert "the chance that the whole answer is right" in text and "far off" in text
    assert "cut short" in text and "cut short" not in figures(replace(answer, finished=True))


def test_an_unsure_answer_is_said_to_be_unsure(answer: Answer) -> None:
    unsure = replace(answer, confidence=0.314, unsure=True)
    assert "The model is not sure" in unsure_notice(unsure) and "31 %" in unsure_notice(unsure)
    assert "less than 1 %" in unsure_notice(replace(unsure, confidence=1e-9))
    assert unsure_notice(replace(answer, confidence=0.0)) == ""


def test_the_asker_says_how_sure_is_sure(asking: Asking, picture: Image.Image) -> None:
    for least, unsure in ((0.0, False), (1.0, True)):
        number = asking.new_question("me")
        *_, last = asking.ask(
            "me", number, chat_about("What is this?", [picture]), max_new_tokens=3, min_confidence=least
        )
        assert last.answer is not None and last.answer.unsure is unsure


@pytest.fixture(scope="module")
def adapter_folder(model: MultiModalModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of the tiny model with random weights, under which it says something else."""
    from multimodal.adapters import attach, detach, save_adapter
    from multimodal.training.adapt import adapted_layers

    folder = tmp_path_factory.mktemp("adapters") / "shop"
    attach(model.model, adapted_layers(model.model), name="new", rank=2, scale=4.0)
    for name, parameter in model.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=2.0, generator=torch.Generator().manual_seed(0))
    save_adapter(model.model, "new", folder, base=model.name)
    detach(model.model, "new")
    return folder


def test_each_asker_has_their_own_adapter(tiny_folder: Path, adapter_folder: Path, picture: Image.Image) -> None:
    adapters = app._adapters([], str(adapter_folder.parent))
    asking = Asking(lambda: app._load(str(tiny_folder), adapters))
    asking.start()

    def begin(session: str, adapter: str | None) -> Generator[Step]:
        number = asking.new_question(session)
        return asking.ask(session, number, chat_about("What is this?", [picture]), max_new_tokens=12, adapter=adapter)

    alone = {adapter: list(begin("me", adapter))[-1].text for adapter in (None, "shop")}
    assert alone[None] != alone["shop"]
    mine, yours = begin("me", None), begin("you", "shop")
    read(mine, words=2)  # and while this is being written
    texts: dict[str, str] = {}
    asker = threading.Thread(target=lambda: texts.update(yours=list(yours)[-1].text))
    asker.start()
    texts["mine"] = list(mine)[-1].text
    asker.join(60)
    assert texts == {"mine": alone[None], "yours": alone["shop"]}
    with pytest.raises(AdapterError, match="no adapter is called 'else'"):
        list(begin("me", "else"))


def test_models_and_adapters_are_chosen_on_the_page(model: MultiModalModel, tmp_path: Path) -> None:
    options = app._parser().parse_args(["--model", "some/where/base", "--also", "other/model"])
    options.adapters = {"shop": tmp_path, "clinic": tmp_path}
    choices = app._choices(options)
    assert choices == [
        Choice("base"),
        Choice("base + shop", adapter="shop"),
        Choice("base + clinic", adapter="clinic"),
        Choice("model", model=1),
    ]
    components = build(model, tmp_path, choices=choices).get_config_file()["components"]
    props = next(block["props"] for block in components if block["props"].get("elem_id") == "model")
    assert props["value"] == 0
    assert [tuple(choice) for choice in props["choices"]] == [
        (choice.label, place) for place, choice in enumerate(choices)
    ]


def test_another_model_is_loaded_when_it_is_first_asked(model: MultiModalModel, picture: Image.Image) -> None:
    loaded: list[str] = []

    def load(name: str) -> MultiModalModel:
        loaded.append(name)
        return model

    asking = Asking(partial(load, "first"), partial(load, "second"))
    asking.start()
    asking.wait()
    assert loaded == ["first"]
    for _ in range(2):
        number = asking.new_question("me")
        *_, last = asking.ask("me", number, chat_about("What is this?", [picture]), max_new_tokens=3, model=1)
        assert last.answer is not None
    assert loaded == ["first", "second"]


def test_adapters_by_flag_and_environment(adapter_folder: Path, tmp_path: Path) -> None:
    assert app._parser().parse_args(["--adapter", "a", "--adapter", "b"]).adapter == [Path("a"), Path("b")]
    assert app._adapters([], None) == {}
    assert app._adapters([adapter_folder], str(adapter_folder)) == {"shop": adapter_folder}
    with pytest.raises(ValueError, match=r"MULTIMODAL_ADAPTERS=\S+: no adapter lies there"):
        app._adapters([], str(tmp_path))
    with pytest.raises(ValueError, match=r"--adapter \S+: there is no adapter; `multimodal adapt` makes one"):
        app._adapters([tmp_path], None)
    (tmp_path / "shop").mkdir()
    (tmp_path / "shop" / app.ADAPTER).write_text("{}")
    with pytest.raises(ValueError, match="two adapters of one name"):
        app._adapters([adapter_folder, tmp_path / "shop"], None)


def test_every_word_is_a_button_under_a_bar_of_its_openness() -> None:
    text = word_buttons([Word("Left", 0, 1, 0.25), Word("lung", 1, 2, 0.5)])
    assert text.count("<button") == 3 and 'data-word="-1" aria-pressed="true"' in text
    assert "height:50.0%" in text and "height:100.0%" in text
    assert "they end at 0.5" in text


def test_what_a_model_or_a_person_wrote_is_escaped() -> None:
    evil = "<script>alert(1)</script>\"'"
    for text in (word_buttons([Word(evil, 0, 1, 0.1)]), doing(evil)):
        assert "<script" not in text and "&lt;script" in text and "\"'" not in text


def test_heat_is_explained(answer: Answer) -> None:
    assert "4.2 times" in heat_legend(4.2, 4.2)
    assert "shut" in heat_legend(0.0, 3.0)


def test_attention_to_a_word_and_to_the_whole_answer(answer: Answer, picture: Image.Image) -> None:
    turn = Turn("What is this?", (picture,), seen=(picture,), text=answer.text, answer=answer)
    drawings = [attention_picture(turn, index)[0] for index in (-1, 0, 1)]
    assert all(drawing.size == picture.size for drawing in drawings)
    assert drawings[1].tobytes() != drawings[2].tobytes()
    assert attention_picture(turn, 10**6)[0].tobytes() == drawings[0].tobytes(), "no such word: the whole answer"


def test_attention_to_several_pictures_is_shown_side_by_side(model: MultiModalModel, picture: Image.Image) -> None:
    pictures = (picture, picture.rotate(90).resize((64, 128)), picture)
    answer = model("Which of them?", list(pictures), max_new_tokens=3, trace=True)
    turn = Turn("Which of them?", pictures, seen=pictures, text=answer.text, answer=answer)
    sheet, legend = attention_picture(turn, -1)
    assert sheet.size == (256 + 8 + 256, 256 + 8 + 256) or sheet.size == (256 + 8 + 64, 256 + 8 + 256)
    assert "times" in legend


def test_both_languages_say_the_same_things() -> None:
    assert WORDS["en"].keys() == WORDS["zh"].keys()
    for key, text in WORDS["en"].items():
        other = WORDS["zh"][key]
        assert set(re.findall(r"{(\w+)", text)) == set(re.findall(r"{(\w+)", other)), key
        assert set(re.findall(r"</?\w+", text)) == set(re.findall(r"</?\w+", other)), key


# ---- the page and its start


def build(model: MultiModalModel, folder: Path, **options: Any) -> Any:
    """The page, with comparisons of the same model."""
    asking, feedback = Asking(lambda: model), Feedback(folder)
    comparing = Comparing(asking, model_name="tiny", feedback=feedback)
    choosing = Choosing(Path("nowhere"), anywhere=True)
    return page.build(asking, feedback, comparing=comparing, choosing=choosing, **options)


def test_the_page_reports_nothing_and_names_no_other_host(model: MultiModalModel, tmp_path: Path) -> None:
    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    blocks = build(model, tmp_path, choices=[Choice("tiny")])
    config = str(blocks.get_config_file())
    assert not blocks.analytics_enabled
    assert config.count('"key": "notice"') == 3, "in each tab with answers"
    assert "Not a medical device" in page.launch_options()["i18n"].translations_dict["en"]["notice"]
    assert "googleapis" not in config and "gstatic" not in config
    options = page.launch_options()
    assert not options["theme"]._stylesheets
    assert options["max_file_size"] and not options["run_history"] and not options["share"]


@pytest.mark.parametrize("again", [False, True])
def test_a_batch_that_is_cancelled_before_its_first_picture_says_so(
    again: bool, asking: Asking, picture: Image.Image, tmp_path: Path
) -> None:
    """And one says nothing when its asker has begun another."""
    with gr.Blocks() as blocks:
        batch_tab(asking)
    named = {function.name: function.fn for function in blocks.fns.values()}
    asker: Any = SimpleNamespace(session_hash="me", headers={})
    picture.save(tmp_path / "one.png")
    paths = [str(tmp_path / "one.png")]
    number, *_ = named["begin"](paths, "What is this?", asker)
    named["stop"](asker)
    if again:
        named["begin"](paths, "What is this?", asker)
    told = list(named["tell"](number, paths, "What is this?", 8, asker))[1:]
    assert bool(told) is not again
    if told:
        status, *_, start, cancel = told[-1]
        assert "Cancelled after 0 of 1 pictures." in status and start.visible and not cancel.visible
    assert asking.made == 0


def test_the_page_is_made_without_what_comparisons_need() -> None:
    heavy = ["multimodal.compare", "multimodal.pipelines", "matplotlib", "torch", "transformers"]
    code = f"import sys, demo.page; print([name for name in {heavy} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=500)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_only_this_machine_may_name_any_folder() -> None:
    assert app._is_here("127.0.0.1") and app._is_here("localhost") and app._is_here("::1")
    assert not app._is_here("0.0.0.0") and not app._is_here("example.org")


def test_pictures_are_made_small_enough_to_keep() -> None:
    image = Image.new("RGB", (5000, 100))
    assert shared.fitted(image, 2048).size == (2048, 41) and image.size == (5000, 100)
    assert shared.fitted(Image.new("RGB", (50, 10)), 2048).size == (50, 10)


def test_what_is_shown_again_is_not_written_again(
    answer: Answer, picture: Image.Image, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It may be on its way to a page, which would get half a picture."""
    monkeypatch.setenv("GRADIO_TEMP_DIR", str(tmp_path))
    turn = Turn("What is this?", (picture,), seen=(picture,), text=answer.text, answer=answer)
    path, legend = _looked(turn, -1, "en")
    before = Path(path).stat().st_ino
    assert _looked(turn, -1, "en") == (path, legend) and Path(path).stat().st_ino == before
    assert _looked(turn, 0, "en")[0] != path, "another word, another picture"
    clear = Image.new("RGBA", (8, 2))
    assert Image.open(shared.shown_file(clear, 8)).getpixel((0, 0)) == (0, 0, 0, 0)
    assert Image.open(shared.shown_file(picture, 4)).size != Image.open(shared.shown_file(picture)).size
    shown = [Path(path) for path, _ in shared.thumbnails()]
    assert shown == [Path(path) for path, _ in shared.thumbnails()] and all(path.is_file() for path in shown)
    assert not list(tmp_path.rglob("*-*.*")), "an unfinished file is left"


def test_the_model_is_chosen_by_flag_or_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MULTIMODAL_MODEL", raising=False)
    assert app._parser().parse_args([]).model == "embedded"
    assert app._parser().parse_args([]).host == "127.0.0.1"
    monkeypatch.setenv("MULTIMODAL_MODEL", "mine")
    assert app._parser().parse_args([]).model == "mine"
    assert app._parser().parse_args(["--model", "other", "--port", "7000"]).model == "other"


def test_a_missing_model_ends_the_demo_with_one_line(tmp_path: Path) -> None:
    missing = str(tmp_path / "nowhere")
    done = subprocess.run(
        [sys.executable, "-m", "demo.app", "--model", missing, "--port", str(free_port())],
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=500,
        env={**os.environ, "TMPDIR": str(tmp_path)},
    )
    assert done.returncode == 1
    assert "Open http://127.0.0.1:" in done.stdout
    assert "there is no trained model" in done.stderr and "Traceback" not in done.stderr
    assert not list(tmp_path.glob("multimodal-demo-*")), "its folder is gone"
