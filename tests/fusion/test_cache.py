"""What is kept in the generation cache changes no word: cached and uncached runs, however decoded, say the same.

"Uncached" runs the whole sequence again at every step, so it is the plain forward pass.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import islice
from typing import Any

import pytest
import torch
from torch import nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessor, StaticCache

from multimodal.fusion import FusionCache, FusionForConditionalGeneration
from tests.fusion.tiny import (
    EOS,
    IMAGE,
    assert_close,
    assert_differs,
    assert_same,
    batch,
    mixed_batch,
    row_of,
    text_config,
    tiny_model,
    words,
)

GREEDY = {"max_new_tokens": 7, "min_new_tokens": 7, "do_sample": False}
STEPS = GREEDY["max_new_tokens"]


def generate(model: FusionForConditionalGeneration, inputs: dict[str, Any], **options: Any) -> Any:
    torch.manual_seed(3)
    return model.generate(**inputs, **{**GREEDY, **options})


@contextmanager
def calls(*modules: nn.Module) -> Iterator[list[tuple[Any, ...]]]:
    """Collect the arguments of every call of the modules."""
    seen: list[tuple[Any, ...]] = []
    hooks = [module.register_forward_pre_hook(lambda _module, args: seen.append(args)) for module in modules]
    yield seen
    for hook in hooks:
        hook.remove()


# ---- cached = uncached


@pytest.mark.parametrize(
    "decoding",
    [
        {},
        {"min_new_tokens": 0},
        {"do_sample": True, "temperature": 1.3},
        {"num_beams": 3},
        {"num_beams": 3, "num_return_sequences": 2, "min_new_tokens": 0, "length_penalty": 0.5},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 2, "do_sample": True},
        {"repetition_penalty": 1.5},
    ],
    ids=lambda decoding: " ".join(decoding) or "greedy",
)
def test_cached_is_uncached(model: FusionForConditionalGeneration, decoding: dict[str, Any]) -> None:
    inputs = mixed_batch()
    cached = generate(model, inputs, **decoding)
    assert_same(cached, generate(model, inputs, **decoding, use_cache=False))
    assert len(cached) == 3 * decoding.get("num_return_sequences", 1)


@pytest.mark.parametrize("decoding", [{}, {"num_beams": 3}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
def test_static_cache(model: FusionForConditionalGeneration, decoding: dict[str, Any]) -> None:
    inputs = mixed_batch()
    static = generate(model, inputs, **decoding, cache_implementation="static")
    assert_same(static, generate(model, inputs, **decoding, use_cache=False))


def test_every_step_gives_the_logits_of_a_whole_pass(model: FusionForConditionalGeneration) -> None:
    inputs = mixed_batch()
    stepwise = model.generate(**inputs, **GREEDY, return_dict_in_generate=True, output_logits=True)
    sequences, start = stepwise.sequences, inputs["input_ids"].shape[1]
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, STEPS, dtype=torch.long)], dim=1)
    whole = model(sequences, attention_mask=mask, pixel_values=inputs["pixel_values"], use_cache=False).logits
    assert_close(torch.stack(stepwise.logits, dim=1), whole[:, start - 1 : -1], "logits of the answer")


def test_left_padding_and_neighbours_change_no_word(model: FusionForConditionalGeneration) -> None:
    inputs = mixed_batch()
    together = generate(model, inputs)
    for row in range(3):
        alone = generate(model, row_of(inputs, row))
        assert_same(together[row, -STEPS:], alone[0, -STEPS:], f"row {row}")


def test_the_picture_matters_to_every_way_of_decoding(model: FusionForConditionalGeneration) -> None:
    inputs = mixed_batch()
    other = {**inputs, "pixel_values": inputs["pixel_values"].flip(-1) * 2}
    for decoding in ({}, {"num_beams": 3}, {"cache_implementation": "static"}):
        answers, others = (generate(model, each, **decoding)[1:] for each in (inputs, other))
        assert not torch.equal(answers, others), decoding


# ---- prompt lookup


def repeating_prompt(count: int) -> list[int]:
    """Every picture stands in the same surroundings, so that lookup drafts what followed it, placeholder and all."""
    before, after = words(2, seed=11), words(2, seed=12)
    return [*[token for _ in range(count) for token in (*before, IMAGE, *after)], *before]


class Follow(LogitsProcessor):
    """Lead every row to say these tokens, so that drafts are accepted; the model's own logits decide the rest."""

    def __init__(self, tokens: list[int], start: int) -> None:
        self.tokens, self.start = tokens, start

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        place = input_ids.shape[1] - self.start
        if place < len(self.tokens):
            scores = scores.clone()
            scores[:, self.tokens[place]] += 100
        return scores


