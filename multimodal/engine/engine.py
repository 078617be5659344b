"""The engine: many requests on one model, a token for each of them in every step.

A request gets a slot, its prompt is read in pieces between the steps of the others, and then it takes part in every
step until it ends. What always holds: a request's tokens do not hang on what else is being answered; one that fails or
is cancelled leaves its neighbours alone; and soon after the last answer no
thread runs. A slot that is free keeps what it holds: the next request that begins with the same tokens and pictures
reads only the rest.

Thread safety: requests come from any thread; all that runners, slots and caches do happens on the engine's own thread.
"""

from __future__ import annotations

import atexit
import itertools
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch

from multimodal.engine.pictures import LeastRecentlyUsed
from multimodal.engine.precisions import make_runner
from multimodal.engine.requests import EngineClosed, EngineError, EngineFull, Generation, Picture, Request, Token
from multimodal.engine.runner import PictureStates, Row, Runner
from multimodal.engine.sampling import Sampler, Scores, TextStream
from multimodal.engine.threads import release_threads
from multimodal.fusion import FusionForConditionalGeneration

READ_AT_ONCE = 128  # tokens of prompts between two steps of the others
READ_ALONE = 4  # times as many where nobody waits for a step
PICTURE_BYTES = 256 * 2**20
LINGER = 2.0  # seconds: with a new thread OpenMP makes new ones, too, which takes longer than a step
WORTH_COPYING = 16  # tokens that a busy slot must share with a request for it to copy them

# A thread that still computes while Python shuts down would abort the process.
_engines: weakref.WeakSet[Engine] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for engine in list(_engines):
        engine.close()


class Adapters:
    """How an engine asks for an adapter; here there are none. ``AdapterSwitch`` is the one with some."""

    @contextmanager
    def use(self, name: str | None, *, given_up: Callable[[], bool] = lambda: False) -> Iterator[bool]:
        """Have the model's modules compute with an adapter; yields whether its turn came."""
        yield True

    def inner_name(self, name: str | None) -> str | None:
        """What PEFT calls it."""
        return name


@dataclass(eq=False)
class _Slot:
    """A row of the cache: what it holds, and for whom."""

    index: int
    tokens: list[int] = field(default_factory=list)
    pictures: list[str] = field(default_factory=list)  # digests
    adapter: str | None = None
    job: _Job | None = None
    used: float = 0.0


@dataclass(eq=False)
class _Job:
    """A request that is being answered."""

    generation: Generation
    sampler: Sampler
    text: TextStream
    slot: _Slot | None = None
    number: int = 0  # in the order of seating
    seen: list[int] = field(default_factory=list)  # of each prompt token: pictures at or before it
    next_token: int | None = None  # None: the prompt is not read yet

    @property
    def request(self) -> Request:
        return self.generation.request


