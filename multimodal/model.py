"""MultiModalModel: the friendly face. A picture and a prompt go in, an answer comes out, whole or word by word.

It brings pictures through ``images.py``, asks the fused model, and reports what it cost and how sure the model was. It
keeps no state between questions, so one model can answer several at once, each with its own adapter.
"""

from __future__ import annotations

import atexit
import math
import re
import threading
import time
import weakref
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers.decoders import DecodeStream
from transformers import PreTrainedConfig, StoppingCriteria, StoppingCriteriaList, TextIteratorStreamer

from multimodal.adapters import AdapterError, AdapterSwitch, load_adapter, read_adapter
from multimodal.fusion import FusionConfig, FusionForConditionalGeneration, FusionProcessor, FusionTrace
from multimodal.images import load_image
from multimodal.presets import trained_folder

DEFAULT_MODEL = "embedded"
CHOSEN: Any = object()  # in the place of an adapter's name: the one that was set


class ModelError(RuntimeError):
    """A model or a prompt that cannot be used; the message names it and the remedy."""


@dataclass(frozen=True)
class Usage:
    """What an answer took: tokens read, tokens written, pictures."""

    prompt_tokens: int
    completion_tokens: int
    images: int


@dataclass(frozen=True)
class Timings:
    """Seconds.

    Attributes:
        prepare: Loading and preparing pictures and prompt.
        first_token: From the call to the first token.
        total: From the call to the last token.
    """

    prepare: float
    first_token: float
    total: float


@dataclass(frozen=True)
class Answer:
    """An answer and what is known of it.

    Attributes:
        text: What the model says.
        confidence: The chance that the whole answer is right, 0 to 1: the probability that the model gave to it,
            end of answer included, as ``multimodal calibrate`` corrected it on questions whose answers are known (see
            :func:`chance_of_right`). It holds for questions and pictures like those; where nobody calibrated the
            model, it is that probability itself. Of a report of many words it is the chance that all of them are right.
        timings: How long it took.
        usage: What it took.
        tokens: What each of the answer's tokens adds to the text, in order, the end-of-answer token included. Where
            several tokens make one character, the last of them has it and the others are empty.
        finished: False if the answer was stopped or ran into ``max_new_tokens``.
        trace: Gates and attention, one row for each of ``tokens``; None without a picture or if not asked for.
        unsure: Whether the confidence is below the ``min_confidence`` that was asked for.
    """

    text: str
    confidence: float
    timings: Timings
    usage: Usage
    tokens: tuple[str, ...]
    finished: bool
    trace: FusionTrace | None = None
    unsure: bool = False


class _Stop(StoppingCriteria):
    """Ends generation within one token of the flag being set, and notes when the first token came."""

    def __init__(self, flag: threading.Event) -> None:
        self.flag = flag
        self.first_token: float | None = None

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        """True for every row once the flag is set."""
        if self.first_token is None:
            self.first_token = time.perf_counter()
        return torch.full((len(input_ids),), self.flag.is_set(), device=input_ids.device)


# Answers in the making. A thread that still computes while Python shuts down would abort the process.
_running: weakref.WeakSet[AnswerStream] = weakref.WeakSet()


@atexit.register
def _stop_all() -> None:
    for stream in list(_running):
        stream.stop()