@pytest.mark.parametrize("rows", [[words(9)], [repeating_prompt(1)], [repeating_prompt(2)], [repeating_prompt(3)]])
@pytest.mark.parametrize("lookup", [2, 5])
def test_prompt_lookup(model: FusionForConditionalGeneration, rows: list[list[int]], lookup: int) -> None:
    inputs = batch(rows)
    assert_same(generate(model, inputs, prompt_lookup_num_tokens=lookup), generate(model, inputs, use_cache=False))


def test_prompt_lookup_with_accepted_and_rejected_drafts(model: FusionForConditionalGeneration) -> None:
    inputs = batch([repeating_prompt(2)])
    start = inputs["input_ids"].shape[1]
    # Says what followed the first picture, then turns away from the draft.
    leading = [Follow([*words(2, seed=12), words(2, seed=11)[0], *words(1, seed=13), *words(2, seed=12)], start)]
    with calls(model.model.language_model) as passes:
        looked_up = generate(model, inputs, prompt_lookup_num_tokens=4, logits_processor=leading)
    assert len(passes) < STEPS, "no draft was accepted"
    assert_same(looked_up, generate(model, inputs, use_cache=False, logits_processor=leading))


def test_drafted_placeholders_are_words(visibility: str) -> None:
    """Drafts of placeholders, let through by force, are rejected and leave the book-keeping as it was."""
    model = tiny_model(visibility=visibility)
    prompt = repeating_prompt(2)
    first = batch([prompt])
    clean, drafted = (model(**first).past_key_values for _ in range(2))
    with_draft = torch.tensor([[prompt[0], IMAGE, prompt[1], IMAGE]])
    model(with_draft, past_key_values=drafted)
    drafted.crop(-with_draft.shape[1])
    later = batch([[*words(2), IMAGE, *words(2, seed=1)]], seed=5)
    step = {"input_ids": later["input_ids"], "pixel_values": later["pixel_values"]}
    assert_same(model(**step, past_key_values=drafted).logits, model(**step, past_key_values=clean).logits)


def test_assisted_decoding_by_a_smaller_model(visibility: str) -> None:
    model = tiny_model(visibility=visibility)
    assistant = tiny_model(text=text_config(num_hidden_layers=2), cross_attention_layers=[1], visibility=visibility)
    inputs = batch([repeating_prompt(1)])
    plain = generate(model, inputs)
    assert_same(model.generate(**inputs, **GREEDY, assistant_model=assistant), plain)


# ---- several generations on one model


def test_interleaved_steps_do_not_disturb_each_other(model: FusionForConditionalGeneration) -> None:
    first, second = mixed_batch(), batch([[IMAGE, *words(4, seed=8)], [*words(3, seed=9), IMAGE, IMAGE]], seed=9)

    def step_by_step(inputs: dict[str, torch.Tensor]) -> Iterator[torch.Tensor]:
        output, mask = model(**inputs), inputs["attention_mask"]
        while True:
            yield output.logits[:, -1]
            token = output.logits[:, -1:].argmax(-1)
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            output = model(token, attention_mask=mask, past_key_values=output.past_key_values)

    alone = [list(islice(step_by_step(inputs), 5)) for inputs in (first, second)]
    turns = zip(step_by_step(first), step_by_step(second), strict=True)
    for step, both in zip(range(5), turns, strict=False):
        for run in (0, 1):
            assert_same(both[run], alone[run][step], f"run {run}, step {step}")


