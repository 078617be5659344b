"""Ours load and are complete; a person's file replaces single values; every mistake in it has one clear message."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from multimodal.compare.assumptions import FILE, Number, changed, load_assumptions, named

OURS = load_assumptions()


def written(folder: Path, text: str) -> Path:
    path = folder / "mine.yaml"
    path.write_text(text, encoding="utf-8")
    return path


def test_every_number_of_ours_says_where_it_is_from() -> None:
    numbers = named(OURS)
    text = FILE.read_text(encoding="utf-8")
    assert len(numbers) == text.count("{value: ") + 3 * text.count("{input: ")  # nothing in the file is dropped
    for name, number in numbers.items():
        assert number.source and number.unit, name
        assert re.fullmatch(r"202\d-\d\d(-\d\d)?", number.date), name


def test_prices_of_others_are_to_be_checked_and_a_local_endpoint_is_free() -> None:
    local = OURS.prices["local"]
    assert (local.input, local.output, local.cached_input) == (0, 0, 0)
    others = [price for name, price in OURS.prices.items() if name != "local"]
    assert len(others) >= 4
    assert all("check before you decide" in price.source for price in others)
    assert all(0 < price.cached_input <= price.input <= price.output for price in others)


def test_a_number_alone_replaces_the_value_and_is_no_longer_ours(tmp_path: Path) -> None:
    mine = load_assumptions(written(tmp_path, "labour: {rate: 95}\n"))
    assert mine.labour.rate == Number(95.0, "USD/hour", "your file mine.yaml", "not said")
    assert {name for name, number in named(mine).items() if number != named(OURS)[name]} == {"labour.rate"}


def test_a_number_may_say_its_source_and_date(tmp_path: Path) -> None:
    text = "energy:\n  electricity: {value: 0.31, unit: USD/kWh, source: our bill, date: 2026-10-01}\n"
    assert load_assumptions(written(tmp_path, text)).energy.electricity == Number(
        0.31, "USD/kWh", "our bill", "2026-10-01"
    )


def test_a_source_alone_leaves_the_value(tmp_path: Path) -> None:
    mine = load_assumptions(written(tmp_path, "labour: {rate: {source: checked}}"))
    assert mine.labour.rate == Number(OURS.labour.rate.value, "USD/hour", "checked", OURS.labour.rate.date)


def test_one_number_of_a_machine_and_of_a_price(tmp_path: Path) -> None:
    text = "hardware: {cpu_server: {power: 99}}\nprices: {kimi-k2.6: {input: 0.5}}\n"
    mine = load_assumptions(written(tmp_path, text))
    assert mine.hardware["cpu_server"].power.value == 99
    assert mine.hardware["cpu_server"].price == OURS.hardware["cpu_server"].price
    price = mine.prices["kimi-k2.6"]
    assert (price.input, price.output) == (0.5, OURS.prices["kimi-k2.6"].output)
    assert price.source == "your file mine.yaml"


def test_a_machine_and_a_price_of_ones_own(tmp_path: Path) -> None:
    text = """
hardware:
  laptop: {price: 900, power: 45, idle_power: 8, memory: 16, lifetime: 4}
prices:
  ours: {input: 1, output: 2, cached_input: 0.5, source: contract, date: 2026}
