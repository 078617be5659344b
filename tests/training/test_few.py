"""Few examples: drawn evenly, held out by picture and answer, two sets of answers compared."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from multimodal.data import Sample
from multimodal.training.few import Paired, draw_evenly, split_by_answer


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(60):
        (tmp_path / f"{number}.png").write_bytes(bytes([number]))
    return tmp_path


def sample(folder: Path, number: int, answer: str, question: str = "What?") -> Sample:
    return Sample(question, answer, (folder / f"{number}.png",), id=f"{number}")


def answers(samples: list[Sample]) -> Counter[str]:
    return Counter(sample.answer.lower() for sample in samples)


def test_drawn_evenly_and_the_same_for_a_seed(folder: Path) -> None:
    many = [sample(folder, n, "Cat" if n % 10 else "dog") for n in range(50)] + [sample(folder, 55, "cow")]
    drawn = draw_evenly(many, 9, seed=0)
    assert answers(drawn) == {"cat": 4, "dog": 4, "cow": 1}
    assert drawn == draw_evenly(many, 9, seed=0) != draw_evenly(many, 9, seed=1)
    assert [one.id for one in drawn] == sorted((one.id for one in drawn), key=int)
    assert answers(draw_evenly(many, 30, seed=0)) == {"cat": 24, "dog": 5, "cow": 1}
    assert draw_evenly(many, 99, seed=0) == many


def test_a_fifth_of_each_answer_is_held_out(folder: Path) -> None:
    many = [sample(folder, n, "abcde"[n % 5]) for n in range(50)]
    kept, held_out = split_by_answer(many, 0.2, seed=0)
    assert answers(held_out) == dict.fromkeys("abcde", 2) and answers(kept) == dict.fromkeys("abcde", 8)
    assert split_by_answer(many, 0.2, seed=0) == (kept, held_out) != split_by_answer(many, 0.2, seed=1)
    assert sorted(kept + held_out, key=many.index) == many
    assert split_by_answer(many, 0.0, seed=0) == (many, [])


def test_an_answer_is_never_held_out_altogether(folder: Path) -> None:
    many = [sample(folder, n, "a") for n in range(18)] + [sample(folder, n, "b") for n in (18, 19)]
    kept, held_out = split_by_answer(many, 0.5, seed=0)
    assert answers(held_out)["b"] == 1 and answers(kept)["b"] == 1
    assert len(held_out) == 10


def test_texts_that_all_differ_are_held_out_too(folder: Path) -> None:
    many = [sample(folder, n, f"a report about {n}") for n in range(20)]
    assert len(split_by_answer(many, 0.2, seed=0)[1]) == 4


def test_questions_about_one_picture_stay_together(folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "3.png").read_bytes())  # under another name
    many = [sample(folder, n % 10, "yes" if n % 3 else "no", f"question {n}?") for n in range(40)]
    many.append(Sample("of a copy?", "yes", (folder / "copy.png",), id="copy"))
    many.append(Sample("of two?", "no", (folder / "4.png", folder / "5.png"), id="two"))
    for seed in range(5):
        kept, held_out = split_by_answer(many, 0.3, seed=seed)
        contents = [{path.read_bytes() for one in side for path in one.images} for side in (kept, held_out)]
        assert held_out and not contents[0] & contents[1]


@pytest.mark.parametrize(
    ("gained", "lost", "chance", "verdict"),
    [
        (0, 0, 1.0, "no difference"),
        (5, 0, 0.0625, "no difference"),
        (6, 0, 0.03125, "better"),
        (0, 6, 0.03125, "worse"),
        (10, 3, 0.0923, "no difference"),
        (4, 4, 1.0, "no difference"),
    ],
)
def test_mcnemar(gained: int, lost: int, chance: float, verdict: str) -> None:
    paired = Paired(20, 8, 8 + gained - lost, gained, lost)
    assert paired.chance == pytest.approx(chance, abs=1e-4)
    assert paired.verdict.startswith(verdict)


def test_what_is_said_of_a_pair() -> None:
    paired = Paired.of([True, False, False, False], [True, True, True, False])
    assert paired == Paired(4, 1, 3, 2, 0)
    before, after, both = paired.lines()
    assert "1 of 4 right, 25.0% (95 % interval 4.6% to 69.9%)" in before and "3 of 4" in after
    assert "2 became right and 0 wrong: no difference" in both and "p = 0.5" in both
    assert "nobody knows" in Paired(0, 0, 0, 0, 0).lines()[0]
