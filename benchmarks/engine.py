"""How fast is the engine, against what else could run this model?

What is compared is measured in turns in one process, and what counts is the ratio of medians: a slow or busy machine
does not change the verdict. How fast memory can be read is measured in the same turns. Peak memory is that of processes
of their own.

    python -m benchmarks.engine [--rounds 5] [--only decode,prefill] [--json FILE]
"""

from __future__ import annotations

import argparse
import ctypes
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from io import BytesIO
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table
from transformers import LogitsProcessor, LogitsProcessorList

from multimodal import MultiModalModel
from multimodal.engine import Generation, Picture, Request, digest_of
from multimodal.images import load_image
from multimodal.samples import sample_images
from multimodal.weights import parts

NEW_TOKENS = 64
REGIONS = 36  # of a picture
PROMPT = "What is in the picture, and what does that tell about where it was taken?"
LATENTS_OF_LLAVA = 81  # every cell of the encoder's grid is a token of the prompt there
READ_BYTES = 2**29

# Pictures' states (B, S, D), how many tokens are read, and whether they are the prompt: inputs beside the tokens.
Inputs = Callable[[torch.Tensor, int, bool], dict[str, Any]]


@dataclass
class Line:
    """One line of the table.

    Attributes:
        what: What is compared.
        value: The ratio; None for a line that was skipped.
        must: What issue 4 asks for; at most where ``lower``.
        detail: What the ratio was made of.
        lower: Whether less is better.
    """

    what: str
    value: float | None
    must: float
    detail: str
    lower: bool = False

    @property
    def ratio(self) -> str:
        """For the table."""
        return "skipped" if self.value is None else f"{self.value:.2f}"

    @property
    def holds(self) -> bool:
        """Whether it is as good as asked for; a line that was skipped is."""
        return self.value is None or (self.value <= self.must if self.lower else self.value >= self.must)


def in_turns(runs: dict[str, Callable[[], float]], rounds: int) -> dict[str, float]:
    """Medians of figures that are measured in turns, after one turn that does not count."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            figure = run()
            if turn:
                found[name].append(figure)
    return {name: statistics.median(figures) for name, figures in found.items()}


def seconds(run: Callable[[], Any]) -> float:
    """How long something takes."""
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


class Prompts:
    """Prompts that nobody has seen, so that nothing of them is known, about sample pictures."""

    def __init__(self, model: MultiModalModel) -> None:
        self.model, self._count = model, 0
        self.pictures = [model._decoded(load_image(sample.path)) for sample in sample_images()]

    def request(self, *, pictures: int = 1, length: int = 40, new: int = NEW_TOKENS) -> Request:
        """A request of ``length`` random tokens with pictures behind them."""
        self._count += 1
        chance = torch.Generator().manual_seed(self._count)
        count = length - pictures
        words = torch.randint(1000, 40000, (count,), generator=chance).tolist()
        shown = [self.pictures[index % len(self.pictures)] for index in range(pictures)]
        image = self.model.model.config.image_token_id
        return Request([*words[:-4], *[image] * pictures, *words[-4:]], shown, new)


class Clock(LogitsProcessor):
    """Notes when each step of ``generate`` came."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        """Leave the scores as they are."""
        self.times.append(time.perf_counter())
        return scores


def a_token(times: list[float]) -> float:
    """Seconds a token, without the prompt."""
    return (times[-1] - times[0]) / (len(times) - 1)


def times_of(generation: Generation) -> list[float]:
    """When its tokens came."""
    generation.wait()
    if generation.error is not None:
        raise generation.error
    return [token.time for token in generation.tokens]


@torch.inference_mode()
def of_transformers(model: MultiModalModel, asked: Request) -> list[float]:
    """When ``generate``'s tokens came; the picture is encoded before."""
    features = model.model.model.get_image_features(torch.stack([picture.pixel_values for picture in asked.pictures]))
    clock = Clock()
    began = time.perf_counter()
    model.model.generate(
        input_ids=torch.tensor([list(asked.tokens)]),
        image_features=features.features[None],
        max_new_tokens=asked.max_new_tokens,
        min_new_tokens=asked.max_new_tokens,
        do_sample=False,
        logits_processor=LogitsProcessorList([clock]),
    )
    return [began, *clock.times]


