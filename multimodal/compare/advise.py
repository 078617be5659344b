"""From a comparison's figures to a decision: which pipeline to use, for whom, at what cost, and how sure that is.

What always holds: a pipeline that breaks a constraint ranks last, whatever else it is good at; a control is never
recommended; a better score counts only where the paired test says so. It asks nobody anything: where an endpoint
stands is told, not guessed. What is said and how it is shown are in ``advice.py``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from multimodal.compare.advice import (
    ASSUMED,
    GIB,
    MEASURED,
    PUBLISHED,
    Advice,
    Constraints,
    Deployment,
    Fact,
    Line,
    Origin,
    gibibytes,
    money,
)
from multimodal.compare.assumptions import Assumptions
from multimodal.compare.ownership import DAYS, YEARS, Load, Ownership, crossings, ownership, sensitivity
from multimodal.compare.results import SHUFFLED
from multimodal.compare.summary import BLIND, Figures, Pair

CONTROLS = (BLIND, "blind_tuned", SHUFFLED)
SIGNIFICANT = 0.05
ENOUGH_EXAMPLES = 50  # with fewer, `multimodal adapt` has little to hold out
OF_A_MACHINE, READERS = ("picture", "ocr", "tags", "caption"), ("ocr", "tags", "caption")  # steps that are done here


@dataclass(frozen=True)
class _Candidate:
    figures: Figures
    load: Load | None
    cost: Ownership | None
    broken: tuple[str, ...]
    notes: tuple[str, ...]
    facts: Mapping[str, Fact] = field(default_factory=dict)
    remote: bool = False

    @property
    def name(self) -> str:
        return self.figures.pipeline

    @property
    def order(self) -> tuple[float, float, str]:
        """Cost, then latency; what is not known comes behind what is."""
        latency = self.figures.latency
        return (self.cost.total if self.cost else math.inf, latency.p99 if latency else math.inf, self.name)


def advise(
    figures: Sequence[Figures], pairs: Sequence[Pair], constraints: Constraints, assumptions: Assumptions, *, task: str,
    deployments: Mapping[str, Deployment],
) -> Advice:  # fmt: skip
    """Rank the pipelines of one task.

    Args:
        figures: As ``summarise`` has them; other tasks' are passed over.
        pairs: As ``pairs_of`` has them, corrected for all that was looked at.
        constraints: What a person allows.
        assumptions: As ``load_assumptions`` has them.
        task: Its name.
        deployments: Where each pipeline would run, by name; controls may be missing.

    Raises:
        ValueError: If nothing was measured on the task, a deployment is missing, or it names a machine or price that is
            not known.
    """
    mine = [each for each in figures if each.task == task]
    if not mine:
        known = ", ".join(dict.fromkeys(each.task for each in figures)) or "none"
        raise ValueError(f"nothing was measured on {task!r} (tasks of this run: {known})")
    if missing := [each.pipeline for each in mine if each.pipeline not in {*deployments, *CONTROLS}]:
        raise ValueError(f"it is not known where {', '.join(missing)} would run; give a Deployment for each")
    differences = {(pair.first, pair.second): pair for pair in pairs if pair.task == task}
    candidates = [
        _candidate(each, deployments.get(each.pipeline), constraints, assumptions, differences) for each in mine
    ]
    fit = _ranked([each for each in candidates if not each.broken], differences)
    rest = _ranked([each for each in candidates if each.broken], differences)
    rest.sort(key=lambda each: each.name in CONTROLS)
    lines = [
        Line(
            place,
            each.name,
            True,
            _reasons(each, fit, place, differences),
            each.notes,
            each.facts,
            each.cost,
            each.remote,
        )
        for place, each in enumerate(fit, 1)
    ]
    lines += [
        Line(len(candidates), each.name, False, each.broken, each.notes, each.facts, each.cost, each.remote)
        for each in rest
    ]
    advice = Advice(task, constraints, assumptions, tuple(lines), _suggestions(mine, fit, constraints))
    usable = [each for each in (*fit, *rest) if each.cost is not None and each.name not in CONTROLS]
    local = next((each.load for each in usable if not each.remote), None)
    remote = next((each.load for each in usable if each.remote), None)
    if local is None or remote is None:
        return advice
    return replace(
        advice, local=local, remote=remote, crossings=tuple(crossings(local, remote, assumptions)),
        swings=tuple(sensitivity(local, remote, constraints.daily_volume, assumptions)),
    )  # fmt: skip


def load_of(figures: Figures, deployment: Deployment, constraints: Constraints) -> Load | None:
    """What a call takes, from what was measured; None where too little was.

    What is done here before an endpoint elsewhere is asked (OCR, tags) takes a machine by its own seconds: those of the
    endpoint keep none of ours busy. A limit that the pipeline cannot keep even alone is left out, as no number of
    machines would keep it; :func:`advise` says so.
    """
    if figures.latency is None:
        return None
    p99 = figures.latency.p99
    keeps = constraints.latency is not None and p99 <= constraints.latency
    load = Load(
        figures.pipeline, deployment.remote, deployment.hardware, throughput=figures.throughput, p99=p99,
        prompt_tokens=figures.prompt_tokens, completion_tokens=figures.completion_tokens, price=deployment.price,
        limit=constraints.latency if keeps else None, concurrency=constraints.concurrency,
    )  # fmt: skip
    if deployment.price is None and deployment.remote:
        if figures.cost_per_1000 is None:
            return None
        load = replace(load, dollars_per_call=figures.cost_per_1000 / 1000)
    if deployment.remote:
        seconds = sum(figures.steps.get(step, 0.0) for step in OF_A_MACHINE)
        if seconds <= 0 or not any(step in figures.steps for step in READERS):
            return replace(load, hardware=None, throughput=None)
        return replace(load, throughput=1 / seconds)
    if not load.throughput:
        if figures.latency.p50 <= 0:
            return None
        return replace(load, throughput=1 / figures.latency.p50)
    return load


def _candidate(
    figures: Figures, given: Deployment | None, constraints: Constraints, assumptions: Assumptions,
    differences: Mapping[tuple[str, str], Pair],
) -> _Candidate:  # fmt: skip
    deployment = given or Deployment()  # a control that nobody would run has no cost
    load = load_of(figures, deployment, constraints) if given else None
    cost = None if load is None else ownership(load, constraints.daily_volume, assumptions)
    return _Candidate(
        figures, load, cost, _broken(figures, deployment, constraints, assumptions),
        _notes(figures, cost, constraints, differences), _facts(figures, load, cost, assumptions),
        deployment.remote,
    )  # fmt: skip


def _broken(
    figures: Figures, deployment: Deployment, constraints: Constraints, assumptions: Assumptions
) -> tuple[str, ...]:
    found, score, memory = [], figures.score, figures.peak_memory
    if figures.pipeline in CONTROLS:
        found.append("a control: it sees no picture, or the wrong one")
    if score is None:
        found.append("it answered nothing")
    elif constraints.min_accuracy is not None and score.value < constraints.min_accuracy:
        found.append(f"its score of {score.value:.3f} is below {constraints.min_accuracy:.3f}")
    if constraints.latency is not None and figures.latency is not None and figures.latency.p99 > constraints.latency:
        found.append(f"99 of 100 answers take up to {figures.latency.p99:.2f} s, more than {constraints.latency:.2f} s")
    if memory is not None and constraints.memory is not None and memory > constraints.memory:
        found.append(f"it takes {gibibytes(memory)} of memory, more than {gibibytes(constraints.memory)}")
    machine = assumptions.hardware.get(deployment.hardware)
    if memory is not None and machine is not None and memory > machine.memory.value * GIB and not deployment.remote:
        has = gibibytes(machine.memory.value * GIB)
        found.append(f"it takes {gibibytes(memory)} of memory, and {deployment.hardware} is assumed to have {has}")
    if deployment.remote and constraints.data_stays_here:
        found.append("it sends data to an endpoint elsewhere")
    if deployment.remote and constraints.audit:
        found.append("its endpoint may change the model at any time, so an answer cannot be reproduced for an audit")
    return tuple(found)


def _notes(
    figures: Figures, cost: Ownership | None, constraints: Constraints, differences: Mapping[tuple[str, str], Pair]
) -> tuple[str, ...]:
    notes, score = [], figures.score
    for control in (BLIND, "blind_tuned"):
        if figures.pipeline in CONTROLS or (against := _against(figures.pipeline, control, differences)) is None:
            continue
        value, p, detectable = against
        if not (p < SIGNIFICANT and value > 0):
            notes.append(
                f"the picture is not used, as far as this run can tell: {value:+.3f} over {control} (adjusted p = "
                f"{p:.2g}; a difference of {detectable:.3f} would have been found in four of five runs)"
            )
    if score is not None and figures.shuffled is not None and figures.shuffled.value >= score.low:
        notes.append(f"with other questions' pictures it scores {figures.shuffled.value:.3f}, about the same")
    if figures.errors:
        notes.append(f"{figures.errors} questions ended in an error and are in no figure")
    if constraints.memory is not None and figures.peak_memory is None:
        notes.append("its memory was not measured")
    if cost is None and figures.pipeline not in CONTROLS:
        notes.append("its cost is not known: no price or no time was measured")
    return tuple(notes)


def _facts(figures: Figures, load: Load | None, cost: Ownership | None, assumptions: Assumptions) -> dict[str, Fact]:
    facts = {}
    if figures.score is not None:
        facts["score"] = Fact(figures.score.value, "", (MEASURED,))
    if figures.latency is not None:
        facts["latency"] = Fact(figures.latency.p99, "s", (MEASURED,))
    if figures.peak_memory is not None:
        facts["memory"] = Fact(figures.peak_memory, "bytes", (MEASURED,))
    if load is None or cost is None:
        return facts
    if load.throughput is not None:
        told = load.throughput == figures.throughput
        facts["throughput"] = Fact(load.throughput, "answers/s", (MEASURED,) if told else (MEASURED, ASSUMED))
    paid: tuple[Origin, ...] = ()
    if cost.calls:
        paid = (MEASURED, PUBLISHED)
        one = ownership(replace(load, hardware=None), 1, assumptions).calls / (DAYS * YEARS)
        facts["price of a call"] = Fact(one, "USD", paid)
    facts["machines"] = Fact(cost.machines, "machines", (MEASURED, ASSUMED) if load.hardware else (ASSUMED,))
    measured: tuple[Origin, ...] = (MEASURED,) if paid or load.hardware else ()
    facts["cost"] = Fact(cost.total, "USD", (*measured, *paid[1:], ASSUMED))
    return facts


def _against(one: str, other: str, differences: Mapping[tuple[str, str], Pair]) -> tuple[float, float, float] | None:
    """How much the first is better, with the adjusted p and what could have been found; None if never compared."""
    sign, pair = 1, differences.get((one, other))
    if pair is None:
        sign, pair = -1, differences.get((other, one))
    if pair is None:
        return None
    return sign * pair.difference.value, pair.difference.adjusted_p, pair.difference.detectable


def _beats(one: str, other: str, differences: Mapping[tuple[str, str], Pair]) -> bool:
    against = _against(one, other, differences)
    return against is not None and against[0] > 0 and against[1] < SIGNIFICANT


def _ranked(candidates: Sequence[_Candidate], differences: Mapping[tuple[str, str], Pair]) -> list[_Candidate]:
    """Next comes the cheapest of those that none of the rest beats: "not significantly worse" is no order by itself."""
    left, ranked = list(candidates), []
    while left:
        unbeaten = [each for each in left if not any(_beats(other.name, each.name, differences) for other in left)]
        ranked.append(min(unbeaten or left, key=lambda each: each.order))
        left.remove(ranked[-1])
    return ranked


def _reasons(
    one: _Candidate, fit: Sequence[_Candidate], place: int, differences: Mapping[tuple[str, str], Pair]
) -> tuple[str, ...]:
    """What the first wins by against the second, and each other loses by against the first."""
    if len(fit) == 1:
        return ("the only one that fits",)
    other = fit[1] if place == 1 else fit[0]
    against = _against(one.name, other.name, differences)
    if against is None:
        found = [f"not compared with {other.name} on the same questions"]
    elif against[1] < SIGNIFICANT:
        return (f"{against[0]:+.3f} against {other.name} (adjusted p = {against[1]:.2g})", *_cheaper(one, other))
    else:
        found = [f"no significant difference from {other.name} ({against[0]:+.3f}, adjusted p = {against[1]:.2g})"]
    return (*found, *_cheaper(one, other))


def _cheaper(one: _Candidate, other: _Candidate) -> tuple[str, ...]:
    if one.cost is None or other.cost is None:
        return ()
    less = other.cost.total - one.cost.total
    if round(less) == 0:
        return ("at the same cost",)
    return (f"{money(abs(less))} {'cheaper' if less > 0 else 'dearer'} than {other.name} over {YEARS} years",)


def _suggestions(figures: Sequence[Figures], fit: Sequence[_Candidate], constraints: Constraints) -> tuple[str, ...]:
    found, names = [], [each.pipeline for each in figures if each.pipeline not in CONTROLS]
    trained = any(name.startswith("native") or name.endswith("_tuned") for name in names)
    if constraints.labelled_examples >= ENOUGH_EXAMPLES and not trained:
        found.append(
            f"you have {constraints.labelled_examples} labelled examples and no pipeline that learned from any: "
            "`multimodal adapt` makes an adapter from them in minutes; compare again with it"
        )
    if not fit:
        found.append("no pipeline fits: the reasons above name the constraint that each one breaks")
    return tuple(found)
