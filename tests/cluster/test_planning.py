"""The simulation against closed forms of queueing theory, and plans that it makes."""

from __future__ import annotations

import json
import math
import random
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy.optimize import brentq

pytest.importorskip("simpy")

from multimodal.cli import main
from multimodal.cluster.planning import (
    Measurements,
    PlanError,
    Traffic,
    plan,
    read_measurements,
    simulate,
)

ROOT = Path(__file__).parent.parent.parent
STEPS = 20  # of an answer, on average
EMBEDDED = read_measurements()


def server(slots: int, tokens: Sequence[int], **changes: Any) -> Measurements:
    """Answers that take 1 s on average, ``slots`` of them at once without getting slower; pictures cost nothing."""
    step = {1: 1 / STEPS, slots: 1 / STEPS}
    given = {"first": 0.0, "later": 0.0, "step": step, "answer_tokens": tokens, "slots": slots}
    return Measurements(kind="server", source="theory", cached_pictures=100, picture_bytes=1000, **{**given, **changes})


def geometric() -> list[int]:
    """Lengths of answers whose steps are geometric with mean ``STEPS``: in continuous time, exponential."""
    shares = (np.arange(4000) + 0.5) / 4000
    return [1 + math.ceil(math.log1p(-share) / math.log1p(-1 / STEPS)) for share in shares]


def waits(load: float, servers: int) -> float:
    """Erlang's C: the chance that a question of an M/M/c queue waits."""
    offered = load * servers
    full = offered**servers / math.factorial(servers) / (1 - load)
    return full / (sum(offered**k / math.factorial(k) for k in range(servers)) + full)


def time_in_system(load: float, servers: int, share: float) -> float:
    """The quantile of a question's time in an M/M/c queue whose service takes 1 s on average."""
    spare, chance = servers * (1 - load), waits(load, servers)

    def longer(t: float) -> float:
        if math.isclose(spare, 1):
            return (1 + chance * t) * math.exp(-t) - (1 - share)
        both = (math.exp(-spare * t) - math.exp(-t)) / (1 - spare)
        return (1 - chance) * math.exp(-t) + chance * (math.exp(-t) + both) - (1 - share)

    return brentq(longer, 0, 1000)


