"""Pipelines by name: those that come with the project, and a person's own class in a file or a module.

What they share (the model, what was read off pictures, the local endpoint) is made once, when a first pipeline needs
it, and closed with the :class:`Parts`. To add a pipeline to the project, add a line to ``PIPELINES``.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from types import ModuleType, TracebackType

from multimodal.adapters import AdapterError
from multimodal.model import DEFAULT_MODEL, MultiModalModel, is_fused
from multimodal.pipelines.chats import Chat, FusedChat, TransformersChat
from multimodal.pipelines.composed import ComposedPipeline
from multimodal.pipelines.endpoint import PROVIDERS, Endpoint, Price
from multimodal.pipelines.prompts import HYBRID, TEXT_ONLY, ReadingPrompt
from multimodal.pipelines.protocol import Pipeline, PipelineError
from multimodal.pipelines.readers import Captioner, ImageNetTags, KeptReader, RapidOcr, Reader, Tesseract
from multimodal.presets import ASSETS

LOCAL = "local"  # the endpoint that this process serves: the fused model's decoder
OCR: Mapping[str, Callable[[], Reader]] = {"rapidocr": RapidOcr, "tesseract": Tesseract}


@dataclass(frozen=True)
class PipelineSettings:
    """What pipelines are made of.

    Attributes:
        model: The fused model, or for ``native`` any that transformers' ``image-text-to-text`` pipeline runs.
        precision: What the fused model computes in.
        adapter: An adapter's folder for ``native`` and ``hybrid``.
        tuned: Folders of the adapters of ``text_only_tuned`` and ``blind_tuned``, where they are not those that come
            with the project.
        endpoint: Of ``text_only``: ``"local"``, a name of ``PROVIDERS``, or a URL.
        endpoint_model: What it calls the model; empty takes the provider's own, or the only one.
        hosted: Endpoint of ``hosted``, likewise; ``"local"`` is the fused model over HTTP.
        hosted_model: What that one calls the model.
        prompt: Jinja file of ``text_only``'s prompt.
        ocr: Who reads text: a key of ``OCR``.
        captioner: A captioner's folder or hub id; empty for none.
        prices: What models charge, by the name in the table of prices or by the model's own.
        readings: Folder that keeps what was read off pictures; None keeps it in memory.
    """

    model: str = DEFAULT_MODEL
    precision: str = "auto"
    adapter: Path | None = None
    tuned: Mapping[str, Path] = field(default_factory=dict)
    endpoint: str = LOCAL
    endpoint_model: str = ""
    hosted: str = LOCAL
    hosted_model: str = ""
    prompt: Path = TEXT_ONLY
    ocr: str = "rapidocr"
    captioner: str = ""
    prices: Mapping[str, Price] = field(default_factory=dict)
    readings: Path | None = None


class Parts:
    """What pipelines share; a context manager.

    Args:
        settings: What they are made of.
    """

    def __init__(self, settings: PipelineSettings) -> None:
        self.settings = settings
        self._open = ExitStack()

    def __enter__(self) -> Parts:
        """Use as a context manager: the local endpoint has ended when the block is left."""
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        """Close what was opened."""
        self._open.close()

    @cached_property
    def model(self) -> MultiModalModel:
        """The fused model."""
        return MultiModalModel.from_pretrained(self.settings.model, precision=self.settings.precision)

    @cached_property
    def readers(self) -> dict[str, KeptReader]:
        """Who reads pictures, by the name of what is read."""
        settings = self.settings
        if settings.ocr not in OCR:
            raise PipelineError(f"nobody reads text by {settings.ocr!r}: use {' or '.join(OCR)}")
        readers: list[Reader] = [OCR[settings.ocr](), ImageNetTags()]
        if settings.captioner:
            readers.append(Captioner(settings.captioner))
        folder = settings.readings
        return {
            reader.name: KeptReader(reader, None if folder is None else folder / f"{reader.name}.jsonl")
            for reader in readers
        }

    @cached_property
    def text_prompt(self) -> ReadingPrompt:
        """What a text model is told of a picture."""
        return ReadingPrompt(list(self.readers.values()), self.settings.prompt)

    @cached_property
    def hybrid_prompt(self) -> ReadingPrompt:
        """What the fused model is told beside the picture."""
        return ReadingPrompt([self.readers["ocr"]], HYBRID)

    @cached_property
    def local_url(self) -> str:
        """The address of the endpoint that this process serves."""
        from multimodal.service import serving

        return self._open.enter_context(serving(self.model, name=self.model.name or DEFAULT_MODEL))

    def seeing(self) -> Chat:
        """The model that sees, with the settings' adapter."""
        if not is_fused(self.settings.model):
            return TransformersChat(self.settings.model)
        return self.fused(self.settings.adapter)

    def fused(self, folder: Path | None = None) -> FusedChat:
        """The fused model, with an adapter."""
        if folder is None:
            return FusedChat(self.model)
        name = str(folder)
        try:
            if name not in self.model.adapters:
                self.model.load_adapter(folder, name)
        except AdapterError as error:
            raise PipelineError(str(error)) from None
        return FusedChat(self.model, adapter=name)

    def tuned(self, pipeline: str) -> FusedChat:
        """The decoder as it was trained to answer without seeing."""
        return self.fused(self.settings.tuned.get(pipeline, ASSETS / pipeline))

    def endpoint(self, where: str, model: str) -> Endpoint:
        """The endpoint of a provider's name or a URL."""
        prices = self.settings.prices
        if where == LOCAL:
            name, digest = self.model.name or DEFAULT_MODEL, f"{LOCAL} {FusedChat(self.model).digest}"
            return Endpoint(self.local_url, model=name, price=Price(0, 0), digest=digest)
        provider = PROVIDERS.get(where)
        if provider is None:
            return Endpoint(where, model=model, key=_key_of(where), price=prices.get(model))
        model = model or provider.model
        price = prices.get(model) if provider.key else Price(0, 0)
        return Endpoint(provider.url, model=model, key=provider.key, price=price)


