"""How fast is the engine on a GPU, against transformers on the same fused model, with its dynamic and its static cache?

Random weights in the sizes of the ``embedded`` preset (SmolLM2-135M and seven blocks), so nothing has to be there but
torch and transformers. What is compared is measured in turns; figures are medians. Each part stands alone: one that
fails prints why, and the others go on.

    python -m benchmarks.engine_cuda --device cuda --output FILE
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch import nn
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedTokenizerFast,
)

from multimodal.engine import Engine, Picture, Request, digest_of
from multimodal.engine.graphs import GraphRunner
from multimodal.engine.quantised import Kind
from multimodal.engine.runner import Row, TorchRunner
from multimodal.engine.sampling import Scores
from multimodal.fusion import FusionConfig, FusionForConditionalGeneration, VisionEncoder
from multimodal.fusion.gates import TanhGate

IMAGE = 16
PROMPT = 40  # tokens of a prompt, its picture in it
POSITIONS = 1024  # of a slot, and of the prefilled ones
COMPILED_SECONDS = 45.0  # that a process may take which compiles


@dataclass(frozen=True)
class Sizes:
    """What is measured.

    Attributes:
        text: The decoder's configuration.
        blocks: Layers with a block.
        image_size: Of the pictures.
        new: Tokens of an answer.
        batches: Requests at once.
        prefill: Tokens of a long prompt.
        rounds: Turns that count.
    """

    text: dict[str, Any]
    blocks: list[int]
    image_size: int
    new: int
    batches: tuple[int, ...]
    prefill: int
    rounds: int


REAL = Sizes(
    text={
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "initializer_range": 0.08,  # with less, a token's own embedding outweighs all that the layers add
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
    },
    blocks=[16, 18, 20, 22, 24, 26, 28],
    image_size=288,
    new=32,
    batches=(1, 8, 64),
    prefill=512,
    rounds=3,
)
TINY = Sizes(
    text={
        "vocab_size": 256,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 2048,
        "initializer_range": 0.2,
    },
    blocks=[1, 3],
    image_size=64,
    new=6,
    batches=(1, 3),
    prefill=64,
    rounds=1,
)


def build(sizes: Sizes, device: str, dtype: torch.dtype) -> FusionForConditionalGeneration:
    """A fused model with random weights and open gates, whose answers never end by themselves."""
    torch.manual_seed(0)
    encoder = VisionEncoder.create(backend="torchvision", name="mobilenet_v3_small", image_size=sizes.image_size)
    text = LlamaConfig(tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2, **sizes.text)
    config = FusionConfig(
        text_config=text,
        vision_config=encoder.config,
        image_token_id=IMAGE,
        cross_attention_layers=sizes.blocks,
        cross_intermediate_size=sizes.text["intermediate_size"] // 2,
        num_latents=36,
        resampler_layers=1,
    )
    model = FusionForConditionalGeneration(config).eval()
    for module in model.modules():
        if isinstance(module, TanhGate):
            nn.init.normal_(module.alpha, std=0.5)
    model.generation_config.eos_token_id = None
    return model.to(device, dtype)


def tokenizer_of(size: int) -> PreTrainedTokenizerFast:
    """A word for each token."""
    backend = Tokenizer(WordLevel({f"w{index}": index for index in range(size)}, unk_token="w0"))
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="w0")


class Clock(LogitsProcessor):
    """Notes when the first and the last step of ``generate`` came, after the device has finished it."""

    def __init__(self, bench: Bench, steps: int) -> None:
        self.bench, self.steps, self.count = bench, steps, 0
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Leave the scores as they are."""
        self.count += 1
        if self.count in (1, self.steps):
            self.times.append(self.bench.now())
        return scores


