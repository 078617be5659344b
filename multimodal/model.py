"""MultiModalModel: the friendly face. Pictures and a prompt, or a chat, go in; an answer comes out, whole or in words.

It brings pictures through ``images.py``, asks the engine, and reports what it cost and how sure the model was. One
model answers several questions at once, each with its own adapter.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedConfig

from multimodal.adapters import AdapterError, AdapterSwitch, load_adapter, read_adapter
from multimodal.answer import Answer, AnswerStream, chance_of_right
from multimodal.engine import DTYPES, Engine, LeastRecentlyUsed, Picture, Request, digest_of
from multimodal.engine.threads import release_threads
from multimodal.fusion import FusionConfig, FusionForConditionalGeneration, FusionProcessor, FusionTrace
from multimodal.images import MAX_PIXELS, load_image, read_encoded
from multimodal.presets import PRESETS, trained_folder

DEFAULT_MODEL = "embedded"
PREPARED_BYTES = 64 * 2**20  # of prepared pictures that are kept
ROLES = ("system", "user", "assistant")
CHOSEN: Any = object()  # in the place of an adapter's name: the one that was set


class ModelError(RuntimeError):
    """A model or a prompt that cannot be used; the message names it and the remedy."""


class MultiModalModel:
    """A fused model, ready to be asked.

    Args:
        model: The fused model.
        processor: Its processor.
        name: What people call it.
        precision: As :func:`~multimodal.engine.make_runner` takes it: what answers are computed in.

    Attributes:
        switch: Lets every answer be computed with its own adapter.
        prepared: Pictures as the encoder takes them, by the content of their files.
    """

    def __init__(
        self,
        model: FusionForConditionalGeneration,
        processor: FusionProcessor,
        *,
        name: str = "",
        precision: str = "auto",
    ) -> None:
        self.model = model.eval()
        self.processor = processor
        self.name = name
        self.precision = precision
        self.switch = AdapterSwitch(self.model)
        self._engine: Engine | None = None
        self._lock = threading.Lock()
        self.prepared: LeastRecentlyUsed[Picture] = LeastRecentlyUsed(PREPARED_BYTES)

    @property
    def engine(self) -> Engine:
        """What answers; made when it is first asked for, with the weights of then."""
        with self._lock:
            if self._engine is None:
                self._engine = Engine(
                    self.model, self.processor.tokenizer, precision=self.precision, adapters=self.switch
                )
            return self._engine

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = DEFAULT_MODEL,
        *,
        adapter: str | Path | None = None,
        dtype: torch.dtype | None = None,
        device: str | None = None,
        precision: str = "auto",
    ) -> MultiModalModel:
        """Load a trained model.

        Args:
            name: ``"embedded"``, or a folder or hub id with a fused checkpoint.
            adapter: Folder of an adapter that ``multimodal adapt`` made, to load and choose.
            dtype: Of the model's weights; None takes that of the precision, or bfloat16 where the hardware has it.
            device: ``"cpu"``, ``"cuda"``, ...; None takes CUDA where there is one.
            precision: As :func:`~multimodal.engine.make_runner` takes it: what answers are computed in.

        Raises:
            ModelError: If there is no such model.
            WeightsError: If a part of it is not here; ``multimodal pull`` fetches it.
            AdapterError: As :meth:`load_adapter` says.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        dtype = dtype or DTYPES.get(precision) or fastest_dtype(device)
        model, processor = load(name, dtype=dtype)
        loaded = cls(model.to(device), processor, name=Path(name).name, precision=precision)
        if adapter is not None:
            loaded.set_adapter(loaded.load_adapter(adapter))
        release_threads()  # from here on the engine's own thread computes
        return loaded

    @property
    def end_tokens(self) -> set[int]:
        """Ids of the tokens that end an answer."""
        end = self.model.generation_config.eos_token_id
        return set(end) if isinstance(end, list) else set() if end is None else {end}

    @property
    def adapters(self) -> list[str]:
        """Names of the adapters that are loaded."""
        return list(self.switch.names)

    @property
    def adapter(self) -> str | None:
        """The adapter that :meth:`set_adapter` chose; None is the model as it came."""
        return self.switch.chosen

    def load_adapter(self, folder: str | Path, name: str | None = None) -> str:
        """Load an adapter that ``multimodal adapt`` made; :meth:`set_adapter` then chooses it.

        Answers that are being written end first, and new ones wait meanwhile.

        Args:
            folder: Its folder.
            name: What to call it; by default as its folder.

        Returns:
            Its name.

        Raises:
            AdapterError: If there is none, it was made for another model, PEFT is missing, or the name is taken.
        """
        folder = Path(folder).expanduser()
        name = name or folder.resolve().name
        weights = read_adapter(folder, self.model, base=self.name)
        with self.switch.alone():
            inner = self.switch.new_name(name)
            load_adapter(self.model, weights, inner)
            self.switch.names[name] = inner
        return name

    def set_adapter(self, name: str | None) -> None:
        """Choose the adapter of the answers that begin from now on; those that are being written keep theirs.

        Args:
            name: As :attr:`adapters` has it; None for the model as it came.

        Raises:
            AdapterError: If none is called so.
        """
        self.switch.choose(self._known(name))

    def _known(self, name: str | None) -> str | None:
        if name is not None and name not in self.switch.names:
            raise AdapterError(f"no adapter is called {name!r}: use {', '.join([*self.adapters, 'None'])}")
        return name

    def confidence_of(self, logprob: float) -> float:
        """The chance that an answer is right, 0 to 1, from the log-probability that the model gave to all of it."""
        return chance_of_right(
            logprob, scale=self.model.config.confidence_scale, bias=self.model.config.confidence_bias
        )

    def __call__(self, prompt: str, image: Any = None, **options: Any) -> Answer:
        """Answer a prompt about a picture, several, or none.

        Args:
            prompt: What to ask.
            image: Anything that ``load_image`` takes, or a list of such.
            **options: As for :meth:`stream`.

        Raises:
            ImageError: If a picture cannot be used.
            ModelError: If the prompt is empty or too long, or an option is out of range.
        """
        with self.stream(prompt, image, **options) as stream:
            for _ in stream:
                pass
        assert stream.answer is not None  # an error of the model was raised by the loop
        return stream.answer

    def stream(self, prompt: str, image: Any = None, **options: Any) -> AnswerStream:
        """Answer a prompt about a picture, several, or none, piece by piece.

        Args:
            prompt: What to ask.
            image: Anything that ``load_image`` takes, or a list of such; pictures stand before the prompt.
            **options: As for :meth:`reply`.

        Returns:
            An iterator over pieces of text; its ``answer`` is there when it is exhausted, its ``stop()`` ends it.

        Raises:
            ImageError: If a picture cannot be used.
            ModelError: If the prompt is empty or too long, or an option is out of range.
            AdapterError: If there is no such adapter.
            EngineError: If the engine does not take it: too many wait, or it has too many pictures.
        """
        return self.reply(conversation(prompt, _as_list(image)), **options)

    def reply(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
        stop: str | Sequence[str] = (),
        trace: bool = False,
        min_confidence: float = 0.0,
        adapter: str | None = CHOSEN,
        top_logprobs: int = 0,
        max_pixels: int = MAX_PIXELS,
        max_seconds: float | None = None,
    ) -> AnswerStream:
        """Answer the last message of a chat piece by piece.

        Args:
            messages: The chat so far, oldest first: each has a ``role`` (``"system"``, ``"user"`` or ``"assistant"``)
                and a ``content``, a string or a list of parts, ``{"type": "text", "text": ...}`` or, of the user,
                ``{"type": "image", "image": ...}`` with anything that ``load_image`` takes. The last one is the
                user's. White space around what a message says does not count.
            max_new_tokens: At most so many tokens, from 1.
            temperature: 0 takes the likeliest token always.
            top_p: With a temperature, sample from the likeliest tokens of this total probability, 0 to 1.
            seed: Of sampling; None draws one from torch's.
            stop: A string, or several, that end the answer and are no part of it.
            trace: Also compute the trace (one more forward pass at the end).
            min_confidence: An answer with less confidence is marked as ``unsure``, 0 to 1; it is given all the same.
            adapter: Which adapter answers, None for none; by default the one that :meth:`set_adapter` chose.
            top_logprobs: Of how many of the likeliest tokens the generation tells the log-probability, with each token.
            max_pixels: Most pixels in a picture.
            max_seconds: For which a picture is decoded, as ``load_image`` has it.

        Returns:
            An iterator over pieces of text; its ``answer`` is there when it is exhausted, its ``stop()`` ends it.

        Raises:
            ImageError: If a picture cannot be used.
            ModelError: If the chat is not as above, its last prompt is empty, it is too long, or an option is out of
                range.
            AdapterError: If there is no such adapter.
            EngineError: If the engine does not take it: too many wait, or it has too many pictures.
        """
        started = time.perf_counter()
        for option, value, fits, range_ in (
            ("max_new_tokens", max_new_tokens, max_new_tokens >= 1, "1 or more"),
            ("temperature", temperature, temperature >= 0, "0 or more"),
            ("top_p", top_p, 0 < top_p <= 1, "above 0, at most 1"),
            ("min_confidence", min_confidence, 0 <= min_confidence <= 1, "0 to 1"),
        ):
            if not fits:
                raise ModelError(f"{option}={value} must be {range_}")
        adapter = self.adapter if adapter is CHOSEN else self._known(adapter)
        tokens, pictures = self._prepare(messages, max_new_tokens, max_pixels, max_seconds)
        prepared = time.perf_counter()
        request = Request(
            tokens=tokens,
            pictures=pictures,
            max_new_tokens=max_new_tokens,
            temperature=temperature,
            top_p=top_p,
            seed=int(torch.randint(2**62, ())) if seed is None else seed,
            stop=[stop] if isinstance(stop, str) else list(stop),
            adapter=adapter,
            top_logprobs=top_logprobs,
        )
        return AnswerStream(
            self,
            self.engine.submit(request),
            started=started,
            prepared=prepared,
            trace=trace,
            min_confidence=min_confidence,
        )

    def forget(self) -> None:
        """Keep nothing of pictures and conversations, while nothing is asked: for who measures a first question."""
        self.prepared.clear()
        self.engine.forget()

    @torch.inference_mode()
    def trace(self, request: Request, answer: Sequence[int]) -> FusionTrace | None:
        """Gates and attention of an answer's tokens, in one more forward pass; None without a picture.

        Args:
            request: What was asked.
            answer: Token ids of the answer.
        """
        if not request.pictures:
            return None
        device = self.model.device
        with self.switch.use(request.adapter):
            trace = self.model.trace(
                torch.tensor([[*request.tokens, *answer]], device=device),
                prompt_length=len(request.tokens),
                pixel_values=torch.stack([picture.pixel_values for picture in request.pictures])[None].to(device),
            )
        release_threads()
        return trace

    def tokenise(self, conversations: Sequence[list[dict[str, Any]]]) -> list[list[int]]:
        """The prompts of several conversations as tokens, a placeholder for each picture.

        Args:
            conversations: As :func:`conversation` makes them; what stands for a picture may be anything.
        """
        return self.processor.tokenizer.apply_chat_template(
            list(conversations),
            chat_template=self.processor.chat_template,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=False,
            sanitize_control_tokens=True,
        )

    def _prepare(
        self, messages: Sequence[Mapping[str, Any]], max_new_tokens: int, max_pixels: int, max_seconds: float | None
    ) -> tuple[list[int], list[Picture]]:
        chat, images = _read_chat(messages)
        pictures = [self._picture(image, max_pixels, max_seconds) for image in images]
        (tokens,) = self.tokenise([chat])
        limit = self.model.config.text_config.max_position_embeddings
        if len(tokens) + max_new_tokens > limit:
            raise ModelError(
                f"the prompt has {len(tokens)} tokens, which with {max_new_tokens} for the answer exceeds the model's "
                f"{limit}: shorten it, or lower max_new_tokens"
            )
        return tokens, pictures

    def _picture(self, image: Any, max_pixels: int = MAX_PIXELS, max_seconds: float | None = None) -> Picture:
        """Prepare a picture; one whose file was asked about before is not decoded again."""
        encoded = read_encoded(image)
        if encoded is None:
            return self._decoded(image, max_pixels, max_seconds)
        key = hashlib.sha256(encoded.data).digest(), max_pixels
        return self.prepared.get(key, lambda: self._decoded(encoded, max_pixels, max_seconds))

    def _decoded(self, image: Any, max_pixels: int = MAX_PIXELS, max_seconds: float | None = None) -> Picture:
        loaded = load_image(image, max_pixels=max_pixels, max_seconds=max_seconds)
        pixels = self.processor.image_processor(loaded, return_tensors="pt")["pixel_values"][0]
        return Picture(pixels, digest_of(pixels))