"""
    mine = load_assumptions(written(tmp_path, text))
    assert mine.hardware["laptop"].memory == Number(16.0, "GiB", "your file mine.yaml", "not said")
    assert (mine.prices["ours"].source, mine.prices["ours"].date) == ("contract", "2026")
    assert set(OURS.hardware) < set(mine.hardware)


def test_an_empty_file_changes_nothing(tmp_path: Path) -> None:
    assert load_assumptions(written(tmp_path, "")) == OURS


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("labor: {rate: 3}", r"^labor in .*mine\.yaml is not known \(did you mean 'labour'\?\); take it out$"),
        ("labour: {rates: 3}", r"^labour\.rates in .* not known \(did you mean 'rate'\?\)"),
        ("hardware: {cpu_server: {watts: 3}}", r"^hardware\.cpu_server\.watts in .* \(known here: price, power, "),
        ("prices: {local: {out: 3}}", r"^prices\.local\.out in .* not known"),
        ("labour: {rate: {val: 3}}", r"^labour\.rate\.val in .* not known \(did you mean 'value'\?\)"),
        ("labour: {rate: cheap}", r"^labour\.rate\.value in .* is 'cheap', not a number; give one"),
        ("labour: {rate: '80'}", r"^labour\.rate\.value in .* is '80', not a number; .* without unit or quotes"),
        ("labour: {rate: true}", r"^labour\.rate\.value in .* is True, not a number"),
        ("labour: {rate: .nan}", r"^labour\.rate\.value in .* is nan, not a number"),
        ("labour: {rate: .inf}", r"^labour\.rate\.value in .* is inf, not a number"),
        ("labour: {rate: -1}", r"^labour\.rate\.value in .* is -1, less than nothing; give 0 or more"),
        ("prices: {local: {input: -0.1}}", r"^prices\.local\.input in .* is -0\.1, less than nothing"),
        ("prices: {local: {input: [1]}}", r"^prices\.local\.input in .* is \[1\], not a number"),
        ("prices: {mine: {input: 1}}", r"^prices\.mine in .* lacks output, cached_input; add what is missing"),
        ("hardware: {mine: {price: 1}}", r"^hardware\.mine in .* lacks power, idle_power, memory, lifetime; add"),
        (
            "hardware: {mine: {price: {source: x}, power: 1, idle_power: 1, memory: 1, lifetime: 1}}",
            r"^hardware\.mine\.price in .* lacks value, date",
        ),
        ("hardware: {cpu_server: {lifetime: 0}}", r"lifetime\.value in .* is 0; give more than 0 \(years\)"),
        ("traffic: {utilisation: 1.5}", r"is 1\.5; give more than 0 and at most 1 \(share\)"),
        ("traffic: {busy_hours: 25}", r"is 25; give more than 0 and at most 24 \(hours/day\)"),
        ("energy: {overhead: 0.5}", r"is 0\.5; give at least 1 \(ratio\)"),
        ("labour: {rate: {value: 8, unit: EUR}}", r"^labour\.rate\.unit in .* is 'EUR'; convert the value to USD/hour"),
        ("labour: {rate: {value: 8, source: [a]}}", r"^labour\.rate\.source in .* is \['a'\], not a text; put it in q"),
        ("labour: 80", r"^labour in .* is 80, not a table"),
        ("hardware: {cpu_server: 2000}", r"^hardware\.cpu_server in .* is 2000, not a table"),
        ("prices: {local: 0}", r"^prices\.local in .* is 0, not a table"),
        ("- rate", r"^the file in .* is \['rate'\], not a table"),
        ("labour: {rate: 3", r"mine\.yaml is not YAML: .*correct that line"),
    ],
)
def test_mistakes(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        load_assumptions(written(tmp_path, text))
    assert "\n" not in str(caught.value)


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.yaml cannot be read \(No such file"):
        load_assumptions(tmp_path / "none.yaml")


@settings(deadline=None)  # the machine may be busy
@given(name=st.sampled_from(sorted(named(OURS))), factor=st.floats(0.5, 1.5))
def test_one_change_changes_one_number(name: str, factor: float) -> None:
    before = named(OURS)
    after = named(changed(OURS, name, before[name].value * factor))
    assert {other for other in before if after[other] != before[other]} <= {name}
    if name not in {"energy.overhead"}:  # the only one whose lower limit is near
        assert after[name].value == before[name].value * factor


@pytest.mark.parametrize(
    ("name", "value", "kept"),
    [
        ("traffic.utilisation", 1.4, 1.0),
        ("traffic.busy_hours", 30, 24.0),
        ("energy.overhead", 0.7, 1.0),
        ("prices.kimi-k2.6.input", -1, 0.0),
    ],
)
def test_a_change_stays_within_what_can_be(name: str, value: float, kept: float) -> None:
    assert named(changed(OURS, name, value))[name].value == kept


def test_a_change_of_nothing() -> None:
    with pytest.raises(ValueError, match=r"no assumption 'labour\.rat' \(did you mean 'labour\.rate'\?\)"):
        changed(OURS, "labour.rat", 1)
