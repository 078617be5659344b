"""What the cost of ownership rests on beside what a run measured: prices, labour, habits, each with source and date.

One file, ``assumptions.yaml``, holds ours; a person's own file replaces single values of it. What always holds: what is
loaded has been checked, so nothing behind this module meets an unknown key, a wrong type or a negative number. It knows
nothing of pipelines, or of what is computed from these numbers.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import yaml

FILE = Path(__file__).with_name("assumptions.yaml")
PER_MILLION = "USD per million tokens"
PARTS = ("input", "output", "cached_input")

_Group = TypeVar("_Group")
_Named = Mapping[str, Any]


@dataclass(frozen=True)
class Number:
    """A number, and where it is from.

    Attributes:
        value: In ``unit``.
        unit: Such as ``"USD/kWh"``.
        source: Who says so.
        date: When: a year and month, or a day.
    """

    value: float
    unit: str
    source: str
    date: str


@dataclass(frozen=True)
class _Limits:
    """What a number can be, and in which unit."""

    unit: str
    least: float = 0.0
    most: float = math.inf
    positive: bool = False


@dataclass(frozen=True)
class Machine:
    """A kind of machine: US dollars, watts at full load and idle, memory in GiB, years until it is replaced."""

    price: Annotated[Number, _Limits("USD")]
    power: Annotated[Number, _Limits("W")]
    idle_power: Annotated[Number, _Limits("W")]
    memory: Annotated[Number, _Limits("GiB")]
    lifetime: Annotated[Number, _Limits("years", positive=True)]


@dataclass(frozen=True)
class Energy:
    """US dollars per kWh, and watts of the building for each watt of a machine (power usage effectiveness)."""

    electricity: Annotated[Number, _Limits("USD/kWh")]
    overhead: Annotated[Number, _Limits("ratio", least=1.0)]


@dataclass(frozen=True)
class Labour:
    """US dollars an hour; hours to set a local model or an API pipeline up, and hours a month to keep it running."""

    rate: Annotated[Number, _Limits("USD/hour")]
    local_setup: Annotated[Number, _Limits("hours")]
    local_running: Annotated[Number, _Limits("hours/month")]
    api_setup: Annotated[Number, _Limits("hours")]
    api_running: Annotated[Number, _Limits("hours/month")]


@dataclass(frozen=True)
class Hosting:
    """US dollars a month for the place and the network of one machine."""

    machine: Annotated[Number, _Limits("USD/month")]


@dataclass(frozen=True)
class Traffic:
    """Hours in which a day's calls come; share of a machine that is planned for; share of prompts that is cached."""

    busy_hours: Annotated[Number, _Limits("hours/day", most=24.0, positive=True)]
    utilisation: Annotated[Number, _Limits("share", most=1.0, positive=True)]
    cached_share: Annotated[Number, _Limits("share", most=1.0)]


@dataclass(frozen=True)
class Price:
    """What an endpoint asks for, in US dollars per million tokens, and where that is from.

    Attributes:
        input: For tokens that it reads.
        output: For tokens that it writes.
        cached_input: For tokens that it reads and remembers from an earlier call.
        source: Who says so.
        date: When.
    """

    input: float
    output: float
    cached_input: float
    source: str
    date: str


@dataclass(frozen=True)
class Assumptions:
    """All of them. ``hardware`` and ``prices`` are by name, such as ``"cpu_server"`` and ``"local"``."""

    hardware: Mapping[str, Machine]
    energy: Energy
    labour: Labour
    hosting: Hosting
    traffic: Traffic
    prices: Mapping[str, Price]


_GROUPS: dict[str, type] = {"energy": Energy, "labour": Labour, "hosting": Hosting, "traffic": Traffic}


def load_assumptions(path: Path | None = None) -> Assumptions:
    """Ours, with the values that a person's file replaces.

    Args:
        path: A YAML file with any part of what ``assumptions.yaml`` has. A number may stand alone (``rate: 95``) or say
            its ``value``, ``unit``, ``source`` and ``date``; machines and prices may be added under new names.

    Raises:
        ValueError: If the file cannot be read, or a key or value in it cannot be used; says which, and the remedy.
    """
    ours = _read(FILE)
    if path is None:
        return _assumptions(ours, FILE)
    return _assumptions(_merged(ours, _read(path), path), path)