def test_threads_do_not_disturb_each_other(model: FusionForConditionalGeneration) -> None:
    runs = [mixed_batch(), batch([[IMAGE, *words(4, seed=8)]], seed=9), batch([words(5)]), batch([repeating_prompt(2)])]
    expected = [model.generate(**inputs, **GREEDY) for inputs in runs]
    answers: list[torch.Tensor | None] = [None] * len(runs)
    barrier = threading.Barrier(len(runs))

    def run(index: int) -> None:
        barrier.wait()
        for _ in range(3):
            answers[index] = model.generate(**runs[index], **GREEDY)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(runs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for index, answer in enumerate(answers):
        assert answer is not None, f"run {index} failed"
        assert_same(answer, expected[index], f"run {index}")


def test_nothing_of_a_generation_stays_on_the_model() -> None:
    model = tiny_model()

    def tensors() -> set[int]:
        return {id(value) for module in model.modules() for value in vars(module).values() if torch.is_tensor(value)}

    before = tensors()
    generate(model, mixed_batch())
    assert tensors() == before


# ---- done once


@pytest.mark.parametrize(
    "decoding",
    [{}, {"num_beams": 3}, {"do_sample": True, "num_return_sequences": 4}, {"cache_implementation": "static"}],
    ids=["greedy", "beams", "samples", "static"],
)
def test_pictures_are_encoded_and_projected_once(decoding: dict[str, Any]) -> None:
    model, inputs = tiny_model(), mixed_batch()
    projections = [
        block.get_submodule(f"attention.{name}")
        for block in model.model.cross_attention_blocks.children()
        for name in ("k_proj", "v_proj")
    ]
    with (
        calls(model.model.vision_encoder) as encoded,
        calls(model.model.resampler) as resampled,
        calls(*projections) as projected,
    ):
        generate(model, inputs, **decoding)
    assert len(encoded) == 1
    assert len(encoded[0][0]) <= inputs["pixel_values"].flatten(0, 1).shape[0], "pictures, not beams"
    assert len(resampled) == 1
    assert len(projected) == len(projections)


def test_prompt_lookup_encodes_once() -> None:
    model = tiny_model()
    with calls(model.model.vision_encoder) as encoded:
        generate(model, batch([repeating_prompt(2)]), prompt_lookup_num_tokens=3)
    assert len(encoded) == 1


def test_empty_slots_are_not_encoded() -> None:
    model = tiny_model()
    with calls(model.model.vision_encoder) as encoded:
        generate(model, mixed_batch())
    assert len(encoded[0][0]) == 3


def test_image_features_stand_for_pixel_values(model: FusionForConditionalGeneration) -> None:
    inputs = mixed_batch()
    pixel_values = inputs.pop("pixel_values")
    features = model.model.get_image_features(pixel_values.flatten(0, 1)).features.unflatten(0, pixel_values.shape[:2])
    by_pixels = model(**inputs, pixel_values=pixel_values).logits
    assert_close(model(**inputs, image_features=features).logits, by_pixels)
    with calls(model.model.vision_encoder) as encoded:
        answers = generate(model, {**inputs, "image_features": features})
    assert not encoded
    assert_same(answers, generate(model, {**inputs, "pixel_values": pixel_values}))


# ---- later turns


def conversation(*turns: list[int]) -> list[dict[str, torch.Tensor]]:
    """The inputs after each turn: all tokens and all pictures so far. One row, so nothing is padded."""
    whole = batch([[token for turn in turns for token in turn]], seed=4)
    lengths = [sum(map(len, turns[: index + 1])) for index in range(len(turns))]
    stages = []
    for length in lengths:
        ids = whole["input_ids"][:, :length]
        stage = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        count = int((ids == IMAGE).sum())
        if count:
            stage["pixel_values"] = whole["pixel_values"][:, :count]
        stages.append(stage)
    return stages


TURNS = {
    "picture, text, picture": [[*words(3), IMAGE, *words(3, seed=1)], words(4, seed=2), [IMAGE, *words(3, seed=3)]],
    "text, picture": [words(5), [*words(2, seed=1), IMAGE, *words(3, seed=2)]],
    "picture, two pictures": [[IMAGE, *words(4)], [*words(2, seed=1), IMAGE, *words(2, seed=2), IMAGE, *words(2)]],
}


@pytest.mark.parametrize("turns", TURNS.values(), ids=TURNS)
@pytest.mark.parametrize("given", ["all", "new"])
def test_a_picture_in_a_later_turn(model: FusionForConditionalGeneration, turns: list[list[int]], given: str) -> None:
    cache, seen = None, 0
    for stage in conversation(*turns):
        uncached = generate(model, stage, use_cache=False)
        inputs = dict(stage)
        count = stage["pixel_values"].shape[1] if "pixel_values" in stage else 0
        if given == "new" and count:
            inputs.pop("pixel_values")
            if count > seen:
                inputs["pixel_values"] = stage["pixel_values"][:, seen:]
        output = generate(model, inputs, past_key_values=cache, return_dict_in_generate=True)
        assert_same(output.sequences, uncached)
        cache, seen = output.past_key_values, count
        assert isinstance(cache, FusionCache)
        cache.crop(-(cache.get_seq_length() - stage["input_ids"].shape[1]))  # the next turn replaces the answer


def test_a_later_turn_over_the_models_own_answer(model: FusionForConditionalGeneration) -> None:
    first = batch([[*words(3), IMAGE, *words(3, seed=1)], [IMAGE, *words(2), IMAGE, *words(3, seed=1)]])
    output = generate(model, first, return_dict_in_generate=True)
    more = batch([[*words(2, seed=5), IMAGE, *words(2, seed=6)], [*words(4, seed=7), IMAGE]], seed=6)
    ids = torch.cat([output.sequences, more["input_ids"]], dim=1)
    mask = torch.cat([first["attention_mask"], torch.ones(2, STEPS + 5, dtype=torch.long)], dim=1)
    new = {"input_ids": ids, "attention_mask": mask, "pixel_values": more["pixel_values"]}
    # Row 0 has pictures 1 and new; row 1 has pictures 1, 2 and new.
    everything = torch.zeros(2, 3, *more["pixel_values"].shape[2:])
    everything[0, 0], everything[0, 1] = first["pixel_values"][0, 0], more["pixel_values"][0, 0]
    everything[1, :2], everything[1, 2] = first["pixel_values"][1], more["pixel_values"][1, 0]
    whole = {**new, "pixel_values": everything}
    uncached = generate(model, whole, use_cache=False)
    with calls(model.model.vision_encoder) as encoded:
        cached = generate(model, whole, past_key_values=output.past_key_values)
    assert_same(cached, uncached, "all pictures given")
    assert len(encoded[0][0]) == 2, "only new pictures are encoded"
    output = generate(model, first, return_dict_in_generate=True)
    assert_same(generate(model, new, past_key_values=output.past_key_values), uncached, "only new pictures given")


def test_rows_that_get_their_pictures_in_different_turns(model: FusionForConditionalGeneration) -> None:
    first = batch([[IMAGE, *words(4)], words(5, seed=1)])
    more = batch([words(3, seed=2), [words(1, seed=3)[0], IMAGE, words(1, seed=4)[0]]], seed=6)
    cache = model(**first).past_key_values
    logits = model(more["input_ids"], pixel_values=more["pixel_values"], past_key_values=cache).logits
    whole = model(
        torch.cat([first["input_ids"], more["input_ids"]], dim=1),
        pixel_values=torch.stack([first["pixel_values"][0], more["pixel_values"][1]]),
        use_cache=False,
    ).logits
    assert_close(logits, whole[:, 5:])


@pytest.mark.parametrize("kind", ["dynamic", "static"])
def test_a_plain_cache_is_taken(kind: str) -> None:
    model, inputs = tiny_model(), mixed_batch()
    config = model.config.text_config
    cache = DynamicCache(config=config) if kind == "dynamic" else StaticCache(config=config, max_cache_len=40)
    output = generate(model, inputs, past_key_values=cache, return_dict_in_generate=True)
    assert isinstance(output.past_key_values, FusionCache)
    assert_same(output.sequences, generate(model, inputs, use_cache=False))


def test_a_reset_cache_is_as_new() -> None:
    model, inputs = tiny_model(), mixed_batch()
    cache = FusionCache(StaticCache(config=model.config.text_config, max_cache_len=40))
    expected = model(**inputs, use_cache=False).logits
    for _ in range(2):
        assert_close(model(**inputs, past_key_values=cache).logits, expected)
        cache.reset()
    assert cache.ordinals is None
    assert cache.placeholders is None


def test_cache_rows_can_be_chosen_and_repeated(model: FusionForConditionalGeneration) -> None:
    inputs = mixed_batch()
    token = torch.tensor([[20], [21], [22]])
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], dim=1)

    def prefilled() -> FusionCache:
        return model(**inputs).past_key_values

    expected = model(token, attention_mask=mask, past_key_values=prefilled()).logits
    chosen = torch.tensor([2, 0])
    cache = prefilled()
    cache.batch_select_indices(chosen)
    assert_close(model(token[chosen], attention_mask=mask[chosen], past_key_values=cache).logits, expected[chosen])
    cache = prefilled()
    cache.batch_repeat_interleave(2)
    rows = torch.tensor([0, 0, 1, 1, 2, 2])
    assert_close(model(token[rows], attention_mask=mask[rows], past_key_values=cache).logits, expected[rows])
    cache = prefilled()
    rows = torch.LongTensor([1, 1, 2])
    cache.reorder_cache(rows)
    assert_close(model(token[rows], attention_mask=mask[rows], past_key_values=cache).logits, expected[rows])


