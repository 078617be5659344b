"""Costs by hand, machines by hand, and where two pipelines cost the same."""

import math
import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from multimodal.compare.assumptions import Assumptions, changed, load_assumptions
from multimodal.compare.ownership import (
    Load,
    Swing,
    break_even,
    cost_plot,
    crossings,
    machines_needed,
    ownership,
    planned_utilisation,
    sensitivity,
    tornado,
    waiting_p99,
)

# Round numbers, so that every cost below can be worked out by hand.
ROUND = {
    "hardware.cpu_server.price": 1000, "hardware.cpu_server.power": 200, "hardware.cpu_server.idle_power": 100,
    "hardware.cpu_server.lifetime": 5, "energy.electricity": 0.5, "energy.overhead": 2, "labour.rate": 10,
    "labour.local_setup": 40, "labour.local_running": 2, "labour.api_setup": 10, "labour.api_running": 1,
    "hosting.machine": 5, "traffic.busy_hours": 10, "traffic.utilisation": 0.5, "traffic.cached_share": 0,
    "prices.kimi-k2.6.input": 2, "prices.kimi-k2.6.output": 10, "prices.kimi-k2.6.cached_input": 1,
}  # fmt: skip
LOCAL = Load("native", hardware="cpu_server", throughput=1.0, p99=2.0)
API = Load("hosted", remote=True, prompt_tokens=400, completion_tokens=20, price="kimi-k2.6")


def round_numbers() -> Assumptions:
    assumed = load_assumptions()
    for name, value in ROUND.items():
        assumed = changed(assumed, name, value)
    return assumed


ASSUMED = round_numbers()


def test_a_local_pipeline_by_hand() -> None:
    cost = ownership(LOCAL, 1000, ASSUMED)
    assert cost.machines == 1
    assert cost.hardware == 1000
    assert cost.hosting == 5 * 36
    idle = 0.1 * 2 * 8760 * 3 * 0.5  # kW, overhead, hours, dollars
    work = 1000 * 365 * 3 / 3600 * 0.1 * 2 * 0.5  # hours of work at 100 W more
    assert cost.energy == pytest.approx(idle + work)
    assert cost.labour == (40 + 2 * 36) * 10
    assert cost.calls == 0
    assert cost.total == pytest.approx(1000 + 180 + idle + work + 1120)


def test_an_api_by_hand() -> None:
    cost = ownership(API, 1000, ASSUMED)
    assert cost.machines == cost.hardware == cost.hosting == cost.energy == 0
    assert cost.labour == (10 + 36) * 10
    assert cost.calls == pytest.approx(1000 * 365 * 3 * (400 * 2 + 20 * 10) / 1e6)


def test_cached_prompts_are_billed_at_their_own_price() -> None:
    half = changed(ASSUMED, "traffic.cached_share", 0.5)
    assert ownership(API, 1, half).calls == pytest.approx(365 * 3 * (200 * 2 + 200 * 1 + 20 * 10) / 1e6)


def test_the_price_that_a_run_knows() -> None:
    assert ownership(Load("x", remote=True, dollars_per_call=0.25), 4, ASSUMED).calls == 365 * 3


@pytest.mark.parametrize(("lifetime", "times"), [(5, 1), (3, 1), (2.9, 2), (1.5, 2), (1, 3), (0.75, 4)])
def test_machines_are_replaced(lifetime: float, times: int) -> None:
    assumed = changed(ASSUMED, "hardware.cpu_server.lifetime", lifetime)
    assert ownership(LOCAL, 10, assumed).hardware == times * 1000


# One answer a second, half of that planned for, ten hours: 18 000 calls a day for a machine.
@pytest.mark.parametrize(
    ("volume", "machines"), [(0, 1), (1000, 1), (18_000, 1), (18_001, 2), (54_000, 3), (54_001, 4)]
)
def test_machines_for_a_volume(volume: int, machines: int) -> None:
    assert machines_needed(LOCAL, volume, ASSUMED) == machines
    assert ownership(LOCAL, volume, ASSUMED).hardware == machines * 1000


@pytest.mark.parametrize(("people", "machines"), [(1, 1), (4, 1), (5, 2), (12, 3), (13, 4)])
def test_machines_for_people_who_ask_at_once(people: int, machines: int) -> None:
    """Within four seconds a machine gives four answers."""
    assert machines_needed(replace(LOCAL, limit=4.0, concurrency=people), 10, ASSUMED) == machines
    assert machines_needed(replace(LOCAL, concurrency=people), 10, ASSUMED) == 1


def test_waiting_by_hand() -> None:
    assert waiting_p99(2.0, 0.5) == pytest.approx(math.log(50))
    assert waiting_p99(2.0, 0.01) == waiting_p99(2.0, 0.0) == 0
    assert waiting_p99(2.0, 1.0) == math.inf
    # The definition itself: one call in a hundred waits longer.
    assert 0.8 * math.exp(-3 * 0.2 * waiting_p99(3, 0.8)) == pytest.approx(0.01)