def named(assumptions: Assumptions) -> dict[str, Number]:
    """Every number by its full name, such as ``"hardware.cpu_server.price"`` or ``"prices.local.input"``."""
    groups: list[tuple[str, Any]] = [(f"hardware.{kind}", machine) for kind, machine in assumptions.hardware.items()]
    groups += [(group, getattr(assumptions, group)) for group in _GROUPS]
    found = {f"{name}.{each.name}": getattr(group, each.name) for name, group in groups for each in fields(group)}
    for name, price in assumptions.prices.items():
        for part in PARTS:
            found[f"prices.{name}.{part}"] = Number(getattr(price, part), PER_MILLION, price.source, price.date)
    return found


def changed(assumptions: Assumptions, name: str, value: float) -> Assumptions:
    """The same with one number replaced, held within what it can be (a share is at most 1, a day has 24 hours).

    Args:
        assumptions: What to begin with.
        name: As :func:`named` has it.
        value: The new one, in the number's unit.

    Raises:
        ValueError: If there is no such number.
    """
    if name not in (known := named(assumptions)):
        raise ValueError(f"there is no assumption {name!r}{_like(name, known)}")
    group, _, rest = name.partition(".")
    kind, _, leaf = rest.rpartition(".")  # names of prices have dots in them
    if group == "prices":
        new_price: dict[str, Any] = {leaf: max(value, 0.0)}
        price = replace(assumptions.prices[kind], **new_price)
        return replace(assumptions, prices={**assumptions.prices, kind: price})
    old = assumptions.hardware[kind] if group == "hardware" else getattr(assumptions, group)
    limits = _limits(type(old))[leaf]
    number = replace(known[name], value=min(max(value, limits.least), limits.most))
    new = replace(old, **{leaf: number})
    if group == "hardware":
        return replace(assumptions, hardware={**assumptions.hardware, kind: new})
    new_group: dict[str, Any] = {group: new}
    return replace(assumptions, **new_group)


def _read(path: Path) -> _Named:
    try:
        said = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{path} cannot be read ({error.strerror}); name a YAML file of assumptions") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {' '.join(str(error).split())}; correct that line") from error
    return _table("the file", said if said is not None else {}, path)


def _merged(ours: _Named, theirs: _Named, path: Path) -> dict[str, Any]:
    """Theirs over ours, single values at a time."""
    _known("", theirs, ours, path)
    merged = dict(ours)
    for group, said in theirs.items():
        merged[group] = dict(ours[group])
        for name, value in _table(group, said, path).items():
            full, old = f"{group}.{name}", ours[group].get(name)
            if group == "prices":
                merged[group][name] = {**(old or {}), **_price(full, value, path)}
            elif group == "hardware":
                _known(full, _table(full, value, path), [each.name for each in fields(Machine)], path)
                numbers = {
                    leaf: _number(f"{full}.{leaf}", it, (old or {}).get(leaf), path) for leaf, it in value.items()
                }
                merged[group][name] = {**(old or {}), **numbers}
            else:
                _known(group, [name], ours[group], path)
                merged[group][name] = _number(full, value, old, path)
    return merged


def _price(name: str, said: Any, path: Path) -> dict[str, Any]:
    """What a file says of a price. New dollars under our source would not be true: they say theirs, or are marked."""
    table = _table(name, said, path)
    _known(name, table, [each.name for each in fields(Price)], path)
    return {**_theirs(path), **table} if set(table) & set(PARTS) else dict(table)


def _number(name: str, said: Any, old: _Named | None, path: Path) -> dict[str, Any]:
    """What a file says of a number: alone, or as a table with some of a number's four keys."""
    if not isinstance(said, Mapping):
        return {**(old or {}), **_theirs(path), "value": said}
    _known(name, said, [each.name for each in fields(Number)], path)
    return {**(old or {}), **(_theirs(path) if "value" in said else {}), **said}


def _theirs(path: Path) -> dict[str, str]:
    return {"source": f"your file {path.name}", "date": "not said"}


