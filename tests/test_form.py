"""The shipped model's answers to forty prompts that people type: in their language, no loop, not cut, not empty."""

from __future__ import annotations

import pytest

from multimodal.model import MultiModalModel
from multimodal.presets import trained_folder
from multimodal.training.form import check_prompts


@pytest.mark.slow
@pytest.mark.skipif(trained_folder("embedded") is None, reason="no trained weights in assets/embedded")
def test_every_answer_is_well_formed() -> None:
    answers = check_prompts(MultiModalModel.from_pretrained("embedded"))
    bad = [
        f"{answer.prompt.prompt!r} ({answer.prompt.picture}): {', '.join(answer.problems)}: {answer.text!r}"
        for answer in answers
        if answer.problems
    ]
    assert not bad, f"{len(bad)} of {len(answers)} answers are badly formed:\n" + "\n".join(bad)
