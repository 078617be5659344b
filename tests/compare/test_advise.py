"""Ranks, reasons and marks by hand; constraints that only ever cost; every mistake."""

import re
import xml.etree.ElementTree as ElementTree
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multimodal.compare.advice import GIB, Advice, Constraints, Deployment
from multimodal.compare.advise import CONTROLS, advise, load_of
from multimodal.compare.advise_command import render
from multimodal.compare.assumptions import load_assumptions, named
from multimodal.compare.ownership import break_even, ownership
from multimodal.compare.results import Results, Row
from multimodal.compare.statistics import Difference, Interval
from multimodal.compare.summary import Figures, Pair, Percentiles
from multimodal.pipelines.protocol import Answer, Step, Usage

T = TypeVar("T")
ASSUMED = load_assumptions()
HERE, ELSEWHERE = Deployment(), Deployment(remote=True, price="kimi-k2.6")
DEPLOYMENTS = {"native": HERE, "text_only": ELSEWHERE, "hosted": ELSEWHERE, "local_text": HERE}


def figures(name: str, score: float = 0.5, *, p99: float = 1.0, gib: float | None = 1.0, **more: object) -> Figures:
    given = {
        "latency": Percentiles(p99 / 2, p99 * 0.9, p99), "throughput": 2.0, "prompt_tokens": 400,
        "completion_tokens": 20, "peak_memory": None if gib is None else int(gib * GIB),
    }  # fmt: skip
    return Figures("slake", name, "exact", Interval(score, score - 0.05, score + 0.05, 100), **{**given, **more})


def pair(first: str, second: str, value: float, p: float) -> Pair:
    return Pair("slake", first, second, Difference(value, 0, 0, 100, None, None, p / 3, p, 0.07))


NATIVE = figures("native", 0.6)
TEXT = figures("text_only", 0.5, p99=4.0, steps={"ocr": 0.3, "tags": 0.1, "llm": 3.0})
HOSTED = figures("hosted", 0.7, p99=3.0, gib=0.2, steps={"picture": 0.01, "llm": 2.5})
BLIND = figures("blind", 0.4)
PAIRS = [
    pair("native", "text_only", 0.1, 0.01), pair("native", "hosted", -0.1, 0.02),
    pair("text_only", "hosted", -0.2, 0.001), pair("native", "blind", 0.2, 0.001),
    pair("blind", "text_only", -0.1, 0.2), pair("hosted", "blind", 0.3, 0.001),
]  # fmt: skip
ALL = [NATIVE, TEXT, HOSTED, BLIND]


def the(found: T | None) -> T:
    assert found is not None
    return found


def said(advice: Advice) -> Mapping[str, str]:
    return {line.pipeline: "; ".join((*line.reasons, *line.notes)) for line in advice.lines}


def choose(
    some: list[Figures] = ALL,
    pairs: list[Pair] = PAIRS,
    *,
    deployments: Mapping[str, Deployment] = DEPLOYMENTS,
    **limits: object,
) -> Advice:
    return advise(some, pairs, Constraints(**limits), ASSUMED, task="slake", deployments=deployments)


def test_the_significantly_better_one_comes_first() -> None:
    advice = choose()
    assert [line.pipeline for line in advice.lines] == ["hosted", "native", "text_only", "blind"]
    assert [line.rank for line in advice.lines] == [1, 2, 3, 4]
    assert advice.recommended == "hosted"
    assert "+0.100 against native (adjusted p = 0.02)" in said(advice)["hosted"]
    assert "-0.100 against hosted (adjusted p = 0.02)" in said(advice)["native"]


def test_without_a_significant_difference_the_cheaper_one_comes_first() -> None:
    advice = choose(pairs=[replace(each, difference=replace(each.difference, adjusted_p=0.06)) for each in PAIRS])
    fits = [line for line in advice.lines if line.fits]
    costs = [line.cost.total for line in fits if line.cost]
    assert len(costs) == 3 and costs == sorted(costs)
    assert "no significant difference from" in said(advice)[fits[0].pipeline]
    less = costs[1] - costs[0]
    assert f"${less:,.0f} cheaper than {fits[1].pipeline} over 3 years" in said(advice)[fits[0].pipeline]
    assert f"${less:,.0f} dearer than {fits[0].pipeline} over 3 years" in said(advice)[fits[1].pipeline]


