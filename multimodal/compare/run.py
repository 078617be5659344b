"""Running a comparison: every pipeline answers every task's questions, on inspect-ai.

inspect-ai carries tasks, concurrency and logs (``inspect view --log-dir RUN/logs``). What is ours: answers that survive
a kill (``store.py``), errors that count neither as right nor as wrong, a spending cap, the controls, and what is
measured beside. One pipeline answers one task at a time, so that none takes another's cores.
"""

from __future__ import annotations

import asyncio
import hashlib
import importlib.metadata
import os
import platform
import random
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cache, lru_cache
from pathlib import Path
from tempfile import TemporaryDirectory

from tqdm import tqdm

from multimodal.compare.energy import measured_energy
from multimodal.compare.results import SHUFFLED, Results
from multimodal.compare.scores import Judge, scores_of
from multimodal.compare.store import Key, Record, Store, read_results
from multimodal.compare.tasks import Task, make_task
from multimodal.data import DataError, Sample, report_bad
from multimodal.data.controls import shuffle_images
from multimodal.images import ImageError
from multimodal.journal import JournalError
from multimodal.pipelines import Answer, Parts, Pipeline, PipelineError, PipelineSettings, Question, make_pipelines
from multimodal.pipelines.patience import patiently

SAME = ("tasks", "split", "limit", "seed", "shuffled")  # what a run keeps when it goes on
SHUFFLED_MOST = 200  # questions: a control that says whether a pipeline looks needs no more, and costs as much a call
AHEAD = 3  # questions that wait for their turn while answers are written down
WAKING = 0.1  # seconds after which the one who waits for a run looks for an interruption
DEFAULT_PIPELINES = ("native", "text_only", "blind")


class BudgetError(RuntimeError):
    """The run would cost more than it may; what is done is kept."""


@dataclass(frozen=True)
class CompareSettings:
    """A comparison.

    Attributes:
        output: Its folder.
        tasks: As :func:`~multimodal.compare.tasks.make_task` takes them.
        pipelines: As :func:`~multimodal.pipelines.make_pipelines` takes them.
        made_of: What pipelines are made of.
        root: Folder that data sets are in.
        split: Which split.
        limit: Draw at most so many questions of each task.
        seed: Of that draw, and of the shuffled pictures.
        concurrency: Questions at a time. Seconds are honest at 1; more is for throughput.
        shuffled: Also ask each pipeline that uses pictures about those of other questions, 200 of a task at most.
        tries: How often a question is asked while an endpoint is busy or away.
        retry_errors: Ask again what ended in an error before.
        max_cost: US dollars that the run may cost in all; None for no limit.
        judge: Endpoint of a judge, a URL or a provider's name; empty for none.
        judge_model: What it calls the model.
        memory: Also measure what each pipeline takes of memory, in a process of its own.
        skip_bad: Leave out rows that cannot be read, and list them.
        command: What made it, for the report; None says how the command line would.
    """

    output: Path
    tasks: Sequence[str]
    pipelines: Sequence[str] = DEFAULT_PIPELINES
    made_of: PipelineSettings = field(default_factory=PipelineSettings)
    root: Path = Path()
    split: str = "validation"
    limit: int | None = None
    seed: int = 0
    concurrency: int = 1
    shuffled: bool = True
    tries: int = 4
    retry_errors: bool = False
    max_cost: float | None = None
    judge: str = ""
    judge_model: str = ""
    memory: bool = True
    skip_bad: bool = False
    command: str | None = None


