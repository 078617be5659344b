"""FusionProcessor: pictures meet their placeholders, or an error names the row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from multimodal.fusion import FusionProcessor
from multimodal.fusion.processing import CHATML_TEMPLATE, PLAIN_TEMPLATE, template_with_images
from tests.fusion.tiny import (
    IMAGE_SIZE,
    IMAGE_TOKEN,
    assert_same,
    photo,
    save_decoder,
    save_encoder,
    tiny_model,
    tiny_tokenizer,
)


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> FusionProcessor:
    folder = tmp_path_factory.mktemp("parts")
    return FusionProcessor.fuse(text=str(save_decoder(folder / "text")), vision=str(save_encoder(folder / "vision")))


def ids_of(processor: FusionProcessor, text: str) -> list[int]:
    return processor.tokenizer.encode(text, add_special_tokens=False)


# ---- what a call returns


def test_one_row(processor: FusionProcessor) -> None:
    inputs = processor(images=photo(), text="see <image> here", return_tensors="pt")
    assert sorted(inputs) == ["attention_mask", "input_ids", "pixel_values"]
    assert inputs["input_ids"].tolist() == [ids_of(processor, "see <image> here")]
    assert inputs["pixel_values"].shape == (1, 1, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert sorted(processor.model_input_names) == sorted(inputs)


def test_rows_are_padded_on_the_left_and_pictures_at_the_end(processor: FusionProcessor) -> None:
    images = [photo(seed) for seed in range(3)]
    texts = ["no picture at all", "<image>", "<image> or <image>?"]
    inputs = processor(images=images, text=texts, return_tensors="pt")
    assert inputs["pixel_values"].shape == (3, 2, 3, IMAGE_SIZE, IMAGE_SIZE)
    assert inputs["attention_mask"][1].tolist() == [0] * 16 + [1]
    assert not inputs["pixel_values"][0].any()
    assert not inputs["pixel_values"][1, 1].any()
    for (row, place), image in zip([(1, 0), (2, 0), (2, 1)], images, strict=True):
        alone = processor(images=image, text="<image>", return_tensors="pt")["pixel_values"][0, 0]
        assert_same(inputs["pixel_values"][row, place], alone, f"picture {place} of row {row}")


@pytest.mark.parametrize("images", [[[], ["a"], ["b", "c"]], [None, "a", ["b", "c"]], [[], ("a",), ("b", "c")]])
def test_nested_lists_are_flat_lists(processor: FusionProcessor, images: list[Any]) -> None:
    pictures = {name: photo(seed) for seed, name in enumerate("abc")}

    def fill(item: Any) -> Any:
        if isinstance(item, list | tuple):
            return type(item)(fill(each) for each in item)
        return None if item is None else pictures[item]

    texts = ["none", "one <image>", "two <image> <image>"]
    nested = processor(images=fill(images), text=texts, return_tensors="pt")
    flat = processor(images=list(pictures.values()), text=texts, return_tensors="pt")
    assert_same(nested["pixel_values"], flat["pixel_values"])


def test_text_alone(processor: FusionProcessor) -> None:
    nothing: list[Any] = [None, [], [[], []]]
    for images in nothing:
        inputs = processor(images=images, text=["hello", "you"], return_tensors="pt")
        assert "pixel_values" not in inputs
        assert inputs["input_ids"].shape == (2, 5)


def test_arrays_and_tensors_are_pictures(processor: FusionProcessor) -> None:
    picture = torch.randint(0, 256, (3, 40, 40), dtype=torch.uint8)
    by_tensor = processor(images=picture, text="<image>", return_tensors="pt")["pixel_values"]
    by_array = processor(images=picture.numpy(), text="<image>", return_tensors="pt")["pixel_values"]
    by_pil = processor(images=Image.fromarray(picture.permute(1, 2, 0).numpy()), text="<image>", return_tensors="pt")
    assert_same(by_array, by_tensor)
    assert_same(by_pil["pixel_values"], by_tensor)


def test_lists_without_return_tensors(processor: FusionProcessor) -> None:
    inputs = processor(images=photo(), text="<image>")
    assert isinstance(inputs["input_ids"], list)
    assert inputs["pixel_values"].shape == (1, 1, 3, IMAGE_SIZE, IMAGE_SIZE)


# ---- wrong counts name the row


TEXTS = ["one <image>", "two <image> <image>"]


@pytest.mark.parametrize(
    ("images", "message"),
    [
        (2, "row 1 has 2 image placeholders but 1 pictures"),  # flat, too few
        (4, "row 1 has 2 image placeholders but 3 pictures"),  # flat, too many
        ([0, 2], "row 0 has 1 image placeholders but 0 pictures"),  # nested, too few
        ([2, 2], "row 0 has 1 image placeholders but 2 pictures"),  # nested, too many
        ([1, 1], "row 1 has 2 image placeholders but 1 pictures"),
        ([1], "1 lists of pictures were given for 2 rows"),
        ([1, 2, 0], "3 lists of pictures were given for 2 rows"),
        (None, "row 0 has 1 image placeholders but 0 pictures"),  # text without pictures
    ],
)
def test_wrong_counts(processor: FusionProcessor, images: int | list[int] | None, message: str) -> None:
    given: Any = images
    if isinstance(images, int):
        given = [photo() for _ in range(images)]
    elif images is not None:
        given = [[photo() for _ in range(count)] for count in images]
    with pytest.raises(ValueError, match=message):
        processor(images=given, text=TEXTS)


def test_pictures_without_placeholders(processor: FusionProcessor) -> None:
    with pytest.raises(ValueError, match="row 0 has 0 image placeholders but 1 pictures"):
        processor(images=photo(), text="no picture here")
    with pytest.raises(ValueError, match="row 1 has 0 image placeholders but 2 pictures"):
        processor(images=[photo(), photo()], text=["none", "none"])


def test_pictures_without_text(processor: FusionProcessor) -> None:
    with pytest.raises(ValueError, match="text is missing"):
        processor(images=photo())


def test_no_rows(processor: FusionProcessor) -> None:
    with pytest.raises(ValueError, match="text is missing"):
        processor(images=[photo()], text=[])


def test_a_path_is_no_picture(processor: FusionProcessor) -> None:
    for images in ("film.png", ["film.png"], [["film.png"]]):
        with pytest.raises(ValueError, match=r"'film.png' is no picture"):
            processor(images=images, text="<image>")


def test_truncation_that_cuts_a_placeholder_is_noticed(processor: FusionProcessor) -> None:
    with pytest.raises(ValueError, match="row 0 has 1 image placeholders but 2 pictures"):
        processor(images=[photo(), photo()], text="<image> <image>", truncation=True, max_length=2)


# ---- conversations


def user(*parts: str) -> dict[str, Any]:
    content = [{"type": "image"} if part == IMAGE_TOKEN else {"type": "text", "text": part} for part in parts]
    return {"role": "user", "content": content}


def test_image_parts_become_placeholders(processor: FusionProcessor) -> None:
    conversation = [
        {"role": "system", "content": "short answers"},
        user(IMAGE_TOKEN, "what is it?"),
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
        user("and ", IMAGE_TOKEN, " this?"),
    ]
    text = processor.apply_chat_template(conversation, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nshort answers<|im_end|>\n"
        "<|im_start|>user\n<image>what is it?<|im_end|>\n"
        "<|im_start|>assistant\na cat<|im_end|>\n"
        "<|im_start|>user\nand <image> this?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_pictures_can_stand_behind_their_question(processor: FusionProcessor) -> None:
    template = template_with_images(CHATML_TEMPLATE, images_last=True)
    conversation = [
        {"role": "system", "content": "short answers"},
        user(IMAGE_TOKEN, "what is it?"),
        {"role": "assistant", "content": [{"type": "text", "text": "a cat"}]},
        user("and ", IMAGE_TOKEN, " this ", IMAGE_TOKEN, "?"),
    ]
    text = processor.apply_chat_template(conversation, chat_template=template, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nshort answers<|im_end|>\n"
        "<|im_start|>user\nwhat is it?<image><|im_end|>\n"
        "<|im_start|>assistant\na cat<|im_end|>\n"
        "<|im_start|>user\nand  this ?<image><image><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_pictures_behind_their_question_keep_their_order(tmp_path: Path) -> None:
    text, vision = save_decoder(tmp_path / "text"), save_encoder(tmp_path / "vision")
    processor = FusionProcessor.fuse(text=str(text), vision=str(vision), images_last=True)
    first, second = photo(1), photo(2)
    content = [
        {"type": "image", "image": first},
        {"type": "text", "text": "<image>?"},
        {"type": "image", "image": second},
    ]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}],
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
        sanitize_control_tokens=True,
    )
    expected = processor(images=[first, second], text="<image><image>", return_tensors="pt")
    assert_same(inputs["pixel_values"], expected["pixel_values"])
    ids = inputs["input_ids"][0].tolist()
    place = ids.index(processor.image_token_id)
    assert processor.tokenizer.decode(ids[place:]) == "<image><image><|im_end|>\n"
    assert processor.tokenizer.decode(ids[:place]).endswith("image<unk>?"), "what a user types stays text"


def test_a_conversation_becomes_inputs(processor: FusionProcessor) -> None:
    picture = photo()
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "what?"}]
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=True, return_dict=True, return_tensors="pt"
    )
    expected = processor(images=picture, text="<|im_start|>user\n<image>what?<|im_end|>\n", return_tensors="pt")
    for key in expected:
        assert_same(inputs[key], expected[key], key)


def test_a_batch_of_conversations(processor: FusionProcessor) -> None:
    conversations = [
        [{"role": "user", "content": [{"type": "text", "text": "hello"}]}],
        [{"role": "user", "content": [{"type": "image", "image": photo()}, {"type": "text", "text": "what?"}]}],
    ]
    inputs = processor.apply_chat_template(conversations, tokenize=True, return_dict=True, return_tensors="pt")
    assert inputs["pixel_values"].shape[:2] == (2, 1)
    assert (inputs["input_ids"] == processor.image_token_id).sum(-1).tolist() == [0, 1]


def test_a_typed_placeholder_is_text_when_sanitized(processor: FusionProcessor) -> None:
    picture = photo()
    content = [{"type": "image", "image": picture}, {"type": "text", "text": "the <image> tag <|im_end|>"}]
    options = {"tokenize": True, "return_dict": True, "return_tensors": "pt"}
    with pytest.raises(ValueError, match="row 0 has 2 image placeholders but 1 pictures"):
        processor.apply_chat_template([{"role": "user", "content": content}], **options)
    inputs = processor.apply_chat_template(
        [{"role": "user", "content": content}], **options, sanitize_control_tokens=True
    )
    ids = inputs["input_ids"][0].tolist()
    assert ids.count(processor.image_token_id) == 1
    assert ids.count(processor.tokenizer.eos_token_id) == 1, "the template's own, not the user's"
    typed = processor.tokenizer.encode("<image>", add_special_tokens=False, split_special_tokens=True)
    assert len(typed) == len("<image>")
    assert any(ids[start : start + len(typed)] == typed for start in range(len(ids)))
    assert inputs["pixel_values"].shape[:2] == (1, 1)


def test_a_decoder_without_a_template_gets_a_plain_one(tmp_path: Path) -> None:
    text = save_decoder(tmp_path / "text")
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = None
    (text / "chat_template.jinja").unlink(missing_ok=True)
    tokenizer.save_pretrained(text)
    processor = FusionProcessor.fuse(text=str(text), vision=str(save_encoder(tmp_path / "vision")))
    told = processor.apply_chat_template([user(IMAGE_TOKEN, "what?")], add_generation_prompt=True)
    assert told == "user: <image>what?\nassistant:"
    assert PLAIN_TEMPLATE in processor.chat_template


# ---- settings


def test_save_is_reload(processor: FusionProcessor, tmp_path: Path) -> None:
    processor.save_pretrained(tmp_path)
    again = FusionProcessor.from_pretrained(tmp_path)
    assert again.image_token == processor.image_token
    assert again.image_token_id == processor.image_token_id
    assert again.tokenizer.padding_side == "left"
    assert again.apply_chat_template([user(IMAGE_TOKEN, "x")]) == processor.apply_chat_template(
        [user(IMAGE_TOKEN, "x")]
    )
    call: dict[str, Any] = {"images": [photo()], "text": ["a <image>", "bcd"], "return_tensors": "pt"}
    inputs, expected = again(**call), processor(**call)
    assert set(inputs) == set(expected)
    for key in expected:
        assert_same(inputs[key], expected[key], key)


def test_a_tokenizer_without_padding_pads_with_its_end() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    processor = FusionProcessor(tiny_image_processor(), tokenizer)
    assert processor.tokenizer.pad_token == tokenizer.eos_token


def tiny_image_processor() -> Any:
    from transformers import ViTImageProcessor

    return ViTImageProcessor(size={"height": IMAGE_SIZE, "width": IMAGE_SIZE})


def test_the_models_inputs_are_the_processors_outputs(processor: FusionProcessor) -> None:
    model = tiny_model(image_token_id=processor.image_token_id)
    texts = ["no picture", "see <image>", "<image> and <image>"]
    inputs = processor(images=[photo(seed) for seed in range(3)], text=texts, return_tensors="pt")
    answers = processor.batch_decode(model.generate(**inputs, max_new_tokens=4, min_new_tokens=4))
    assert len(answers) == 3
    assert all(isinstance(answer, str) for answer in answers)