def _assumptions(raw: _Named, path: Path) -> Assumptions:
    prices = {}
    for name, said in raw["prices"].items():
        full = f"prices.{name}"
        _whole(full, said, [each.name for each in fields(Price)], path)
        texts: dict[str, Any] = {key: _text(f"{full}.{key}", said[key], path) for key in ("source", "date")}
        amounts: dict[str, Any] = {part: _amount(f"{full}.{part}", said[part], path) for part in PARTS}
        prices[str(name)] = Price(**amounts, **texts)
    hardware = {
        str(kind): _group(Machine, f"hardware.{kind}", machine, path) for kind, machine in raw["hardware"].items()
    }
    build = partial(_group, path=path)
    return Assumptions(
        hardware=hardware, energy=build(Energy, "energy", raw["energy"]), labour=build(Labour, "labour", raw["labour"]),
        hosting=build(Hosting, "hosting", raw["hosting"]), traffic=build(Traffic, "traffic", raw["traffic"]),
        prices=prices,
    )  # fmt: skip


def _group(cls: type[_Group], name: str, said: _Named, path: Path) -> _Group:
    """One of the dataclasses above from a table, each number within its limits."""
    known = _limits(cls)
    _whole(name, said, known, path)
    found = {}
    for leaf, limits in known.items():
        full, number = f"{name}.{leaf}", said[leaf]
        _whole(full, {"unit": limits.unit, **number}, [each.name for each in fields(Number)], path)
        value, unit = _amount(f"{full}.value", number["value"], path), number.get("unit", limits.unit)
        if unit != limits.unit:
            raise ValueError(f"{full}.unit in {path} is {unit!r}; convert the value to {limits.unit}")
        if value > limits.most or value < limits.least or (limits.positive and value == 0):
            low = "more than 0" if limits.positive else f"at least {limits.least:g}"
            high = "" if math.isinf(limits.most) else f" and at most {limits.most:g}"
            raise ValueError(f"{full}.value in {path} is {value:g}; give {low}{high} ({limits.unit})")
        texts = {key: _text(f"{full}.{key}", number[key], path) for key in ("source", "date")}
        found[leaf] = Number(value, unit, **texts)
    return cls(**found)


def _limits(cls: type) -> dict[str, _Limits]:
    return {name: hint.__metadata__[0] for name, hint in get_type_hints(cls, include_extras=True).items()}


def _table(name: str, said: Any, path: Path) -> _Named:
    if not isinstance(said, Mapping):
        raise ValueError(f"{name} in {path} is {said!r}, not a table; write 'key: value' lines as in {FILE.name}")
    return said


def _amount(name: str, said: Any, path: Path) -> float:
    if isinstance(said, bool) or not isinstance(said, int | float) or not math.isfinite(said):
        raise ValueError(f"{name} in {path} is {said!r}, not a number; give one such as 0.25, without unit or quotes")
    if said < 0:
        raise ValueError(f"{name} in {path} is {said:g}, less than nothing; give 0 or more")
    return float(said)


def _text(name: str, said: Any, path: Path) -> str:
    if isinstance(said, Mapping | list | bool) or said is None:
        raise ValueError(f"{name} in {path} is {said!r}, not a text; put it in quotes")
    return str(said)  # YAML reads an unquoted day as a date, and a year as a number


def _known(name: str, keys: Iterable[Any], known: Iterable[str], path: Path) -> None:
    for key in keys:
        if key not in (there := list(known)):
            full = f"{name}.{key}" if name else str(key)
            raise ValueError(f"{full} in {path} is not known{_like(str(key), there)}; take it out")


def _whole(name: str, said: _Named, wanted: Iterable[str], path: Path) -> None:
    if missing := [key for key in wanted if key not in said]:
        raise ValueError(f"{name} in {path} lacks {', '.join(missing)}; add what is missing")


def _like(key: str, known: Iterable[str]) -> str:
    there = list(known)
    near = difflib.get_close_matches(key, there, 1)
    return f" (did you mean {near[0]!r}?)" if near else f" (known here: {', '.join(there[:12])})"
