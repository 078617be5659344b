"""The fused model: a text decoder that reads pictures through gated cross-attention.

``FusionModel`` holds a stock decoder, a vision encoder, a resampler and the cross-attention blocks. A block runs just
before its decoder layer, through a pre-forward hook, so the decoder stays the class that transformers ships and its
state dict loads unchanged. What always holds: with shut gates, and for every row without an image, the logits
are the bare decoder's, bit for bit. Nothing of a forward pass is stored on a module.

Axes: B batch, T text tokens, I images, R grid cells, L region tokens per image, S = I * L, D width.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModel, GenerationConfig, GenerationMixin, PreTrainedModel
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from multimodal.fusion.bases import decoder_state_dict, encoder_state_dict, load_decoder, load_encoder, read_tensors
from multimodal.fusion.cache import FusionCache
from multimodal.fusion.configuration import FusionConfig
from multimodal.fusion.cross_attention import BlockRecord, GatedCrossAttentionBlock, VisionContext, visible_images
from multimodal.fusion.gates import DynamicGate, TanhGate
from multimodal.fusion.low_rank import DECODER_ADAPTER, LowRank, fold, read_low_rank, remove_low_rank
from multimodal.fusion.prefix import PrefixStates, run_suffix
from multimodal.fusion.resampler import RegionResampler
from multimodal.fusion.trace import FusionTrace
from multimodal.fusion.vision import VisionEncoder, VisionFeatures


@dataclass
class FusionModelOutput(BaseModelOutputWithPast):
    """A decoder's output, and the trace if one was asked for."""

    trace: FusionTrace | None = None


@dataclass
class FusionCausalLMOutput(CausalLMOutputWithPast):
    """A causal language model's output, and the trace if one was asked for."""

    trace: FusionTrace | None = None


@dataclass(frozen=True)
class Part:
    """One line of the table of parts: its name, number of parameters, and how many of them are trained."""

    name: str
    parameters: int
    trainable: int


class FusionPreTrainedModel(PreTrainedModel):
    """What all classes of the fused model share: configuration, initial weights, support flags."""

    config_class = FusionConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    input_modalities = ("image", "text")
    supports_gradient_checkpointing = True
    _no_split_modules = ["LlamaDecoderLayer", "GatedCrossAttentionBlock"]  # noqa: RUF012
    _skip_keys_device_placement = ["past_key_values", "vision_context"]  # noqa: RUF012
    _supports_sdpa = True
    _supports_attention_backend = True

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, TanhGate):
            init.zeros_(module.alpha)  # a gate starts shut
        if isinstance(module, DynamicGate):
            init.zeros_(module.token_weight.weight)
            init.zeros_(module.token_weight.bias)
        if isinstance(module, RegionResampler):
            module.reset_parameters()