def conversation(prompt: str, images: Sequence[Any] = ()) -> list[dict[str, Any]]:
    """The chat that asks one question: the pictures first, then the text. Training and answering share it."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": prompt.strip()}]}]


def _read_chat(messages: Sequence[Mapping[str, Any]]) -> tuple[list[dict[str, Any]], list[Any]]:
    """A chat as the template takes it, and its pictures in order."""
    chat: list[dict[str, Any]] = []
    images: list[Any] = []
    for number, message in enumerate(messages, start=1):
        if not isinstance(message, Mapping) or message.get("role") not in ROLES:
            raise ModelError(f"message {number} has none of the roles {', '.join(ROLES)}: give it one as its 'role'")
        role = message["role"]
        parts = _parts_of(message.get("content"), number)
        shown = [part.pop("image") for part in parts if part["type"] == "image"]
        if shown and role != "user":
            raise ModelError(f"message {number} is of the {role} and has a picture: show pictures as the user")
        images += shown
        chat.append({"role": role, "content": parts})
    if not chat or chat[-1]["role"] != "user":
        last = f"ends with a message of the {chat[-1]['role']}" if chat else "has no message"
        raise ModelError(f"the chat {last}: end it with a question of the user")
    if not any(part.get("text", "").strip() for part in chat[-1]["content"]):
        raise ModelError("the prompt is empty: ask something about the picture")
    return chat, images


def _parts_of(content: Any, number: int) -> list[dict[str, Any]]:
    """What a message says and shows, in parts of our own, without white space at the two ends of its text."""
    parts: list[dict[str, Any]] = []
    for part in [{"type": "text", "text": content}] if isinstance(content, str) else _as_list(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        if kind == "text" and isinstance(part.get("text"), str):
            parts.append({"type": "text", "text": part["text"]})
        elif kind == "image" and "image" in part:
            parts.append({"type": "image", "image": part["image"]})
        else:
            raise ModelError(
                f"message {number} has a part that is neither text nor a picture: give a string, or a list of "
                "{'type': 'text', 'text': ...} and {'type': 'image', 'image': ...}"
            )
    texts = [part for part in parts if part["type"] == "text"]
    if texts:
        texts[0]["text"] = texts[0]["text"].lstrip()
        texts[-1]["text"] = texts[-1]["text"].rstrip()
    return parts


def folder_of(name: str | Path) -> Path:
    """The folder that a model's name means: that of our own, or the name itself."""
    return trained_folder(str(name)) or Path(name).expanduser()


