"""FusionConfig: everything that fixes the shape of a fused model, and where its parts came from."""

from __future__ import annotations

from typing import Any

from transformers import AutoConfig, LlamaConfig, PreTrainedConfig

from multimodal.fusion.gates import GATES
from multimodal.fusion.vision import VisionConfig

VISIBILITIES = ("all_previous", "latest")

# A field that is filled in on construction: its type says what it holds afterwards.
UNSET: Any = None


class FusionConfig(PreTrainedConfig):
    """Configuration of a fused model.

    Attributes:
        text_config: The decoder's configuration (Llama-like).
        vision_config: The encoder's.
        cross_attention_layers: Decoder layers before which a cross-attention block stands, from 0, ascending.
            None spreads ``num_hidden_layers // 4`` blocks evenly, leaving the first quarter of the decoder to text.
        gate: ``"tanh"`` or ``"dynamic"``.
        gate_per_channel: One gate value per channel, or one per block.
        qk_norm: RMSNorm over the cross-attention's queries and keys.
        cross_attention_heads: Query heads of a block; None takes the decoder's.
        cross_attention_key_value_heads: Key/value heads of a block; None takes the decoder's.
        cross_intermediate_size: Width inside a block's feed-forward; None takes half of the decoder's.
        num_latents: Region tokens per image.
        resampler_hidden_size: Width of the region tokens; None takes the decoder's.
        resampler_heads: Heads of the resampler; None takes about one per 64 channels.
        resampler_layers: Layers of the resampler.
        visibility: Which images a token sees: ``"all_previous"`` in its row, or only the ``"latest"``.
        image_token_id: The placeholder that stands for an image, a token of the decoder's own vocabulary.
        text_base: Name (folder, hub id or known part) of the decoder whose weights a checkpoint leaves out.
        vision_base: Likewise of the encoder.
        bases: What is known of those bases: source, revision, digest.
        trainable_vision_stages: Last stages of the encoder that are or were trained, and so are kept in a checkpoint.
        trainable_decoder: Whether the decoder is or was trained, and so is kept in a checkpoint.
        confidence_scale: With ``confidence_bias``, turns the probability that the model gives to its answer into the
            chance that it is right: its log-odds times the scale, plus the bias. ``multimodal calibrate`` fits both.
        confidence_bias: See ``confidence_scale``.

    Raises:
        ValueError: If a value is unknown or does not fit the decoder.
    """

    model_type = "gated_fusion"
    sub_configs_defaults = {"text_config": LlamaConfig, "vision_config": VisionConfig}  # noqa: RUF012

    text_config: PreTrainedConfig = UNSET
    vision_config: VisionConfig = UNSET
    cross_attention_layers: list[int] = UNSET
    gate: str = "dynamic"
    gate_per_channel: bool = True
    qk_norm: bool = True
    cross_attention_heads: int = UNSET
    cross_attention_key_value_heads: int = UNSET
    cross_intermediate_size: int = UNSET
    num_latents: int = 32
    resampler_hidden_size: int = UNSET
    resampler_heads: int = UNSET
    resampler_layers: int = 2
    visibility: str = "all_previous"
    image_token_id: int = 0
    text_base: str | None = None
    vision_base: str | None = None
    bases: dict[str, Any] | None = None
    trainable_vision_stages: int = 0
    trainable_decoder: bool = False
    confidence_scale: float = 1.0
    confidence_bias: float = 0.0
    tie_word_embeddings: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        """Turn sub-configurations into objects, fill in what follows from the decoder, and check."""
        text = self.text_config
        if isinstance(text, dict):
            text = dict(text)
            self.text_config = AutoConfig.for_model(text.pop("model_type", "llama"), **text)
        if isinstance(self.vision_config, dict):
            self.vision_config = VisionConfig(**self.vision_config)
        super().__post_init__(**kwargs)
        self._fill_in()
        self._check()

    def _fill_in(self) -> None:
        text = self.text_config
        layers = text.num_hidden_layers
        if self.cross_attention_layers is None:
            every = max(layers // max(layers // 4, 1), 1)
            self.cross_attention_layers = list(range(every, layers, every)) or [layers - 1]
        if self.cross_attention_heads is None:
            self.cross_attention_heads = text.num_attention_heads
        if self.cross_attention_key_value_heads is None:
            self.cross_attention_key_value_heads = text.num_key_value_heads
        if self.cross_intermediate_size is None:
            self.cross_intermediate_size = text.intermediate_size // 2
        if self.resampler_hidden_size is None:
            self.resampler_hidden_size = text.hidden_size
        if self.resampler_heads is None:
            width = self.resampler_hidden_size
            self.resampler_heads = next(heads for heads in range(max(width // 64, 1), 0, -1) if width % heads == 0)
        self.tie_word_embeddings = bool(text.tie_word_embeddings)

    def _check(self) -> None:
        text = self.text_config
        if self.gate not in GATES:
            raise ValueError(f"gate={self.gate!r} is unknown: use one of {', '.join(GATES)}")
        if self.visibility not in VISIBILITIES:
            raise ValueError(f"visibility={self.visibility!r} is unknown: use one of {', '.join(VISIBILITIES)}")
        layers = self.cross_attention_layers
        if sorted(set(layers)) != list(layers) or not layers or layers[0] < 0 or layers[-1] >= text.num_hidden_layers:
            raise ValueError(
                f"cross_attention_layers={layers} must ascend within the decoder's {text.num_hidden_layers} layers, "
                f"0 to {text.num_hidden_layers - 1}"
            )
        if not 0 <= self.image_token_id < text.vocab_size:
            raise ValueError(
                f"image_token_id={self.image_token_id} is outside of the decoder's vocabulary of {text.vocab_size}: "
                "name a spare token of the tokenizer"
            )
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if self.image_token_id in _as_list(getattr(text, name)):
                raise ValueError(f"image_token_id={self.image_token_id} is the decoder's {name}: name a spare token")
        if self.resampler_hidden_size % 4:
            raise ValueError(f"resampler_hidden_size={self.resampler_hidden_size} must be a multiple of 4")
        for name in ("num_latents", "resampler_layers"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for heads, width in (
            ("cross_attention_heads", text.hidden_size),
            ("cross_attention_key_value_heads", self.cross_attention_heads),
            ("resampler_heads", self.resampler_hidden_size),
        ):
            if getattr(self, heads) < 1 or width % getattr(self, heads):
                raise ValueError(f"{heads}={getattr(self, heads)} must divide {width}")


def _as_list(value: int | list[int] | None) -> list[int]:
    return value if isinstance(value, list) else [] if value is None else [value]