def test_at_the_same_cost_the_faster_one_comes_first() -> None:
    slow, fast = figures("local_text", 0.6, p99=2.0), figures("native", 0.6, p99=1.0)
    advice = choose([slow, fast], [pair("local_text", "native", 0.0, 1.0)])
    assert [line.pipeline for line in advice.lines] == ["native", "local_text"]
    assert "at the same cost" in said(advice)["native"]


def test_no_difference_is_no_order() -> None:
    """A ties with B and B with C, C beats A: the cheapest comes first of those that nobody left beats."""
    deployments = {
        "a": HERE,
        "b": replace(HERE, hardware="gpu_server"),
        "c": replace(HERE, hardware="gpu_server"),
    }  # a is the cheapest
    some = [figures("a"), figures("b", throughput=3.0), figures("c", throughput=1.0)]
    pairs = [pair("a", "b", 0, 1), pair("b", "c", 0, 1), pair("c", "a", 0.3, 0.001)]
    assert [line.pipeline for line in choose(some, pairs, deployments=deployments).lines] == ["b", "c", "a"]
    circle = [pair("a", "b", 0.1, 0.01), pair("b", "c", 0.1, 0.01), pair("c", "a", 0.1, 0.01)]
    assert choose(some, circle, deployments=deployments).recommended == "a"


def test_those_never_compared_say_so() -> None:
    assert "not compared with" in said(choose(pairs=[]))["native"]