def test_a_limit_plans_for_less_of_a_machine() -> None:
    assert planned_utilisation(LOCAL, 0.5) == 0.5
    assert planned_utilisation(replace(LOCAL, limit=1000.0), 0.5) == 0.5
    tight = planned_utilisation(replace(LOCAL, limit=3.0), 0.5)
    assert waiting_p99(1.0, tight) == pytest.approx(1.0)  # 2 s for the answer, 1 s of waiting
    assert planned_utilisation(replace(LOCAL, limit=2.0), 0.5) == pytest.approx(0.01)  # no waiting at all
    assert machines_needed(replace(LOCAL, limit=3.0), 18_000, ASSUMED) > 1


def test_break_even_by_hand() -> None:
    """Here and there both are straight lines up to 18 000 calls a day."""
    fixed = ownership(LOCAL, 0, ASSUMED).total - ownership(API, 0, ASSUMED).total
    call = 3 * 365 * (0.001 - 0.1 * 2 * 0.5 / 3600)
    found = break_even(LOCAL, API, ASSUMED)
    assert found == pytest.approx(fixed / call)
    assert found == pytest.approx(break_even(API, LOCAL, ASSUMED))
    assert crossings(LOCAL, API, ASSUMED)[0].cheaper == "native"


def test_never() -> None:
    assert break_even(LOCAL, replace(API, price="local"), ASSUMED) is None
    assert break_even(API, API, ASSUMED) is None
    dear = replace(LOCAL, throughput=0.0001)  # thousands of machines: an API stays cheaper
    assert break_even(dear, API, ASSUMED) is None


def test_a_machine_more_may_turn_it_back() -> None:
    """Just above the volume of one machine the API is cheaper again, and later not."""
    assumed = changed(ASSUMED, "hardware.cpu_server.price", 9000)
    slow = replace(LOCAL, throughput=0.7)
    found = crossings(slow, API, assumed)
    assert [crossing.cheaper for crossing in found[:3]] == ["native", "hosted", "native"]
    assert [crossing.equal for crossing in found[:3]] == [True, False, True]
    assert found[1].volume == pytest.approx(0.7 * 0.5 * 36_000)


LOADS = st.builds(
    Load,
    name=st.just("one"),
    remote=st.booleans(),
    hardware=st.sampled_from(["cpu_server", "gpu_server", None]),
    throughput=st.floats(0.05, 20),
    p99=st.floats(0.1, 5),
    prompt_tokens=st.floats(0, 2000),
    completion_tokens=st.floats(0, 200),
    price=st.sampled_from(["local", "kimi-k2.6", "gpt-6-sol", None]),
    limit=st.sampled_from([None, 6.0, 30.0]),
    concurrency=st.integers(1, 20),
)


@settings(deadline=None)  # the machine may be busy
@given(load=LOADS, volume=st.floats(0, 1e6), more=st.floats(0, 1e6))
def test_cost_grows_with_volume(load: Load, volume: float, more: float) -> None:
    little, much = ownership(load, volume, ASSUMED), ownership(load, volume + more, ASSUMED)
    assert much.total >= little.total * (1 - 1e-12)
    assert much.machines >= little.machines
    assert little.labour == much.labour


@settings(deadline=None, max_examples=500)  # the machine may be busy; one pair in five or so crosses
@given(one=LOADS, other=LOADS)
def test_the_two_cost_the_same_where_they_cross(one: Load, other: Load) -> None:
    one = replace(one, name="first")

    def difference(volume: float) -> float:
        return ownership(one, volume, ASSUMED).total - ownership(other, volume, ASSUMED).total

    found = crossings(one, other, ASSUMED)
    assert break_even(one, other, ASSUMED) == (found[0].volume if found else None)
    for crossing in found[:5]:
        near, scale = 1e-5 * crossing.volume, ownership(one, crossing.volume, ASSUMED).total
        below, above = difference(crossing.volume - near), difference(crossing.volume + near)
        if crossing.equal:
            assert abs(min(below, above, key=abs)) <= 1e-3 * scale
        else:  # a machine more is what turns it
            assert machines_needed(one, crossing.volume - near, ASSUMED) != machines_needed(
                one, crossing.volume + near, ASSUMED
            ) or machines_needed(other, crossing.volume - near, ASSUMED) != machines_needed(
                other, crossing.volume + near, ASSUMED
            )


