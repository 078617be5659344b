"""The engine against ``generate``: alone and in company, with what it knows already, and when something goes wrong."""

from __future__ import annotations

import asyncio
import math
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from multimodal.engine import EngineError, EngineFull, Request
from multimodal.engine.modules import ModuleRunner
from multimodal.engine.runner import Row, TorchRunner
from multimodal.fusion import FusionForConditionalGeneration
from tests.engine.conftest import MakeEngine, expected, mixed_requests, request
from tests.fusion.tiny import IMAGE, tiny_model, words

SIZES = {"slots": 4, "positions": 256, "pictures": 4}


def ids(generation: Any) -> list[int]:
    return [token.id for token in generation.tokens]


def idle(engine: Any) -> bool:
    """Nothing is left behind: no job, no waiting request, no thread."""
    deadline = time.monotonic() + 10
    while engine._thread is not None and time.monotonic() < deadline:
        time.sleep(0.005)
    return engine._thread is None and not engine._waiting and all(slot.job is None for slot in engine.slots)


class SlowRunner(TorchRunner):
    """Counts steps, takes its time, and may fail for some slots."""

    def __init__(self, *args: Any, pause: float = 0.0, **options: Any) -> None:
        super().__init__(*args, **options)
        self.pause, self.steps, self.rows, self.poisoned = pause, 0, 0, set[int]()

    def step(self, rows: Sequence[Row], adapter: str | None = None) -> torch.Tensor:
        self.steps += 1
        self.rows += len(rows)
        time.sleep(self.pause)
        if any(row.token in self.poisoned for row in rows):
            raise RuntimeError("the machine is out of steam")
        return super().step(rows, adapter)


@pytest.fixture
def slow(model: FusionForConditionalGeneration) -> SlowRunner:
    return SlowRunner(model, torch.float32, **SIZES, pause=0.005)


