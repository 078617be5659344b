"""The tab "Choose" without a browser: which comparisons are found and read, the report and the advice."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

pytest.importorskip("gradio", reason="the demo needs Gradio: pip install -e '.[demo]'")
pytest.importorskip("inspect_ai", reason="comparisons need the extra: pip install -e '.[compare]'")

from demo.choose_tab import _why, _wishes
from demo.choosing import LARGEST, Choosing, ChoosingError, Wishes, framed, told
from tests.demo.tiny import save_comparison


@pytest.fixture
def choosing(tmp_path: Path) -> Choosing:
    save_comparison(tmp_path / "comparison")
    return Choosing(tmp_path, anywhere=True)


def test_without_a_comparison_it_says_what_makes_one(tmp_path: Path) -> None:
    choosing = Choosing(tmp_path, anywhere=True)
    assert choosing.found() == []
    for ask in (choosing.report, lambda said: choosing.advice(said, Wishes())):
        with pytest.raises(ChoosingError, match="multimodal compare --tasks"):
            ask("")
        with pytest.raises(ChoosingError, match="comparison-9 is not the folder of a comparison"):
            ask("comparison-9")


def test_the_latest_comparison_is_first(choosing: Choosing, tmp_path: Path) -> None:
    save_comparison(tmp_path / "comparison-new")
    (tmp_path / "comparison-empty").mkdir()
    for file in (tmp_path / "comparison").iterdir():
        os.utime(file, (1, 1))
    assert choosing.found() == ["comparison-new", "comparison"]


def test_another_path_is_read_only_for_this_machine(choosing: Choosing, tmp_path: Path) -> None:
    other = save_comparison(tmp_path / "elsewhere" / "run")
    assert "toy" in choosing.report(str(other))
    closed = Choosing(tmp_path, anywhere=False)
    assert "toy" in closed.report("comparison")
    for path in (str(other), "comparison/../elsewhere/run"):
        with pytest.raises(ChoosingError, match="one of the comparisons in the list"):
            closed.report(path)


def test_the_report_is_the_written_one_where_it_is_up_to_date(choosing: Choosing, tmp_path: Path) -> None:
    made = choosing.report("comparison")
    assert "Comparison on toy" in made and "native" in made
    assert not (tmp_path / "comparison" / "report.html").exists(), "nothing is written"
    written = tmp_path / "comparison" / "report.html"
    written.write_text("as written")
    assert choosing.report("comparison") == "as written"
    os.utime(written, (1, 1))
    assert "Comparison on toy" in choosing.report("comparison"), "it is out of date"


def test_a_report_that_is_too_large_is_not_put_into_the_page(choosing: Choosing, tmp_path: Path) -> None:
    (tmp_path / "comparison" / "report.html").write_text("x" * (LARGEST + 1))
    with pytest.raises(ChoosingError, match=r"too large to show here.*multimodal compare report comparison"):
        choosing.report("comparison")


def test_advice_follows_the_wishes(choosing: Choosing) -> None:
    free = choosing.advice("comparison", Wishes())
    assert '<section class="advice">' in free and "1,000 calls a day" in free
    assert "<svg" in free, "one pipeline asks elsewhere, so costs are drawn"
    assert "2,000 calls a day" in choosing.advice("comparison", Wishes(daily_volume=2000))
    strict = choosing.advice("comparison", Wishes(latency=0.05, memory=0.5, data_stays_here=True))
    assert "no pipeline fits" in strict
    assert "use native" in choosing.advice("comparison", Wishes(data_stays_here=True))


def test_results_are_read_again_when_there_are_more(choosing: Choosing, tmp_path: Path) -> None:
    choosing.advice("comparison", Wishes())
    first = choosing._results(tmp_path / "comparison")
    assert choosing._results(tmp_path / "comparison") is first
    save_comparison(tmp_path / "comparison", questions=9)
    later = first and (tmp_path / "comparison" / "run.json").stat().st_mtime + 10
    os.utime(tmp_path / "comparison" / "run.json", (later, later))
    assert len(choosing._results(tmp_path / "comparison").rows) == 27


def test_a_broken_comparison_is_one_line(choosing: Choosing, tmp_path: Path) -> None:
    (tmp_path / "comparison" / "run.json").write_text("{}")
    with pytest.raises(ChoosingError, match=r"comparison can't be read: .*run.json lacks command"):
        choosing.advice("comparison", Wishes())


def test_a_lacking_extra_is_told_in_one_line() -> None:
    lacking = ModuleNotFoundError("No module named 'matplotlib'", name="matplotlib")
    assert _why(lacking) == "matplotlib is not installed: pip install 'multimodal[compare]'"
    assert _why(ChoosingError("no comparison")) == "no comparison"


def test_an_empty_number_box_is_nothing() -> None:
    assert _wishes(None, None, None, True, None) == Wishes(0, 0, 0, True, 0)


def test_the_report_cannot_reach_out_of_its_frame() -> None:
    text = framed('<p title="a">it\'s</p>')
    assert 'sandbox="allow-scripts"' in text and "allow-same-origin" not in text
    assert "&lt;p title=&quot;a&quot;&gt;it&#x27;s" in text
    assert "<b>" not in told("<b>")