def test_a_cached_token_still_sees_the_picture(model: FusionForConditionalGeneration) -> None:
    inputs = batch([[*words(2), IMAGE, *words(3)]])
    other = {**inputs, "pixel_values": -inputs["pixel_values"]}
    token = torch.tensor([[20]])
    cross_only = [model(**each).past_key_values for each in (inputs, other)]
    cross_only[1].self_attention_cache = model(**inputs).past_key_values.self_attention_cache
    first, second = (model(token, past_key_values=cache).logits for cache in cross_only)
    assert_differs(first, second, "only the cross keys and values differ")


# ---- the placeholder is never an answer


class Only(LogitsProcessor):
    """Makes one token all but certain."""

    def __init__(self, token: int) -> None:
        self.token = token

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        scores = scores.clone()
        scores[:, self.token] = scores[:, self.token] + 1000
        return scores


@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"do_sample": True}], ids=["greedy", "beams", "sampling"])
@pytest.mark.parametrize("own_config", [False, True])
def test_the_placeholder_is_never_generated(options: dict[str, Any], own_config: bool) -> None:
    model, inputs = tiny_model(), batch([words(4), words(5)])
    urged = {**inputs, "logits_processor": [Only(IMAGE)]}
    assert (model.generate(**urged, max_new_tokens=1, suppress_tokens=[EOS])[:, -1] == IMAGE).all()
    settings: dict[str, Any] = {**GREEDY, **options}
    if own_config:
        settings = {"generation_config": GenerationConfig(**settings)}
    answer = model.generate(**urged, **settings)[:, 5:]
    assert answer.shape[1] == STEPS
    assert not (answer == IMAGE).any()