class Bench:
    """The model, and a method for each part.

    Args:
        device: Name of a torch device.
        sizes: What is measured.
        deadline: Of ``time.perf_counter``: from then on one turn has to do.
    """

    def __init__(self, device: str, sizes: Sizes, deadline: float = float("inf")) -> None:
        self.device, self.sizes, self.deadline = device, sizes, deadline
        self.model = build(sizes, device, torch.bfloat16)
        self.tokenizer = tokenizer_of(sizes.text["vocab_size"])
        side = sizes.image_size
        self.pixels = torch.randn(max(sizes.batches), 3, side, side, generator=torch.Generator().manual_seed(1))
        self.pictures = [Picture(pixels, digest_of(pixels)) for pixels in self.pixels]
        self._count = 0

    # ---- what all parts use

    def now(self) -> float:
        """The time, when all that was started has ended."""
        if self.device.startswith("cuda"):
            torch.cuda.synchronize()
        return time.perf_counter()

    def in_turns(self, runs: dict[str, Callable[[], Any]]) -> dict[str, list[Any]]:
        """Figures that are measured in turns, after one turn that does not count; a run that fails is left out."""
        found: dict[str, list[Any]] = {name: [] for name in runs}
        for turn in range(self.sizes.rounds + 1):
            if turn > 1 and time.perf_counter() > self.deadline:
                break
            for name, run in runs.items():
                if name in found:
                    try:
                        figure = run()
                    except Exception:
                        print(f"{name} failed:", file=sys.stderr)
                        traceback.print_exc()
                        del found[name]
                    else:
                        found[name] += [figure] if turn else []
        return found

    def prompt(self, length: int, *, picture: bool = True) -> list[int]:
        """Random tokens that nobody has seen, a placeholder before the last four."""
        self._count += 1
        chance = torch.Generator().manual_seed(self._count)
        words = torch.randint(IMAGE + 1, self.sizes.text["vocab_size"], (length - picture,), generator=chance).tolist()
        return [*words[:-4], *[IMAGE] * picture, *words[-4:]]

    def runner(self, kind: type[TorchRunner], slots: int, quantised: Kind | None = None) -> TorchRunner:
        """A prepared runner that computes in bfloat16."""
        runner = kind(self.model, torch.bfloat16, slots=slots, positions=POSITIONS, pictures=1, quantised=quantised)
        runner.prepare()
        return runner

    def generate(self, batch: int, length: int, new: int, **options: Any) -> list[float]:
        """When ``generate`` began, when its first and its last tokens came; the pictures are encoded before."""
        tokens = torch.tensor([self.prompt(length) for _ in range(batch)], device=self.device)
        pixels = self.pixels[:batch].to(self.device, torch.bfloat16)
        features = self.model.model.get_image_features(pixels).features[:, None]  # (B, 1, R, D)
        return self._generate(self.model, tokens, new, image_features=features, **options)

    def _generate(self, model: Any, tokens: torch.Tensor, new: int, **options: Any) -> list[float]:
        clock = Clock(self, new)
        began = self.now()
        model.generate(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=new,
            min_new_tokens=new,
            do_sample=False,
            logits_processor=LogitsProcessorList([clock]),
            **options,
        )
        return [began, *clock.times]

    # ---- parts

    def parity(self) -> Iterator[dict[str, Any]]:
        """How many of the whole engine's greedy tokens are those of ``generate``."""
        for dtype in (torch.float32, torch.bfloat16):
            model = self.model if dtype == torch.bfloat16 else build(self.sizes, self.device, dtype)
            asked = [
                Request(self.prompt(length, picture=picture), [self.pictures[0]] * picture, 16)
                for length, picture in ((12, True), (9, False), (40, True), (300, True), (7, False), (25, True))
            ]
            runner = GraphRunner(model, dtype, slots=4, positions=POSITIONS, pictures=1)
            engine = Engine(model, self.tokenizer, runner=runner)
            try:
                ours = [[token.id for token in found.tokens] for found in engine.generate(asked)]
            finally:
                engine.close()
            agree = total = 0
            different = len({token for said in ours for token in said})  # few: the weights make a dull model
            for its, said in zip(asked, ours, strict=True):
                inputs: dict[str, Any] = {"input_ids": torch.tensor([list(its.tokens)], device=self.device)}
                if its.pictures:
                    inputs["pixel_values"] = its.pictures[0].pixel_values[None, None].to(self.device, dtype)
                theirs = model.generate(**inputs, max_new_tokens=16, do_sample=False)[0, len(its.tokens) :].tolist()
                agree += sum(mine == other for mine, other in zip(said, theirs, strict=True))
                total += len(theirs)
            yield {"dtype": str(dtype).removeprefix("torch."), "agree": agree, "of": total, "different": different}

    def decode(self) -> Iterator[dict[str, Any]]:
        """Tokens a second behind the prompts, a picture in each; greedy tokens chosen as the engine does."""
        slots, runners = max(self.sizes.batches), {}
        kinds: dict[str, tuple[type[TorchRunner], Kind | None]] = {
            "graphs": (GraphRunner, None),
            "graphs, int8": (GraphRunner, "int8"),
            "graphs, int4": (GraphRunner, "int4"),
            "no graphs": (TorchRunner, None),
        }
        for name, (kind, quantised) in kinds.items():
            began = self.now()
            try:
                runners[name] = self.runner(kind, slots, quantised)
            except Exception as error:
                traceback.print_exc()
                yield {"variant": name, "error": repr(error)}
            else:
                weights = runners[name].weight_bytes / 1e6
                yield {"variant": name, "prepare_seconds": self.now() - began, "weights_mb": weights}
        with torch.inference_mode():
            for picture, runner in ((picture, runner) for picture in range(slots) for runner in runners.values()):
                runner.see(picture, 0, self._states(picture))
        new = self.sizes.new

        def ours(runner: TorchRunner, batch: int) -> float:
            rows = []
            for slot in range(batch):
                tokens = self.prompt(PROMPT)
                logits = runner.read(slot, tokens, 0, seen_by(tokens))
                rows.append(Row(slot, int(logits.argmax()), PROMPT, 1))
            began = self.now()
            for _ in range(new - 1):
                scores = Scores(runner.step(rows), self.model.generation_config.suppress_tokens or [])
                rows = [
                    Row(row.slot, token, row.length + 1, 1)
                    for row, token in zip(rows, scores.likeliest, strict=True)
                ]  # fmt: skip
            return batch * (new - 1) / (self.now() - began)

        def theirs(batch: int, **options: Any) -> float:
            _, first, last = self.generate(batch, PROMPT, new, **options)
            return batch * (new - 1) / (last - first)

        for batch in self.sizes.batches:
            runs: dict[str, Callable[[], float]] = {
                f"engine, {name}": lambda r=runner, b=batch: ours(r, b)  # type: ignore[misc]
                for name, runner in runners.items()
            }
            runs["transformers, dynamic cache"] = lambda b=batch: theirs(b)  # type: ignore[misc]
            runs["transformers, static cache"] = lambda b=batch: theirs(  # type: ignore[misc]
                b, cache_implementation="static", disable_compile=True
            )
            with torch.inference_mode():
                for name, rates in self.in_turns(runs).items():
                    yield {"variant": name, "batch": batch, **spread("tokens_per_second", rates)}

    def prefill(self) -> Iterator[dict[str, Any]]:
        """A long prompt with a picture in it; for both, the picture has been encoded."""
        length = self.sizes.prefill
        runner = self.runner(TorchRunner, 1)
        with torch.inference_mode():
            runner.see(0, 0, self._states(0))
            features = self.model.model.get_image_features(self.pixels[:1].to(self.device, torch.bfloat16)).features

        def ours() -> float:
            tokens = self.prompt(length)
            began = self.now()
            runner.read(0, tokens, 0, seen_by(tokens))
            return self.now() - began

        def theirs() -> float:
            tokens = torch.tensor([self.prompt(length)], device=self.device)
            began = self.now()
            self.model(input_ids=tokens, image_features=features[:, None], use_cache=True, logits_to_keep=1)
            return self.now() - began

        with torch.inference_mode():
            for name, times in self.in_turns({"engine": ours, "transformers": theirs}).items():
                yield {"variant": name, "tokens": length, **spread("seconds", times)}

    def requests(self) -> Iterator[dict[str, Any]]:
        """The whole engine, scheduler, text and all, against ``generate``: prompts, answers, new pictures encoded."""
        slots = max(self.sizes.batches)
        engine = Engine(self.model, self.tokenizer, runner=self.runner(GraphRunner, slots))
        new = self.sizes.new

        def ours(batch: int) -> float:
            engine.forget()
            asked = [Request(self.prompt(PROMPT), [picture], new) for picture in self.pictures[:batch]]
            began = self.now()
            for generation in engine.generate(asked):
                if generation.error is not None:
                    raise generation.error
            return batch * new / (self.now() - began)

        def theirs(batch: int) -> float:
            tokens = torch.tensor([self.prompt(PROMPT) for _ in range(batch)], device=self.device)
            began = self.now()
            pixels = self.pixels[:batch, None].to(self.device, torch.bfloat16)
            self._generate(self.model, tokens, new, pixel_values=pixels)
            return batch * new / (self.now() - began)

        try:
            for batch in (min(self.sizes.batches), slots):
                runs: dict[str, Callable[[], float]] = {
                    "engine": lambda b=batch: ours(b),  # type: ignore[misc]
                    "transformers": lambda b=batch: theirs(b),  # type: ignore[misc]
                }
                for name, rates in self.in_turns(runs).items():
                    yield {"variant": name, "batch": batch, **spread("tokens_per_second", rates)}
        finally:
            engine.close()

    def memory(self) -> Iterator[dict[str, Any]]:
        """Peak memory above that of the model itself, on a GPU."""
        if not self.device.startswith("cuda"):
            return
        batch = min(8, max(self.sizes.batches))

        def engine() -> None:
            runner = self.runner(GraphRunner, batch)
            rows = []
            for slot in range(batch):
                tokens = self.prompt(PROMPT)
                runner.see(slot, 0, self._states(slot))
                rows.append(Row(slot, int(runner.read(slot, tokens, 0, seen_by(tokens)).argmax()), PROMPT, 1))
            runner.step(rows)

        runs: dict[str, Callable[[], Any]] = {
            f"engine, graphs, {batch} slots of {POSITIONS}": engine,
            "transformers, dynamic cache": lambda: self.generate(batch, PROMPT, self.sizes.new),
        }
        for name, run in runs.items():
            gc.collect()
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            with torch.inference_mode():
                run()
            peak = torch.cuda.max_memory_allocated()
            yield {"variant": name, "batch": batch, "peak_mb": peak / 1e6, "above_model_mb": (peak - before) / 1e6}

    def compiled(self) -> Iterator[dict[str, Any]]:
        """The bare decoder with the static cache, compiled by ``generate`` itself: it does not compile fused models."""
        torch.manual_seed(0)
        text = LlamaConfig(tie_word_embeddings=True, pad_token_id=0, bos_token_id=1, eos_token_id=2, **self.sizes.text)
        bare = LlamaForCausalLM(text).eval().to(self.device, torch.bfloat16)
        bare.generation_config.eos_token_id = None
        new = self.sizes.new
        for batch in self.sizes.batches:
            rates = []
            for turn in range(self.sizes.rounds + 2):
                tokens = torch.tensor([self.prompt(PROMPT, picture=False) for _ in range(batch)], device=self.device)
                began = self.now()
                _, first, last = self._generate(bare, tokens, new, cache_implementation="static")
                if turn == 0:
                    yield {"variant": "bare decoder, compiled", "batch": batch, "first_seconds": self.now() - began}
                elif turn > 1:
                    rates.append(batch * (new - 1) / (last - first))
            yield {"variant": "bare decoder, compiled", "batch": batch, **spread("tokens_per_second", rates)}

    def _states(self, picture: int) -> Any:
        """What the blocks read of a picture."""
        if not hasattr(self, "_encoder"):
            runner = TorchRunner(self.model, torch.bfloat16, slots=1, positions=8, pictures=1)
            self._encoder = Engine(self.model, self.tokenizer, runner=runner)
        return self._encoder.encode(self.pictures[picture])


