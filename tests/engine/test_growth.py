"""The figures on how cost grows: points, lines through them, table and plot."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("matplotlib")

from benchmarks.growth import AXES, Cost, Point, fitted, plot, points_of, table


def test_a_line_goes_through_its_points() -> None:
    fit = fitted([1, 2, 4, 8], [5.0, 7.0, 11.0, 19.0])
    assert (fit.slope, fit.start, fit.explained) == (pytest.approx(2), pytest.approx(3), pytest.approx(1))
    assert fitted([1, 2, 3], [1.0, 3.0, 1.0]).explained == pytest.approx(0)
    assert fitted([1, 2, 3], [4.0, 4.0, 4.0]).explained == 1


def test_one_thing_grows_and_the_others_stay(tmp_path: Path) -> None:
    points = points_of(AXES)
    assert points["pictures"][-1] == Point(pictures=16) and points["batch"][0] == Point()
    every = {point for its in points.values() for point in its}
    costs = {
        point: Cost(
            first=10 + point.prompt / 10,
            token=5 + 0.5 * point.batch,
            memory=0.045 * point.batch * (point.prompt + point.answer),
        )
        for point in every
    }
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table(points, costs).splitlines()[2:]]
    found = {(line[0], line[3]): line for line in lines}
    assert len(lines) == len(found) == 12
    assert found["prompt", "ms to the first token"][4:] == ["16.4", "112.4", "0.1 ms a prompt token", "1.00"]
    assert found["batch", "ms a token"][6] == "0.5 ms a request"
    assert found["answer", "MB"][6] == "0.045 MB an answer token"
    files = [tmp_path / name for name in ("first.svg", "second.svg")]
    for file in files:
        plot(points, costs, file)
    assert files[0].read_bytes() == files[1].read_bytes() and b"<svg" in files[0].read_bytes()