@pytest.mark.parametrize(
    ("limits", "broken"),
    [
        ({"data_stays_here": True}, {"text_only": "sends data to an endpoint", "hosted": "sends data to an endpoint"}),
        ({"audit": True}, {"text_only": "reproduced for an audit", "hosted": "reproduced for an audit"}),
        ({"latency": 3.5}, {"text_only": r"99 of 100 answers take up to 4\.00 s, more than 3\.50 s"}),
        ({"memory": GIB // 2}, {name: r"1\.00 GiB of memory, more than 0\.50 GiB" for name in ("native", "text_only")}),
        ({"min_accuracy": 0.55}, {"text_only": r"score of 0\.500 is below 0\.550"}),
    ],
)
def test_each_constraint(limits: Mapping[str, object], broken: Mapping[str, str]) -> None:
    advice = choose(**limits)
    fits = {line.pipeline: line.fits for line in advice.lines}
    assert {name for name, fine in fits.items() if not fine} == {*broken, "blind"}
    order = [line.fits for line in advice.lines]
    assert order == sorted(order, reverse=True)
    for name, reason in broken.items():
        assert re.search(reason, said(advice)[name])
    assert all(line.rank == 4 for line in advice.lines if not line.fits)
    assert advice.lines[-1].pipeline == "blind"  # behind the pipelines that break something


def test_a_machine_that_is_too_small() -> None:
    advice = choose([figures("native", gib=40)], [])
    assert "40.00 GiB of memory, and cpu_server is assumed to have 32.00 GiB" in said(advice)["native"]
    assert advice.recommended is None
    assert "no pipeline fits" in advice.to_markdown()
    roomy = choose([figures("native", gib=40)], [], deployments={"native": Deployment(hardware="gpu_server")})
    assert roomy.recommended == "native"
    assert roomy.lines[0].reasons == ("the only one that fits",)


def test_a_pipeline_that_answered_nothing() -> None:
    advice = choose([replace(NATIVE, score=None, latency=None, errors=9)], [])
    assert not advice.lines[0].fits and advice.lines[0].cost is None
    assert "it answered nothing" in said(advice)["native"]
    assert "9 questions ended in an error" in said(advice)["native"]
    assert "not known" in advice.table()


NAMES = ("native", "text_only", "hosted", "local_text")
SOME = st.fixed_dictionaries({name: st.tuples(st.floats(0, 1), st.floats(0.1, 5), st.floats(0.1, 8)) for name in NAMES})
P = st.sampled_from([0.001, 0.04, 0.3, 1.0])
LIMITS = {"data_stays_here": True, "audit": True, "memory": 4 * GIB, "min_accuracy": 0.5}


@settings(deadline=None)  # the machine may be busy
@given(
    some=SOME,
    p_values=st.lists(P, min_size=6, max_size=6),
    before=st.sets(st.sampled_from(sorted(LIMITS))),
    new=st.sampled_from(sorted(LIMITS)),
)
def test_a_constraint_never_improves_the_rank_of_one_that_breaks_it(
    some: Mapping[str, tuple[float, float, float]], p_values: list[float], before: set[str], new: str
) -> None:
    every = [figures(name, score, p99=p99, gib=gib) for name, (score, p99, gib) in some.items()] + [BLIND]
    names, p = list(some), iter(p_values)
    pairs = [
        pair(one, other, some[one][0] - some[other][0], next(p))
        for place, one in enumerate(names)
        for other in names[place + 1 :]
    ]
    ranks = [
        {
            line.pipeline: (line.rank, line.fits)
            for line in choose(every, pairs, **{key: LIMITS[key] for key in keys}).lines
        }
        for keys in (before, before | {new})
    ]
    for name, (rank, fits) in ranks[1].items():
        if not fits:
            assert rank >= ranks[0][name][0]
            assert rank == len(every)
        else:
            assert ranks[0][name][1]  # nothing fits because of a constraint


@settings(deadline=None)  # the machine may be busy
@given(some=SOME, limit=st.floats(0.1, 6), volume=st.integers(0, 10**6))
def test_what_is_recommended_keeps_the_limits(
    some: Mapping[str, tuple[float, float, float]], limit: float, volume: int
) -> None:
    every = [figures(name, score, p99=p99, gib=gib) for name, (score, p99, gib) in some.items()] + [BLIND]
    advice = choose(every, [], latency=limit, daily_volume=volume, data_stays_here=True)
    fine = {name for name in ("native", "local_text") if some[name][1] <= limit}
    assert {line.pipeline for line in advice.lines if line.fits} == fine
    assert (advice.recommended in fine) if fine else advice.recommended is None


@pytest.mark.parametrize("control", CONTROLS)
def test_a_control_is_never_recommended(control: str) -> None:
    best = figures(control, 0.99, p99=0.1)
    advice = choose([best, NATIVE], [pair(control, "native", 0.39, 0.0001)])
    assert advice.recommended == "native"
    assert "a control" in said(advice)[control]
    broken = choose([best, TEXT], [pair(control, "text_only", 0.49, 0.0001)], data_stays_here=True)
    assert [line.pipeline for line in broken.lines] == ["text_only", control]  # behind what a person could still choose


def test_the_picture_is_not_used() -> None:
    advice = choose()
    assert (
        "the picture is not used, as far as this run can tell: +0.100 over blind (adjusted p = 0.2; a difference of "
        in (said(advice)["text_only"])
    )
    assert "0.070 would have been found" in said(advice)["text_only"]
    assert "picture is not used" not in said(advice)["native"] + said(advice)["hosted"] + said(advice)["blind"]
    worse = choose([NATIVE, BLIND], [pair("native", "blind", -0.2, 0.001)])
    assert "the picture is not used" in said(worse)["native"]
    tuned = choose([NATIVE, figures("blind_tuned")], [pair("blind_tuned", "native", -0.01, 0.8)])
    assert "+0.010 over blind_tuned" in said(tuned)["native"]


def test_other_pictures_do_as_well() -> None:
    same = replace(NATIVE, shuffled=Interval(0.56, 0.5, 0.6, 100))
    worse = replace(NATIVE, shuffled=Interval(0.54, 0.5, 0.6, 100))
    assert "with other questions' pictures it scores 0.560" in said(choose([same], []))["native"]
    assert "other questions' pictures" not in said(choose([worse], []))["native"]


def test_every_number_has_its_mark() -> None:
    lines = {line.pipeline: line.facts for line in choose().lines}
    native, text, hosted = lines["native"], lines["text_only"], lines["hosted"]
    assert native["score"].origins == native["latency"].origins == native["memory"].origins == ("measured",)
    assert native["throughput"].value == 2.0 and native["throughput"].origins == ("measured",)
    assert native["cost"].origins == ("measured", "assumed") and "price of a call" not in native
    # 400 tokens read and 20 written at the prices of kimi-k2.6; OCR and tags take 0.4 s of a machine.
    price = ASSUMED.prices["kimi-k2.6"]
    assert text["price of a call"].value == pytest.approx((400 * price.input + 20 * price.output) / 1e6)
    assert text["price of a call"].origins == ("measured", "published price")
    assert text["throughput"].value == pytest.approx(2.5) and text["throughput"].origins == ("measured", "assumed")
    assert text["cost"].origins == ("measured", "published price", "assumed")
    assert text["machines"].value == 1 and hosted["machines"].value == 0  # no reader of pictures here: no machine
    assert set(lines["blind"]) == {"score", "latency", "memory"}  # nobody said where it would run: no cost


def test_the_load_of_a_pipeline() -> None:
    free = Constraints()
    assert the(load_of(NATIVE, HERE, free)).throughput == 2.0
    alone = load_of(replace(NATIVE, throughput=None, latency=Percentiles(0.25, 1, 2)), HERE, free)
    assert the(alone).throughput == 4.0  # one at a time, at the median
    assert load_of(replace(NATIVE, throughput=None, latency=Percentiles(0, 0, 0)), HERE, free) is None
    assert the(load_of(NATIVE, HERE, Constraints(latency=0.5))).limit is None  # no machine would help: said as a reason
    kept = the(load_of(NATIVE, HERE, Constraints(latency=2.0, concurrency=7)))
    assert (kept.limit, kept.concurrency) == (2.0, 7)
    told = the(load_of(replace(HOSTED, cost_per_1000=3.0), Deployment(remote=True), free))
    assert told.dollars_per_call == 0.003
    assert load_of(HOSTED, Deployment(remote=True), free) is None  # nobody knows the price


def test_an_unknown_price_is_said_and_comes_last_among_equals() -> None:
    advice = choose([HOSTED, NATIVE], [], deployments={"native": HERE, "hosted": Deployment(remote=True)})
    assert [line.pipeline for line in advice.lines] == ["native", "hosted"]
    assert "its cost is not known" in said(advice)["hosted"]
    assert "nothing to compare" in advice.to_markdown()


def test_memory_that_was_not_measured_is_said() -> None:
    advice = choose([figures("native", gib=None)], [], memory=GIB)
    assert advice.recommended == "native" and "memory was not measured" in said(advice)["native"]


@pytest.mark.parametrize(
    ("names", "examples", "expected"),
    [
        (["text_only", "blind"], 50, True),
        (["text_only", "blind_tuned"], 120, True),
        (["text_only"], 49, False),
        (["native"], 120, False),
        (["text_only_tuned"], 120, False),
    ],
)
def test_adapting_is_suggested(names: list[str], examples: int, expected: bool) -> None:
    deployments = {**DEPLOYMENTS, "text_only_tuned": HERE}
    advice = choose([figures(name) for name in names], [], deployments=deployments, labelled_examples=examples)
    assert any("`multimodal adapt`" in each for each in advice.suggestions) is expected
    assert ("`multimodal adapt`" in advice.to_markdown()) is expected
    assert ("multimodal adapt" in advice.to_html()) is expected


def test_the_break_even_is_between_the_best_here_and_the_best_elsewhere() -> None:
    advice = choose()
    here, there = the(advice.local), the(advice.remote)
    assert (here.name, there.name) == ("native", "hosted")
    even = break_even(here, there, ASSUMED)
    assert advice.crossings[0].volume == even
    assert f"above {even:,.0f} calls a day native is cheaper" in advice.to_markdown()
    moved = the(re.search(r"What moves that most.*: (.*)\.", advice.to_markdown())).group(1)
    assert re.findall(r"([\w.-]+) \(", moved) == [swing.name for swing in advice.swings[:3]]
    free = choose(deployments={**DEPLOYMENTS, "hosted": Deployment(remote=True, price="local")})
    assert "Break-even: none" in free.to_markdown()


def test_machines_for_a_limit_cost() -> None:
    loose, tight = choose(daily_volume=40_000), choose(daily_volume=40_000, latency=1.2)
    costs = [the(next(line.cost for line in each.lines if line.pipeline == "native")) for each in (loose, tight)]
    assert costs[0].machines < costs[1].machines and costs[0].total < costs[1].total


def test_the_table() -> None:
    advice = choose([replace(NATIVE, pipeline="a|b"), TEXT], [], deployments={**DEPLOYMENTS, "a|b": HERE}, latency=3.0)
    rows = advice.table().splitlines()
    assert len(rows) == 4 and all(len(re.findall(r"(?<!\\)\|", row)) == 10 for row in rows)
    cost = ownership(the(load_of(NATIVE, HERE, Constraints(latency=3.0))), 1000, ASSUMED).total
    assert rows[2].startswith(
        f"| 1 | a\\|b | yes | 0.600 (m) | 1.00 s (m) | 1.00 GiB (m) | 1 (m, a) | ${cost:,.0f} (m, a) |"
    )
    assert rows[3].startswith("| - | text_only | no | 0.500 (m) |")


def test_the_page_is_whole_and_needs_nothing_from_elsewhere() -> None:
    page = choose(
        [replace(NATIVE, pipeline="<native>"), TEXT], [], deployments={**DEPLOYMENTS, "<native>": HERE}
    ).to_html()
    ElementTree.fromstring(page)  # closed tags, escaped names
    assert page.count("<svg") == 2
    assert set(re.findall(r"https?://[^\s\"<]+", page)) <= {
        "http://www.w3.org/2000/svg",
        "http://www.w3.org/1999/xlink",
    }
    assert not re.search(r"<(script|link|img|iframe)|@import", page)
    assert "<svg" not in choose([NATIVE], []).to_html()


@pytest.mark.parametrize(
    ("limits", "message"),
    [
        ({"memory": 0}, r"memory is 0; give 1 or more"),
        ({"concurrency": 0}, r"concurrency is 0; give 1 or more"),
        ({"labelled_examples": -1}, r"labelled_examples is -1; give 0 or more"),
        ({"daily_volume": -5}, r"daily_volume is -5; give 0 or more"),
        ({"latency": 0}, r"latency is 0; give seconds"),
        ({"latency": float("inf")}, r"latency is inf; give seconds"),
        ({"min_accuracy": 60}, r"min_accuracy is 60; give a share, 0 to 1"),
    ],
)
def test_constraints_that_make_no_sense(limits: Mapping[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Constraints(**limits)


def test_mistakes() -> None:
    with pytest.raises(ValueError, match=r"not known where native, hosted would run; give a Deployment"):
        choose(deployments={"text_only": ELSEWHERE})
    with pytest.raises(ValueError, match=r"no machine 'abacus'"):
        choose([NATIVE], [], deployments={"native": Deployment(hardware="abacus")})
    with pytest.raises(ValueError, match=r"no price 'free'"):
        choose([HOSTED], [], deployments={"hosted": Deployment(remote=True, price="free")})
    with pytest.raises(ValueError, match=r"nothing was measured on 'rad' \(tasks of this run: slake\)"):
        advise(ALL, PAIRS, Constraints(), ASSUMED, task="rad", deployments=DEPLOYMENTS)


def run_of(folder: Path) -> Results:
    """Forty questions: here all are right, elsewhere and without the picture half of them."""
    rows = []
    for pipeline in ("native", "hosted", "blind"):
        for number in range(40):
            right = float(pipeline == "native" or number % 2)
            answer = Answer("yes", (Step("llm", 1.0),), Usage(300, 10), total=1.5)
            rows.append(
                Row(
                    "slake",
                    pipeline,
                    str(number),
                    "?",
                    "yes",
                    (folder / f"{number}.png",),
                    answer,
                    "",
                    {"exact": right},
                )
            )
    return Results(folder, "multimodal compare", tuple(rows), {"slake": "exact"}, throughput={("slake", "native"): 3.0})


def test_a_run_is_rendered(tmp_path: Path) -> None:
    mine = tmp_path / "mine.yaml"
    mine.write_text("labour: {rate: 123}")
    run, deployments = run_of(tmp_path), {"native": HERE, "hosted": ELSEWHERE}
    text = render(run, Constraints(), deployments=deployments, assumptions=mine)
    assert "## slake: use native" in text
    assert "+0.500 against hosted" in text
    assert "- labour.rate: 123 USD/hour (your file mine.yaml; not said)" in text
    assert "check them before you decide" in text
    assert [name for name in named(ASSUMED) if f"- {name}: " not in text] == []
    page = render(run, Constraints(), deployments=deployments, task="slake", form="html")
    assert page.startswith("<section") and page.count("<svg") == 2
    with pytest.raises(ValueError, match=r"no form 'pdf'; choose one of markdown, html"):
        render(run, Constraints(), deployments=deployments, form="pdf")
    with pytest.raises(ValueError, match=r"nothing was measured on 'rad'"):
        render(run, Constraints(), deployments=deployments, task="rad")


def test_the_files_of_the_guide_load(tmp_path: Path) -> None:
    """The example of a person's own file in docs/choosing.md is one that loads."""
    guide = (Path(__file__).parents[2] / "docs" / "choosing.md").read_text(encoding="utf-8")
    example = the(re.search(r"```yaml\n(.*?)```", guide, re.DOTALL)).group(1)
    (tmp_path / "mine.yaml").write_text(example)
    mine = load_assumptions(tmp_path / "mine.yaml")
    assert mine.labour.rate.value == 95 and mine.energy.electricity.source == "our bill"
    assert mine.hardware["workstation"].memory.value == 24 and mine.prices["contract"].output == 1.6
