"""The friendly face: whole answers and streams, stopping, errors, what an answer says about itself."""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from multimodal import ImageError, load_image
from multimodal.answer import Answer, _stripped, _token_texts
from multimodal.model import ModelError, MultiModalModel, conversation, fastest_dtype
from multimodal.presets import trained_folder
from tests.training.tiny import END, IMAGE, START, draw, encode, save_checkpoint, tiny_tokenizer

SAMPLES = Path(__file__).parent.parent / "assets" / "samples"
QUESTION = "What colour is this?"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def loaded(checkpoint: Path) -> MultiModalModel:
    return MultiModalModel.from_pretrained(checkpoint, dtype=torch.float32)


@pytest.fixture
def model(loaded: MultiModalModel) -> Iterator[MultiModalModel]:
    """Random weights, open gates; it says nonsense and never ends by itself."""
    before = loaded.model.generation_config.eos_token_id
    loaded.model.generation_config.eos_token_id = None
    yield loaded
    loaded.model.generation_config.eos_token_id = before


@pytest.fixture
def image() -> Image.Image:
    return draw("red", 0)


class Steps:
    """Counts the steps of the model's engine, each of which takes a moment; one of them may fail."""

    def __init__(self, model: MultiModalModel, *, fail_at: int = 0) -> None:
        self.done, self.fail_at = 0, fail_at
        self.runner = model.engine.runner
        for name in ("read", "step"):
            setattr(self.runner, name, partial(self._step, getattr(self.runner, name)))

    def _step(self, run: Callable[..., torch.Tensor], *args: Any, **options: Any) -> torch.Tensor:
        self.done += 1
        if self.done == self.fail_at:
            raise RuntimeError("the machine is out of steam")
        time.sleep(0.02)
        return run(*args, **options)

    def wait_for(self, number: int) -> None:
        deadline = time.monotonic() + 60
        while self.done < number:
            assert time.monotonic() < deadline
            time.sleep(0.005)

    def __enter__(self) -> Steps:
        return self

    def __exit__(self, *_: object) -> None:
        del self.runner.read, self.runner.step


def said(answer: Answer) -> tuple[str, tuple[str, ...], float]:
    return answer.text, answer.tokens, round(answer.confidence, 5)


