"""The test of form: what it finds wrong, what it lets pass, and the forty prompts."""

from pathlib import Path

import pytest

from multimodal.data.prompts import BROKEN, CUT, EMPTY, FORM_PROMPTS, LANGUAGE, LOOP, PICTURES, check_form
from multimodal.data.refusals import REFUSALS

SAMPLES = Path(__file__).parents[2] / "assets" / "samples"


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("Liver", "en"),
        ("Left Lung, Lower Right", "en"),
        ("Absorb nutrients, secrete enzymes, digest food", "en"),
        ("2", "en"),
        ("2", "zh"),
        ("T2", "zh"),
        ("X-Ray", "zh"),
        ("是的", "zh"),
        ("左肺,右下", "zh"),
        ("Granny Smith | Apple", "en"),
        ("It shows the liver and spleen. The liver and spleen look healthy.", "en"),
        ("Sour cream from fresh cream. It has a fresh taste.", "en"),
        ("From Arlagårdar, 1.5 percent fat.", "en"),
        ("这是胸部的X光片。可见肺、心脏。未见异常。", "zh"),
        ("这是Arla牛奶。", "zh"),
        *((text, language) for language, text in REFUSALS.items()),
    ],
)
def test_good_answers(text: str, language: str) -> None:
    assert check_form(text, language) == []


@pytest.mark.parametrize(
    ("text", "language", "problem"),
    [
        ("", "en", EMPTY),
        (" .\n", "zh", EMPTY),
        ("肝脏", "en", LANGUAGE),
        ("The liver is 肝脏.", "en", LANGUAGE),
        ("Это печень.", "en", LANGUAGE),
        ("This is a chest X-ray.", "zh", LANGUAGE),
        ("Liver", "zh", LANGUAGE),
        ("这是 an X-ray of the chest and it shows the lungs.", "zh", LANGUAGE),
        ("lung lung lung lung.", "en", LOOP),
        ("There is a mass in the lung in the lung in the lung.", "en", LOOP),
        ("It shows the heart. It shows the heart.", "en", LOOP),
        ("It shows the left lung and heart the left lung and heart.", "en", LOOP),
        ("A is in the lower left lung. B is in the lower left lung. C is in the lower left lung.", "en", LOOP),
        ("可见肺、肺、肺、肺。", "zh", LOOP),
        ("这是胸部的X光片。这是胸部的X光片。", "zh", LOOP),
        ("This is a chest", "en", CUT),
        ("It shows the", "en", CUT),
        ("This is a CT scan. It shows the liver", "en", CUT),
        ("Liver,", "en", CUT),
        ("a rather small and all round sugar melon with greenish yellow mesh", "en", CUT),
        ("This is milk (organic.", "en", CUT),
        ("可见肺、", "zh", CUT),
        ("这是胸部的X光片", "zh", CUT),
        ("这是胸部的X光片。可见", "zh", CUT),
        ("A mass.<|im_end|>", "en", BROKEN),
        ("位于左\ufffd。", "zh", BROKEN),
    ],
)
def test_bad_answers(text: str, language: str, problem: str) -> None:
    assert problem in check_form(text, language)


def test_the_forty_prompts() -> None:
    assert len(FORM_PROMPTS) == len({(prompt.prompt, prompt.picture) for prompt in FORM_PROMPTS}) == 40
    assert sum(prompt.language == "zh" for prompt in FORM_PROMPTS) == 12
    for prompt in FORM_PROMPTS:
        assert (SAMPLES / PICTURES[prompt.picture]).is_file()
        assert (prompt.language == "zh") == (LANGUAGE in check_form(prompt.prompt, "en"))