class AnswerStream(Iterator[str]):
    """Pieces of an answer as they are generated; they join to its text, and ``answer`` is there at their end.

    Leaving the loop early is not enough to stop the model: call :meth:`stop`, or use the stream as a context manager.
    """

    def __init__(
        self,
        model: MultiModalModel,
        inputs: dict[str, torch.Tensor],
        options: dict[str, Any],
        *,
        started: float,
        trace: bool,
        min_confidence: float = 0.0,
        adapter: str | None = None,
    ) -> None:
        self.answer: Answer | None = None
        self._adapter = adapter
        self._min_confidence = min_confidence
        self._flag = threading.Event()
        self._error: BaseException | None = None
        self._streamer = TextIteratorStreamer(model.processor.tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._pieces = _stripped(self._streamer)
        self._thread = threading.Thread(target=self._run, args=(model, inputs, options, started, trace), daemon=True)
        _running.add(self)
        self._thread.start()

    def __next__(self) -> str:
        """The next piece; an error of the model is raised here."""
        for piece in self._pieces:
            return piece
        self._thread.join()
        if self._error is not None:
            raise self._error
        raise StopIteration

    def __enter__(self) -> AnswerStream:
        """Use as a context manager: generation has ended when the block is left."""
        return self

    def __exit__(self, *exception: object) -> None:
        """Stop."""
        self.stop()

    def stop(self) -> None:
        """End generation, within one token, and wait for it; ``answer`` then holds what there is, or None."""
        self._flag.set()
        self._thread.join()

    def _run(
        self,
        model: MultiModalModel,
        inputs: dict[str, torch.Tensor],
        options: dict[str, Any],
        started: float,
        trace: bool,
    ) -> None:
        try:
            with model.switch.use(self._adapter, given_up=self._flag.is_set) as its_turn:
                if its_turn:
                    self.answer = self._generate(model, inputs, options, started, trace)
        except BaseException as error:  # handed to the reader, who would otherwise wait for ever
            self._error = error
        finally:
            _running.discard(self)
            self._streamer.text_queue.put(self._streamer.stop_signal)

    @torch.inference_mode()
    def _generate(
        self,
        model: MultiModalModel,
        inputs: dict[str, torch.Tensor],
        options: dict[str, Any],
        started: float,
        trace: bool,
    ) -> Answer:
        prepared = time.perf_counter()
        watch = _Stop(self._flag)
        prompt_length = inputs["input_ids"].shape[1]
        output = model.model.generate(
            **inputs,
            **options,
            streamer=self._streamer,
            stopping_criteria=StoppingCriteriaList([watch]),
            return_dict_in_generate=True,
            output_logits=True,
        )
        ended = time.perf_counter()
        new = output.sequences[0, prompt_length:]
        logits = torch.stack([step[0].float() for step in output.logits])
        logits[:, model.model.generation_config.suppress_tokens or []] = -math.inf  # what can't be said has no share
        logprobs = logits.log_softmax(-1)
        chosen = logprobs.gather(1, new[:, None])  # (T_new, 1)
        confidence = model.confidence_of(chosen.sum().item())
        found = None
        if trace and "pixel_values" in inputs:
            found = model.model.trace(
                output.sequences,
                prompt_length=prompt_length,
                pixel_values=inputs["pixel_values"],
                attention_mask=inputs["attention_mask"],
            )
        tokenizer = model.processor.tokenizer
        return Answer(
            text=tokenizer.decode(new, skip_special_tokens=True).strip(),
            confidence=confidence,
            timings=Timings(
                prepare=prepared - started,
                first_token=(watch.first_token or ended) - started,
                total=ended - started,
            ),
            usage=Usage(
                prompt_tokens=prompt_length,
                completion_tokens=len(new),
                images=inputs["pixel_values"].shape[1] if "pixel_values" in inputs else 0,
            ),
            tokens=_token_texts(tokenizer, new.tolist()),
            finished=int(new[-1]) in model.end_tokens,
            unsure=confidence < self._min_confidence,
            trace=found,
        )


class MultiModalModel:
    """A fused model, ready to be asked.

    Args:
        model: The fused model.
        processor: Its processor.
        name: What people call it.

    Attributes:
        switch: Lets every answer be computed with its own adapter.
    """

    def __init__(self, model: FusionForConditionalGeneration, processor: FusionProcessor, *, name: str = "") -> None:
        self.model = model.eval()
        self.processor = processor
        self.name = name
        self.switch = AdapterSwitch(self.model)

    @classmethod
    def from_pretrained(
        cls,
        name: str | Path = DEFAULT_MODEL,
        *,
        adapter: str | Path | None = None,
        dtype: torch.dtype | None = None,
        device: str | None = None,
    ) -> MultiModalModel:
        """Load a trained model.

        Args:
            name: ``"embedded"``, or a folder or hub id with a fused checkpoint.
            adapter: Folder of an adapter that ``multimodal adapt`` made, to load and choose.
            dtype: Of weights and computation; None takes bfloat16 where the hardware has it, else float32.
            device: ``"cpu"``, ``"cuda"``, ...; None takes CUDA where there is one.

        Raises:
            ModelError: If there is no such model.
            WeightsError: If a part of it is not here; ``multimodal pull`` fetches it.
            AdapterError: As :meth:`load_adapter` says.
        """
        device = device or ("cuda" if torch.cuda.is_available() else "cpu")
        model, processor = load(name, dtype=dtype or fastest_dtype(device))
        loaded = cls(model.to(device), processor, name=Path(name).name)
        if adapter is not None:
            loaded.set_adapter(loaded.load_adapter(adapter))
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

    def stream(
        self,
        prompt: str,
        image: Any = None,
        *,
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_p: float = 1.0,
        trace: bool = False,
        min_confidence: float = 0.0,
        adapter: str | None = CHOSEN,
    ) -> AnswerStream:
        """Answer piece by piece.

        Args:
            prompt: What to ask.
            image: Anything that ``load_image`` takes, or a list of such; pictures stand before the prompt.
            max_new_tokens: At most so many tokens, from 1.
            temperature: 0 takes the likeliest token always.
            top_p: With a temperature, sample from the likeliest tokens of this total probability, 0 to 1.
            trace: Also compute the trace (one more forward pass at the end).
            min_confidence: An answer with less confidence is marked as ``unsure``, 0 to 1; it is given all the same.
            adapter: Which adapter answers, None for none; by default the one that :meth:`set_adapter` chose. Where
                another one is at work, this answer waits until it has ended.

        Returns:
            An iterator over pieces of text; its ``answer`` is there when it is exhausted, its ``stop()`` ends it.

        Raises:
            ImageError: If a picture cannot be used.
            ModelError: If the prompt is empty or too long, or an option is out of range.
            AdapterError: If there is no such adapter.
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
        inputs = self._prepare(prompt, _as_list(image), max_new_tokens)
        options: dict[str, Any] = {"max_new_tokens": max_new_tokens, "do_sample": temperature > 0}
        if temperature > 0:
            options |= {"temperature": temperature, "top_p": top_p}
        told: dict[str, Any] = {
            "started": started,
            "trace": trace,
            "min_confidence": min_confidence,
            "adapter": adapter,
        }
        return AnswerStream(self, inputs, options, **told)

    def encode(self, conversations: Sequence[list[dict[str, Any]]]) -> dict[str, torch.Tensor]:
        """The model's inputs for several conversations, pictures included.

        Args:
            conversations: As :func:`conversation` makes them. Their text may say "<image>" or "<|im_end|>" without
                meaning it.
        """
        inputs = self.processor.apply_chat_template(
            list(conversations),
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
            return_tensors="pt",
            sanitize_control_tokens=True,
        )
        return dict(inputs.to(self.model.device))

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

    def _prepare(self, prompt: str, images: Sequence[Any], max_new_tokens: int) -> dict[str, torch.Tensor]:
        if not prompt.strip():
            raise ModelError("the prompt is empty: ask something about the picture")
        inputs = self.encode([conversation(prompt, [load_image(image) for image in images])])
        length, limit = inputs["input_ids"].shape[1], self.model.config.text_config.max_position_embeddings
        if length + max_new_tokens > limit:
            raise ModelError(
                f"the prompt has {length} tokens, which with {max_new_tokens} for the answer exceeds the model's "
                f"{limit}: shorten it, or lower max_new_tokens"
            )
        return inputs


def conversation(prompt: str, images: Sequence[Any] = ()) -> list[dict[str, Any]]:
    """The chat that asks one question: the pictures first, then the text. Training and answering share it."""
    content: list[dict[str, Any]] = [{"type": "image", "image": image} for image in images]
    return [{"role": "user", "content": [*content, {"type": "text", "text": prompt.strip()}]}]


def chance_of_right(logprob: float, *, scale: float = 1.0, bias: float = 0.0) -> float:
    """How likely an answer is right: ``sigmoid(scale * log-odds + bias)`` of the probability that the model gave to it.

    J. Platt, "Probabilistic Outputs for Support Vector Machines", 1999. With the defaults it is that probability.

    Args:
        logprob: Log-probability of the whole answer, the sum over its tokens.
        scale: ``FusionConfig.confidence_scale``.
        bias: ``FusionConfig.confidence_bias``.
    """
    score = scale * log_odds(logprob) + bias
    return 1 / (1 + math.exp(-score)) if score > 0 else math.exp(score) / (1 + math.exp(score))


def log_odds(logprob: float) -> float:
    """``log(p / (1 - p))`` of a probability given as its logarithm; that of certainty is finite, too."""
    logprob = min(logprob, -1e-6)
    return logprob - math.log(-math.expm1(logprob))


def folder_of(name: str | Path) -> Path:
    """The folder that a model's name means: that of our own, or the name itself."""
    return trained_folder(str(name)) or Path(name).expanduser()


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


def _stripped(pieces: Iterable[str]) -> Iterator[str]:
    """The same text in pieces that are not empty, without white space at its two ends."""
    held, begun = "", False
    for piece in pieces:
        text = held + piece if begun else piece.lstrip()
        shown = text.rstrip()
        held = text[len(shown) :]
        if shown:
            begun = True
            yield shown


def _token_texts(tokenizer: Any, tokens: list[int]) -> tuple[str, ...]:
    stream = DecodeStream(skip_special_tokens=False)
    return tuple(stream.step(tokenizer.backend_tokenizer, token) or "" for token in tokens)