class TestAnswers:
    @pytest.mark.parametrize(
        "options", [{}, {"gate": "tanh"}, {"visibility": "latest"}, {"qk_norm": False}], ids=lambda o: str(o)
    )
    @pytest.mark.parametrize("kind", ["flat", "modules"])
    def test_alone_and_in_company_as_generate(self, make: MakeEngine, options: dict[str, Any], kind: str) -> None:
        model = tiny_model(**options)
        model.generation_config.eos_token_id = None
        runner = ModuleRunner(model, **SIZES) if kind == "modules" else TorchRunner(model, torch.float32, **SIZES)
        engine = make(model, runner=runner, read_at_once=8)
        asked = mixed_requests()
        said = [expected(model, its) for its in asked]
        assert [ids(engine.generate([its])[0]) for its in asked] == said
        assert [ids(generation) for generation in engine.generate(asked * 3)] == said * 3
        assert idle(engine)

    def test_ends_where_the_model_does(self, make: MakeEngine, model: FusionForConditionalGeneration) -> None:
        asked = request([IMAGE, *words(5)])
        said = expected(model, asked)
        end = said[4]
        model.generation_config.eos_token_id = [end]
        try:
            (generation,) = make().generate([asked])
        finally:
            model.generation_config.eos_token_id = None
        assert ids(generation) == said[: said.index(end) + 1] and generation.reason == "end"
        (generation,) = make().generate([asked])
        assert generation.reason == "length" and len(generation.tokens) == 10

    def test_log_probabilities(self, make: MakeEngine, model: FusionForConditionalGeneration) -> None:
        asked = request([*words(3), IMAGE, *words(5)], max_new_tokens=4)
        (generation,) = make().generate([asked])
        tokens = torch.tensor([[*asked.tokens, *ids(generation)]])
        pixels = torch.stack([picture.pixel_values for picture in asked.pictures])[None]
        with torch.no_grad():
            logits = model(input_ids=tokens, pixel_values=pixels).logits[0, len(asked.tokens) - 1 : -1]
        logits[:, IMAGE] = -torch.inf  # which an answer cannot hold
        chosen = logits.log_softmax(-1).gather(1, tokens[0, len(asked.tokens) :, None])[:, 0]
        assert [token.logprob for token in generation.tokens] == pytest.approx(chosen.tolist(), abs=1e-4)

    def test_the_likeliest_tokens_of_each_step(self, make: MakeEngine, model: FusionForConditionalGeneration) -> None:
        asked = request([*words(3), IMAGE, *words(5)], max_new_tokens=4, top_logprobs=3)
        (generation, without) = make().generate([asked, request(words(4), max_new_tokens=2)])
        tokens = torch.tensor([[*asked.tokens, *ids(generation)]])
        pixels = torch.stack([picture.pixel_values for picture in asked.pictures])[None]
        with torch.no_grad():
            logits = model(input_ids=tokens, pixel_values=pixels).logits[0, len(asked.tokens) - 1 : -1]
        logits[:, IMAGE] = -torch.inf
        values, likeliest = logits.log_softmax(-1).topk(3)
        for token, their_ids, their_values in zip(generation.tokens, likeliest, values, strict=True):
            assert [pair[0] for pair in token.top_logprobs] == their_ids.tolist()
            assert [pair[1] for pair in token.top_logprobs] == pytest.approx(their_values.tolist(), abs=1e-4)
            assert token.top_logprobs[0] == (token.id, pytest.approx(token.logprob, abs=1e-5))
        assert all(token.top_logprobs == () for token in without.tokens)
        (everything,) = make().generate([request(words(4), max_new_tokens=1, top_logprobs=97)])
        assert IMAGE not in dict(everything.tokens[0].top_logprobs)  # it cannot be said
        assert sum(math.exp(value) for _, value in everything.tokens[0].top_logprobs) == pytest.approx(1)

    @pytest.mark.parametrize("penalty", [1.3, 0.7])
    def test_a_repetition_penalty(
        self, make: MakeEngine, model: FusionForConditionalGeneration, monkeypatch: pytest.MonkeyPatch, penalty: float
    ) -> None:
        """Of a request, or of the model's generation configuration; a request's own comes first."""
        asked = [request([*words(3, seed=seed), IMAGE, *words(5)], seed=seed, max_new_tokens=25) for seed in range(3)]
        plain = [expected(model, its) for its in asked]
        monkeypatch.setattr(model.generation_config, "repetition_penalty", penalty)
        said = [expected(model, its) for its in asked]
        assert said != plain
        by_configuration = make().generate(asked)
        of_their_own = make().generate([replace(its, repetition_penalty=1.0) for its in asked])
        monkeypatch.undo()
        by_request = make().generate([replace(its, repetition_penalty=penalty) for its in asked])
        assert [ids(generation) for generation in by_configuration] == said
        assert [ids(generation) for generation in by_request] == said
        assert [ids(generation) for generation in of_their_own] == plain

    def test_a_seed_gives_its_answer_in_any_company(self, make: MakeEngine) -> None:
        engine = make()
        options = {"temperature": 2.0, "top_p": 0.9}
        alone = [ids(engine.generate([request(words(5), seed=0, **options)])[0])]
        asked = [Request(words(5), (), 10, 2.0, 0.9, seed) for seed in range(5)]
        together = [ids(generation) for generation in engine.generate(asked)]
        assert together[0] == alone[0] and len(set(map(tuple, together))) > 2

    def test_stop_strings_are_not_said(self, make: MakeEngine) -> None:
        engine = make()
        (generation,) = engine.generate([request([IMAGE, *words(5)], max_new_tokens=30)])
        text = generation.text
        stop = text[8:10]
        (stopped,) = engine.generate([request([IMAGE, *words(5)], max_new_tokens=30, stop=["never", stop])])
        assert stopped.reason == "stop" and stopped.text == text[: text.index(stop)]
        (other,) = engine.generate([request([IMAGE, *words(5)], max_new_tokens=30, stop=[text[-1] + "never"])])
        assert other.reason == "length" and other.text == text