def compare(
    settings: CompareSettings,
    *,
    progress: bool = True,
    make: Callable[[Sequence[str], Parts], list[Pipeline]] = make_pipelines,
) -> Results:
    """Run a comparison, or go on with what its folder holds. It may be called where an event loop runs (Jupyter).

    Args:
        settings: The comparison.
        progress: Show a bar for each pipeline and task.
        make: Makes the pipelines; on a cluster others than :func:`~multimodal.pipelines.make_pipelines` does.

    Raises:
        DataError: If a data set cannot be read.
        PipelineError: If a pipeline cannot be made.
        BudgetError: If the spending cap is reached.
        ValueError: If the folder holds another comparison, or another process uses it.
        JournalError: If the disk is full.
    """
    bad: list[DataError] | None = [] if settings.skip_bad else None
    tasks = [
        make_task(
            name, root=settings.root, split=settings.split, limit=settings.limit, seed=settings.seed, skip_bad=bad
        )
        for name in settings.tasks
    ]
    if bad:
        print(report_bad(bad))
    called = [task.name for task in tasks]
    if twice := sorted({name for name in called if called.count(name) > 1}):
        raise ValueError(f"two tasks are called {', '.join(twice)}: give one of the files another name")
    store = Store(settings.output.expanduser())
    made_of = settings.made_of
    if made_of.readings is None:
        made_of = replace(made_of, readings=store.folder / "readings")
    with store.alone(), Parts(made_of) as parts:
        pipelines = make(settings.pipelines, parts)
        judge = Judge(parts.endpoint(settings.judge, settings.judge_model)) if settings.judge else None
        controls = ["", SHUFFLED] if settings.shuffled else [""]
        _note(store, settings, tasks, pipelines, controls)
        run = _Run(settings, store, judge, progress)
        for task in tasks:
            for pipeline in pipelines:
                for control in controls:
                    if not control or getattr(pipeline, "uses_pictures", True):
                        run.group(task, pipeline, control)
    if settings.memory:
        _measure_memory(store, settings, made_of, [each.name for each in pipelines])
    return read_results(store.folder)