class Engine:
    """Answers requests on a fused model with continuous batching.

    Orca (Yu et al., OSDI 2022) introduced scheduling by the step; chunked prefill is that of Sarathi (Agrawal et al.,
    2023).

    Args:
        model: The fused model, in evaluation mode. Its weights are packed when they are first used: later changes of
            them are not seen, but for adapters.
        tokenizer: Its tokenizer.
        runner: Runs it; None makes one with :func:`make_runner`.
        queue: How many requests may wait for a slot.
        read_at_once: Tokens of a prompt that are read between two steps.
        picture_bytes: What may be kept of pictures.
        linger: Seconds for which the engine's thread waits for more when nothing is left to do.
        adapters: Of the model, by name.
        **options: For :func:`make_runner`.

    Attributes:
        pictures: Cross keys and values of pictures, by digest and adapter.
    """

    def __init__(
        self,
        model: FusionForConditionalGeneration,
        tokenizer: Any,
        *,
        runner: Runner | None = None,
        queue: int = 256,
        read_at_once: int = READ_AT_ONCE,
        picture_bytes: int = PICTURE_BYTES,
        linger: float = LINGER,
        adapters: Any = None,
        **options: Any,
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.runner = runner or make_runner(model, **options)
        self.queue, self.read_at_once, self.linger = queue, read_at_once, linger
        self.adapters = adapters or Adapters()
        self.pictures: LeastRecentlyUsed[PictureStates] = LeastRecentlyUsed(picture_bytes)
        self.slots = [_Slot(index) for index in range(self.runner.slots)]
        self._waiting: deque[_Job] = deque()
        self._numbers = itertools.count()
        self._lock = threading.Condition()
        self._thread: threading.Thread | None = None
        self._closed = False
        _engines.add(self)

    # ---- for everybody

    def submit(self, request: Request) -> Generation:
        """Take a request; its tokens come as they are made.

        Raises:
            EngineFull: If too many wait.
            EngineClosed: If the engine is closed.
            EngineError: If the request cannot be answered: too long, or pictures and placeholders differ in number.
        """
        seen = _counted(request.tokens, self.model.config.image_token_id)
        self._check(request, seen)
        release_threads()
        job = _Job(
            Generation(request),
            self._sampler(request),
            TextStream(self.tokenizer, request.stop),
            seen=seen,
        )
        with self._lock:
            if self._closed:
                raise EngineClosed("the engine is closed: make another one")
            if len(self._waiting) >= self.queue:
                raise EngineFull(f"{len(self._waiting)} requests wait already: ask again in a moment")
            self._waiting.append(job)
            self._lock.notify()
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
                self._thread.start()
        return job.generation

    def prepare(self) -> None:
        """Do now what the first request would have to wait for."""
        self.runner.prepare()
        release_threads()

    def generate(self, requests: Sequence[Request]) -> list[Generation]:
        """Answer requests and wait for all of them.

        Raises:
            EngineError: As :meth:`submit` says; no more than ``queue`` of them wait at a time.
        """
        generations: list[Generation] = []
        for request in requests:
            while True:
                try:
                    generations.append(self.submit(request))
                    break
                except EngineFull:  # of these requests, or of somebody else's
                    pending = next((generation for generation in generations if not generation.over), None)
                    time.sleep(0.01) if pending is None else pending.wait()
        for generation in generations:
            generation.wait()
        return generations

    def forget(self) -> None:
        """Keep nothing of pictures and conversations, while nothing is asked: for who measures a first question."""
        self.pictures.clear()
        with self._lock:
            for slot in self.slots:
                if slot.job is None:
                    slot.tokens, slot.pictures = [], []

    @torch.inference_mode()
    def encode(self, picture: Picture) -> PictureStates:
        """What the blocks read of a picture, computed anew, with the adapter that is active in the model's modules.

        Raises:
            EngineError: If the picture holds NaN or infinity.
        """
        model = self.model.model
        pixels = picture.pixel_values[None].to(self.model.device, model.vision_encoder.dtype)
        features, grid = model.vision_encoder(pixels)  # (1, R, D)
        if not features.isfinite().all():
            raise EngineError("a picture holds NaN or infinity: prepare pictures with the image processor")
        regions, _ = model.resampler(features.to(self.model.dtype), grid)  # (1, L, D)
        blocks: Any = model.cross_attention_blocks
        pairs = [block.attention.keys_values(regions) for block in blocks]
        keys, values = (torch.stack([pair[which][0] for pair in pairs]) for which in (0, 1))  # (M, K, L, C)
        return PictureStates(keys, values)

    @property
    def closed(self) -> bool:
        """Whether it takes no request any more."""
        return self._closed

    def close(self) -> None:
        """End all that is being answered, and wait for it; a closed engine takes no request."""
        with self._lock:
            self._closed = True
            self._lock.notify()
            thread = self._thread
            for job in [*self._waiting, *self._jobs()]:
                job.generation.cancel()
        if thread is not None and thread is not threading.current_thread():
            thread.join()

    def _sampler(self, request: Request) -> Sampler:
        penalty = request.repetition_penalty
        if penalty is None:
            penalty = self.model.generation_config.repetition_penalty
        return Sampler(
            temperature=request.temperature,
            top_p=request.top_p,
            seed=request.seed,
            repetition_penalty=1.0 if penalty is None else penalty,
            prompt=request.tokens,
        )

    def _check(self, request: Request, seen: Sequence[int]) -> None:
        if not request.tokens:
            raise EngineError("the prompt is empty: give at least one token")
        needed = len(request.tokens) + request.max_new_tokens
        if needed > self.runner.positions:
            raise EngineError(
                f"{len(request.tokens)} tokens, and {request.max_new_tokens} for the answer, exceed the engine's "
                f"{self.runner.positions}: shorten the prompt, or lower max_new_tokens"
            )
        count = seen[-1]
        if count != len(request.pictures):
            raise EngineError(f"{len(request.pictures)} pictures for {count} placeholders: give one for each")
        if count > self.runner.pictures:
            raise EngineError(f"{count} pictures exceed the engine's {self.runner.pictures}: give fewer at a time")
        vocabulary = self.model.config.text_config.vocab_size
        if not 0 <= request.top_logprobs <= vocabulary:
            raise EngineError(f"top_logprobs={request.top_logprobs}: ask for 0 to {vocabulary} tokens")
        if request.repetition_penalty is not None and request.repetition_penalty <= 0:
            raise EngineError(f"repetition_penalty={request.repetition_penalty} must be above 0; 1 is none")

    # ---- the engine's own thread

    def _jobs(self) -> list[_Job]:
        return [slot.job for slot in self.slots if slot.job is not None]

    @torch.inference_mode()
    def _run(self) -> None:
        try:
            while self._has_work():
                self._drop_cancelled()
                self._admit()
                self._read()
                self._step()
        except BaseException as error:  # better told to all than waited for in vain
            with self._lock:
                jobs, self._thread = [*self._waiting, *self._jobs()], None
                self._waiting.clear()
            for job in jobs:
                self._end(job, error=error)
            raise

    def _has_work(self) -> bool:
        """Wait for work; whether the thread goes on. If not, the next request starts another."""
        with self._lock:
            if not self._jobs():
                self._lock.wait_for(lambda: self._waiting or self._closed, self.linger)
                if not self._waiting:
                    self._thread = None
            return self._thread is not None

    def _drop_cancelled(self) -> None:
        with self._lock:
            gone = [job for job in self._waiting if job.generation.cancelled]
            for job in gone:
                self._waiting.remove(job)
        for job in [*gone, *(job for job in self._jobs() if job.generation.cancelled)]:
            self._end(job, reason="cancelled")

    def _end(self, job: _Job, *, reason: str | None = None, error: BaseException | None = None) -> None:
        """Give the slot back, then tell the reader."""
        if job.slot is not None:
            job.slot.job, job.slot.used = None, time.monotonic()
            if error is not None:
                job.slot.tokens, job.slot.pictures = [], []
        job.generation.end(reason, error)

    def _admit(self) -> None:
        while True:
            free = [slot for slot in self.slots if slot.job is None]
            with self._lock:
                if not free or not self._waiting:
                    return
                job = self._waiting.popleft()
            try:
                self._seat(job, free)
            except Exception as error:  # it is in no list yet: nobody else would tell the one who asked
                self._end(job, error=error)

    def _seat(self, job: _Job, free: list[_Slot]) -> None:
        """Give a request the free slot that knows most of its prompt; else the one unused for longest."""
        known = {slot.index: self._known(job, slot) for slot in self.slots}
        slot = max(free, key=lambda slot: (known[slot.index], -slot.used))
        best = max(self.slots, key=lambda slot: known[slot.index])
        count = known[slot.index]
        if best.job is not None and known[best.index] >= count + WORTH_COPYING:
            slot = min(free, key=lambda slot: slot.used)
            count = known[best.index]
            pictures = job.seen[count - 1]
            self.runner.copy(best.index, slot.index, count, pictures)
            slot.pictures = best.pictures[:pictures]
        slot.tokens = list(job.request.tokens[:count])
        slot.pictures = slot.pictures[: job.seen[count - 1] if count else 0]
        slot.adapter, slot.job, job.slot = job.request.adapter, job, slot
        job.number = next(self._numbers)
        job.generation.reused = count

    def _known(self, job: _Job, slot: _Slot) -> int:
        """How many of a prompt's tokens a slot knows: one at least is left to be read, for its logits."""
        if slot.adapter != job.request.adapter:
            return 0
        count = 0
        for token, held, seen in zip(job.request.tokens[:-1], slot.tokens, job.seen, strict=False):
            if token != held or (seen and job.request.pictures[seen - 1].digest != slot.pictures[seen - 1]):
                break
            count += 1
        return count

    def _read(self) -> None:
        """So many tokens of prompts, those first that have waited for longest; more where nobody waits for a step."""
        jobs = self._jobs()
        left = self.read_at_once * (1 if any(job.next_token is not None for job in jobs) else READ_ALONE)
        for job in sorted((job for job in jobs if job.next_token is None), key=lambda job: job.number):
            if left <= 0:
                break
            try:
                left -= self._read_piece(job, left)
            except Exception as error:  # told to the one who asked; the others go on
                self._end(job, error=error)

    def _read_piece(self, job: _Job, most: int) -> int:
        """Read on in a prompt; returns how many tokens were read."""
        request, slot = job.request, job.slot
        assert slot is not None
        inner = self.adapters.inner_name(request.adapter)
        start = len(slot.tokens)
        piece = list(request.tokens[start : start + most])
        seen = job.seen[start : start + len(piece)]
        new = range(len(slot.pictures), max(seen))
        with self._modules(job, encodes=len(new) > 0) as its_turn:
            if not its_turn:
                return 0
            for place in new:
                picture = request.pictures[place]
                states = self.pictures.get((picture.digest, request.adapter), partial(self.encode, picture))
                self.runner.see(slot.index, place, states)
                slot.pictures[place:] = [picture.digest]
            logits = self.runner.read(slot.index, piece, start, seen, inner)
        slot.tokens += piece
        if len(slot.tokens) == len(request.tokens):
            self._take(job, self._scores(logits[None]), 0)
        return len(piece)

    def _modules(self, job: _Job, encodes: bool) -> AbstractContextManager[bool]:
        """The right adapter in the model's modules, where something runs through them."""
        adapters = self.adapters if encodes or self.runner.computes_in_modules else Adapters()
        return adapters.use(job.request.adapter, given_up=lambda: job.generation.cancelled)

    def _step(self) -> None:
        """One token for everybody whose prompt is read; those with the same adapter together."""
        groups: dict[str | None, list[_Job]] = {}
        for job in self._jobs():
            if job.next_token is not None:
                groups.setdefault(job.request.adapter, []).append(job)
        for jobs in groups.values():
            try:
                logits = self._run_step(jobs)
            except Exception as error:
                if len(jobs) == 1:
                    self._end(jobs[0], error=error)
                    continue
                self._step_one_by_one(jobs)
                continue
            if logits is not None:
                scores = self._scores(logits)
                for row, job in enumerate(jobs):
                    self._advance(job, scores, row)

    def _step_one_by_one(self, jobs: Sequence[_Job]) -> None:
        """Find out whose fault it was."""
        for job in jobs:
            try:
                logits = self._run_step([job])
            except Exception as error:
                self._end(job, error=error)
            else:
                if logits is not None:
                    self._advance(job, self._scores(logits), 0)

    def _run_step(self, jobs: Sequence[_Job]) -> torch.Tensor | None:
        rows = []
        for job in jobs:
            assert job.slot is not None and job.next_token is not None
            rows.append(Row(job.slot.index, job.next_token, len(job.slot.tokens), len(job.slot.pictures)))
        with self._modules(jobs[0], encodes=False) as its_turn:
            if not its_turn:
                return None
            return self.runner.step(rows, self.adapters.inner_name(jobs[0].request.adapter))

    def _scores(self, logits: torch.Tensor) -> Scores:
        return Scores(logits, self.model.generation_config.suppress_tokens or [])

    def _advance(self, job: _Job, scores: Scores, row: int) -> None:
        """The step's token is in the cache now."""
        assert job.slot is not None and job.next_token is not None
        job.slot.tokens.append(job.next_token)
        self._take(job, scores, row)

    def _take(self, job: _Job, scores: Scores, row: int) -> None:
        """Choose the next token, and end where it ends the answer."""
        try:
            token, logprob = job.sampler.pick(scores, row)
            top = scores.top(row, job.request.top_logprobs)
            text = job.text.add(token)
        except Exception as error:
            self._end(job, error=error)
            return
        ends = self.model.generation_config.eos_token_id
        ends = ends if isinstance(ends, list) else [ends]
        reason = None
        if token in ends:
            reason = "end"
        elif job.text.stopped:
            reason = "stop"
        elif len(job.generation.tokens) + 1 >= job.request.max_new_tokens:
            reason = "length"
        if reason is not None:
            text += job.text.flush()
        job.generation.add(Token(token, logprob, text, time.perf_counter(), top))
        job.next_token = token
        if reason is not None:
            self._end(job, reason=reason)


def _counted(tokens: Sequence[int], image_token_id: int) -> list[int]:
    """Of each token: how many placeholders stand at or before it."""
    return list(itertools.accumulate(int(token == image_token_id) for token in tokens))
