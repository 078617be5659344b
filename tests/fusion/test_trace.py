"""FusionTrace says what happened: gates and attention of every token, folded back to the picture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.nn import functional

from multimodal.fusion import FusionForConditionalGeneration, FusionTrace, TanhGate
from tests.fusion.tiny import (
    GRID,
    IMAGE,
    assert_close,
    assert_same,
    batch,
    mixed_batch,
    row_of,
    tiny_model,
    words,
)

BLOCKS, LATENTS, CELLS = 2, 3, GRID[0] * GRID[1]


def trace_of(model: FusionForConditionalGeneration, inputs: dict[str, torch.Tensor]) -> FusionTrace:
    trace = model(**inputs, output_trace=True).trace
    assert trace is not None
    return trace


def images_before(inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    return (inputs["input_ids"] == IMAGE).cumsum(-1)  # (B, T)


def test_shapes(model: FusionForConditionalGeneration) -> None:
    inputs = mixed_batch()
    trace = trace_of(model, inputs)
    rows, tokens = inputs["input_ids"].shape
    assert trace.layers == (1, 3)
    assert trace.grid == GRID
    assert trace.attention_gates.shape == trace.feed_forward_gates.shape == (rows, BLOCKS, tokens)
    assert trace.attention.shape == (rows, BLOCKS, tokens, 2, LATENTS)
    assert trace.resampler_maps.shape == (rows, 2, LATENTS, CELLS)
    assert trace.openness().shape == (rows, tokens)
    assert trace.image_attention(1).shape == (rows, tokens, *GRID)


def test_nothing_is_seen_where_no_picture_stands(model: FusionForConditionalGeneration) -> None:
    inputs = mixed_batch()
    trace = trace_of(model, inputs)
    blind = (images_before(inputs) == 0)[:, None].expand(-1, BLOCKS, -1)  # (B, M, T)
    for gates in (trace.attention_gates, trace.feed_forward_gates):
        assert not gates[blind].any()
        assert (gates[~blind] > 0).all()
        assert (gates[~blind] < 1).all()
    assert not trace.attention[blind].any()
    for image in (0, 1):
        assert not trace.image_attention(image)[images_before(inputs) <= image].any()


def test_attention_sums_to_one_over_what_is_seen(model: FusionForConditionalGeneration) -> None:
    inputs = mixed_batch()
    trace, before = trace_of(model, inputs), images_before(inputs)
    seen = (before > 0).float()
    assert_close(trace.attention.sum((-1, -2)), seen[:, None].expand(-1, BLOCKS, -1), "over pictures and regions")
    both = trace.image_attention(0).sum((-1, -2)) + trace.image_attention(1).sum((-1, -2))
    assert_close(both, seen, "over the grids")
    first = trace.image_attention(0).sum((-1, -2))
    assert_close(first[before == 1], torch.ones_like(first[before == 1]), "behind one picture")
    behind_two = first[before == 2]
    if model.config.visibility == "latest":
        assert not behind_two.any()
    else:
        assert (behind_two > 0).all()
        assert (behind_two < 1).all()


def test_resampler_maps_sum_to_one_and_are_zero_for_empty_slots() -> None:
    trace = trace_of(tiny_model(), mixed_batch())
    expected = torch.tensor([[0, 0], [1, 0], [1, 1]])[..., None].expand(-1, -1, LATENTS).float()  # (B, I, L)
    assert_close(trace.resampler_maps.sum(-1), expected)


def test_static_openness_is_the_gates_mean() -> None:
    model = tiny_model(gate="tanh")
    inputs = mixed_batch()
    trace = trace_of(model, inputs)
    for index, block in enumerate(model.model.cross_attention_blocks.children()):
        module = block.get_submodule("attention_gate")
        assert isinstance(module, TanhGate)
        openness = torch.tanh(module.alpha).abs().mean()
        assert_close(trace.attention_gates[2, index], (images_before(inputs)[2] > 0) * openness)


def test_dynamic_openness_differs_from_token_to_token() -> None:
    inputs = mixed_batch()
    gates = trace_of(tiny_model(gate="dynamic"), inputs).attention_gates[2, :, images_before(inputs)[2] > 0]
    assert (gates.std(-1) > 1e-3).all()


def test_shut_gates_show_nothing() -> None:
    trace = trace_of(tiny_model(shut=True), mixed_batch())
    assert not trace.openness().any()
    assert not trace.image_attention().any()


def test_left_padding_does_not_change_a_trace(model: FusionForConditionalGeneration) -> None:
    inputs = mixed_batch()
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    together = model(**inputs, position_ids=positions, output_trace=True).trace
    for row in (1, 2):
        alone = trace_of(model, row_of(inputs, row))
        length, count = alone.openness().shape[1], alone.attention.shape[3]
        assert_close(together.openness()[row, -length:], alone.openness()[0], f"openness of row {row}")
        assert_close(together.attention[row, :, -length:, :count], alone.attention[0], f"attention of row {row}")
        for image in range(count):
            padded, single = together.image_attention(image)[row, -length:], alone.image_attention(image)[0]
            assert_close(padded, single, f"row {row}, picture {image}")


@pytest.mark.parametrize("decoding", [{}, {"num_beams": 3}, {"use_cache": False}, {"cache_implementation": "static"}])
def test_a_generation_is_traced_as_its_forward_pass(
    model: FusionForConditionalGeneration, decoding: dict[str, Any]
) -> None:
    inputs = mixed_batch()
    start = inputs["input_ids"].shape[1]
    sequences = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False, **decoding)
    trace = model.trace(sequences, prompt_length=start, **{k: v for k, v in inputs.items() if k != "input_ids"})
    assert trace is not None
    whole = {
        "input_ids": sequences,
        "attention_mask": functional.pad(inputs["attention_mask"], (0, 5), value=1),
        "pixel_values": inputs["pixel_values"],
    }
    expected = trace_of(model, whole)
    assert trace.openness().shape[1] == 5, "one row for each token of the answer"
    assert_close(trace.openness(), expected.openness()[:, start - 1 : -1])
    assert_close(trace.image_attention(), expected.image_attention()[:, start - 1 : -1])


def test_a_trace_is_that_of_the_steps_which_generated(model: FusionForConditionalGeneration) -> None:
    """Each step, run with a cache, gives the gate that the trace of the whole shows."""
    inputs = batch([[*words(2), IMAGE, *words(3)]])
    seen: list[torch.Tensor] = []
    gate = model.model.cross_attention_blocks[0].get_submodule("attention_gate")
    hook = gate.register_forward_hook(lambda _module, _args, output: seen.append(output[1][:, -1]))
    sequences = model.generate(**inputs, max_new_tokens=5, min_new_tokens=5, do_sample=False)
    hook.remove()
    trace = model.trace(sequences, prompt_length=6, pixel_values=inputs["pixel_values"])
    assert trace is not None
    assert_close(trace.attention_gates[:, 0], torch.stack(seen, dim=1))


def test_attention_folds_back_through_the_resampler() -> None:
    model = tiny_model(cross_attention_layers=[2])
    trace = trace_of(model, mixed_batch())
    expected = (trace.attention[:, 0, :, 0, :, None] * trace.resampler_maps[:, None, 0]).sum(2)  # (B, T, R)
    assert_close(trace.image_attention(), expected.unflatten(-1, GRID))


def test_tokens_cuts_a_span() -> None:
    trace = trace_of(tiny_model(), mixed_batch())
    part = trace.tokens(2, 5)
    assert_close(part.image_attention(), trace.image_attention()[:, 2:5])
    assert_same(part.openness(), trace.openness()[:, 2:5])
    assert_same(part.feed_forward_gates, trace.feed_forward_gates[:, :, 2:5])


def test_without_pictures_there_is_no_trace() -> None:
    model, inputs = tiny_model(), batch([words(5)])
    assert model(**inputs, output_trace=True).trace is None
    assert model.trace(torch.LongTensor(inputs["input_ids"]), prompt_length=3) is None
    assert model(**mixed_batch()).trace is None, "not asked for"


def test_a_trace_needs_all_pictures_in_one_pass() -> None:
    model, inputs = tiny_model(), mixed_batch()
    cache = model(**inputs).past_key_values
    with pytest.raises(ValueError, match="call without past_key_values"):
        model(torch.full((3, 1), 20), past_key_values=cache, output_trace=True)