class _Run:
    """What is done so far, and what may still be spent."""

    def __init__(self, settings: CompareSettings, store: Store, judge: Judge | None, progress: bool) -> None:
        self.settings, self.store, self.judge, self.progress = settings, store, judge, progress
        self.records = store.records()
        self.spent = sum(each.cost for each in self.records.values())
        self.fatal: BaseException | None = None
        self.over = threading.Event()  # nothing more is asked
        self.judging = 0.0  # seconds that the judge has taken
        self._lock = threading.Lock()

    def group(self, task: Task, pipeline: Pipeline, control: str) -> None:
        """Have one pipeline answer one task."""
        samples = list(task.samples)
        if control == SHUFFLED:
            chance = random.Random(f"{self.settings.seed}/{task.name}")
            some = sorted(chance.sample(range(len(samples)), min(len(samples), SHUFFLED_MOST)))
            mixed = shuffle_images(samples, seed=self.settings.seed)
            samples = [mixed[place] for place in some]
        keys = [Key(task.name, pipeline.name, control, sample.id) for sample in samples]
        digests = [_digest(pipeline, sample, task) for sample in samples]
        left = {key for key, digest in zip(keys, digests, strict=True) if not self._is_done(key, digest)}
        new = {key for key, digest in zip(keys, digests, strict=True) if key in left and not self._kept(key, digest)}
        if not left:
            return
        _load_inspect()
        getattr(pipeline, "prepare", lambda: None)()  # loading is nobody's answer
        getattr(pipeline, "forget", lambda: None)()
        name = f"{task.name} {pipeline.name}{f' ({control})' if control else ''}"
        bar = tqdm(total=len(samples), initial=len(samples) - len(left), desc=name, disable=not self.progress)
        by_id = {sample.id: (sample, key, digest) for sample, key, digest in zip(samples, keys, digests, strict=True)}

        def answer(id_: str) -> Answer:
            sample, key, digest = by_id[id_]
            if key not in left:
                record = self.records[key]
                if record.answer is None:
                    raise PipelineError(record.error)
                return replace(record.answer, cached=True)
            try:
                return self._ask(task, pipeline, sample, key, digest)
            finally:
                bar.update()

        started, judged = time.perf_counter(), self.judging
        with bar, measured_energy(elsewhere=bool(_elsewhere(pipeline))) as energy:
            _evaluate(task, samples, name, answer, self)
        seconds = time.perf_counter() - started - (self.judging - judged) / self.settings.concurrency
        if self.fatal is not None:
            raise self.fatal
        failed = [self.records[key].error for key in left if self.records[key].answer and self.records[key].error]
        if failed:
            print(f"{name}: {failed[0]} ({len(failed)} answers): --retry-errors has them judged again")
        fresh = [self.records[key].answer for key in keys if key in new]
        # A picture that another pipeline had read before was not read again: what it took then counts.
        kept = sum(step.seconds for each in fresh if each is not None for step in each.steps
                   if not step.cached and step.details.get("kept"))  # fmt: skip
        self.store.add_group(
            task=task.name, pipeline=pipeline.name, control=control, seconds=seconds + kept, wall=seconds,
            answers=sum(each is not None for each in fresh), watt_hours=energy.watt_hours,
            model_seconds=sum(each.total for each in fresh if each is not None) - kept,
        )  # fmt: skip

    def _is_done(self, key: Key, digest: str) -> bool:
        record = self.records.get(key)
        if record is None or record.digest != digest:
            return False
        if record.error:
            return not self.settings.retry_errors
        return self.judge is None or record.judged is not None

    def _kept(self, key: Key, digest: str) -> Answer | None:
        """An answer that only the judge has not seen yet."""
        record = self.records.get(key)
        return None if record is None or record.digest != digest else record.answer

    def _ask(self, task: Task, pipeline: Pipeline, sample: Sample, key: Key, digest: str) -> Answer:
        if self.fatal is not None:
            raise self.fatal
        try:
            self._check_budget()
            answer, record = self._kept(key, digest), Record(digest, images=_shown(sample, key.control))
            if answer is None:
                question = Question(sample.question, tuple(sample.images), max_new_tokens=task.max_new_tokens)
                try:
                    answer = patiently(lambda: pipeline.answer(question), tries=self.settings.tries, pause=self._pause)
                except _FATAL:
                    raise
                except Exception as error:
                    self._keep(key, replace(record, error=message_of(error)))
                    raise
                self._keep(key, replace(record, answer=answer))
                self._pay(answer.cost)
            if self.judge is not None:
                self._keep(key, self._judged(self.judge, sample, answer, record))
            return answer
        except _FATAL as error:
            self.fatal = error
            raise

    def _judged(self, judge: Judge, sample: Sample, answer: Answer, record: Record) -> Record:
        """An answer with what the judge says of it; where it fails, the answer is kept."""
        started = time.perf_counter()
        try:
            said = patiently(
                lambda: judge.score(sample.question, answer.text, sample.answer),
                tries=self.settings.tries,
                pause=self._pause,
            )
            self._pay(said.cost)
            return replace(record, answer=answer, judged=said.score, judge_cost=said.cost or 0.0)
        except PipelineError as error:
            return replace(record, answer=answer, error=message_of(error))
        finally:
            with self._lock:
                self.judging += time.perf_counter() - started

    def _keep(self, key: Key, record: Record) -> None:
        self.store.add(key, record)
        with self._lock:
            self.records[key] = record

    def _pay(self, cost: float | None) -> None:
        with self._lock:
            self.spent += cost or 0.0

    def _check_budget(self) -> None:
        most = self.settings.max_cost
        if most is not None and self.spent >= most:
            raise BudgetError(
                f"{self.spent:.4f} of {most:.4f} dollars are spent: the answers so far are kept; raise --max-cost, and "
                "the same command goes on"
            )

    def _pause(self, seconds: float) -> None:
        """Wait, unless the run is over meanwhile."""
        if self.over.wait(seconds) and self.fatal is not None:
            raise self.fatal


_FATAL = (BudgetError, JournalError, KeyboardInterrupt)