def seen_by(tokens: list[int]) -> list[int]:
    """For each token, how many pictures stand at or before it."""
    place = tokens.index(IMAGE)
    return [0] * place + [1] * (len(tokens) - place)


def spread(name: str, figures: list[float]) -> dict[str, Any]:
    """Median, least and most."""
    return {name: statistics.median(figures), "least": min(figures), "most": max(figures), "turns": len(figures)}


PARTS = ("parity", "decode", "prefill", "requests", "memory", "compiled")


class Report:
    """Prints each figure at once, and keeps all of them in a file.

    Args:
        output: The file, or None.
    """

    def __init__(self, output: Path | None) -> None:
        self.output = output
        self.lines: list[dict[str, Any]] = []

    def add(self, line: dict[str, Any]) -> None:
        """One more figure."""
        self.lines.append(line)
        print(json.dumps(line), flush=True)
        if self.output is not None:
            self.output.write_text(json.dumps(self.lines, indent=2) + "\n")


def compile_apart(options: argparse.Namespace, report: Report) -> None:
    """Run the part that compiles in a process of its own, which may take too long, or fail in any way."""
    command = [sys.executable, "-m", "benchmarks.engine_cuda", "--device", options.device, "--only", "compiled"]
    command += ["--here", *(["--tiny"] if options.tiny else [])]
    with tempfile.TemporaryFile("w+") as output:  # not a pipe: what the process leaves behind could hold it open
        process = subprocess.Popen(command, stdout=output, start_new_session=True)
        try:
            status = process.wait(COMPILED_SECONDS)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            report.add({"part": "compiled", "error": f"took longer than {COMPILED_SECONDS:.0f} s"})
        else:
            if status:
                report.add({"part": "compiled", "error": f"exit status {status}"})
        output.seek(0)
        for line in output:
            if line.startswith('{"part": "compiled"'):
                report.add(json.loads(line))


