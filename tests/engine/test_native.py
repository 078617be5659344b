"""Compiled steps against torch's, on tiny random models: precisions, mixed rows, both implementations, threads."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional

from multimodal.engine import Engine, build
from multimodal.engine.build import FLAGS
from multimodal.engine.native import KINDS, SHORT, NativeRunner, Precision, Tiles, library, obstacle, pack_tiles
from multimodal.engine.runner import Packed, PictureStates, Row, TorchRunner
from multimodal.fusion import FusionForConditionalGeneration
from tests.engine.conftest import mixed_requests
from tests.fusion.tiny import assert_close, assert_same, text_config, tiny_model, tiny_tokenizer, words

SIZES = {"slots": 12, "positions": 64, "pictures": 2}
LIMITS: dict[Precision, float] = {"bfloat16": 0.05, "int8": 0.1}  # of the largest logit; random weights, no outliers
ODD = {"hidden_size": 40, "intermediate_size": 50, "num_attention_heads": 4}  # no multiple of 16 anywhere
WIDE = {
    "hidden_size": 128,
    "intermediate_size": 208,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "initializer_range": 0.06,
}


@pytest.fixture(scope="module", params=FLAGS)
def path(request: pytest.FixtureRequest) -> Path:
    try:
        return build.build(print, instructions=request.param)
    except build.BuildError as error:
        pytest.skip(f"nothing can be compiled here: {error}")


@pytest.fixture(scope="module")
def model() -> FusionForConditionalGeneration:
    return tiny_model()


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def picture(model: FusionForConditionalGeneration, seed: int) -> PictureStates:
    config = model.config
    width = config.text_config.hidden_size // config.cross_attention_heads
    shape = (len(config.cross_attention_layers), config.cross_attention_key_value_heads, config.num_latents, width)
    generator = torch.Generator().manual_seed(seed)
    return PictureStates(torch.randn(shape, generator=generator), torch.randn(shape, generator=generator))


def native(
    model: FusionForConditionalGeneration, precision: Precision, path: Path, dtype: torch.dtype = torch.float32
) -> NativeRunner:
    return NativeRunner(model, precision, dtype=dtype, path=path, **SIZES)


def filled(runner: TorchRunner) -> list[Row]:
    """Prompts in eleven slots, with 0, 1 or 2 pictures and of different lengths; the rows that come next."""
    rows = []
    for slot in range(11):
        count, length = slot % 3, 3 + slot * 5 % 13
        for place in range(count):
            runner.see(slot, place, picture(runner.model, slot * 2 + place))
        seen = [min(count, max(0, index)) for index in range(length)]
        runner.read(slot, words(length, seed=slot), 0, seen)
        rows.append(Row(slot, 10 + slot, length, count))
    return rows[::-1]


def ids(generation: Any) -> list[int]:
    return [token.id for token in generation.tokens]


def after(rows: Sequence[Row]) -> list[Row]:
    return [Row(row.slot, row.token + 3, row.length + 1, row.pictures) for row in rows]


def steps(runner: TorchRunner, rows: Sequence[Row], count: int = 3) -> torch.Tensor:
    """Logits of some steps ``(count, B, V)``."""
    found = []
    for _ in range(count):
        found.append(runner.step(rows))
        rows = after(rows)
    return torch.stack(found)


class TestAgainstTorch:
    @pytest.mark.parametrize("precision", LIMITS)
    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"gate": "tanh"},
            {"visibility": "latest"},
            {"qk_norm": False},
            {"text": ODD},
            {"text": WIDE, "cross_attention_heads": 2, "cross_attention_key_value_heads": 1},
        ],
        ids=lambda options: ",".join(f"{name}={value}" for name, value in options.items())[:40] or "plain",
    )
    def test_close(self, path: Path, precision: Precision, options: dict[str, Any]) -> None:
        options = {**options, **({"text": text_config(**options["text"])} if "text" in options else {})}
        model = tiny_model(**options)
        runner, oracle = native(model, precision, path), TorchRunner(model, torch.float32, **SIZES)
        expected = steps(oracle, filled(oracle))
        actual = steps(runner, filled(runner))
        assert actual.shape == expected.shape
        assert_close(actual, expected, str(options), limit=LIMITS[precision] * expected.abs().max().item())

    def test_int4_computes_what_its_matrices_say(self, path: Path, model: FusionForConditionalGeneration) -> None:
        """Four bits of random weights are coarse: compared with the same matrices, not with the exact ones."""
        runner, oracle = native(model, "int4", path), TorchRunner(model, torch.float32, **SIZES)
        packed = runner.packed(None)
        oracle._packed[None] = Packed(
            [replace(layer, **unpacked(layer, "qkv", "o", "gate_up", "down")) for layer in packed.layers],
            [replace(block, **unpacked(block, "q", "o", "gate_up", "down")) for block in packed.blocks],
            unpacked(packed, "head")["head"],
        )
        expected = steps(oracle, filled(oracle))
        actual = steps(runner, filled(runner))
        assert_close(actual, expected, limit=0.06 * expected.abs().max().item())

    @pytest.mark.parametrize("precision", LIMITS)
    @pytest.mark.parametrize(("length", "near"), [(SHORT, 0), (SHORT + 1, 0), (SHORT + 1, 64)])
    def test_prompts(
        self,
        path: Path,
        model: FusionForConditionalGeneration,
        precision: Precision,
        length: int,
        near: int,
    ) -> None:
        """As steps, as matrices, and as more steps."""
        runner, oracle = native(model, precision, path), TorchRunner(model, torch.float32, **SIZES)
        runner._near = near
        for one in (runner, oracle):
            one.see(0, 0, picture(model, 0))
            one.read(0, words(10), 0, [0] * 4 + [1] * 6)
        tokens, seen = words(length, seed=1), [1] * length
        expected = oracle.read(0, tokens, 10, seen)
        assert_close(runner.read(0, tokens, 10, seen), expected, limit=LIMITS[precision] * expected.abs().max().item())

    @pytest.mark.parametrize("precision", KINDS)
    def test_prompts_in_bfloat16(self, path: Path, model: FusionForConditionalGeneration, precision: Precision) -> None:
        exact, rounded = native(model, precision, path), native(model, precision, path, torch.bfloat16)
        for runner in (exact, rounded):
            runner._near = 0
            runner.see(0, 0, picture(model, 0))
        tokens, seen = words(SHORT + 9), [0] * 3 + [1] * (SHORT + 6)
        expected = exact.read(0, tokens, 0, seen)
        assert_close(rounded.read(0, tokens, 0, seen), expected, limit=0.08 * expected.abs().max().item())


def unpacked(part: Any, *names: str) -> dict[str, Any]:
    """Float32 matrices in the place of packed ones."""

    def linear(tiles: Tiles) -> Any:
        matrix = tiles.matrix(torch.float32).clone()
        if tiles.input_weight is not None:
            matrix = matrix * tiles.input_weight[: tiles.inputs]
        return lambda states: functional.linear(states, matrix)

    return {name: linear(getattr(part, name)) for name in names}


class TestRows:
    @pytest.mark.parametrize("precision", KINDS)
    def test_each_is_as_it_is_alone(
        self, path: Path, model: FusionForConditionalGeneration, precision: Precision, threads: None
    ) -> None:
        """More rows than one pass takes, in company and alone, on two threads and on one."""
        together, alone = native(model, precision, path), native(model, precision, path)
        rows = filled(together)
        filled(alone)
        torch.set_num_threads(2)
        expected = torch.stack([steps(alone, [row])[:, 0] for row in rows], 1)
        torch.set_num_threads(1)
        assert_same(steps(together, rows), expected)
        for count in range(2, len(rows)):  # each has a kernel of its own
            assert_same(steps(together, rows[:count]), expected[:, :count], f"{count} rows")

    @pytest.mark.parametrize("precision", KINDS)
    @pytest.mark.parametrize("visibility", ["all_previous", "latest"])
    def test_a_short_prompt_is_what_its_tokens_are_one_by_one(
        self, path: Path, precision: Precision, visibility: str, threads: None
    ) -> None:
        model = tiny_model(visibility=visibility)
        at_once, one_by_one = native(model, precision, path), native(model, precision, path)
        tokens, seen = words(SHORT - 1), [0] * 3 + [1] * 9 + [2] * (SHORT - 13)
        for runner in (at_once, one_by_one):
            for place in range(2):
                runner.see(4, place, picture(model, place))
        torch.set_num_threads(1)
        for place, (token, pictures) in enumerate(zip(tokens, seen, strict=True)):
            expected = one_by_one.step([Row(4, token, place, pictures)])[0]
        torch.set_num_threads(2)
        for _ in range(5):  # threads meet differently each time
            assert_same(at_once.read(4, tokens, 0, seen), expected)
        assert_same(*(runner.step([Row(4, 9, len(tokens), 2)]) for runner in (at_once, one_by_one)))

    @pytest.mark.parametrize("visibility", ["all_previous", "latest"])
    def test_without_a_picture_it_is_the_bare_decoder(self, path: Path, visibility: str) -> None:
        open_, shut = tiny_model(visibility=visibility), tiny_model(visibility=visibility, shut=True)
        shut.model.language_model.load_state_dict(open_.model.language_model.state_dict())
        runners = [native(model, "int8", path) for model in (open_, shut)]
        filled(runners[0])
        rows = [row for row in filled(runners[1]) if not row.pictures]
        assert_same(*(steps(runner, rows) for runner in runners))

    def test_latest_sees_the_latest_alone(self, path: Path) -> None:
        model = tiny_model(visibility="latest")
        runners = [native(model, "int8", path) for _ in range(2)]
        for first, runner in enumerate(runners):
            runner.read(3, words(5), 0, [0] * 5)
            runner.see(3, 0, picture(model, first))
            runner.see(3, 1, picture(model, 7))
        assert_same(*(runner.step([Row(3, 9, 5, 2)]) for runner in runners))
        one, other = (runner.step([Row(3, 9, 5, 1)]) for runner in runners)
        assert not torch.equal(one, other)

    def test_what_is_out_of_range_is_refused(self, path: Path, model: FusionForConditionalGeneration) -> None:
        runner = native(model, "int8", path)
        for row in (Row(12, 5, 0, 0), Row(0, 97, 0, 0), Row(0, 5, 64, 0), Row(0, 5, 0, 3), Row(-1, 5, 0, 0)):
            with pytest.raises(ValueError, match=r"slot|token"):
                runner.step([row])

    def test_two_engines_at_once(self, path: Path, model: FusionForConditionalGeneration, threads: None) -> None:
        runners = [native(model, precision, path) for precision in ("int8", "bfloat16")]
        expected = [steps(runner, filled(runner), 20) for runner in runners]
        found: list[list[torch.Tensor]] = [[], []]

        def work(index: int) -> None:
            torch.set_num_threads(2)
            rows = filled(runners[index])
            found[index] += [steps(runners[index], rows, 20) for _ in range(5)]

        workers = [threading.Thread(target=work, args=(index,)) for index in range(2)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join(60)
        for results, one in zip(found, expected, strict=True):
            assert len(results) == 5
            for result in results:
                assert_same(result, one)


class TestPacking:
    @pytest.mark.parametrize("precision", KINDS)
    @pytest.mark.parametrize("shape", [(16, 64), (48, 128), (33, 50)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("tokens", [1, 20, 33])
    def test_linear(
        self, path: Path, precision: Precision, shape: tuple[int, int], dtype: torch.dtype, tokens: int
    ) -> None:
        torch.manual_seed(0)
        weight, norm, states = torch.randn(shape), torch.rand(shape[1]), torch.randn(tokens, shape[1])
        tiles = pack_tiles(library(path), weight, precision, norm)
        matrix = tiles.matrix(torch.float32)
        limit = {"int4": 0.12, "int8": 0.01, "bfloat16": 0.003}[precision]
        assert ((matrix - weight).norm() / weight.norm()).item() < limit
        expected = (states * norm) @ matrix.T
        found = tiles(states.to(dtype))
        assert found.dtype == dtype
        assert_close(found, expected, limit=1e-4 if dtype == torch.float32 else 0.02 * expected.abs().max().item())

    def test_what_came_from_four_bits_goes_back_to_them(self, path: Path) -> None:
        """Groups of 32 with a step and a minimum, as in a Q4_1 GGUF, stored as bfloat16."""
        torch.manual_seed(0)
        codes = torch.randint(0, 16, (64, 4, 32)).float()
        codes[..., 0], codes[..., 1] = 0, 15
        steps, minima = torch.rand(64, 4, 1).half().float() * 0.02 + 0.001, -torch.rand(64, 4, 1).half().float() * 0.2
        weight = (codes * steps + minima).bfloat16().float().flatten(1)
        found = pack_tiles(library(path), weight, "int4").matrix(torch.float32)
        assert ((found - weight).norm() / weight.norm()).item() < 0.003

    @pytest.mark.parametrize("value", [0.0, 1e-7, -0.25, 300.0])
    @pytest.mark.parametrize("precision", KINDS)
    def test_constant(self, path: Path, precision: Precision, value: float) -> None:
        found = pack_tiles(library(path), torch.full((16, 64), value), precision).matrix(torch.float32)
        assert_close(found, torch.full((16, 64), value), limit=1e-6 + abs(value) * 0.005)

    @pytest.mark.parametrize("precision", KINDS)
    def test_head_is_packed_in_pieces(self, path: Path, precision: Precision, monkeypatch: pytest.MonkeyPatch) -> None:
        model = tiny_model(text=text_config(vocab_size=120))
        whole: Any = native(model, precision, path).packed(None).head
        monkeypatch.setattr("multimodal.engine.native.PIECE", 32)
        joined: Any = native(model, precision, path).packed(None).head
        assert joined.outputs == whole.outputs == 120
        assert torch.equal(joined.matrix(torch.float32), whole.matrix(torch.float32))

    def test_bytes(self, path: Path) -> None:
        """On matrices large enough that padding does not count."""
        model = tiny_model(text=text_config(hidden_size=256, intermediate_size=512, vocab_size=128))
        size = {precision: native(model, precision, path).weight_bytes for precision in KINDS}
        assert size["int8"] < 0.6 * size["bfloat16"]
        assert size["int4"] < 0.36 * size["bfloat16"]

    def test_nothing_else_keeps_the_weights(self, path: Path, model: FusionForConditionalGeneration) -> None:
        runner = native(model, "int8", path)
        assert runner.packed(None) is runner.packed(None)
        sizes = [tiles.scratch for layer in runner.packed(None).layers for tiles in (layer.qkv, layer.down)]
        assert all(scratch is runner._scratch for scratch in sizes), "one scratch buffer for all of a runner"
        del model, sizes
        gc.collect()
        owned = {part.data_ptr() for part in runner.model.state_dict().values()}
        matrices = [
            part for part in gc.get_objects() if type(part) is torch.Tensor and part.dim() == 2 and len(part) == 96
        ]
        assert not [part for part in matrices if part.dtype == torch.float32 and part.data_ptr() not in owned]


class TestEngine:
    def test_answers_in_company(self, path: Path) -> None:
        """The same tokens alone and together with others."""
        model = tiny_model()
        model.generation_config.eos_token_id = None
        found = []
        for batches in ([mixed_requests()], [[one] for one in mixed_requests()]):
            runner = NativeRunner(model, "int8", dtype=torch.float32, path=path, slots=4, positions=128, pictures=2)
            engine = Engine(model, tiny_tokenizer(), runner=runner)
            found.append([ids(said) for batch in batches for said in engine.generate(batch)])
            engine.close()
        assert found[0] == found[1]

    def test_obstacles(self, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
        monkeypatch.setenv("MULTIMODAL_CACHE", str(tmp_path))
        model = tiny_model()
        reason = obstacle(model)
        assert reason is not None
        assert "multimodal pull" in reason or "compiler" in reason
        with pytest.raises(ValueError, match="compile"):
            NativeRunner(model, "int8", dtype=torch.float32, **SIZES)
        assert "biases" in str(obstacle(tiny_model(text=text_config(attention_bias=True))))

    def test_unknown_precision(self, path: Path, model: FusionForConditionalGeneration) -> None:
        with pytest.raises(ValueError, match="int3"):
            native(model, "int3", path)
        with pytest.raises(ValueError, match="float16"):
            native(model, "int8", path, torch.float16)