def message_of(error: Exception) -> str:
    """What an error says, in one line, with its kind where the message is not one of ours."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if isinstance(error, PipelineError | ImageError) else f"{type(error).__name__}: {text}"


@cache
def _load_inspect() -> None:
    """Have inspect-ai read all of itself. Half of it comes with a first question only, which then waits for seconds."""
    os.environ.setdefault("INSPECT_DISABLE_MODEL_API", "1")
    # It also traces into a file in the home folder, and complains in tracebacks where that is full.
    os.environ.setdefault("INSPECT_TRACE_LEVEL", "CRITICAL")
    import inspect_ai
    from inspect_ai.dataset import Sample as InspectSample

    nothing = inspect_ai.Task(dataset=[InspectSample(input="nothing")], solver=[], name="nothing")
    # Where its log cannot be written it has read itself all the same.
    with suppress(OSError), TemporaryDirectory() as logs, ThreadPoolExecutor(1, thread_name_prefix="inspect") as thread:
        thread.submit(inspect_ai.eval, nothing, model=None, log_dir=logs, log_realtime=False, display="log").result()


def _evaluate(task: Task, samples: Sequence[Sample], name: str, answer: Callable[[str], Answer], run: _Run) -> None:
    """Let inspect-ai run the questions; what goes wrong with one of them is in its log."""
    from inspect_ai import Task as InspectTask
    from inspect_ai import eval as inspect_eval
    from inspect_ai.dataset import MemoryDataset
    from inspect_ai.dataset import Sample as InspectSample
    from inspect_ai.model import ModelOutput
    from inspect_ai.scorer import Score, Scorer, Target, mean, scorer
    from inspect_ai.solver import Generate, Solver, TaskState, solver

    settings = run.settings
    pool = ThreadPoolExecutor(settings.concurrency, thread_name_prefix="compare")

    @solver(name="pipeline")
    def answering() -> Solver:
        async def solve(state: TaskState, generate: Generate) -> TaskState:
            found = await asyncio.get_running_loop().run_in_executor(pool, answer, str(state.sample_id))
            state.output = ModelOutput.from_content(name, found.text)
            state.metadata["answer"] = found.to_dict()
            state.completed = True
            return state

        return solve

    @scorer(metrics={"*": [mean()]}, name="scores")
    def scoring() -> Scorer:
        async def score(state: TaskState, target: Target) -> Score:
            text = state.output.completion
            return Score(value=dict(scores_of(text, target.text, metric=task.metric)), answer=text)

        return score

    dataset = [
        InspectSample(
            id=sample.id,
            input=sample.question,
            target=sample.answer,
            metadata={**sample.meta, "images": [str(path) for path in sample.images]},
        )
        for sample in samples
    ]
    inspect_task = InspectTask(
        dataset=MemoryDataset(dataset), solver=answering(), scorer=scoring(), name=re.sub(r"[^\w.-]+", "-", name)
    )
    # In a thread: where an event loop runs already, as in Jupyter, a second one cannot begin.
    with pool, ThreadPoolExecutor(1, thread_name_prefix="inspect") as thread:
        done = thread.submit(
            inspect_eval,
            inspect_task,
            model=None,
            log_dir=str(run.store.folder / "logs"),
            log_images=False,
            log_realtime=False,
            display="log",  # says nothing at its level, and unlike "none" draws no widget in Jupyter
            # The pool alone says how many are answered at a time; what inspect-ai notes of one goes on beside the next.
            max_samples=settings.concurrency + AHEAD,
            fail_on_error=False,
            score_display=False,
        )
        try:
            while not wait(
                [done], timeout=WAKING
            ).done:  # Ctrl-C may reach another thread, and waits for this one to wake
                pass
            done.result()
        except KeyboardInterrupt:
            run.fatal = KeyboardInterrupt("interrupted: the same command goes on where it stopped")
            run.over.set()
            done.exception()  # what runs ends first
            raise run.fatal from None
        except BaseException as error:  # inspect-ai's own: its log cannot be written, or what was raised in it
            if run.fatal is not None:
                raise run.fatal from None
            if isinstance(error, OSError):
                logs = run.store.folder / "logs"
                raise JournalError(
                    f"{logs} cannot be written ({error.strerror or error}): make room, then start the same command "
                    "again"
                ) from None
            raise


def _digest(pipeline: Pipeline, sample: Sample, task: Task) -> str:
    """Tells what was asked by its content: the same picture in another place is the same question."""
    pictures = [_content(path) for path in sample.images]
    asked = [pipeline.digest, sample.question, pictures, task.max_new_tokens]
    return hashlib.sha256(repr(asked).encode()).hexdigest()[:16]


def _shown(sample: Sample, control: str) -> tuple[str, ...]:
    """The pictures that are not the question's own."""
    return tuple(map(str, sample.images)) if control == SHUFFLED else ()