def main() -> int:
    """Measure, and return 1 where a part failed."""
    parser = argparse.ArgumentParser(description="The engine on a GPU, against transformers.")
    parser.add_argument("--device", default="cuda", help="of torch (default: cuda)")
    parser.add_argument("--tiny", action="store_true", help="tiny sizes: only to see that it runs")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), metavar="PARTS")
    parser.add_argument("--seconds", type=float, default=50.0, help="from then on one turn has to do (default: 50)")
    parser.add_argument("--output", type=Path, metavar="FILE", help="write the figures here, too")
    parser.add_argument("--here", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
    report, began, bench = Report(options.output), time.perf_counter(), None
    is_cuda = options.device.startswith("cuda")
    report.add(
        {
            "part": "about",
            "device": torch.cuda.get_device_name(options.device) if is_cuda else "CPU",
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "python": sys.version.split()[0],
        }
    )
    for part in options.only:
        start = time.perf_counter()
        gc.collect()  # what the part before has left
        try:
            if part == "compiled" and not options.here:
                compile_apart(options, report)
            else:
                if bench is None:
                    bench = Bench(options.device, TINY if options.tiny else REAL, began + options.seconds)
                for line in getattr(bench, part)():
                    report.add({"part": part, **line})
        except Exception:
            traceback.print_exc()
            report.add({"part": part, "error": traceback.format_exc().splitlines()[-1]})
        if not options.here:
            report.add({"part": part, "took_seconds": time.perf_counter() - start})
    if not options.here:
        report.add({"part": "all", "took_seconds": time.perf_counter() - began})
    return int(any("error" in line for line in report.lines))


if __name__ == "__main__":
    sys.exit(main())