class TestWhatItKnows:
    def test_a_second_question_about_a_picture_does_not_encode_it(self, make: MakeEngine) -> None:
        engine = make()
        first, second = (request([*words(4, seed=seed), IMAGE], seed=7) for seed in (1, 2))
        engine.generate([first, second, request([*words(4, seed=1), IMAGE], seed=8)])
        assert (engine.pictures.hits, engine.pictures.misses) == (1, 2)

    def test_pictures_never_mix(self, make: MakeEngine, model: FusionForConditionalGeneration) -> None:
        """The same words, pictures of one size, interleaved, in slots that have just held another picture."""
        engine = make()
        tokens = [*words(3), IMAGE, *words(4, seed=1)]
        asked = [request(tokens, seed=seed) for seed in (1, 2, 3, 1, 3, 2, 2, 1)] * 3
        said = {seed: expected(model, request(tokens, seed=seed)) for seed in (1, 2, 3)}
        assert len({tuple(answer) for answer in said.values()}) == 3
        order = [1, 2, 3, 1, 3, 2, 2, 1] * 3
        assert [ids(generation) for generation in engine.generate(asked)] == [said[seed] for seed in order]

    def test_the_next_turn_reads_only_what_is_new(
        self, make: MakeEngine, model: FusionForConditionalGeneration
    ) -> None:
        engine = make()
        first = request([IMAGE, *words(6)])
        (answer,) = engine.generate([first])
        history = [*first.tokens, *ids(answer)]
        following = Request([*history, *words(4, seed=3)], first.pictures, 8)
        (again,) = engine.generate([following])
        assert again.reused == len(history) - 1  # the last token of an answer is said, not read
        assert ids(again) == expected(model, following)

    def test_another_picture_is_another_conversation(self, make: MakeEngine) -> None:
        engine = make()
        engine.generate([request([*words(3), IMAGE, *words(3)], seed=1)])
        (other,) = engine.generate([request([*words(3), IMAGE, *words(3)], seed=2)])
        assert other.reused == 3

    def test_a_busy_slot_lends_what_it_knows(self, make: MakeEngine, model: FusionForConditionalGeneration) -> None:
        engine = make()
        asked = [Request([*words(40), *words(2, seed=seed)], (), 30) for seed in (1, 2, 3)]
        first = engine.submit(asked[0])
        next(iter(first))
        generations = [first, *map(engine.submit, asked[1:])]
        assert all(generation.wait(10) for generation in generations)
        assert [ids(generation) for generation in generations] == [expected(model, its) for its in asked]
        assert [generation.reused for generation in generations] == [0, 40, 40]

    def test_the_picture_cache_is_bounded(self, make: MakeEngine, model: FusionForConditionalGeneration) -> None:
        engine = make(picture_bytes=3000)
        asked = [request([IMAGE, *words(2)], seed=seed, max_new_tokens=2) for seed in range(8)]
        generations = engine.generate(asked)
        assert [ids(generation) for generation in generations] == [expected(model, its) for its in asked]
        assert 0 < engine.pictures.nbytes <= 3000 and 0 < len(engine.pictures) < 8


def test_what_is_prepared_is_not_packed_again(
    make: MakeEngine, slow: SlowRunner, monkeypatch: pytest.MonkeyPatch
) -> None:
    slow.prepare()
    monkeypatch.setattr(slow, "pack", None)
    (generation,) = make(runner=slow).generate([request([IMAGE, *words(3)])])
    assert generation.error is None and len(generation.tokens) == 10


class TestScheduling:
    def test_requests_share_steps(self, make: MakeEngine, slow: SlowRunner) -> None:
        engine = make(runner=slow)
        engine.generate([request(words(4, seed=seed), max_new_tokens=20) for seed in range(4)])
        assert slow.rows == 4 * 19 and slow.steps <= 19 + 4

    def test_a_long_prompt_does_not_stall_the_others(self, make: MakeEngine, slow: SlowRunner) -> None:
        engine = make(runner=slow, read_at_once=8)
        short = engine.submit(request(words(3), max_new_tokens=30))
        next(iter(short))
        long = engine.submit(request(words(160, seed=2), max_new_tokens=2))
        long.wait()
        assert len(short.tokens) >= 15  # 20 pieces were read, and a step stood behind each

    def test_cancelling_ends_within_a_step(self, make: MakeEngine, slow: SlowRunner) -> None:
        engine = make(runner=slow)
        generation, neighbour = (engine.submit(request(words(4, seed=seed), max_new_tokens=200)) for seed in (0, 1))
        next(iter(generation))
        generation.cancel()
        count = len(generation.tokens)
        assert generation.wait(10) and generation.reason == "cancelled" and len(generation.tokens) <= count + 2
        assert not neighbour.over
        neighbour.cancel()
        assert neighbour.wait(10) and idle(engine)

    def test_a_request_that_waits_can_be_cancelled(self, make: MakeEngine, slow: SlowRunner) -> None:
        engine = make(runner=slow)
        busy = [engine.submit(request(words(4), max_new_tokens=200)) for _ in range(4)]
        waiting = engine.submit(request(words(4), max_new_tokens=200))
        waiting.cancel()
        assert waiting.wait(10) and waiting.reason == "cancelled" and not waiting.tokens
        assert not any(generation.over for generation in busy)

    def test_an_event_loop_reads_many(self, make: MakeEngine, model: FusionForConditionalGeneration) -> None:
        engine = make()
        asked = mixed_requests()

        async def read(its: Request) -> list[int]:
            return [token.id async for token in engine.submit(its)]

        async def read_all() -> list[list[int]]:
            return await asyncio.gather(*map(read, asked))

        assert asyncio.run(read_all()) == [expected(model, its) for its in asked]

    def test_closing_ends_everything(self, make: MakeEngine, slow: SlowRunner) -> None:
        engine = make(runner=slow)
        generations = [engine.submit(request(words(4), max_new_tokens=200)) for _ in range(6)]
        engine.close()
        assert all(generation.over for generation in generations) and idle(engine)
        with pytest.raises(EngineError, match="closed"):
            engine.submit(request(words(3)))
        assert not [thread for thread in threading.enumerate() if thread is engine._thread]


