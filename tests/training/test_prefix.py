"""The frozen prefix: the numbers and gradients of the ordinary forward pass, and a cache that no kill can harm."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from multimodal.fusion import FusionForConditionalGeneration
from multimodal.training import prefix as module
from multimodal.training.collator import IGNORED, FusionCollator
from multimodal.training.prefix import HEAD, PrefixCache, can_keep_prefixes, can_keep_states
from tests.fusion.tiny import BOS, IMAGE, PAD, pictures, text_config, tiny_model, words

LIMIT = 5e-5  # of the largest number: sums in another order
SMALL = 1e-3  # a gradient that is zero but for rounding (of a bias of keys) is not measured by itself

ROWS = {
    "image first": [
        [BOS, IMAGE, *words(8, seed=1)],
        [BOS, IMAGE, *words(3, seed=2)],
        [BOS, IMAGE, IMAGE, *words(5, seed=3)],
    ],
    "image last": [
        [BOS, *words(9, seed=4), IMAGE, *words(4, seed=5)],
        [BOS, *words(2, seed=6), IMAGE, *words(6, seed=7)],
        [BOS, *words(5, seed=8), IMAGE, *words(1, seed=9), IMAGE, *words(2, seed=10)],
    ],
    "nothing in front": [[IMAGE, *words(4, seed=11)], [BOS, *words(3, seed=12), IMAGE, *words(2, seed=13)]],
}


def start_of(row: list[int]) -> int:
    return row.index(IMAGE)


def whole(rows: list[list[int]]) -> dict[str, torch.Tensor]:
    """Rows as the ordinary forward pass takes them."""
    known = [start_of(row) + 1 for row in rows]
    labels = [[IGNORED] * count + row[count:] for row, count in zip(rows, known, strict=True)]
    items = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]
    return FusionCollator(PAD)(items) | {"pixel_values": pictures_of(rows)}


def behind(rows: list[list[int]], cache: PrefixCache) -> dict[str, torch.Tensor]:
    """The same rows behind their prefixes."""
    items = [
        {"prefix": cache[row], "input_ids": row[start_of(row) :], "labels": [IGNORED, *row[start_of(row) + 1 :]]}
        for row in rows
    ]
    return FusionCollator(PAD)(items) | {"pixel_values": pictures_of(rows)}


def pictures_of(rows: list[list[int]]) -> torch.Tensor:
    pixels = pictures(len(rows), max(row.count(IMAGE) for row in rows))
    for index, row in enumerate(rows):
        pixels[index, row.count(IMAGE) :] = 0
    return pixels


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


def assert_near(actual: torch.Tensor, expected: torch.Tensor, what: str) -> None:
    """Relative to the largest number."""
    assert actual.shape == expected.shape, f"{what}: {tuple(actual.shape)} is not {tuple(expected.shape)}"
    difference = ((actual - expected).abs().max() / expected.abs().max().clamp_min(SMALL)).item()
    assert difference <= LIMIT, f"{what}: largest difference {difference:.2e} of the largest number, limit {LIMIT}"


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("gate", ["tanh", "dynamic"])
@pytest.mark.parametrize("visibility", ["all_previous", "latest"])
def test_logits_and_gradients_are_the_ordinary_ones(kind: str, gate: str, visibility: str, tmp_path: Path) -> None:
    model, rows = tiny_model(gate=gate, visibility=visibility), ROWS[kind]
    model.set_trainable(vision_stages=1)
    model.train()
    cache = PrefixCache(tmp_path, model, rows)
    assert model.model.language_model.training
    expected = model(**whole(rows))
    expected.loss.backward()
    wanted = gradients(model)
    assert {name.split(".")[1] for name in wanted} == {"vision_encoder", "resampler", "cross_attention_blocks"}

    output = model(**behind(rows, cache))
    assert_near(output.loss, expected.loss, "loss")
    for index, row in enumerate(rows):
        start = start_of(row)
        suffix = output.logits[index, : len(row) - start]
        assert_near(suffix, expected.logits[index, start : len(row)], f"logits of row {index}")
    output.loss.backward()
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_near(found[name], gradient, name)


@pytest.mark.parametrize("layers", [[0, 2], [3]], ids=["the first layer", "the last layer"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_blocks_anywhere_and_both_kinds_of_attention(layers: list[int], attention: str, tmp_path: Path) -> None:
    model, rows = tiny_model(cross_attention_layers=layers), ROWS["image last"]
    model.set_attn_implementation(attention)
    expected = model(**whole(rows), use_cache=False)
    output = model(**behind(rows, PrefixCache(tmp_path, model, rows)))
    assert_near(output.loss, expected.loss, "loss")


def test_a_trace_behind_a_prefix_is_the_ordinary_one_and_can_be_trained_on(tmp_path: Path) -> None:
    model, rows = tiny_model(), ROWS["image last"]
    expected = model(**whole(rows), output_trace=True).trace
    trace = model(**behind(rows, PrefixCache(tmp_path, model, rows)), output_trace=True).trace
    assert trace.layers == expected.layers
    for index, row in enumerate(rows):
        start, length = start_of(row), len(row) - start_of(row)
        for name in ("attention_gates", "feed_forward_gates", "attention"):
            suffix = getattr(trace, name)[index, :, :length]
            assert_near(suffix, getattr(expected, name)[index, :, start : len(row)], name)
    trace.image_attention()[..., 0, 0].sum().backward()
    names = {name for name, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert any("resampler" in name for name in names)
    assert any("cross_attention_blocks.1.attention.q_proj" in name for name in names)


@pytest.mark.parametrize("kind", ROWS)
def test_below_layers_that_learn_whole_rows_are_kept(kind: str, tmp_path: Path) -> None:
    rows = [*ROWS[kind], [BOS, *words(6, seed=14)]]  # such a decoder learns from text, too
    model = tiny_model()
    model.set_trainable()
    model.model.language_model.layers[3].mlp.up_proj.weight.requires_grad_(True)  # as LoRA's weights would
    model.train()
    labels = [[IGNORED] * 2 + row[2:] for row in rows]
    items = [{"input_ids": row, "labels": label} for row, label in zip(rows, labels, strict=True)]
    shown = {"pixel_values": pictures_of(rows)}
    expected = model(**FusionCollator(PAD)(items), **shown)
    expected.loss.backward()
    wanted = gradients(model)
    assert "model.language_model.layers.3.mlp.up_proj.weight" in wanted

    cache = PrefixCache(tmp_path, model, rows)
    known = [{"prefix": cache[row], **item} for row, item in zip(rows, items, strict=True)]
    assert {entry["prefix"].keys.shape[2] for entry in known} == {0}
    output = model(**FusionCollator(PAD)(known), **shown)
    assert_near(output.loss, expected.loss, "loss")
    for index, row in enumerate(rows):
        assert_near(output.logits[index, : len(row)], expected.logits[index, : len(row)], f"logits of row {index}")
    output.loss.backward()
    found = gradients(model)
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_near(found[name], gradient, name)


# ---- what is refused


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[FusionForConditionalGeneration, dict[str, Any]]:
    model = tiny_model()
    return model, behind(ROWS["image last"], PrefixCache(tmp_path, model, ROWS["image last"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"prefix_keys": None}, "belong together"),
        ({"input_ids": None}, "needs the input_ids"),
        ({"use_cache": True}, "no cache"),
        ({"prefix_states": torch.zeros(3, 2, 32)}, "needs the input_ids"),
        ({"prefix_values": torch.zeros(3, 3, 2, 1, 8)}, "must be alike"),
        ({"attention_mask": torch.ones(3, 4)}, r"attention_mask \(3, 4\) must be \(3, 17\)"),
    ],
)
def test_arguments_that_do_not_fit(inputs: Any, changes: dict[str, Any], message: str) -> None:
    model, given = inputs
    with pytest.raises(ValueError, match=message):
        model(**{**given, **changes})


def test_decoders_of_another_kind_are_refused(inputs: Any, tmp_path: Path) -> None:
    model, given = inputs
    decoder = model.model.language_model
    decoder.config.layer_types = ["full_attention", "sliding_attention"] * 2
    with pytest.raises(ValueError, match="full attention"):
        model(**given)
    decoder.config.layer_types = None
    decoder.layers[2].gradient_checkpointing = True
    assert not can_keep_prefixes(model)
    decoder.layers[2].gradient_checkpointing = False
    assert can_keep_prefixes(model)

    class BloomLayer(LlamaDecoderLayer):
        def forward(self, hidden_states: torch.Tensor, alibi: torch.Tensor) -> torch.Tensor:
            return hidden_states

    decoder.layers[3].__class__ = BloomLayer
    with pytest.raises(ValueError, match="BloomLayer is not called as Llama's"):
        model(**given)
    with pytest.raises(ValueError, match="is not called as"):
        PrefixCache(tmp_path, model, ROWS["image last"])


def test_a_decoder_that_learns_has_no_constants() -> None:
    model = tiny_model()
    assert can_keep_prefixes(model)
    model.model.language_model.layers[3].mlp.up_proj.weight.requires_grad_(True)  # as LoRA's weights would
    assert not can_keep_prefixes(model)
    assert can_keep_states(model), "below it nothing learns"
    model.model.language_model.layers[0].mlp.up_proj.weight.requires_grad_(True)
    assert not can_keep_states(model)
    assert not can_keep_prefixes(tiny_model(text=text_config(attention_dropout=0.1)))


def test_a_row_without_a_picture(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="without a picture"):
        PrefixCache(tmp_path, tiny_model(), [words(4)])


# ---- the files


MANY = [[BOS, *words(4 + seed % 3, seed=seed % 7), IMAGE, *words(2, seed=seed)] for seed in range(30)]


@pytest.fixture
def computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, int]]:
    """How many prefixes and rows were computed."""
    counts = {"prefixes": 0, "rows": 0}
    for owner, name, what in ((module, "_keys_and_values", "prefixes"), (module._LowerLayers, "states", "rows")):
        original = getattr(owner, name)

        def count(*args: Any, original: Callable[..., Any] = original, what: str = what) -> Any:
            found = original(*args)
            counts[what] += len(found)
            return found

        monkeypatch.setattr(owner, name, count)
    monkeypatch.setattr(module, "BATCH_TOKENS", 30)  # several batches of each length
    yield counts


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir() if file.suffix != ".lock"}


def test_each_distinct_prefix_and_row_is_computed_once(computed: dict[str, int], tmp_path: Path) -> None:
    model = tiny_model()
    prefixes = {tuple(row[: start_of(row)]) for row in MANY}
    rows = {tuple(row) for row in MANY}
    assert len(prefixes) < len(rows)
    PrefixCache(tmp_path, model, MANY[:20] + MANY[:5])
    before = dict(computed)
    PrefixCache(tmp_path, model, MANY[:20])
    assert computed == before  # all of it is there
    cache = PrefixCache(tmp_path, model, MANY)
    assert computed == {"prefixes": len(prefixes), "rows": len(rows)}  # only what was new
    for row in MANY:
        entry = cache[row]
        assert entry.keys.shape == entry.values.shape == (3, 2, start_of(row), 8)
        assert entry.states.shape == (len(row) - start_of(row), 32)


def test_a_kill_at_any_byte_leaves_no_trace(computed: dict[str, int], tmp_path: Path) -> None:
    model = tiny_model()
    PrefixCache(tmp_path / "whole", model, MANY[:8])
    whole = contents(tmp_path / "whole")
    (prefixes,) = [name for name in whole if name.endswith(".prefixes")]
    size = len(whole[prefixes])
    cuts = {0, 1, HEAD.size - 1, HEAD.size, size - 1, *range(0, size, max(size // 12, 1))}
    for cut, name in itertools.product(sorted(cuts), whole):
        folder = tmp_path / f"{cut}-{name[-8:]}"
        folder.mkdir()
        for other, content in whole.items():
            (folder / other).write_bytes(content[:cut] if other == name else content)
        PrefixCache(folder, model, MANY[:8])
        assert contents(folder) == whole, f"{name} cut at byte {cut} of {len(whole[name])}"


def test_what_decides_the_numbers_names_the_file(tmp_path: Path) -> None:
    def files() -> int:
        return len(list(tmp_path.glob("*.prefixes")))

    model = tiny_model()
    PrefixCache(tmp_path, model, MANY)
    model.config.text_config.use_cache = False  # as Trainer does
    nn.init.normal_(model.model.resampler.latents)
    PrefixCache(tmp_path, model, MANY)
    assert files() == 1
    PrefixCache(tmp_path, tiny_model(cross_attention_layers=[2, 3]), MANY)
    assert files() == 2
    model.model.language_model.layers[2].mlp.up_proj.weight.data[0, 0] += 1
    PrefixCache(tmp_path, model, MANY)
    assert files() == 3
    learning = tiny_model()
    for change in range(2):  # of what learns, and so names nothing
        learning.model.language_model.layers[3].mlp.up_proj.weight.requires_grad_(True).data[0, 0] += change
        PrefixCache(tmp_path, learning, MANY)
    assert files() == 4
    cache = PrefixCache(tmp_path, model.to(torch.bfloat16), MANY)
    assert files() == 5
    entry = cache[MANY[0]]
    assert {entry.keys.dtype, entry.values.dtype, entry.states.dtype} == {torch.bfloat16}
