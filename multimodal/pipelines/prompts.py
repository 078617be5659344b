"""What a text model is told of a picture: readings, put into words by a Jinja template that a person can edit.

A template has a variable for each reader (``ocr``, ``tags``, ``caption``), empty where nothing was read, and
``question``. It runs in Jinja's sandbox: it comes from a file that somebody may have been handed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from jinja2 import StrictUndefined, TemplateError
from jinja2.sandbox import ImmutableSandboxedEnvironment

from multimodal.pipelines.protocol import PipelineError, Step
from multimodal.pipelines.readers import KeptReader

TEXT_ONLY = Path(__file__).with_name("text_only.j2")
HYBRID = Path(__file__).with_name("hybrid.j2")
VARIABLES = ("ocr", "tags", "caption", "question")


class ReadingPrompt:
    """Makes a prompt of a question and what readers see in its pictures.

    Args:
        readers: Who reads, in the order of the steps.
        template: A Jinja file.

    Attributes:
        digest: Changes with the readers and the template.

    Raises:
        PipelineError: If there is no such file, or it is no template.
    """

    def __init__(self, readers: Sequence[KeptReader], template: Path) -> None:
        self.readers, self.template = readers, template
        environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
        try:
            text = template.read_text(encoding="utf-8")
            self._template = environment.from_string(text)
        except (OSError, UnicodeDecodeError) as error:
            raise PipelineError(f"the prompt {template} cannot be read ({error}): give a Jinja file") from None
        except TemplateError as error:
            raise PipelineError(f"the prompt {template} is no Jinja template ({error}): repair it") from None
        self.digest = hashlib.sha256("\n".join([text, *(reader.digest for reader in readers)]).encode()).hexdigest()[
            :16
        ]

    def of(self, question: str, images: Sequence[Any]) -> tuple[str, tuple[Step, ...]]:
        """The prompt, and the steps that led to it: one for each reader and picture.

        Raises:
            ImageError: If a picture cannot be used.
            PipelineError: If the template asks for something that is not there.
        """
        steps = tuple(reader.read(image) for image in images for reader in self.readers)
        read = {
            name: "\n".join(step.output for step in steps if step.name == name and step.output) for name in VARIABLES
        }
        try:
            return self._template.render({**read, "question": question}).strip(), steps
        except Exception as error:  # what it calls may raise anything
            known = ", ".join(VARIABLES)
            raise PipelineError(f"the prompt {self.template} cannot be filled in ({error}): it has {known}") from None
