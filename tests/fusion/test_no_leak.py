"""A picture reaches the tokens that may see it, and nothing else.

The row under test: text, picture 1, text, picture 2, text, picture 3, text. A second row stands beside it.
"""

from __future__ import annotations

import pytest
import torch

from multimodal.fusion import FusionForConditionalGeneration
from multimodal.fusion.cross_attention import visible_images
from multimodal.fusion.vision import VisionFeatures
from tests.fusion.tiny import IMAGE, assert_differs, assert_same, batch, pictures, tiny_model, words

PLACES = (2, 5, 9)
LENGTH = 12


def scene() -> dict[str, torch.Tensor]:
    row = words(LENGTH)
    for place in PLACES:
        row[place] = IMAGE
    return batch([row, [*words(3, seed=1), IMAGE, *words(5, seed=2)]])


def change(inputs: dict[str, torch.Tensor], picture: int) -> dict[str, torch.Tensor]:
    pixel_values = inputs["pixel_values"].clone()
    pixel_values[0, picture] = pictures(seed=7)
    return {**inputs, "pixel_values": pixel_values}


@pytest.mark.parametrize("picture", range(3))
def test_a_picture_changes_only_what_stands_behind_it(model: FusionForConditionalGeneration, picture: int) -> None:
    inputs = scene()
    logits, changed = model(**inputs).logits, model(**change(inputs, picture)).logits
    place = PLACES[picture]
    assert_same(changed[0, :place], logits[0, :place], "before the picture")
    assert_same(changed[1], logits[1], "another row")
    for token in range(place, LENGTH):
        assert_differs(changed[0, token], logits[0, token], f"token {token}")


@pytest.mark.parametrize("picture", range(3))
def test_latest_means_the_nearest_picture_only(picture: int) -> None:
    # One block before the first layer: no token can learn of a picture from other tokens.
    model = tiny_model(visibility="latest", cross_attention_layers=[0])
    inputs = scene()

    def after_block(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        seen: list[torch.Tensor] = []
        layer = model.model.language_model.layers[0].input_layernorm
        hook = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
        model(**inputs)
        hook.remove()
        return seen[0]

    states, changed = after_block(inputs), after_block(change(inputs, picture))
    ends = [*PLACES[1:], LENGTH]
    for token in range(LENGTH):
        if PLACES[picture] <= token < ends[picture]:
            assert_differs(changed[0, token], states[0, token], f"token {token}")
        else:
            assert_same(changed[0, token], states[0, token], f"token {token}")


def test_all_previous_sees_earlier_pictures_too() -> None:
    inputs = scene()
    latest, everything = (tiny_model(visibility=mode)(**inputs).logits for mode in ("latest", "all_previous"))
    assert_same(latest[0, : PLACES[1]], everything[0, : PLACES[1]], "up to the second picture")
    assert_differs(latest[0, PLACES[1] :], everything[0, PLACES[1] :])
    assert_same(latest[1], everything[1], "a row with one picture")


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
def test_a_broken_picture_is_refused_by_row_and_place(poison: float) -> None:
    # It could not be kept from the row's earlier words: the decoder's own attention multiplies it by zero, giving NaN.
    model, inputs = tiny_model(), scene()
    inputs["pixel_values"][0, 1, 0, 0, 0] = poison
    with pytest.raises(ValueError, match="picture 2 of row 0 holds NaN or infinity"):
        model(**inputs)


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
def test_a_picture_that_breaks_in_the_encoder_spares_the_other_rows(
    model: FusionForConditionalGeneration, implementation: str
) -> None:
    model.set_attn_implementation(implementation)
    inputs = scene()
    logits = model(**inputs).logits
    hook = model.model.vision_encoder.register_forward_hook(lambda _module, _args, output: break_first(output))
    broken = model(**inputs).logits
    hook.remove()
    assert not broken[0].isfinite().all(), "the picture is broken"
    assert_same(broken[1], logits[1], "another row")


def break_first(output: VisionFeatures) -> VisionFeatures:
    """As when a number overflows: the first picture's features are no numbers any more."""
    features = output.features.clone()
    features[0] = float("nan")
    return output._replace(features=features)


def test_what_fills_an_empty_slot_changes_nothing(model: FusionForConditionalGeneration) -> None:
    inputs = scene()
    logits = model(**inputs).logits
    pixel_values = inputs["pixel_values"].clone()
    pixel_values[1, 1:] = float("nan")
    assert_same(model(**{**inputs, "pixel_values": pixel_values}).logits, logits)


def test_visible_images() -> None:
    ordinals = torch.tensor([[1, 2, 0], [1, 0, 0]])  # two pictures and one
    images_before = torch.tensor([[0, 1, 1, 2], [0, 0, 1, 1]])
    everything = visible_images(ordinals, images_before, "all_previous").int().tolist()
    assert everything == [[[0, 0, 0], [1, 0, 0], [1, 0, 0], [1, 1, 0]], [[0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0]]]
    latest = visible_images(ordinals, images_before, "latest").int().tolist()
    assert latest == [[[0, 0, 0], [1, 0, 0], [1, 0, 0], [0, 1, 0]], [[0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 0, 0]]]