@lru_cache(maxsize=4096)
def _content(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:  # whoever answers will say so
        return str(path)


def _note(
    store: Store, settings: CompareSettings, tasks: Sequence[Task], pipelines: Sequence[Pipeline], controls: list[str]
) -> None:
    """Write down what the run is; pipelines may be added to one that is there.

    Raises:
        ValueError: If the folder holds another comparison.
    """
    said = asdict(settings)
    made_of = {key: value for key, value in said.pop("made_of").items() if key not in ("prices", "readings")}
    chosen = {key: str(value) if isinstance(value, Path) else value for key, value in {**said, **made_of}.items()}
    chosen = {key: value for key, value in chosen.items() if value not in (None, "", False, {}, [])}
    chosen["tasks"], chosen["pipelines"] = list(settings.tasks), list(settings.pipelines)
    chosen = {key: str(value) if isinstance(value, dict) else value for key, value in chosen.items()}
    before = store.noted()
    names = [pipeline.name for pipeline in pipelines]
    remote = {pipeline.name: bool(getattr(pipeline, "remote", False)) for pipeline in pipelines}
    if before is not None:
        differing = [key for key in SAME if before["settings"].get(key) != chosen.get(key)]
        if differing:
            changes = "; ".join(f"{key} was {before['settings'].get(key)}, is {chosen.get(key)}" for key in differing)
            raise ValueError(f"{store.folder} holds another comparison ({changes}): give another folder")
        remote = {**before["remote"], **remote}
        names = [*before["pipelines"], *(name for name in names if name not in before["pipelines"])]
    store.note(
        {
            "command": settings.command or command_of(settings),
            "settings": chosen,
            "machine": _machine(pipelines),
            "controls": controls,
            "pipelines": names,
            "remote": remote,
            "tasks": [
                {
                    "name": task.name,
                    "metric": task.metric,
                    "questions": [
                        {
                            "id": sample.id,
                            "question": sample.question,
                            "target": sample.answer,
                            "images": [str(path) for path in sample.images],
                            "meta": dict(sample.meta),
                        }
                        for sample in task.samples
                    ],
                }
                for task in tasks
            ],
        }
    )


def command_of(settings: CompareSettings) -> str:
    """The command line of a comparison."""
    import shlex

    parts = ["multimodal compare", f"--tasks {','.join(settings.tasks)}", f"--pipelines {','.join(settings.pipelines)}"]
    parts += [] if settings.limit is None else [f"--limit {settings.limit}"]
    parts += [f"--seed {settings.seed}"] if settings.seed else []
    return " ".join([*parts, f"--output {shlex.quote(str(settings.output))}"])


def _elsewhere(pipeline: Pipeline) -> str:
    """Where a pipeline's answers are computed; empty for this machine, and for an endpoint."""
    return getattr(pipeline, "elsewhere", "")


def _machine(pipelines: Sequence[Pipeline]) -> dict[str, str]:
    cpu = platform.processor() or platform.machine()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        cpu = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), cpu)
    except OSError:
        pass
    versions = {
        name: importlib.metadata.version(name) for name in ("multimodal", "torch", "transformers", "inspect-ai")
    }
    places = ", ".join(sorted({*map(_elsewhere, pipelines)} - {""}))
    answered_by = {"answered by": places} if places else {}
    return {"cpu": cpu, "cores": str(os.cpu_count()), **answered_by, "python": platform.python_version(), **versions}


def _measure_memory(store: Store, settings: CompareSettings, made_of: PipelineSettings, names: Sequence[str]) -> None:
    from multimodal.compare.memory import peak_memory

    noted = store.noted() or {}
    known = {group["pipeline"] for group in store.groups() if "peak_memory" in group}
    question = noted["tasks"][0]["questions"][0]
    for name, pipeline in zip(names, settings.pipelines, strict=True):
        if name not in known:
            peak = peak_memory(pipeline, made_of, question["question"], question["images"])
            if peak is not None:
                store.add_group(pipeline=name, peak_memory=peak)
