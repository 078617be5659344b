"""Tokens from logits, and text that ends before a stop string."""

from __future__ import annotations

import math
from collections import Counter

import pytest
import torch

from multimodal.engine.sampling import Sampler, Scores, TextStream
from tests.training.tiny import tiny_tokenizer


def test_greedy_takes_the_likeliest() -> None:
    logits = torch.tensor([[0.0, 1.0, 9.0, 3.0], [0.0, 3.0, 9.0, 1.0]])
    token, logprob = Sampler(temperature=0, top_p=1, seed=0).pick(Scores(logits, [2]), 1)
    assert logits[:, 2].tolist() == [-math.inf] * 2  # it cannot be said
    assert token == 1 and logprob == pytest.approx(float(logits[1].log_softmax(-1)[1]))


def test_sampling_follows_temperature_and_nucleus() -> None:
    logits = torch.tensor([0.0, 1.0, 2.0, -torch.inf])

    def drawn(temperature: float, top_p: float) -> Counter[int]:
        sampler = Sampler(temperature=temperature, top_p=top_p, seed=3)
        picked = [sampler.pick(Scores(logits[None].clone()), 0) for _ in range(2000)]
        for token, logprob in picked[:20]:
            assert logprob == pytest.approx(float(logits.log_softmax(-1)[token]), abs=1e-5)
        return Counter(token for token, _ in picked)

    shares = (logits / 2).softmax(-1)
    for token, count in drawn(2.0, 1.0).items():
        assert count / 2000 == pytest.approx(float(shares[token]), abs=0.04)
    assert set(drawn(2.0, float(shares[2]) + 0.01)) == {1, 2}
    assert set(drawn(2.0, 0.01)) == {2}
    assert set(drawn(0.01, 1.0)) == {2}


def test_what_was_read_or_said_is_less_likely() -> None:
    """Positive logits shrink and negative ones grow; the log-probability is that of the model itself."""
    logits = torch.tensor([[4.0, 3.0, 2.5, -1.0]])
    sampler = Sampler(temperature=0, top_p=1, seed=0, repetition_penalty=1.5, prompt=[0, 3])
    picked = [sampler.pick(Scores(logits.clone()), 0) for _ in range(3)]
    assert [token for token, _ in picked] == [1, 0, 0]  # 3.0, then 2.67 of 4.0, for the 3.0 has become 2.0
    assert [logprob for _, logprob in picked] == pytest.approx(logits[0].log_softmax(-1)[[1, 0, 0]].tolist(), abs=1e-5)
    negative = Sampler(temperature=0, top_p=1, seed=0, repetition_penalty=2.0, prompt=[0])
    assert negative.pick(Scores(torch.tensor([[-1.0, -1.5]])), 0)[0] == 1


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ([], "red or blue"),
        (["blue"], "red or "),
        (["lue", "or b"], "red "),
        (["blues", "never"], "red or blue"),
        (["red"], ""),
        ([""], "red or blue"),
    ],
)
def test_stop_strings(stop: list[str], expected: str) -> None:
    tokenizer = tiny_tokenizer()
    stream, pieces = TextStream(tokenizer, stop), []
    for token in tokenizer("red or blue", add_special_tokens=False)["input_ids"]:
        pieces.append(stream.add(token))
        assert not any(string and string in "".join(pieces) for string in stop)
        if stream.stopped:
            break
    assert "".join([*pieces, stream.flush()]) == expected
    assert stream.stopped == (expected != "red or blue")


def test_half_a_character_at_the_end_shows_as_one_that_is_unknown() -> None:
    tokenizer = tiny_tokenizer()
    ids = tokenizer("日", add_special_tokens=False)["input_ids"][:-1]
    stream = TextStream(tokenizer)
    assert "".join([*map(stream.add, ids), stream.flush()]) == tokenizer.decode(ids)


def test_the_likeliest_tokens_come_in_order() -> None:
    logits = torch.tensor([[0.0, 1.0, 9.0, 3.0], [0.0, 3.0, 2.0, 1.0]])
    scores = Scores(logits, [2])
    expected = logits.log_softmax(-1)
    assert scores.top(1, 0) == ()
    assert [token for token, _ in scores.top(0, 3)] == [3, 1, 0]
    for token, logprob in scores.top(1, 2):
        assert logprob == pytest.approx(float(expected[1, token]), abs=1e-6)
    assert [token for token, _ in scores.top(0, 99)] == [3, 1, 0]  # what is suppressed cannot be said


@pytest.mark.parametrize(("temperature", "top_p"), [(5e-324, 1.0), (1e308, 1.0), (1.0, 5e-324), (1e-300, 1e-300)])
def test_extremes_are_no_error(temperature: float, top_p: float) -> None:
    logits = torch.tensor([[30.0, -4.0, 29.0, 0.0]])
    samplers = [Sampler(temperature=temperature, top_p=top_p, seed=seed) for seed in range(40)]
    picked = {sampler.pick(Scores(logits.clone(), [3]), 0)[0] for sampler in samplers}
    assert picked == ({0, 1, 2} if temperature > 1 else {0})
