"""What the benchmark compares with runs, in tiny sizes, and a line that was skipped is told as such."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.engine import (
    NEW_TOKENS,
    Inputs,
    Line,
    greedy,
    idefics_inputs,
    idefics_of,
    mllama_inputs,
    mllama_of,
)
from tests.fusion.tiny import fusion_config


@pytest.mark.parametrize(
    ("make", "inputs"), [(mllama_of, mllama_inputs), (idefics_of, idefics_inputs)], ids=["mllama", "idefics"]
)
def test_peers_write_with_their_caches_and_see_the_pictures(make: Callable[[Any], Any], inputs: Inputs) -> None:
    theirs = make(fusion_config())
    read: list[int] = []
    said: list[Any] = []
    theirs.get_input_embeddings().register_forward_hook(lambda _, given, __: read.append(given[0].shape[1]))
    theirs.lm_head.register_forward_hook(lambda _, __, logits: said.append(logits[:, -1]))
    states = torch.randn(2, 3, 32, dtype=torch.bfloat16)
    greedy(theirs, states, inputs)
    assert read == [40, *[1] * (NEW_TOKENS - 1)]
    with torch.no_grad():
        tokens = torch.tensor([[25, 30]] * 2)
        seen, others = (
            theirs(input_ids=tokens, use_cache=True, **inputs(its, 2, True)).logits for its in (states, states + 1)
        )
    assert theirs.dtype == torch.bfloat16 and seen.isfinite().all() and said[0].shape == (2, 97)
    if make is idefics_of:  # Mllama's gates are shut at first; what they cost is the same
        assert not torch.equal(seen, others)


def test_a_line_that_was_skipped() -> None:
    skipped, short = Line("against llama.cpp", None, 0.7, "not installed"), Line("decode", 2.4, 2.5, "")
    assert (skipped.ratio, skipped.holds) == ("skipped", True)
    assert (short.ratio, short.holds) == ("2.40", False)
