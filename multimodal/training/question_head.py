"""The light head that stands in the decoder's place while the vision side learns (``vision_side.py``).

It reads the question with a small recurrent network, attends over the region tokens and picks one of the training
answers. What always holds: what dropout takes away follows from a number of each row alone, so a run that goes on after
an interruption, or on several processes, gives the same curve.

Axes: N pictures, Q questions about them, T words of a question, L region tokens, D width, A answers, H heads.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional

WIDTH = 512
HEADS = 8
DROPOUT = 0.2


class RowDropout(nn.Module):
    """Dropout whose mask follows from a number of each row, not from the state of a random number generator.

    Args:
        place: Tells the masks of one row in several places apart.
    """

    def __init__(self, place: int) -> None:
        super().__init__()
        self.place = place

    def forward(self, states: torch.Tensor, rows: torch.Tensor | None) -> torch.Tensor:
        """Drop.

        Args:
            states: ``(Q, ...)``; what lies behind the first axis is counted from its beginning, so padding at the end
                changes nothing.
            rows: ``(Q,)``, the number of each row; in evaluation not needed.
        """
        if not self.training or rows is None:
            return states
        cells = torch.arange(states[0].numel(), device=states.device)
        bits = _mixed(_mixed(rows + self.place)[:, None] + cells)  # (Q, cells)
        kept = (bits & 0xFFFFFF) >= DROPOUT * 2**24
        return states * kept.view_as(states) / (1 - DROPOUT)


def _mixed(numbers: torch.Tensor) -> torch.Tensor:
    """Random bits that follow from a number: the mixing of splitmix64 (Steele et al., 2014, figure 15)."""
    numbers = numbers * -7046029254386353131  # the golden ratio, as an odd number of 64 bits
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        numbers = (numbers ^ (numbers >> shift & (1 << 64 - shift) - 1)) * factor
    return numbers ^ (numbers >> 31 & (1 << 33) - 1)


class QuestionHead(nn.Module):
    """Question and region tokens to answer logits: attention by the question, then a classifier.

    Args:
        num_words: Size of the vocabulary of the questions.
        hidden_size: Width of the region tokens.
        num_answers: ``A``.
    """

    def __init__(self, *, num_words: int, hidden_size: int, num_answers: int) -> None:
        super().__init__()
        self.words = nn.Embedding(num_words, WIDTH // 2)
        self.reader = nn.GRU(WIDTH // 2, WIDTH // 2, batch_first=True, bidirectional=True)
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(hidden_size, WIDTH)
        self.value = nn.Linear(hidden_size, WIDTH)
        self.seen_norm = nn.LayerNorm(2 * WIDTH)
        self.seen_proj = nn.Linear(2 * WIDTH, WIDTH)
        self.question_proj = nn.Linear(WIDTH, WIDTH)
        self.hidden = nn.Linear(2 * WIDTH, WIDTH)
        self.word_dropout, self.seen_dropout, self.hidden_dropout = RowDropout(1), RowDropout(2), RowDropout(3)
        self.classifier = nn.Linear(WIDTH, num_answers)

    def forward(
        self,
        regions: torch.Tensor,
        questions: torch.Tensor,
        of_picture: torch.Tensor,
        rows: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Answer.

        Args:
            regions: ``(N, L, D)``, region tokens.
            questions: ``(Q, T)``, numbers of words, 0 behind the end.
            of_picture: ``(Q,)``, which picture each is about.
            rows: ``(Q,)``, for dropout.

        Returns:
            Logits ``(Q, A)`` and attention over the region tokens ``(Q, L)``, mean of the heads.
        """
        lengths = (questions != 0).sum(-1).clamp_min(1).cpu()
        packed = nn.utils.rnn.pack_padded_sequence(
            self.word_dropout(self.words(questions), rows), lengths, batch_first=True, enforce_sorted=False
        )
        question = self.reader(packed)[1].transpose(0, 1).flatten(1)  # (Q, WIDTH)

        def heads(states: torch.Tensor) -> torch.Tensor:
            return states.unflatten(-1, (HEADS, -1)).transpose(1, 2)  # (., H, ., WIDTH/H)

        queries = heads(self.query(question)[:, None])  # (Q, H, 1, WIDTH/H)
        values = self.value(regions)  # (N, L, WIDTH)
        scores = queries @ heads(self.key(regions))[of_picture].transpose(-1, -2) * (WIDTH // HEADS) ** -0.5
        weights = scores.softmax(-1)  # (Q, H, 1, L)
        found = (weights @ heads(values)[of_picture]).flatten(1)  # (Q, WIDTH)
        seen = self.seen_norm(torch.cat([found, values.mean(1)[of_picture]], -1))
        seen = self.seen_proj(self.seen_dropout(seen, rows))  # (Q, WIDTH)
        asked = self.question_proj(question)
        hidden = functional.gelu(self.hidden(torch.cat([seen * asked, seen + asked], -1)))
        return self.classifier(self.hidden_dropout(hidden, rows)), weights.mean(1).squeeze(1)
