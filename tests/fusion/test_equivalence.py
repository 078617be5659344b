"""One computation, several ways to run it: all give the same logits."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import LlamaForCausalLM

from multimodal.fusion import FusionForConditionalGeneration
from tests.fusion.tiny import (
    IMAGE,
    assert_close,
    assert_differs,
    assert_same,
    mixed_batch,
    open_gates,
    row_of,
    text_config,
    tiny_model,
)


def test_eager_is_sdpa(model: FusionForConditionalGeneration, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = mixed_batch()
    calls = 0
    sdpa = functional.scaled_dot_product_attention

    def counted(*args: Any, **kwargs: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        return sdpa(*args, **kwargs)

    monkeypatch.setattr("multimodal.fusion.cross_attention.functional.scaled_dot_product_attention", counted)
    model.set_attn_implementation("sdpa")
    calls = 0
    fast = model(**inputs).logits
    blocks, layers = len(model.config.cross_attention_layers), model.config.text_config.num_hidden_layers
    assert calls >= blocks + layers + model.config.resampler_layers
    model.set_attn_implementation("eager")
    calls = 0
    slow = model(**inputs).logits
    assert calls == model.config.resampler_layers, "only the resampler, which masks nothing, keeps to sdpa"
    tokens = inputs["attention_mask"].bool()
    assert_close(fast[tokens], slow[tokens])  # padding may hold anything


def test_eager_is_asked_for_as_in_transformers() -> None:
    torch.manual_seed(0)
    config = tiny_model().config
    model = FusionForConditionalGeneration._from_config(config, attn_implementation="eager")
    assert model.config.text_config._attn_implementation == "eager"


def test_a_traced_pass_gives_the_same_logits(model: FusionForConditionalGeneration) -> None:
    inputs = mixed_batch()
    assert_close(model(**inputs, output_trace=True).logits, model(**inputs).logits)


def test_a_batch_is_its_rows(model: FusionForConditionalGeneration) -> None:
    inputs = mixed_batch()
    positions = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
    together = model(**inputs, position_ids=positions).logits
    for row in range(3):
        alone = model(**row_of(inputs, row)).logits[0]
        assert_close(together[row, -len(alone) :], alone, f"row {row}, padded on the left")


def test_padding_on_the_right_changes_nothing(model: FusionForConditionalGeneration) -> None:
    inputs = mixed_batch()
    for row in range(3):
        single = row_of(inputs, row)
        padded = {
            **single,
            "input_ids": functional.pad(single["input_ids"], (0, 4), value=0),
            "attention_mask": functional.pad(single["attention_mask"], (0, 4), value=0),
        }
        alone = model(**single).logits
        assert_close(model(**padded).logits[:, : alone.shape[1]], alone, f"row {row}")


def test_the_order_of_rows_does_not_matter(model: FusionForConditionalGeneration) -> None:
    inputs = mixed_batch()
    order = torch.tensor([2, 0, 1])
    shuffled = {key: value[order] for key, value in inputs.items()}
    assert_close(model(**shuffled).logits, model(**inputs).logits[order])


def test_the_order_of_pictures_does(model: FusionForConditionalGeneration) -> None:
    inputs = mixed_batch()
    swapped = {**inputs, "pixel_values": inputs["pixel_values"].flip(1)}
    assert_differs(model(**swapped).logits[2], model(**inputs).logits[2])


def test_logits_to_keep() -> None:
    model, inputs = tiny_model(), mixed_batch()
    logits = model(**inputs).logits
    assert_close(model(**inputs, logits_to_keep=2).logits, logits[:, -2:])
    places = torch.tensor([1, 4])
    assert_close(model(**inputs, logits_to_keep=places).logits, logits[:, places])


def test_hidden_states_are_the_decoders() -> None:
    model, inputs = tiny_model(), mixed_batch()
    output = model(**inputs, output_hidden_states=True)
    assert len(output.hidden_states) == model.config.text_config.num_hidden_layers + 1
    assert_close(model.lm_head(output.hidden_states[-1]), output.logits)


def test_half_precision_stays_near(gate: str) -> None:
    model, inputs = tiny_model(gate=gate), mixed_batch()
    logits = model(**inputs).logits
    half = model.to(torch.bfloat16)(**inputs).logits
    assert half.dtype == torch.bfloat16
    assert_close(half.float(), logits, limit=0.1 * logits.abs().max().item())


@pytest.mark.parametrize("tied", [True, False])
def test_a_decoders_state_dict_loads_unchanged(tied: bool) -> None:
    text = text_config(tie_word_embeddings=tied)
    decoder = LlamaForCausalLM(text).eval()
    model = tiny_model(text=text, shut=True)
    model.model.language_model.load_state_dict(decoder.model.state_dict(), strict=True)
    model.lm_head.load_state_dict(decoder.lm_head.state_dict(), strict=True)
    assert set(model.model.language_model.state_dict()) == set(decoder.model.state_dict())
    inputs = mixed_batch()
    ids = inputs["input_ids"]
    assert_same(model(**inputs).logits, decoder(ids, attention_mask=inputs["attention_mask"]).logits)
    assert (model.lm_head.weight is model.get_input_embeddings().weight) == tied


def test_a_copy_is_independent(gate: str) -> None:
    model, inputs = tiny_model(gate=gate), mixed_batch()
    logits = model(**inputs).logits
    twin = copy.deepcopy(model)
    assert_same(twin(**inputs).logits, logits, "the copy")
    open_gates(twin, seed=5)
    assert_same(model(**inputs).logits, logits, "the original, after the copy's gates changed")
    changed = twin(**inputs).logits
    assert_differs(changed, logits, "the copy, after its gates changed")
    open_gates(model, seed=6)
    assert_same(twin(**inputs).logits, changed, "the copy, after the original's gates changed")


def test_wrong_counts_are_refused() -> None:
    model, inputs = tiny_model(), mixed_batch()
    pixel_values = inputs.pop("pixel_values")
    with pytest.raises(ValueError, match=r"row 2 has 2 image placeholders.*pictures for 1 were given"):
        model(**inputs, pixel_values=pixel_values[:, :1])
    with pytest.raises(ValueError, match=r"row 2 has 2 image placeholders.*pictures for 3 were given"):
        model(**inputs, pixel_values=torch.cat([pixel_values, pixel_values[:, :1]], dim=1))
    with pytest.raises(ValueError, match=r"row 2 has 2 image placeholders.*pictures for 0 were given"):
        model(**inputs)
    with pytest.raises(ValueError, match="row 2 has 2 image placeholders"):
        model.generate(**inputs, max_new_tokens=2)
    no_placeholder = inputs["input_ids"].masked_fill(inputs["input_ids"] == IMAGE, IMAGE + 1)
    with pytest.raises(ValueError, match=r"row 0 has 0 image placeholders.*pictures for 2 were given"):
        model(no_placeholder, pixel_values=pixel_values)


def test_pictures_need_tokens() -> None:
    model, inputs = tiny_model(), mixed_batch()
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with pytest.raises(ValueError, match="pictures need input_ids"):
        model(inputs_embeds=embeddings, pixel_values=inputs["pixel_values"])


def test_embeddings_stand_for_text() -> None:
    model, inputs = tiny_model(), mixed_batch()
    ids = inputs["input_ids"][:1]
    assert_same(model(inputs_embeds=model.get_input_embeddings()(ids)).logits, model(ids).logits)
