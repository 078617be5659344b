"""Ways of answering a question about pictures, all behind one protocol (``protocol.py``).

``native`` and ``hybrid`` see the picture; ``text_only`` is told what OCR and labels say of it; ``blind`` is told
nothing. ``registry.py`` has them all by name.
"""

from multimodal.pipelines.composed import ComposedPipeline
from multimodal.pipelines.protocol import Answer, Pipeline, PipelineError, Question, Step, Turn, Usage
from multimodal.pipelines.registry import PIPELINES, Parts, PipelineSettings, make_pipelines

__all__ = [
    "PIPELINES",
    "Answer",
    "ComposedPipeline",
    "Parts",
    "Pipeline",
    "PipelineError",
    "PipelineSettings",
    "Question",
    "Step",
    "Turn",
    "Usage",
    "make_pipelines",
]
