"""What `multimodal advise` prints: a finished run and a person's constraints in, Markdown or an HTML fragment out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from multimodal.compare.advice import Constraints, Deployment
from multimodal.compare.advise import advise
from multimodal.compare.assumptions import Assumptions, load_assumptions, named
from multimodal.compare.results import Results
from multimodal.compare.summary import pairs_of, summarise

FORMATS = ("markdown", "html")


def render(
    results: Results, constraints: Constraints, *, deployments: Mapping[str, Deployment], task: str | None = None,
    assumptions: Path | None = None, form: str = "markdown",
) -> str:  # fmt: skip
    """Advice on each task of a run.

    Args:
        results: The run.
        constraints: What the person allows.
        deployments: Where each pipeline would run, by name.
        task: Only this one; None for all.
        assumptions: The person's own file; None for ours.
        form: ``"markdown"``, with every assumption and its source at the end, or ``"html"``: a fragment for a page.

    Raises:
        ValueError: As :func:`advise` and :func:`load_assumptions`, or if there is no such form.
    """
    if form not in FORMATS:
        raise ValueError(f"there is no form {form!r}; choose one of {', '.join(FORMATS)}")
    assumed, figures, pairs = load_assumptions(assumptions), summarise(results), pairs_of(results)
    advice = [
        advise(figures, pairs, constraints, assumed, task=name, deployments=deployments)
        for name in ([task] if task is not None else results.tasks)
    ]
    if form == "html":
        return "\n".join(each.to_html() for each in advice)
    listed = "\n".join(_sources(assumed))
    check = "Prices are those known to the authors on the date beside each: check them before you decide."
    return "\n".join([*(each.to_markdown() for each in advice), f"## Assumed\n\n{check}\n\n{listed}\n"])


def deployments_of(
    results: Results, *, hardware: str = "cpu_server", apis: Mapping[str, str] | None = None
) -> dict[str, Deployment]:
    """Where a run's pipelines would run: as they ran in it, or at an API.

    Args:
        results: The run.
        hardware: Kind of machine, of the assumptions, of what runs here.
        apis: Pipelines that would ask an API, and its name in the table of prices.

    Raises:
        ValueError: If the run has no such pipeline.
    """
    apis = apis or {}
    if unknown := sorted(set(apis) - set(results.pipelines)):
        raise ValueError(f"the run has no pipeline {', '.join(unknown)}: it has {', '.join(results.pipelines)}")
    return {
        name: Deployment(
            remote=name in apis or results.remote.get(name, False), price=apis.get(name), hardware=hardware
        )
        for name in results.pipelines
    }


def _sources(assumptions: Assumptions) -> list[str]:
    """One line of Markdown for each assumption: name, value, unit, source, date."""
    return [
        f"- {name}: {number.value:g} {number.unit} ({number.source}; {number.date})"
        for name, number in named(assumptions).items()
    ]
