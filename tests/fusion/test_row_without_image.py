"""A row without a picture is the bare decoder's, exactly, whatever stands beside it."""

from __future__ import annotations

import pytest
import torch

from multimodal.fusion import FusionForConditionalGeneration
from tests.fusion.tiny import assert_differs, assert_same, bare_decoder, batch, mixed_batch, text_only, words

OPTIONS = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}


def test_alone(model: FusionForConditionalGeneration) -> None:
    inputs = batch([words(7), words(4)])
    assert_same(model(**inputs).logits, bare_decoder(model)(**inputs).logits)


def test_among_rows_with_pictures(model: FusionForConditionalGeneration) -> None:
    inputs = mixed_batch()
    fused, bare = model(**inputs).logits, bare_decoder(model)(**text_only(inputs)).logits
    assert_same(fused[0], bare[0], "the row without a picture")
    for row in (1, 2):
        assert_differs(fused[row], bare[row], f"row {row}, which has pictures")


def test_tokens_before_the_first_picture(model: FusionForConditionalGeneration) -> None:
    inputs = mixed_batch()
    fused, bare = model(**inputs).logits, bare_decoder(model)(**text_only(inputs)).logits
    assert_same(fused[1, :2], bare[1, :2], "padding and text before the picture")


def test_when_traced(model: FusionForConditionalGeneration) -> None:
    inputs = mixed_batch()
    fused = model(**inputs, output_trace=True).logits
    assert_same(fused[0], bare_decoder(model)(**text_only(inputs)).logits[0])


def test_step_by_step_with_a_cache(model: FusionForConditionalGeneration) -> None:
    inputs, bare = mixed_batch(), bare_decoder(model)
    fused_step, bare_step = model(**inputs), bare(**text_only(inputs))
    mask = inputs["attention_mask"]
    for _ in range(6):
        assert_same(fused_step.logits[0], bare_step.logits[0])
        token = fused_step.logits[:, -1:].argmax(-1)  # the bare decoder is given the same words
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
        fused_step = model(token, attention_mask=mask, past_key_values=fused_step.past_key_values)
        bare_step = bare(token, attention_mask=mask, past_key_values=bare_step.past_key_values)


@pytest.mark.parametrize("decoding", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_generation(model: FusionForConditionalGeneration, decoding: dict[str, object]) -> None:
    inputs, bare = mixed_batch(), bare_decoder(model)
    options = {**OPTIONS, **decoding}
    fused = model.generate(**inputs, **options)
    alone = bare.generate(**text_only(inputs), **options, suppress_tokens=model.generation_config.suppress_tokens)
    assert_same(fused[0], alone[0], "the row without a picture")
    assert not torch.equal(fused[1:], alone[1:]), "the rows with pictures should answer otherwise"