def _key_of(url: str) -> str:
    """Any other endpoint away from this machine is given OpenAI's variable, as its own client does it."""
    return "OPENAI_API_KEY" if Endpoint(url).remote else ""


PIPELINES: Mapping[str, Callable[[Parts], Pipeline]] = {
    "native": lambda parts: ComposedPipeline("native", parts.seeing(), sees=True),
    "hybrid": lambda parts: ComposedPipeline("hybrid", parts.seeing(), prompt=parts.hybrid_prompt, sees=True),
    "text_only": lambda parts: ComposedPipeline(
        "text_only",
        parts.endpoint(parts.settings.endpoint, parts.settings.endpoint_model),
        prompt=parts.text_prompt,
        sees=False,
    ),
    "text_only_tuned": lambda parts: ComposedPipeline(
        "text_only_tuned", parts.tuned("text_only_tuned"), prompt=parts.text_prompt, sees=False
    ),
    "blind": lambda parts: ComposedPipeline("blind", parts.fused(), sees=False),
    "blind_tuned": lambda parts: ComposedPipeline("blind_tuned", parts.tuned("blind_tuned"), sees=False),
    "hosted": lambda parts: ComposedPipeline(
        "hosted", parts.endpoint(parts.settings.hosted, parts.settings.hosted_model), sees=True
    ),
}


def make_pipelines(names: Sequence[str], parts: Parts) -> list[Pipeline]:
    """Make pipelines.

    Args:
        names: Keys of ``PIPELINES``, or a person's own: ``my_file.py:MyClass`` or ``my.module:MyClass``, a class
            without arguments that has the face of :class:`~multimodal.pipelines.protocol.Pipeline`.
        parts: What they share.

    Raises:
        PipelineError: If there is no such pipeline, two have the same name, or one cannot be made.
    """
    made = [PIPELINES[name](parts) if name in PIPELINES else _own(name) for name in names]
    twice = {each.name for each in made if [other.name for other in made].count(each.name) > 1}
    if twice:
        raise PipelineError(f"two pipelines are called {', '.join(sorted(twice))}: give each a name of its own")
    return made


def _own(name: str) -> Pipeline:
    place, colon, attribute = name.rpartition(":")
    if not colon:
        known = ", ".join(PIPELINES)
        raise PipelineError(f"there is no pipeline {name!r}: use {known}, or your own as my_file.py:MyClass")
    try:
        found = getattr(_module(place), attribute)()
    except PipelineError:
        raise
    except Exception as error:
        raise PipelineError(
            f"the pipeline {name!r} cannot be made ({type(error).__name__}: {error}): it is a class without arguments, "
            "as my_file.py:MyClass or my.module:MyClass"
        ) from error
    if not isinstance(found, Pipeline):
        lacking = [each for each in ("name", "digest", "answer") if not hasattr(found, each)]
        raise PipelineError(f"the pipeline {name!r} has no {', '.join(lacking)}: see multimodal.pipelines.Pipeline")
    return found


def _module(place: str) -> ModuleType:
    if not place.endswith(".py"):
        return importlib.import_module(place)
    path = Path(place).resolve()
    name = f"{path.stem} of {path.parent}"  # no import has such a name
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None  # its name ends as a module's does
    module = sys.modules[name] = importlib.util.module_from_spec(spec)  # dataclasses look for their module there
    # Not as its loader does: to a cache of bytecode, a file of the same second and size is the same file.
    exec(compile(path.read_bytes(), path, "exec"), module.__dict__)
    return module