def is_fused(name: str | Path) -> bool:
    """Whether a name means a fused model, and not another one, or none."""
    if str(name) in PRESETS:
        return True
    try:
        return PreTrainedConfig.get_config_dict(str(folder_of(name)))[0].get("model_type") == FusionConfig.model_type
    except OSError:
        return False  # whoever loads it says what is wrong


def load(
    name: str | Path, *, dtype: torch.dtype | None = None
) -> tuple[FusionForConditionalGeneration, FusionProcessor]:
    """Load a trained model and its processor: our own, from a folder, or from the hub.

    Args:
        name: ``"embedded"``, a folder that ``multimodal train`` made, or a hub id (``owner/name``).
        dtype: None takes the stored one.

    Raises:
        ModelError: If there is no such model.
        WeightsError: If a part of it is not here; ``multimodal pull`` fetches it.
    """
    folder = folder_of(name)
    if (folder / "config.json").is_file():
        source = str(folder)
    elif re.fullmatch(r"[\w.-]+/[\w.-]+", str(name)) and not folder.exists():
        source = str(name)
    else:
        raise ModelError(
            f"there is no trained model {str(name)!r}: give {DEFAULT_MODEL!r}, a folder that `multimodal train` made, "
            "or a hub id (owner/name)"
        )
    try:
        kind = PreTrainedConfig.get_config_dict(source)[0].get("model_type")
        if kind != FusionConfig.model_type:
            raise ModelError(f"{source} holds a {kind} model, not a fused one: `multimodal train` makes one of it")
        options: dict[str, Any] = {} if dtype is None else {"dtype": dtype}
        model = FusionForConditionalGeneration.from_pretrained(source, **options)
        return model, FusionProcessor.from_pretrained(source)
    except OSError as error:  # a file is missing, or the hub does not answer
        reason = str(error).strip().splitlines()[0]
        raise ModelError(f"the model {source!r} cannot be loaded: {reason}") from error


def fastest_dtype(device: str) -> torch.dtype:
    """bfloat16 where the hardware computes in it, else float32."""
    if device.startswith("cuda"):
        native = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device == "cpu":
        native = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    else:
        native = True
    return torch.bfloat16 if native else torch.float32


def _as_list(image: Any) -> list[Any]:
    if image is None:
        return []
    return list(image) if isinstance(image, list | tuple) else [image]