def read_memory(numbers: torch.Tensor) -> float:
    """Bytes a second that all threads together read."""
    return numbers.nbytes / seconds(numbers.sum)


class Bench:
    """The models, and a method for each part of the table.

    Args:
        rounds: Turns of each measurement.
        precision: The engine's.
    """

    def __init__(self, rounds: int, precision: str) -> None:
        self.rounds, self.precision = rounds, precision
        self.oracle = MultiModalModel.from_pretrained("embedded", dtype=torch.bfloat16)
        self.model = MultiModalModel.from_pretrained("embedded", precision=precision)
        for model in (self.oracle, self.model):
            model.model.generation_config.eos_token_id = None  # answers of a fixed length
        self.prompts, self.engine = Prompts(self.oracle), self.model.engine

    def decode(self) -> Iterator[Line]:
        """Seconds a token, alone, with a picture; and what reading the weights alone would take."""
        numbers = torch.ones(READ_BYTES // 4)
        found = in_turns(
            {
                "transformers": lambda: a_token(of_transformers(self.oracle, self.prompts.request())[1:]),
                "engine": lambda: a_token(times_of(self.engine.submit(self.prompts.request()))),
                "bytes": lambda: read_memory(numbers),
            },
            self.rounds,
        )
        theirs, ours = found["transformers"], found["engine"]
        name = f"decode, one request with a picture, {self.precision}, against transformers bfloat16"
        yield Line(name, theirs / ours, 2.5, f"{1 / ours:.0f} against {1 / theirs:.0f} tokens/s")
        needed = self.engine.runner.weight_bytes / found["bytes"]
        gigabytes = found["bytes"] / 1e9
        detail = f"{self.engine.runner.weight_bytes / 1e6:.0f} MB a token at {gigabytes:.0f} GB/s"
        yield Line(f"share of the memory roofline, {self.precision}", needed / ours, 0.5, detail)

    def batch(self) -> Iterator[Line]:
        """Eight requests at once."""

        def together() -> float:
            return seconds(lambda: self.engine.generate([self.prompts.request() for _ in range(8)]))

        def one_by_one() -> float:
            return seconds(lambda: [self.engine.generate([self.prompts.request()]) for _ in range(8)])

        found = in_turns({"together": together, "one by one": one_by_one}, self.rounds)
        rates = [8 * NEW_TOKENS / found[name] for name in ("together", "one by one")]
        detail = f"{rates[0]:.0f} against {rates[1]:.0f} tokens/s in all"
        yield Line("8 requests at once against one after another", rates[0] / rates[1], 3.0, detail)

    def second_question(self) -> Iterator[Line]:
        """Time to the first word of a first and a second question about a photograph."""
        photo = load_image(sample_images()[0].path).resize((4032, 3024))
        names = iter(range(10**6))

        def ask(data: bytes, prompt: str) -> float:
            with self.model.stream(prompt, data, max_new_tokens=1) as stream:
                list(stream)
            assert stream.answer is not None
            return stream.answer.timings.first_token

        for size in ("12 megapixels", "1 megapixel"):
            first, second = [], []
            for _ in range(self.rounds + 1):
                shown = photo if size == "12 megapixels" else photo.resize((1154, 866))
                shown.putpixel((next(names), 0), (255, 0, 0))
                file = BytesIO()
                shown.save(file, "JPEG", quality=92)
                first.append(ask(file.getvalue(), "What is shown here?"))
                second.append(ask(file.getvalue(), "Where was it taken?"))
            before, after = statistics.median(first[1:]), statistics.median(second[1:])
            detail = f"{1e3 * before:.0f} and {1e3 * after:.0f} ms"
            yield Line(f"second question about a picture of {size}, sooner", before / after, 5.0, detail)

    def prefill(self) -> Iterator[Line]:
        """512 tokens of a prompt."""

        def theirs() -> float:
            times = of_transformers(self.oracle, self.prompts.request(length=512, new=1))
            return times[1] - times[0]

        def ours() -> float:
            asked = self.prompts.request(length=512, new=1)
            began = time.perf_counter()
            return times_of(self.engine.submit(asked))[0] - began

        found = in_turns({"theirs": theirs, "ours": ours}, self.rounds)
        detail = f"{1e3 * found['ours']:.0f} against {1e3 * found['theirs']:.0f} ms"
        yield Line("prefill, 512 tokens, against transformers bfloat16", found["theirs"] / found["ours"], 1.2, detail)

    def pictures(self) -> Iterator[Line]:
        """What sixteen pictures do to a token's time; in a LLaVA-style model they lengthen the prompt."""

        def ours(count: int) -> float:
            asked = self.prompts.request(length=40 + count, pictures=count)
            return a_token(times_of(self.engine.submit(asked)))

        def llava(count: int) -> float:
            return a_token(list(self._decoder_steps(40 + LATENTS_OF_LLAVA * count)))

        found = in_turns(
            {f"{name} {count}": lambda f=f, c=count: f(c)  # type: ignore[misc]
             for name, f in (("ours", ours), ("llava", llava)) for count in (1, 16)},
            self.rounds,
        )  # fmt: skip
        for name, what in (("ours", "16 pictures against 1"), ("llava", "the same, LLaVA-style in transformers")):
            one, many = found[f"{name} 1"], found[f"{name} 16"]
            must = 1.15 if name == "ours" else float("inf")
            yield Line(
                f"{what}: time a token", many / one, must, f"{1e3 * many:.1f} and {1e3 * one:.1f} ms", lower=True
            )

    @torch.inference_mode()
    def _decoder_steps(self, length: int) -> Iterator[float]:
        """Times of the bare decoder's tokens behind a prompt of so many embeddings."""
        decoder, head = self.oracle.model.model.language_model, self.oracle.model.lm_head
        embeds = torch.randn(1, length, decoder.config.hidden_size, dtype=torch.bfloat16) * 0.1
        output = decoder(inputs_embeds=embeds, use_cache=True)
        for _ in range(NEW_TOKENS):
            token = head(output.last_hidden_state[:, -1:]).argmax(-1)
            yield time.perf_counter()
            output = decoder(input_ids=token, past_key_values=output.past_key_values, use_cache=True)

    def llama_cpp(self) -> Iterator[Line]:
        """The same decoder without pictures in llama.cpp, 8-bit, where llama-cpp-python is installed."""
        name = f"decode, one request with a picture, {self.precision}, against llama.cpp Q8_0 on the bare decoder"
        if find_spec("llama_cpp") is None:
            yield Line(name, None, 0.7, "llama-cpp-python is not installed")
            return
        # In a process of its own: beside torch's threads it is at a third of its speed.
        alone = get_context("spawn")
        with (
            tempfile.TemporaryDirectory() as folder,
            ProcessPoolExecutor(1, alone, open_llama, (Path(folder) / "q8_0.gguf", torch.get_num_threads())) as llama,
        ):

            def theirs() -> float:
                return llama.submit(llama_a_token, list(self.prompts.request(pictures=0).tokens)).result()

            def ours() -> float:
                return a_token(times_of(self.engine.submit(self.prompts.request())))

            found = in_turns({"theirs": theirs, "ours": ours}, self.rounds)
        detail = f"{1 / found['ours']:.0f} against {1 / found['theirs']:.0f} tokens/s"
        yield Line(name, found["theirs"] / found["ours"], 0.7, detail)

    def mllama(self) -> Iterator[Line]:
        """Llama 3.2 Vision's text model of the same sizes, random weights, on given picture states."""
        yield from self._against("Mllama", mllama_of(self.oracle.model.config), mllama_inputs)

    def idefics(self) -> Iterator[Line]:
        """Idefics of the same sizes, random weights, on given picture states; its blocks are six, not seven."""
        yield from self._against("Idefics", idefics_of(self.oracle.model.config), idefics_inputs)

    def _against(self, name: str, theirs: Any, inputs: Inputs) -> Iterator[Line]:
        states = torch.randn(8, REGIONS, theirs.config.hidden_size, dtype=torch.bfloat16)
        for batch in (1, 8):

            def ours(batch: int = batch) -> float:
                asked = [self.prompts.request() for _ in range(batch)]
                return seconds(lambda: self.engine.generate(asked))

            def run(batch: int = batch) -> float:
                return seconds(lambda: greedy(theirs, states[:batch], inputs))

            found = in_turns({"ours": ours, "theirs": run}, self.rounds)
            detail = f"{found['ours']:.2f} against {found['theirs']:.2f} s for 40 + {NEW_TOKENS} tokens"
            what = f"against {name} of the same sizes in transformers, bfloat16, batch {batch}"
            yield Line(what, found["theirs"] / found["ours"], 2.0, detail)

    def memory(self) -> Iterator[Line]:
        """Peak memory of processes that answer one question."""
        peaks = {name: peak_of(name) for name in ("transformers", self.precision)}
        detail = f"{peaks[self.precision]:.0f} against {peaks['transformers']:.0f} MB"
        name = f"peak memory of a process, {self.precision}, against transformers bfloat16"
        yield Line(name, peaks[self.precision] / peaks["transformers"], 0.7, detail, lower=True)


def mllama_of(config: Any) -> Any:
    """A random Llama 3.2 Vision text model with the decoder's and the blocks' sizes."""
    from transformers import MllamaForCausalLM
    from transformers.models.mllama.configuration_mllama import MllamaTextConfig

    text, blocks = config.text_config, config.cross_attention_layers
    places = [layer + index for index, layer in enumerate(blocks)]  # there they count as layers
    return (
        MllamaForCausalLM(
            MllamaTextConfig(
                vocab_size=text.vocab_size,
                hidden_size=text.hidden_size,
                intermediate_size=text.intermediate_size,
                num_hidden_layers=text.num_hidden_layers + len(blocks),
                cross_attention_layers=places,
                num_attention_heads=text.num_attention_heads,
                num_key_value_heads=text.num_key_value_heads,
                pad_token_id=0,
                rope_parameters={"rope_type": "default", "rope_theta": 1e5},
            )
        )
        .to(torch.bfloat16)
        .eval()
    )


def idefics_of(config: Any) -> Any:
    """A random Idefics with the decoder's sizes; its pictures' states are as wide as the decoder.

    Between its blocks stand equally many layers: it has as many blocks as that allows, but not more than the model.
    """
    from transformers import IdeficsConfig, IdeficsForVisionText2Text

    text, blocks = config.text_config, len(config.cross_attention_layers)
    layers, heads = text.num_hidden_layers, text.num_attention_heads
    return (
        IdeficsForVisionText2Text(
            IdeficsConfig(
                vocab_size=text.vocab_size,
                hidden_size=text.hidden_size,
                intermediate_size=text.intermediate_size,
                num_hidden_layers=layers,
                num_attention_heads=heads,
                tie_word_embeddings=True,
                cross_layer_interval=next(n for n in range(1, layers + 1) if layers % n == 0 and layers // n <= blocks),
                qk_layer_norms=True,
                alpha_initializer="ones",
                vision_config={"embed_dim": text.hidden_size, "num_hidden_layers": 1, "num_attention_heads": heads},
            )
        )
        .to(torch.bfloat16)
        .eval()
    )


def open_llama(file: Path, threads: int) -> None:
    """Have the decoder in this process in llama.cpp, requantised to Q8_0 in a file."""
    import llama_cpp

    global _llama
    (part,) = (part for part in parts() if part.name == "smollm2-135m-instruct")
    spec = find_spec(part.wheel.file.split("/")[0])
    assert spec is not None and spec.origin is not None
    source = Path(spec.origin).parents[1] / part.wheel.file
    options = llama_cpp.llama_model_quantize_default_params()
    options.ftype, options.allow_requantize = llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0, True
    if llama_cpp.llama_model_quantize(str(source).encode(), str(file).encode(), ctypes.byref(options)):
        raise RuntimeError(f"llama.cpp cannot requantise {source}")
    _llama = llama_cpp.Llama(str(file), n_ctx=512, n_threads=threads, verbose=False)


_llama: Any = None


def llama_a_token(tokens: list[int]) -> float:
    """Seconds that llama.cpp takes for a token behind these."""
    said = _llama.generate(tokens, temp=0.0, repeat_penalty=1.0)
    return a_token([time.perf_counter() for _ in islice(said, NEW_TOKENS)])


def mllama_inputs(states: torch.Tensor, tokens: int, first: bool) -> dict[str, Any]:
    """It keeps the pictures' keys and values; every token sees them."""
    masks = {"cross_attention_mask": None, "full_text_row_masked_out_mask": None}
    return {**masks, "logits_to_keep": 1, **({"cross_attention_states": states} if first else {})}


def idefics_inputs(states: torch.Tensor, tokens: int, first: bool) -> dict[str, Any]:
    """It wants the pictures in each step; every token sees the only one."""
    sees = torch.ones(len(states), tokens, 1, dtype=torch.long)
    return {"image_encoder_embeddings": states[:, None], "image_attention_mask": sees}


@torch.inference_mode()
def greedy(model: Any, states: torch.Tensor, inputs: Inputs) -> None:
    """Forty tokens read, sixty-four written, by the model's own forward with its cache: no ``generate`` around it."""
    batch = len(states)
    tokens = torch.randint(20, model.config.vocab_size, (batch, 40))
    output = model(input_ids=tokens, use_cache=True, **inputs(states, 40, True))
    for step in range(NEW_TOKENS - 1):
        token = output.logits[:, -1:].argmax(-1)
        place = torch.tensor([[40 + step]]).expand(batch, 1)
        output = model(
            input_ids=token,
            position_ids=place,
            past_key_values=output.past_key_values,
            use_cache=True,
            **inputs(states, 1, False),
        )


def peak_of(name: str) -> float:
    """Peak memory in megabytes of a process that answers with transformers or with the engine."""
    found = subprocess.run(
        [sys.executable, "-m", "benchmarks.engine", "--answer-with", name], capture_output=True, text=True, check=True
    )
    return float(found.stdout.split()[-1])


def answer_with(name: str) -> None:
    """Answer one question, and print this process's peak memory in megabytes."""
    if name == "transformers":
        model = MultiModalModel.from_pretrained("embedded", dtype=torch.bfloat16)
        picture = model._decoded(load_image(sample_images()[0].path))
        (tokens,) = model.tokenise(
            [[{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": PROMPT}]}]]
        )
        of_transformers(model, Request(tokens, [Picture(picture.pixel_values, digest_of(picture.pixel_values))], 32))
    else:
        model = MultiModalModel.from_pretrained("embedded", precision=name)
        model(PROMPT, sample_images()[0].path, max_new_tokens=32)
    status = Path("/proc/self/status").read_text()  # getrusage would tell the peak of the process that forked this one
    print(int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1]) / 1024)


# Memory first: the file of the weights counts in full where another process, such as this one later, has it mapped.
PARTS = ("memory", "decode", "llama_cpp", "batch", "second_question", "prefill", "pictures", "mllama", "idefics")


def main() -> int:
    """Measure, print the table and return 1 where a line falls short."""
    parser = argparse.ArgumentParser(description="The engine against transformers, on this machine.")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each measurement (default: 5)")
    parser.add_argument("--precision", default="int8", help="the engine's (default: int8)")
    parser.add_argument("--only", type=lambda text: text.split(","), default=list(PARTS), metavar="PARTS")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the lines here, too")
    parser.add_argument("--answer-with", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if unknown := set(options.only) - set(PARTS):
        parser.error(f"there is no part {', '.join(sorted(unknown))}: choose from {','.join(PARTS)}")
    if options.answer_with:
        answer_with(options.answer_with)
        return 0
    bench, lines, console = Bench(options.rounds, options.precision), [], Console()
    for part in options.only:
        for line in getattr(bench, part)():
            lines.append(line)
            console.print(f"{line.what}: {line.ratio} ({line.detail})", highlight=False)
    table = Table("what", "ratio", "must", "measured")
    for line in lines:
        sign = "\N{LESS-THAN OR EQUAL TO}" if line.lower else "\N{GREATER-THAN OR EQUAL TO}"
        must = f"{sign} {line.must:g}" if line.must < float("inf") else "\N{EM DASH}"
        table.add_row(line.what, line.ratio, must + ("" if line.holds else ", short"), line.detail)
    console.print(table)
    if options.json:
        options.json.write_text(json.dumps([asdict(line) for line in lines], indent=2) + "\n")
    return int(not all(line.holds for line in lines))


if __name__ == "__main__":
    sys.exit(main())