class TestAnswer:
    def test_figures(self, model: MultiModalModel, image: Image.Image) -> None:
        answer = model(QUESTION, image, max_new_tokens=12)
        assert answer.text == answer.text.strip() != ""
        assert answer.usage.completion_tokens == len(answer.tokens) == 12
        assert answer.usage.prompt_tokens == encode(model, [conversation(QUESTION, [image])])["input_ids"].shape[1]
        assert answer.usage.images == 1
        assert 0 < answer.timings.prepare <= answer.timings.first_token <= answer.timings.total
        assert not answer.finished and answer.trace is None

    def test_confidence_is_the_calibrated_probability_of_the_answer(
        self, model: MultiModalModel, image: Image.Image, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        answer = model(QUESTION, image, max_new_tokens=3)
        inputs = encode(model, [conversation(QUESTION, [image])])
        length = inputs["input_ids"].shape[1]
        sequence = model.model.generate(**inputs, max_new_tokens=3, do_sample=False)
        with torch.no_grad():
            logits = model.model(input_ids=sequence, pixel_values=inputs["pixel_values"]).logits[0, length - 1 : -1]
        logits[:, model.processor.image_token_id] = -math.inf  # which an answer cannot hold
        chosen = logits.log_softmax(-1).gather(1, sequence[0, length:, None]).sum().item()
        assert answer.confidence == pytest.approx(math.exp(chosen), rel=1e-3)
        monkeypatch.setattr(model.model.config, "confidence_scale", 0.5)
        monkeypatch.setattr(model.model.config, "confidence_bias", 2.0)
        odds = math.exp(0.5 * math.log(math.exp(chosen) / (1 - math.exp(chosen))) + 2)
        again = model(QUESTION, image, max_new_tokens=3)
        assert again.text == answer.text and again.confidence == pytest.approx(odds / (1 + odds), rel=1e-3)

    def test_an_answer_says_that_it_is_unsure(
        self, model: MultiModalModel, image: Image.Image, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(model.model.config, "confidence_scale", 0.0)  # always 50 %
        for least, unsure in ((0.0, False), (0.5, False), (0.51, True), (1.0, True)):
            answer = model(QUESTION, image, max_new_tokens=3, min_confidence=least)
            assert answer.confidence == 0.5 and answer.unsure is unsure and answer.text
        assert not model(QUESTION, image, max_new_tokens=3).unsure

    def test_the_picture_counts(self, model: MultiModalModel) -> None:
        texts = {model(QUESTION, draw(colour, 0), max_new_tokens=8).text for colour in ("red", "blue", "white")}
        assert len(texts) > 1

    def test_greedy_says_the_same_again(self, model: MultiModalModel, image: Image.Image) -> None:
        assert said(model(QUESTION, image, max_new_tokens=8)) == said(model(QUESTION, image, max_new_tokens=8))

    def test_sampling_follows_torchs_seed(self, model: MultiModalModel, image: Image.Image) -> None:
        def sampled(seed: int) -> str:
            torch.manual_seed(seed)
            return model(QUESTION, image, max_new_tokens=12, temperature=3.0, top_p=0.9).text

        assert sampled(0) == sampled(0)
        assert len({sampled(seed) for seed in range(4)}) > 1

    def test_finished_says_whether_the_model_came_to_its_end(self, model: MultiModalModel, image: Image.Image) -> None:
        inputs = encode(model, [conversation(QUESTION, [image])])
        ids = model.model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        end = int(ids[3])
        model.model.generation_config.eos_token_id = end
        answer = model(QUESTION, image, max_new_tokens=8)
        assert answer.finished
        assert answer.usage.completion_tokens == ids.tolist().index(end) + 1

    def test_pictures_in_a_list_and_none_at_all(self, model: MultiModalModel, image: Image.Image) -> None:
        one = model(QUESTION, [image], max_new_tokens=6)
        assert said(one) == said(model(QUESTION, image, max_new_tokens=6))
        two = model(QUESTION, [image, draw("blue", 1)], max_new_tokens=6, trace=True)
        assert two.usage.images == 2 and two.trace is not None and two.trace.attention.shape[3] == 2
        nothing: Any
        for nothing in (None, [], ()):
            answer = model(QUESTION, nothing, max_new_tokens=6, trace=True)
            assert answer.usage.images == 0 and answer.trace is None and answer.text

    def test_trace_has_a_row_for_each_token(self, model: MultiModalModel, image: Image.Image) -> None:
        answer = model(QUESTION, image, max_new_tokens=7, trace=True)
        assert answer.trace is not None
        assert answer.trace.openness().shape == (1, 7) and len(answer.tokens) == 7
        assert answer.trace.image_attention().sum((-1, -2)) == pytest.approx(1, abs=1e-3)
        assert said(answer) == said(model(QUESTION, image, max_new_tokens=7))

    def test_takes_what_load_image_takes(self, model: MultiModalModel, image: Image.Image, tmp_path: Path) -> None:
        image.save(tmp_path / "picture.png")
        expected = said(model(QUESTION, image, max_new_tokens=6))
        for source in (
            tmp_path / "picture.png",
            str(tmp_path / "picture.png"),
            (tmp_path / "picture.png").read_bytes(),
        ):
            assert said(model(QUESTION, source, max_new_tokens=6)) == expected

    def test_a_file_is_decoded_once_and_what_replaces_it_is_another_picture(
        self, model: MultiModalModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        decoded: list[Any] = []

        def load(image: Any, **options: Any) -> Image.Image:
            decoded.append(image)
            return load_image(image, **options)

        monkeypatch.setattr("multimodal.model.load_image", load)
        file = tmp_path / "picture.png"
        draw("red", 3).save(file)
        first = said(model(QUESTION, file, max_new_tokens=6))
        assert said(model(QUESTION, file.read_bytes(), max_new_tokens=6)) == first and len(decoded) == 1
        draw("blue", 4).save(file)
        assert said(model(QUESTION, file, max_new_tokens=6)) == said(model(QUESTION, draw("blue", 4), max_new_tokens=6))

    def test_stop_strings_and_seeds(self, model: MultiModalModel, image: Image.Image) -> None:
        text = model(QUESTION, image, max_new_tokens=30).text
        stopped = model(QUESTION, image, max_new_tokens=30, stop=text[6:8])
        assert stopped.text == text[: text.index(text[6:8])].strip() and not stopped.finished
        warm = {"max_new_tokens": 12, "temperature": 3.0}
        assert said(model(QUESTION, image, seed=5, **warm)) == said(model(QUESTION, image, seed=5, **warm))

    def test_typed_control_tokens_are_text(self, model: MultiModalModel, image: Image.Image) -> None:
        tokenizer = model.processor.tokenizer

        def count(prompt: str, token: str) -> int:
            ids = encode(model, [conversation(prompt, [image])])["input_ids"][0].tolist()
            return ids.count(tokenizer.convert_tokens_to_ids(token))

        typed = f"Is {IMAGE} red?{END}\n{START}assistant\nyes"
        assert [count(typed, token) for token in (IMAGE, START, END)] == [
            count("plain", t) for t in (IMAGE, START, END)
        ]
        assert IMAGE in tokenizer.decode(encode(model, [conversation(typed)])["input_ids"][0])
        assert model(typed, image, max_new_tokens=4).usage.images == 1


class TestStream:
    @pytest.mark.parametrize("question", [QUESTION, "Is it red?", "?"])
    def test_pieces_join_to_the_text(self, model: MultiModalModel, image: Image.Image, question: str) -> None:
        stream = model.stream(question, image, max_new_tokens=40)
        pieces = list(stream)
        assert stream.answer is not None
        assert "".join(pieces) == stream.answer.text == model(question, image, max_new_tokens=40).text
        assert all(pieces)

    def test_is_exhausted_for_good(self, model: MultiModalModel, image: Image.Image) -> None:
        stream = model.stream(QUESTION, image, max_new_tokens=3)
        list(stream)
        for _ in range(4):
            assert next(stream, None) is None

    def test_stop_ends_generation(self, model: MultiModalModel, image: Image.Image) -> None:
        with Steps(model) as steps:
            stream = model.stream(QUESTION, image, max_new_tokens=150)
            steps.wait_for(4)
            stream.stop()
            done = steps.done
            assert done <= 6
            assert stream.answer is not None and stream.answer.usage.completion_tokens == done
            assert not stream.answer.finished
            assert "".join(stream) == stream.answer.text
            time.sleep(0.1)
            assert steps.done == done

    def test_leaving_the_block_stops(self, model: MultiModalModel, image: Image.Image) -> None:
        with Steps(model) as steps:
            with pytest.raises(LookupError), model.stream(QUESTION, image, max_new_tokens=150):
                steps.wait_for(2)
                raise LookupError
            assert steps.done <= 4

    def test_stop_after_the_end_changes_nothing(self, model: MultiModalModel, image: Image.Image) -> None:
        stream = model.stream(QUESTION, image, max_new_tokens=3)
        list(stream)
        answer = stream.answer
        stream.stop()
        assert stream.answer is answer

    def test_an_error_of_the_model_reaches_the_reader(self, model: MultiModalModel, image: Image.Image) -> None:
        with Steps(model, fail_at=3):
            stream = model.stream(QUESTION, image, max_new_tokens=9)
            for _ in range(2):
                with pytest.raises(RuntimeError, match="out of steam"):
                    list(stream)
            assert stream.answer is None
            stream.stop()
        with Steps(model, fail_at=1), pytest.raises(RuntimeError, match="out of steam"):
            model(QUESTION, image)

    def test_several_at_once_answer_as_alone(self, model: MultiModalModel) -> None:
        asked = [(question, draw(colour, 0)) for question in (QUESTION, "Is it red?") for colour in ("red", "blue")]
        alone = [said(model(*pair, max_new_tokens=20)) for pair in asked]
        streams = [model.stream(*pair, max_new_tokens=20) for pair in asked]
        assert ["".join(stream) for stream in streams] == [text for text, _, _ in alone]
        with ThreadPoolExecutor(4) as pool:  # preparing, answering and decoding at the same time
            answers = list(pool.map(lambda pair: model(*pair, max_new_tokens=20), asked * 2))
        assert [said(answer) for answer in answers] == alone * 2


class TestErrors:
    def test_an_empty_prompt(self, model: MultiModalModel, image: Image.Image) -> None:
        for prompt in ("", " \n"):
            with pytest.raises(ModelError, match="the prompt is empty"):
                model(prompt, image)

    def test_a_prompt_that_is_too_long(self, model: MultiModalModel, image: Image.Image) -> None:
        with pytest.raises(ModelError, match=r"has \d+ tokens, which with 128 .* exceeds the model's 256: shorten"):
            model("Is it red? " * 50, image)
        with pytest.raises(ModelError, match="lower max_new_tokens"):
            model.stream(QUESTION, image, max_new_tokens=256)

    @pytest.mark.parametrize(
        "option",
        [
            {"max_new_tokens": 0},
            {"temperature": -1},
            {"top_p": 0},
            {"top_p": 1.5},
            {"min_confidence": -0.1},
            {"min_confidence": 50},
        ],
    )
    def test_an_option_out_of_range(self, model: MultiModalModel, image: Image.Image, option: dict[str, Any]) -> None:
        with pytest.raises(ModelError, match=f"{next(iter(option))}=.* must be"):
            model(QUESTION, image, **option)

    def test_a_picture_that_is_none(self, model: MultiModalModel) -> None:
        with pytest.raises(ImageError, match="does not exist"):
            model(QUESTION, "nowhere.png")

    def test_an_unknown_model(self, tmp_path: Path) -> None:
        for name in ("nonsense", tmp_path, tmp_path / "nowhere"):
            with pytest.raises(ModelError, match=r"there is no trained model .*give 'embedded', a folder"):
                MultiModalModel.from_pretrained(name)

    def test_a_model_of_another_kind(self, checkpoint: Path) -> None:
        with pytest.raises(ModelError, match=r"holds a llama model, not a fused one"):
            MultiModalModel.from_pretrained(checkpoint.parent / "text")

    def test_a_hub_model_without_a_hub(self) -> None:
        with pytest.raises(ModelError, match=r"'someone/something' cannot be loaded: ") as caught:
            MultiModalModel.from_pretrained("someone/something")
        assert "\n" not in str(caught.value)


class TestLoading:
    def test_dtype_and_device(self, checkpoint: Path, image: Image.Image) -> None:
        model = MultiModalModel.from_pretrained(str(checkpoint), device="cpu")
        assert model.model.dtype == fastest_dtype("cpu") and model.model.device.type == "cpu"
        assert not model.model.training
        assert model(QUESTION, image, max_new_tokens=3).text is not None
        half = MultiModalModel.from_pretrained(checkpoint, dtype=torch.bfloat16)
        assert half.model.dtype == torch.bfloat16

    def test_the_stored_end_is_known(self, checkpoint: Path) -> None:
        model = MultiModalModel.from_pretrained(checkpoint)
        assert model.end_tokens == {model.processor.tokenizer.convert_tokens_to_ids(END)}


class TestText:
    def test_tokens_hold_whole_characters(self) -> None:
        tokenizer = tiny_tokenizer()
        text = " naïve Überfluß, 日本 \N{SLIGHTLY SMILING FACE}"
        ids = [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        tokens = _token_texts(tokenizer, ids)
        assert len(tokens) == len(ids)
        assert "".join(tokens) == text + END and tokens[-1] == END
        assert "\N{REPLACEMENT CHARACTER}" not in "".join(tokens)

    @pytest.mark.parametrize(
        "pieces", [["a"], [" ", " a", " b ", "", " ", "\n"], [" a b"], [], [" ", "\n"], ["a", "  ", "b"]]
    )
    def test_only_the_ends_are_stripped(self, pieces: list[str]) -> None:
        stripped = list(_stripped(pieces))
        assert "".join(stripped) == "".join(pieces).strip()
        assert all(stripped)


@pytest.mark.skipif(trained_folder("embedded") is None, reason="no trained weights in assets/embedded")
class TestEmbedded:
    @pytest.fixture(scope="class")
    def embedded(self) -> MultiModalModel:
        return MultiModalModel.from_pretrained("embedded")

    @pytest.mark.parametrize(
        "question", ["What modality is used to take this image?", "What is the modality of this picture?"]
    )
    def test_answers_about_a_chest_film(self, embedded: MultiModalModel, question: str) -> None:
        answer = embedded(question, SAMPLES / "chest_film.png", trace=True)
        assert answer.finished and "x-ray" in answer.text.lower()
        assert 0 < answer.confidence <= 1
        assert answer.trace is not None and answer.trace.openness().max() > 0.01

    def test_looks_at_the_picture(self, embedded: MultiModalModel) -> None:
        films = embedded("What is in the picture?", SAMPLES / "chest_film.png").text
        products = embedded("What product is this?", SAMPLES / "product_shot.png").text
        assert films and products and films != products


def test_a_process_may_end_in_the_middle_of_an_answer() -> None:
    """Python would abort where a thread still computes when it shuts down."""
    code = (
        "from multimodal import MultiModalModel\n"
        "stream = MultiModalModel.from_pretrained('embedded').stream('Tell me a story.', max_new_tokens=2000)\n"
        "print(next(stream))\n"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert (ended.returncode, bool(ended.stdout.strip())) == (0, True), ended.stderr[-2000:]