class TestAgainstTheory:
    @pytest.mark.parametrize("load", [0.3, 0.6])
    def test_mm1(self, load: float) -> None:
        found = simulate(server(1, geometric()), Traffic(load), 1, questions=12_000)
        assert found.mean == pytest.approx(1 / (1 - load), rel=0.1)
        assert found.p99 == pytest.approx(math.log(100) / (1 - load), rel=0.15)
        assert found.p50 == pytest.approx(math.log(2) / (1 - load), rel=0.1)
        assert found.utilisation == pytest.approx(load, rel=0.04)
        assert found.rate == pytest.approx(load, rel=0.04)

    @pytest.mark.parametrize("callers", [1, 3, 12])
    def test_callers_that_wait_for_their_answers(self, callers: int) -> None:
        """M/M/1 with a finite source: who has an answer asks again after ``entrance``."""
        pause = 2.0
        found = simulate(server(1, geometric(), entrance=pause), Traffic(1), 1, callers=callers, questions=12_000)
        nobody = 1 / sum(math.perm(callers, there) / pause**there for there in range(callers + 1))
        assert found.rate == pytest.approx(1 - nobody, rel=0.04)
        assert found.utilisation == pytest.approx(1 - nobody, rel=0.04)
        assert found.mean == pytest.approx(callers / (1 - nobody), rel=0.04)  # Little's law, the pause in it

    @pytest.mark.parametrize("slots", [2, 4])
    def test_mmc(self, slots: int) -> None:
        load = 0.7
        found = simulate(server(slots, geometric()), Traffic(load * slots), 1, questions=12_000)
        assert found.p99 == pytest.approx(time_in_system(load, slots, 0.99), rel=0.15)
        assert found.p50 == pytest.approx(time_in_system(load, slots, 0.5), rel=0.1)

    def test_md1(self) -> None:
        """Pollaczek and Khinchine: with answers of one length the wait is half of that of an M/M/1 queue."""
        load = 0.7
        found = simulate(server(1, [STEPS + 1]), Traffic(load), 1, questions=12_000)
        assert found.mean == pytest.approx(1 + load / (2 * (1 - load)), rel=0.06)

    def test_replicas_share_the_load(self) -> None:
        """With so little load that nobody waits, a question takes the service time, however many replicas."""
        for replicas in (1, 5):
            found = simulate(server(1, [STEPS + 1]), Traffic(0.01), replicas, questions=1000)
            assert found.p50 == pytest.approx(1.0)

    def test_caches(self) -> None:
        """Where pictures stay with their replica, all questions but the first about each find it."""
        reuse = {"traffic": Traffic(5, questions=4, pause=10), "replicas": 5, "questions": 10_000}
        kind = server(4, [2], first=0.2, later=0.1)
        own = simulate(kind, routing="picture", **reuse)
        anywhere = simulate(kind, routing="load", **reuse)
        assert own.cached == pytest.approx(1 - 1 / 4, abs=0.02)
        # the question before one about the same picture, the one before that, ...: each was here with a chance of 1/5
        chance = sum((3 / 4) ** k * (1 / 4) * (1 - (4 / 5) ** k) for k in range(100))
        assert anywhere.cached == pytest.approx(chance, abs=0.03)
        assert own.mean < anywhere.mean
        full = simulate(replace(kind, cached_pictures=1), routing="picture", **reuse)
        assert full.cached < 0.2

    def test_what_is_spent_at_the_entrance_comes_on_top(self) -> None:
        traffic, later = Traffic(0.6), server(1, geometric(), entrance=0.5)
        plain, delayed = (simulate(kind, traffic, 1) for kind in (server(1, geometric()), later))
        for time in ("p50", "p99", "mean", "first_token_p99"):
            assert getattr(delayed, time) == pytest.approx(getattr(plain, time) + 0.5)
        assert delayed.utilisation == plain.utilisation  # the replica has no more to do
        assert later.alone() == pytest.approx(server(1, geometric()).alone() + 0.5)

    def test_a_replica_that_is_busy_is_passed_over(self) -> None:
        """All ask about one picture: its replica alone would be overwhelmed."""
        traffic = Traffic(3, questions=1e9, pause=0.1)
        found = simulate(server(1, [STEPS + 1]), traffic, 5, questions=3000)
        assert found.p99 < 6 and found.utilisation == pytest.approx(3 / 5, rel=0.05)


class TestPlan:
    def test_is_the_smallest_that_keeps_p99(self) -> None:
        made = plan(EMBEDDED, Traffic(60), p99=1.0, questions=4000)
        assert made.cells == 1 and made.outcome.p99 <= 1.0
        fewer = simulate(EMBEDDED, Traffic(60), made.replicas - 1, questions=4000)
        assert fewer.p99 > 1.0
        assert EMBEDDED.price and made.price == pytest.approx(made.replicas * EMBEDDED.price)

    def test_same_seed_same_plan(self) -> None:
        first, again = (plan(EMBEDDED, Traffic(20), p99=2.0, questions=2000, seed=3) for _ in range(2))
        assert first == again
        assert plan(EMBEDDED, Traffic(20), p99=2.0, questions=2000, seed=4).outcome != first.outcome

    def test_much_traffic_is_cut_into_cells(self) -> None:
        made = plan(EMBEDDED, Traffic(200_000), p99=2.0, questions=4000)
        assert made.cells > 100 and made.replicas == made.cells * made.outcome.replicas
        capacity = made.replicas / EMBEDDED.work(cached=2 / 3)
        assert 200_000 < capacity < 1.5 * 200_000
        assert made.network == pytest.approx(200_000 * EMBEDDED.picture_bytes * 4 / 3)
        assert replace(made, measured=replace(EMBEDDED, around=0.01)).entrance_cores == pytest.approx(2000)

    def test_what_no_number_of_replicas_can_do(self) -> None:
        with pytest.raises(PlanError, match=r"1 of 100 answers takes more than .* no number of replicas"):
            plan(EMBEDDED, Traffic(10), p99=0.1)
        with pytest.raises(PlanError, match="p99 stays above"):  # each picture is new, and takes longer
            plan(EMBEDDED, Traffic(10, questions=1), p99=EMBEDDED.alone() + 0.001, questions=1000)