@settings(deadline=None)  # the machine may be busy
@given(one=LOADS, other=LOADS, volumes=st.lists(st.floats(1, 1e6), min_size=2, max_size=2))
def test_the_cheaper_changes_only_where_it_is_said(one: Load, other: Load, volumes: list[float]) -> None:
    low, high = sorted(volumes)
    signs = []
    for volume in (low, high):
        costs = [ownership(load, volume, ASSUMED).total for load in (one, other)]
        assume(abs(costs[0] - costs[1]) > 1e-6 * max(costs))
        signs.append(costs[0] > costs[1])
    between = [crossing for crossing in crossings(one, other, ASSUMED) if low <= crossing.volume <= high]
    assert (len(between) % 2 == 1) == (signs[0] != signs[1])


def test_sensitivity_by_hand() -> None:
    swings = sensitivity(LOCAL, API, 1000, ASSUMED)
    by_name = {swing.name: swing for swing in swings}
    base = ownership(LOCAL, 1000, ASSUMED).total - ownership(API, 1000, ASSUMED).total
    assert all(swing.base == pytest.approx(base) for swing in swings)
    hardware = by_name["hardware.cpu_server.price"]
    assert (hardware.low, hardware.high) == (pytest.approx(base - 500), pytest.approx(base + 500))
    read = by_name["prices.kimi-k2.6.input"]  # dearer calls make the difference smaller
    assert (read.low, read.high) == (pytest.approx(base + 438), pytest.approx(base - 438))
    assert by_name["hardware.cpu_server.lifetime"].low == pytest.approx(base + 1000)  # 2.5 years: bought twice
    assert [swing.width for swing in swings] == sorted((swing.width for swing in swings), reverse=True)
    assert not [name for name in by_name if "gpu_server" in name or "gpt" in name]  # what neither uses moves nothing
    # Energy is most of it here: both halve, or raise by half, 1314 dollars of idling and what work adds.
    assert {swing.name for swing in swings[:2]} == {"energy.electricity", "energy.overhead"}


def test_sensitivity_to_the_price_that_a_run_knows() -> None:
    paid = Load("x", remote=True, dollars_per_call=0.001)
    swing = next(each for each in sensitivity(LOCAL, paid, 1000, ASSUMED) if each.name.startswith("price of a call"))
    assert swing.high - swing.base == pytest.approx(-0.5 * 1095)


def test_plots_are_whole_and_say_their_units() -> None:
    even = break_even(LOCAL, API, ASSUMED)
    cost = cost_plot(LOCAL, API, 1000, ASSUMED)
    swings = sensitivity(LOCAL, API, 1000, ASSUMED)
    bars = tornado(swings, "native", "hosted", most=3)
    for text in (cost, bars):
        assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
        assert "US dollars" in text
        assert "<style" not in text and "http://matplotlib" not in text and "<image" not in text
    assert f"break-even: {even:,.0f} a day" in cost
    assert "calls a day" in cost and "your volume: 1,000 a day" in cost and "native" in cost
    assert [swing.name in bars for swing in swings[:4]] == [True, True, True, False]
    assert cost == cost_plot(LOCAL, API, 1000, ASSUMED)  # the same every time


def test_two_plots_share_no_id() -> None:
    texts = (
        cost_plot(LOCAL, API, 1000, ASSUMED),
        tornado(sensitivity(LOCAL, API, 1000, ASSUMED), "native", "hosted"),
    )
    ids = [{each.get("id") for each in ElementTree.fromstring(text).iter()} - {None} for text in texts]
    assert ids[0] and not ids[0] & ids[1]


def test_a_plot_without_a_break_even_marks_none() -> None:
    assert "break-even" not in cost_plot(LOCAL, replace(API, price="local"), 0, ASSUMED)


def test_the_width_of_a_swing_counts_the_base() -> None:
    assert Swing("x", base=0.0, low=3.0, high=5.0).width == 5.0


@pytest.mark.parametrize(
    ("load", "volume", "message"),
    [
        (LOCAL, -1, r"a daily volume of -1 calls is less than nothing"),
        (replace(LOCAL, hardware="abacus"), 1, r"no machine 'abacus' \(known: cpu_server, gpu_server\); add it under"),
        (replace(API, price="gpt"), 1, r"no price 'gpt' \(known: local, .*\); add it under 'prices:'"),
        (replace(LOCAL, throughput=None), 1, r"native runs on cpu_server, but its throughput is None: measure"),
        (replace(LOCAL, throughput=0), 1, r"its throughput is 0: measure"),
        (replace(LOCAL, limit=1.5), 1, r"native takes 2 s \(p99\) .* limit of 1\.5 s: no number of machines helps"),
    ],
)
def test_mistakes(load: Load, volume: float, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ownership(load, volume, ASSUMED)


def test_nothing_to_draw() -> None:
    with pytest.raises(ValueError, match=r"no assumption moves the difference"):
        tornado(sensitivity(API, API, 10, ASSUMED), "hosted", "hosted")
