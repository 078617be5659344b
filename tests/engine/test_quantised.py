"""Weights in int8 and 4 bits by torch alone, as on a GPU: how near they are, and that steps and graphs read them."""

from __future__ import annotations

from typing import Any, get_args

import pytest
import torch

from multimodal.engine import EngineError, make_runner
from multimodal.engine.graphs import GraphRunner
from multimodal.engine.quantised import Int4, Kind, quantise
from multimodal.engine.runner import Linear, TorchRunner
from tests.engine.test_graphs import SIZES, following, read_all
from tests.fusion.tiny import assert_close, assert_differs, text_config, tiny_model

KINDS: tuple[Kind, ...] = get_args(Kind)


class TestMatrices:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("shape", [(16, 64), (33, 50), (7, 3)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_linear(self, kind: Kind, shape: tuple[int, int], dtype: torch.dtype) -> None:
        torch.manual_seed(0)
        weight, norm, states = torch.randn(shape), torch.rand(shape[1]), torch.randn(5, shape[1])
        packed = quantise(weight, kind, norm)
        matrix = quantise(weight, kind)(torch.eye(shape[1])).T
        limit = {"int4": 0.12, "int8": 0.01}[kind]
        assert 0 < ((matrix - weight).norm() / weight.norm()).item() < limit
        expected = (states * norm) @ matrix.T
        found = packed(states.to(dtype))
        assert found.dtype == dtype
        assert_close(found, expected, limit=1e-4 if dtype == torch.float32 else 0.02 * expected.abs().max().item())

    def test_what_came_from_four_bits_goes_back_to_them(self) -> None:
        """Groups of 32 with a step and a minimum, as in a Q4_1 GGUF, stored as bfloat16."""
        torch.manual_seed(0)
        codes = torch.randint(0, 16, (64, 4, 32)).float()
        codes[..., 0], codes[..., 1] = 0, 15
        steps, minima = torch.rand(64, 4, 1).half().float() * 0.02 + 0.001, -torch.rand(64, 4, 1).half().float() * 0.2
        weight = (codes * steps + minima).bfloat16().float().flatten(1)
        packed = quantise(weight, "int4", torch.rand(128))
        assert isinstance(packed, Int4)
        assert ((packed.matrix(torch.float32) - weight).norm() / weight.norm()).item() < 0.003

    @pytest.mark.parametrize("value", [0.0, 1e-7, -0.25, 300.0])
    @pytest.mark.parametrize("kind", KINDS)
    def test_constant(self, kind: Kind, value: float) -> None:
        found = quantise(torch.full((16, 64), value), kind)(torch.eye(64)).T
        assert_close(found, torch.full((16, 64), value), limit=1e-6 + abs(value) * 0.005)


class Unpacked(TorchRunner):
    """Computes with the float32 matrices that the codes stand for."""

    def _kept(self, weight: torch.Tensor, norm: torch.Tensor | None, kind: Kind | None) -> Linear:
        assert kind is not None
        return super()._kept(quantise(weight, kind)(torch.eye(weight.shape[1])).T, norm, None)


class TestRunners:
    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize("options", [{}, {"gate": "tanh"}, {"qk_norm": False}], ids=lambda o: str(o))
    @torch.inference_mode()
    def test_steps_and_padded_steps_compute_with_the_codes(self, kind: Kind, options: dict[str, Any]) -> None:
        model = tiny_model(**options)
        runners = [its(model, torch.float32, **SIZES, quantised=kind) for its in (Unpacked, TorchRunner, GraphRunner)]
        exact = TorchRunner(model, torch.float32, **SIZES)
        rows = read_all(exact, model)
        for runner in runners:
            read_all(runner, model)
        for _ in range(3):
            expected, plain, padded = (runner.step(rows) for runner in runners)
            assert_close(plain, expected, limit=1e-4)
            assert_close(padded, plain)
            assert_differs(plain, exact.step(rows))
            rows = following(rows, expected)

    def test_bytes(self) -> None:
        """On matrices large enough that steps and minima do not count."""
        model = tiny_model(text=text_config(hidden_size=256, intermediate_size=512, vocab_size=128))
        runners = [TorchRunner(model, torch.bfloat16, **SIZES, quantised=kind) for kind in (None, "int8", "int4")]
        exact, int8, int4 = (runner.weight_bytes for runner in runners)
        assert int8 < 0.6 * exact and int4 < 0.36 * exact
        assert runners[1].packed(None) is runners[1].packed(None)

    @pytest.mark.parametrize("kind", KINDS)
    def test_where_no_compiled_code_runs(self, kind: Kind) -> None:
        runner = make_runner(tiny_model().to("meta"), precision=kind, slots=2, positions=16)
        assert isinstance(runner, TorchRunner) and runner.quantised == kind
        automatic = make_runner(tiny_model().to("meta", torch.bfloat16), slots=2, positions=16)
        assert isinstance(automatic, TorchRunner) and automatic.quantised is None
        with pytest.raises(EngineError, match=f"{kind} does not run here: it is on meta"):
            make_runner(tiny_model(text=text_config(attention_bias=True)).to("meta"), precision=kind)