class TestCommand:
    def test_table(self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        assert main(["plan", "--rate", "10"]) == 0
        shown = capsys.readouterr().out
        assert re.search(r"embedded, int8, 2 cores +│ picture +│ +\d+ │ +1 │", shown), shown
        assert re.search(r"│ load +│", shown)

    def test_kinds(self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("COLUMNS", "200")
        own = json.loads((ROOT / "multimodal" / "cluster" / "measured.json").read_text())
        files = []
        for kind, price, around in (("cheap", 0.01, 0.0), ("dear", None, 0.25)):
            files += ["--kind", str(tmp_path / f"{kind}.json")]
            (tmp_path / f"{kind}.json").write_text(json.dumps({**own, "kind": kind, "price": price, "around": around}))
        assert main(["plan", "--rate", "5", "--json", *files]) == 0
        made = json.loads(capsys.readouterr().out)
        assert [entry["kind"] for entry in made] == ["cheap", "cheap", "dear", "dear"]
        assert made[0]["price"] == pytest.approx(0.01 * made[0]["replicas"]) and made[2]["price"] is None
        assert [entry["entrance_cores"] for entry in made] == [0, 0, 1.25, 1.25]
        assert main(["plan", "--rate", "5", *files]) == 0
        shown = capsys.readouterr().out
        assert (
            len(re.findall(r"cheap .* MB/s │ +│ +0\.01", shown))
            == len(re.findall(r"dear .* MB/s │ +1\.2 │", shown))
            == 2
        ), shown

    @pytest.mark.parametrize("content", ["", "[]", '{"kind": "x"}', '{"kind": "x", "step": {"one": 2}}'])
    def test_no_measurements(self, content: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        path = tmp_path / "mine.json"
        path.write_text(content)
        assert main(["plan", "--rate", "5", "--kind", str(path)]) == 1
        error = capsys.readouterr().err
        assert "mine.json: not measurements of a replica" in error and "benchmarks.service_times" in error

    def test_traffic_that_is_none(self, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["plan", "--rate", "0"]) == 1
        assert "more than 0 questions a second" in capsys.readouterr().err


def test_nothing_else_imports_ray_or_simpy() -> None:
    code = (
        "import sys; sys.modules['ray'] = sys.modules['simpy'] = None\n"
        "import multimodal, multimodal.cli, multimodal.cluster\n"
        "raise SystemExit(multimodal.cli.main(['plan', '--rate', '1']))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert ended.returncode == 1 and "pip install 'multimodal[cluster]'" in ended.stderr


def test_benchmark_writes_what_the_command_reads(tmp_path: Path) -> None:
    from benchmarks.service_times import measure
    from multimodal import MultiModalModel
    from tests.training.tiny import save_checkpoint

    model = MultiModalModel.from_pretrained(save_checkpoint(tmp_path))
    path = tmp_path / "mine.json"
    path.write_text(json.dumps(measure(model, kind="mine", price=None, rounds=1)))
    measured = read_measurements(path)
    assert measured.kind == "mine" and set(measured.step) == {1, 2, 4, 8} and measured.slots == 8
    assert measured.first > 0 and measured.cached_pictures > 0 and measured.picture_bytes > 0
    assert random.Random(0).choice(measured.answer_tokens) > 0
