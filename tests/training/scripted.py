"""A tiny model that says what a test wants, and is as sure of it as the test wants; everything else of it is real."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch

from multimodal.model import MultiModalModel


class Scripted(MultiModalModel):
    """Answers by question.

    Args:
        model: Whose tokenizer, encoder and trace are used.
        answers: What to say to each question.
        sure: Probability of each answer as a whole, by question; 0.9 where nothing is said.
    """

    def __init__(
        self, model: MultiModalModel, answers: Mapping[str, str], sure: Mapping[str, float] | None = None
    ) -> None:
        super().__init__(model.model, model.processor)
        self.answers, self.sure = dict(answers), dict(sure or {})
        self.asked: list[dict[str, Any]] = []
        self.real, self.model = self.model, _Talking(self)


class _Talking:
    """The fused model with another ``generate``."""

    def __init__(self, script: Scripted) -> None:
        self._script = script

    def __getattr__(self, name: str) -> Any:
        return getattr(self._script.real, name)

    def generate(self, *, input_ids: torch.Tensor, logits_processor: Any, **options: Any) -> torch.Tensor:
        script, tokenizer = self._script, self._script.processor.tokenizer
        script.asked.append({"input_ids": input_ids, **options})
        prompts = [tokenizer.decode(row.tolist()) for row in input_ids]
        questions = [max((q for q in script.answers if q in prompt), key=len) for prompt in prompts]
        end = tokenizer.eos_token_id
        said = [
            [*tokenizer(script.answers[question], add_special_tokens=False)["input_ids"], end] for question in questions
        ]
        longest = max(map(len, said))
        sequences = input_ids
        for step in range(longest):
            scores = torch.empty(len(said), script.real.config.text_config.vocab_size)
            tokens = [answer[step] if step < len(answer) else tokenizer.pad_token_id for answer in said]
            for row, (question, answer, token) in enumerate(zip(questions, said, tokens, strict=True)):
                each = script.sure.get(question, 0.9) ** (1 / len(answer))
                scores[row] = math.log((1 - each) / (scores.shape[1] - 1))
                scores[row, token] = math.log(each)
            logits_processor(sequences, scores)
            sequences = torch.cat([sequences, torch.tensor(tokens)[:, None]], dim=1)
        return sequences