class TestFaults:
    def test_a_failing_row_leaves_its_neighbours_alone(
        self, make: MakeEngine, model: FusionForConditionalGeneration, slow: SlowRunner
    ) -> None:
        asked = [request([IMAGE, *words(5, seed=seed)], seed=seed) for seed in range(4)]
        said = [expected(model, its) for its in asked]
        slow.poisoned = {next(token for token in said[2] if not any(token in other for other in (said[0], said[3])))}
        engine = make(runner=slow)
        generations = [engine.submit(its) for its in asked]
        for generation in generations:
            generation.wait()
        assert [ids(generations[place]) for place in (0, 3)] == [said[0], said[3]]
        with pytest.raises(RuntimeError, match="out of steam"):
            list(generations[2])
        slow.poisoned = set()
        assert ids(engine.generate([asked[2]])[0]) == said[2] and idle(engine)

    def test_a_slot_that_cannot_be_copied_costs_one_request(
        self, make: MakeEngine, slow: SlowRunner, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        def fail(*_: Any) -> None:
            raise RuntimeError("no room for a copy")

        monkeypatch.setattr(slow, "copy", fail)
        engine = make(runner=slow)
        first = engine.submit(request(words(40), max_new_tokens=20))
        next(iter(first))
        with pytest.raises(RuntimeError, match="no room for a copy"):
            list(engine.submit(request([*words(40), *words(2)], max_new_tokens=2)))
        assert len(list(first)) == 20 and idle(engine)

    def test_many_wait_their_turn_though_others_fill_the_queue(self, make: MakeEngine, slow: SlowRunner) -> None:
        engine = make(runner=slow, queue=1)
        for _ in range(4):
            engine.submit(request(words(4), max_new_tokens=20))
            time.sleep(0.05)
        engine.submit(request(words(4), max_new_tokens=20))  # fills the queue
        (generation,) = engine.generate([request(words(3), max_new_tokens=2)])
        assert len(generation.tokens) == 2 and idle(engine)

    def test_a_picture_of_nothing(self, make: MakeEngine) -> None:
        engine = make()
        broken = request([IMAGE, *words(3)])
        broken.pictures[0].pixel_values[0, 0, 0] = torch.nan
        fine, wrong = engine.submit(request([IMAGE, *words(3)], seed=1)), engine.submit(broken)
        with pytest.raises(EngineError, match="NaN"):
            list(wrong)
        assert len(list(fine)) == 10 and idle(engine)

    def test_what_it_refuses(self, make: MakeEngine, slow: SlowRunner) -> None:
        engine = make(runner=slow, queue=2)
        for asked, why in (
            (Request([]), "empty"),
            (request(words(250)), "250 tokens, and 10 for the answer, exceed the engine's 256"),
            (Request([IMAGE]), "0 pictures for 1 placeholders"),
            (request([IMAGE] * 5), "5 pictures exceed the engine's 4"),
            (request(words(3), top_logprobs=98), "top_logprobs=98: ask for 0 to 97"),
            (request(words(3), repetition_penalty=0.0), r"repetition_penalty=0\.0 must be above 0"),
        ):
            with pytest.raises(EngineError, match=why):
                engine.submit(asked)
        with pytest.raises(EngineFull, match="requests wait already"):
            for _ in range(8):
                engine.submit(request(words(4), max_new_tokens=200))
        engine.close()
        assert idle(engine)

    def test_an_unknown_precision(self, make: MakeEngine) -> None:
        with pytest.raises(EngineError, match="no precision 'int7': use auto"):
            make(precision="int7")