class FusionModel(FusionPreTrainedModel):
    """Decoder, encoder, resampler and cross-attention blocks, without the language-model head.

    Args:
        config: The fused model's configuration.
    """

    def __init__(self, config: FusionConfig) -> None:
        super().__init__(config)
        self.vision_encoder = VisionEncoder._from_config(config.vision_config)
        self.resampler = RegionResampler(config)
        self.cross_attention_blocks = nn.ModuleList(
            GatedCrossAttentionBlock(config, index) for index in range(len(config.cross_attention_layers))
        )
        self.language_model = AutoModel.from_config(config.text_config)
        for index, layer in enumerate(self.language_model.layers):
            layer.register_forward_pre_hook(partial(self._before_layer, index), with_kwargs=True)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's token embedding."""
        return self.language_model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's token embedding."""
        self.language_model.set_input_embeddings(value)

    def get_image_features(self, pixel_values: torch.Tensor) -> VisionFeatures:
        """Encode pictures ``(N, 3, height, width)`` to grid features ``(N, R, D)`` and their grid."""
        return self.vision_encoder(pixel_values)

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        prefix_states: torch.Tensor | None = None,
        prefix_keys: torch.Tensor | None = None,
        prefix_values: torch.Tensor | None = None,
        use_cache: bool | None = None,
        output_trace: bool = False,
        **kwargs: Any,
    ) -> FusionModelOutput:
        """Run the decoder over text that may hold image placeholders.

        With ``prefix_states``, ``prefix_keys`` and ``prefix_values`` (all or none, see ``prefix.py``), ``input_ids``
        are only what stands behind a frozen prefix, and only the layers from the first with a block on are run over it.

        Args:
            input_ids: ``(B, T)``, one placeholder token for each image.
            attention_mask: ``(B, T_past + T)``, 1 for tokens, 0 for padding; with a prefix ``(B, P + T)``, padded on
                the left over ``P``.
            position_ids: ``(B, T)``.
            past_key_values: The cache of what came before, pictures included.
            inputs_embeds: ``(B, T, D)`` instead of ``input_ids``; text only.
            pixel_values: ``(B, I, 3, height, width)``, the pictures whose placeholders stand in ``input_ids``, in
                order; rows with fewer pictures are padded at the end.
            image_features: ``(B, I, R, D_vision)`` instead of ``pixel_values``: the encoder's output.
            prefix_states: ``(B, T, D)``, the tokens of ``input_ids`` as they enter the first layer with a block.
            prefix_keys: ``(B, N, K, P, C)``, keys of the prefix for that layer and all ``N`` from there on.
            prefix_values: ``(B, N, K, P, C)``, likewise.
            use_cache: Return a cache; by default yes, except in training. There is none behind a prefix.
            output_trace: Return a :class:`FusionTrace`; all pictures must be in this pass. It keeps its gradients.
            **kwargs: Handed to the decoder.

        Returns:
            The decoder's output; ``past_key_values`` is a :class:`FusionCache`.

        Raises:
            ValueError: If the number of pictures does not fit the placeholders, or a prefix not the decoder or the
                other arguments.
        """
        prefix = _prefix(prefix_states, prefix_keys, prefix_values)
        if prefix is not None:
            if input_ids is None or input_ids.shape != prefix.states.shape[:2]:
                raise ValueError("a prefix needs the input_ids of the tokens behind it, (B, T) as in prefix_states")
            if past_key_values is not None or inputs_embeds is not None or position_ids is not None or use_cache:
                raise ValueError("a prefix goes with no cache, no inputs_embeds and no position_ids")
            use_cache = False
        if use_cache is None:
            use_cache = self.config.text_config.use_cache and not self.training
        cache = self._fusion_cache(past_key_values, use_cache)
        records: list[BlockRecord] | None = [] if output_trace else None
        context, maps, grid = self._vision_context(input_ids, pixel_values, image_features, cache, records)
        if prefix is None:
            output = self.language_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=None if cache is None else cache.self_attention_cache,
                inputs_embeds=inputs_embeds,
                use_cache=use_cache,
                vision_context=context,
                **kwargs,
            )
        else:
            first = self.config.cross_attention_layers[0]
            output = BaseModelOutputWithPast(
                last_hidden_state=run_suffix(
                    self.language_model, prefix, first=first, attention_mask=attention_mask, vision_context=context
                )
            )
        trace = None
        if records is not None and maps is not None:
            trace = FusionTrace.from_records(
                records, layers=self.config.cross_attention_layers, resampler_maps=maps, grid=grid
            )
        return FusionModelOutput(
            last_hidden_state=output.last_hidden_state,
            past_key_values=cache,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            trace=trace,
        )

    def _before_layer(
        self, index: int, _layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Pre-forward hook of every decoder layer: take the context away from it, and run its block if it has one."""
        context = kwargs.pop("vision_context", None)
        if context is not None and index in self.config.cross_attention_layers:
            block = self.cross_attention_blocks[self.config.cross_attention_layers.index(index)]
            args = (block(args[0], context), *args[1:])
        return args, kwargs

    def _fusion_cache(self, past_key_values: Cache | None, use_cache: bool) -> FusionCache | None:
        if isinstance(past_key_values, FusionCache):
            return past_key_values
        if past_key_values is None:
            return FusionCache(DynamicCache(config=self.config.text_config)) if use_cache else None
        return FusionCache(past_key_values)

    def _vision_context(
        self,
        input_ids: torch.Tensor | None,
        pixel_values: torch.Tensor | None,
        image_features: torch.Tensor | None,
        cache: FusionCache | None,
        records: list[BlockRecord] | None,
    ) -> tuple[VisionContext | None, torch.Tensor | None, tuple[int, int]]:
        """Encode new pictures, and say which token sees which. No context means: nobody sees anything."""
        pictures = pixel_values if pixel_values is not None else image_features
        grid = tuple(self.config.vision_config.grid_size)
        old_ordinals = None if cache is None else cache.ordinals
        if input_ids is None:
            if pictures is not None or old_ordinals is not None:
                raise ValueError("pictures need input_ids: the placeholders in them say where the pictures stand")
            return None, None, grid

        is_image = input_ids == self.config.image_token_id  # (B, T)
        _check_image_count(is_image, pictures, old_ordinals)
        if pictures is None and old_ordinals is None:
            return None, None, grid
        if records is not None and old_ordinals is not None:
            raise ValueError("a trace needs all pictures in one pass: call without past_key_values")

        before = is_image.new_zeros(len(is_image), dtype=torch.long)
        if cache is not None and cache.placeholders is not None:
            before = cache.placeholders
        given = 0 if pictures is None else pictures.shape[1]
        # A placeholder beyond the given pictures is a rejected draft of assisted decoding: it counts as a word.
        images_before = before[:, None] + is_image.cumsum(-1).clamp_max(given)  # (B, T)
        states = maps = None
        ordinals = [] if old_ordinals is None else [old_ordinals]
        if pictures is not None:
            place = torch.arange(1, given + 1, device=input_ids.device)  # (I,)
            filled = place <= is_image.sum(-1, keepdim=True)  # (B, I)
            _check_finite(pictures, filled)
            states, maps, grid = self._region_tokens(
                pictures, filled, encoded=pixel_values is None, output_attentions=records is not None
            )
            ordinals.append((before[:, None] + place) * filled)
        all_ordinals = torch.cat(ordinals, dim=1)  # (B, I)
        if cache is not None:
            cache.ordinals, cache.placeholders = all_ordinals, images_before[:, -1]

        visible = visible_images(all_ordinals, images_before, self.config.visibility)  # (B, T, I)
        visible = visible.repeat_interleave(self.config.num_latents, dim=-1)  # (B, T, S)
        return VisionContext(states, visible, cache, records), maps, grid

    def _region_tokens(
        self, pictures: torch.Tensor, filled: torch.Tensor, *, encoded: bool, output_attentions: bool
    ) -> tuple[torch.Tensor, torch.Tensor | None, tuple[int, int]]:
        """Encode and resample the filled slots only: ``(B, S, D)``, maps ``(B, I, L, R)`` and the grid."""
        if encoded:
            features, grid = pictures[filled], tuple(self.config.vision_config.grid_size)
        else:
            features, grid = self.vision_encoder(pictures[filled])  # (N, R, D)
        regions, maps = self.resampler(features.to(self.dtype), grid, output_attentions)  # (N, L, D)

        def to_rows(found: torch.Tensor) -> torch.Tensor:
            rows = found.new_zeros(*filled.shape, *found.shape[1:])
            rows[filled] = found
            return rows

        return to_rows(regions).flatten(1, 2), None if maps is None else to_rows(maps), grid


def _prefix(states: torch.Tensor | None, keys: torch.Tensor | None, values: torch.Tensor | None) -> PrefixStates | None:
    if states is None and keys is None and values is None:
        return None
    if states is None or keys is None or values is None:
        raise ValueError("prefix_states, prefix_keys and prefix_values belong together: give all or none")
    return PrefixStates(states, keys, values)


def _check_image_count(
    is_image: torch.Tensor, pictures: torch.Tensor | None, old_ordinals: torch.Tensor | None
) -> None:
    most = int(is_image.sum(-1).max()) if is_image.numel() else 0
    given = 0 if pictures is None else pictures.shape[1]
    # Behind earlier pictures, a placeholder without one can be a draft of assisted decoding, copied from the prompt.
    if given > most or (given < most and old_ordinals is None):
        row = int(is_image.sum(-1).argmax()) if is_image.numel() else 0
        raise ValueError(
            f"row {row} has {most} image placeholders, the most of all rows, but pictures for {given} were given: "
            "give one picture for each placeholder"
        )


def _check_finite(pictures: torch.Tensor, filled: torch.Tensor) -> None:
    broken = ~pictures.flatten(2).isfinite().all(-1) & filled  # (B, I)
    if broken.any():
        row, picture = broken.nonzero()[0].tolist()
        raise ValueError(
            f"picture {picture + 1} of row {row} holds NaN or infinity: prepare pictures with the image processor"
        )


class FusionForConditionalGeneration(FusionPreTrainedModel, GenerationMixin):
    """The fused model with its language-model head: forward with a loss, ``generate``, ``pipeline``.

    Args:
        config: The fused model's configuration. Weights are random; see :meth:`fuse` and :meth:`from_pretrained`.

    Attributes:
        decoder_adapter: What was added to the weights of a decoder that a checkpoint names and does not hold.
    """

    _tied_weights_keys = {"lm_head.weight": "model.language_model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: FusionConfig) -> None:
        super().__init__(config)
        self.decoder_adapter: LowRank | None = None
        self.model = FusionModel(config)
        text = config.text_config
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.post_init()
        if self.generation_config is not None:
            self.generation_config.suppress_tokens = [config.image_token_id]  # an answer never holds a placeholder
        self.set_trainable(vision_stages=config.trainable_vision_stages, decoder=config.trainable_decoder)

    # ---- building, loading, saving

    @classmethod
    def fuse(
        cls,
        *,
        text: str,
        vision: str | VisionEncoder,
        image_token_id: int,
        dtype: torch.dtype | None = None,
        **options: Any,
    ) -> FusionForConditionalGeneration:
        """Join a pretrained decoder and a pretrained encoder; the gates are shut, so the decoder answers as before.

        Args:
            text: A Llama-like causal language model: folder, hub id, or the name of a known part.
            vision: An image encoder: folder or hub id of a transformers vision model, ``"torchvision/resnet101"``,
                the name of a known part, or a :class:`VisionEncoder`.
            image_token_id: The placeholder, a spare token of the decoder's vocabulary; see ``FusionProcessor.fuse``.
            dtype: Of all parts, each rounded once, from its own; None takes the decoder's.
            **options: Other fields of :class:`FusionConfig`.

        Returns:
            The model, in evaluation mode.

        Raises:
            ValueError: If an option is unknown, or a part can not be used.
        """
        unknown = options.keys() - {field.name for field in fields(FusionConfig)}
        if unknown:
            raise ValueError(f"{', '.join(sorted(unknown))}: FusionConfig has no such field")
        decoder = load_decoder(text)
        encoder = vision if isinstance(vision, VisionEncoder) else load_encoder(vision)
        decoder.config.name_or_path = encoder.config.name_or_path = ""  # a folder of this machine, maybe
        config = FusionConfig(
            text_config=decoder.config,
            vision_config=encoder.config,
            text_base=text,
            vision_base=vision if isinstance(vision, str) else None,
            image_token_id=image_token_id,
            **options,
        )
        model = cls(config).to(dtype or decoder.dtype)
        model.model.language_model.load_state_dict(decoder.model.state_dict())
        model.lm_head.load_state_dict(decoder.lm_head.state_dict())
        model.model.vision_encoder.load_state_dict(encoder.state_dict())
        if decoder.generation_config is not None:
            model.generation_config = decoder.generation_config
            model.generation_config.suppress_tokens = [config.image_token_id]
        return model.eval()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> FusionForConditionalGeneration:
        """Load a fused model; the weights of its bases, which its checkpoint leaves out, come from where they are.

        Args:
            pretrained_model_name_or_path: Folder or hub id.
            *args: As in transformers.
            **kwargs: As in transformers (``config``, ``dtype``, ``device_map``, ``revision``, ...).

        Returns:
            The model in evaluation mode; with ``output_loading_info`` a pair, of which it is the first.
        """
        if pretrained_model_name_or_path is None:
            return super().from_pretrained(None, *args, **kwargs)
        hub = {key: kwargs[key] for key in ("cache_dir", "revision", "token", "subfolder") if key in kwargs}
        config = kwargs.pop("config", None)
        if config is None:
            config = FusionConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        has_bases = config.text_base is not None or config.vision_base is not None
        if not has_bases:
            loaded = super().from_pretrained(pretrained_model_name_or_path, *args, config=config, **kwargs)
        else:
            state_dict: dict[str, torch.Tensor] = {}
            decoder_adapter: LowRank | None = None
            if config.text_base is not None and not config.trainable_decoder:
                state_dict |= decoder_state_dict(config.text_base)
            if config.vision_base is not None:
                state_dict |= encoder_state_dict(config.vision_base)
            trained = read_tensors(pretrained_model_name_or_path, **hub)
            state_dict |= trained
            if config.text_base is not None and not config.trainable_decoder:
                subfolder = "/".join(filter(None, [hub.get("subfolder"), DECODER_ADAPTER]))
                decoder_adapter = read_low_rank(pretrained_model_name_or_path, **{**hub, "subfolder": subfolder})
                if decoder_adapter is not None:
                    fold(state_dict, decoder_adapter)
            kwargs.setdefault("dtype", next(t.dtype for t in trained.values() if t.is_floating_point()))
            for key in hub:
                kwargs.pop(key)
            loaded = super().from_pretrained(None, *args, config=config, state_dict=state_dict, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded
        if has_bases:
            model.decoder_adapter = decoder_adapter
            model.name_or_path = str(pretrained_model_name_or_path)
            model.generation_config = GenerationConfig.from_pretrained(pretrained_model_name_or_path, **hub)
        model.set_trainable(vision_stages=config.trainable_vision_stages, decoder=config.trainable_decoder)
        return loaded

    def save_pretrained(self, save_directory: Any, *, state_dict: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Save the configuration and what was trained; frozen bases are named in it, not copied.

        Args:
            save_directory: Folder, made if needed.
            state_dict: Save these tensors instead of the model's own.
            **kwargs: As in transformers.
        """
        state_dict = self.state_dict() if state_dict is None else state_dict
        frozen = self._frozen_prefixes()
        kept = {name: tensor for name, tensor in state_dict.items() if not self._is_left_out(name, frozen)}
        # Under the names of the modules, by which `from_pretrained` puts them in the place of the bases' own.
        kwargs.setdefault("save_original_format", False)
        super().save_pretrained(save_directory, state_dict=kept, **kwargs)
        folder = Path(save_directory) / DECODER_ADAPTER
        if self.decoder_adapter is not None and self.config.text_base is not None and not self.config.trainable_decoder:
            self.decoder_adapter.save(folder, dtype=self.dtype)
        else:
            remove_low_rank(folder)  # that of another model which was saved there before

    def _frozen_prefixes(self) -> tuple[list[str], list[str]]:
        """Prefixes of what a checkpoint leaves out, and of what it keeps all the same."""
        left_out, kept = [], []
        if self.config.text_base is not None and not self.config.trainable_decoder:
            left_out += ["model.language_model.", "lm_head."]
        if self.config.vision_base is not None:
            left_out.append("model.vision_encoder.")
            trained = {id(module) for module in self._last_stages(self.config.trainable_vision_stages)}
            kept += [f"{name}." for name, module in self.named_modules() if id(module) in trained]
        return left_out, kept

    @staticmethod
    def _is_left_out(name: str, prefixes: tuple[list[str], list[str]]) -> bool:
        left_out, kept = prefixes
        return name.startswith(tuple(left_out)) and not name.startswith(tuple(kept))

    # ---- what is trained

    def set_trainable(self, *, vision_stages: int = 0, fusion: bool = True, decoder: bool = False) -> None:
        """Choose what is trained; everything else is frozen.

        Args:
            vision_stages: How many of the encoder's last stages.
            fusion: Resampler and cross-attention blocks.
            decoder: The whole decoder, head included (for a few of its weights use LoRA through PEFT).

        Raises:
            ValueError: If the encoder has fewer stages.
        """
        config = self.config
        # What was trained once stays in every later checkpoint, also when it is frozen again.
        config.trainable_vision_stages = max(config.trainable_vision_stages, vision_stages)
        config.trainable_decoder = config.trainable_decoder or decoder
        self.model.vision_encoder.requires_grad_(False)
        for module in self._last_stages(vision_stages):
            module.requires_grad_(True)
        self.model.resampler.requires_grad_(fusion)
        self.model.cross_attention_blocks.requires_grad_(fusion)
        self.model.language_model.requires_grad_(decoder)
        self.lm_head.requires_grad_(decoder)

    def _last_stages(self, count: int) -> list[nn.Module]:
        stages = self.model.vision_encoder.stages()
        if not 0 <= count <= len(stages):
            raise ValueError(f"vision_stages={count}: this encoder has {len(stages)} stages")
        return [module for stage in stages[len(stages) - count :] for module in stage]

    def trainable_parts(self) -> list[Part]:
        """The table of parts: what there is, how large it is, and how much of it is trained."""
        parts = {
            "vision encoder": self.model.vision_encoder,
            "resampler": self.model.resampler,
            "cross-attention": self.model.cross_attention_blocks,
            "decoder": nn.ModuleList([self.model.language_model, self.lm_head]),
        }

        def count(module: nn.Module, trained_only: bool = False) -> int:
            return sum(p.numel() for p in module.parameters() if p.requires_grad or not trained_only)

        return [Part(name, count(module), count(module, trained_only=True)) for name, module in parts.items()]

    # ---- running

    def get_input_embeddings(self) -> nn.Module:
        """The decoder's token embedding."""
        return self.model.get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        """Replace the decoder's token embedding."""
        self.model.set_input_embeddings(value)

    def get_output_embeddings(self) -> nn.Module:
        """The language-model head."""
        return self.lm_head

    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        prefix_states: torch.Tensor | None = None,
        prefix_keys: torch.Tensor | None = None,
        prefix_values: torch.Tensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        output_trace: bool = False,
        **kwargs: Any,
    ) -> FusionCausalLMOutput:
        """Predict the next tokens.

        Takes what :meth:`FusionModel.forward` takes; ``labels`` ``(B, T)``, the tokens themselves, -100 where no loss
        is wanted; and ``logits_to_keep``, how many last positions get logits (0: all), or which.

        Returns:
            Loss (if labels are given), logits ``(B, T, vocabulary)``, cache and trace.
        """
        output = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            pixel_values=pixel_values,
            image_features=image_features,
            prefix_states=prefix_states,
            prefix_keys=prefix_keys,
            prefix_values=prefix_values,
            use_cache=use_cache,
            output_trace=output_trace,
            **kwargs,
        )
        kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
        logits = self.lm_head(output.last_hidden_state[:, kept])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.text_config.vocab_size, **kwargs)
        return FusionCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=output.past_key_values,
            hidden_states=output.hidden_states,
            attentions=output.attentions,
            trace=output.trace,
        )

    @torch.no_grad()
    def trace(
        self,
        sequences: torch.LongTensor,
        *,
        prompt_length: int,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
    ) -> FusionTrace | None:
        """Trace a whole generation, however it was decoded.

        Args:
            sequences: ``(B, T)``, what ``generate`` returned: prompts and answers.
            prompt_length: Length of the prompts; the trace has one row for each token after it.
            pixel_values: ``(B, I, 3, height, width)``, as given to ``generate``.
            image_features: ``(B, I, R, D_vision)``, likewise.
            attention_mask: ``(B, prompt_length)``, as given to ``generate``.

        Returns:
            The trace of the states that chose the answers' tokens, or None where there are no pictures.
        """
        if attention_mask is not None:
            answer = attention_mask.new_ones(len(sequences), sequences.shape[1] - prompt_length)
            attention_mask = torch.cat([attention_mask, answer], dim=1)
        output = self.model(
            input_ids=sequences,
            attention_mask=attention_mask,
            pixel_values=pixel_values,
            image_features=image_features,
            use_cache=False,
            output_trace=True,
        )
        return None if output.trace is None else output.trace.tokens(prompt_length - 1, sequences.shape[1] - 1)

    # ---- generation

    def prepare_inputs_for_generation(
        self,
        input_ids: torch.LongTensor,
        next_sequence_length: int | None = None,
        past_key_values: Cache | None = None,
        is_first_iteration: bool | None = False,
        pixel_values: torch.Tensor | None = None,
        image_features: torch.Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Give the pictures to the first step only, and of those only the ones that the cache does not hold."""
        inputs = super().prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=next_sequence_length,
            past_key_values=past_key_values,
            is_first_iteration=is_first_iteration,
            **kwargs,
        )
        # An assistant's first iteration is not called so: there the cache is empty.
        if is_first_iteration or past_key_values is None or past_key_values.get_seq_length() == 0:
            inputs["pixel_values"] = self._new_images(pixel_values, input_ids, inputs, past_key_values)
            inputs["image_features"] = self._new_images(image_features, input_ids, inputs, past_key_values)
        return inputs

    def _new_images(
        self,
        pictures: torch.Tensor | None,
        input_ids: torch.Tensor,
        inputs: dict[str, Any],
        past_key_values: Cache | None,
    ) -> torch.Tensor | None:
        """Of a whole conversation's pictures ``(B, I, ...)``, those whose placeholders are not in the cache yet."""
        if pictures is None or inputs.get("input_ids") is None or getattr(past_key_values, "ordinals", None) is None:
            return pictures
        total = (input_ids == self.config.image_token_id).sum(-1)  # (B,)
        new = (inputs["input_ids"] == self.config.image_token_id).sum(-1)  # (B,)
        if pictures.shape[1] != int(total.max()):
            return pictures  # only the new ones were given
        if int(new.max()) == 0:
            return None
        slots = (total - new)[:, None] + torch.arange(int(new.max()), device=new.device)  # (B, I_new)
        slots = slots.clamp_max(pictures.shape[1] - 1)
        return pictures[torch.arange(len(pictures), device=new.device)[:, None], slots]

    def _prepare_cache_for_generation(
        self, generation_config: GenerationConfig, model_kwargs: dict[str, Any], *args: Any
    ) -> None:
        super()._prepare_cache_for_generation(generation_config, model_kwargs, *args)
        cache = model_kwargs.get("past_key_values")
        if cache is not None and not isinstance(cache, FusionCache):
            model_kwargs["past_key_values"] = FusionCache(cache)

    def _expand_inputs_for_generation(
        self, expand_size: int = 1, is_encoder_decoder: bool = False, input_ids: Any = None, **model_kwargs: Any
    ) -> tuple[Any, dict[str, Any]]:
        pixel_values = model_kwargs.get("pixel_values")
        image_size = self.config.vision_config.image_size
        if expand_size > 1 and pixel_values is not None and tuple(pixel_values.shape[-2:]) == (image_size, image_size):
            # A picture is encoded once, not once for every beam.
            del model_kwargs["pixel_values"]
            features = self.model.get_image_features(pixel_values.flatten(0, 1)).features
            model_kwargs["image_features"] = features.unflatten(0, pixel_values.shape[:2])  # (B, I, R, D)
        return super()._expand_inputs_for_generation(
            expand_size=expand_size, is_encoder_decoder=is_encoder_decoder, input_ids=input_ids, **model_kwargs
        )
