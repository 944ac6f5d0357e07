"""`memory3 simulate`: its settings, its document and its picture."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from memory3.cli import app
from memory3.cost import PRESETS, formats
from memory3.hierarchy.curves import draw_simulation
from memory3.hierarchy.policies import POLICIES
from memory3.hierarchy.simulation import document, headed, settings, simulate
from memory3.hierarchy.trace import zipf
from memory3.spec import SpecError
from memory3.tiers import costs_of, rent_of

FORMS = formats(PRESETS["paper-2.4b"], record_bytes=39_424)


def test_adaptive_tiers_stay_within_one_and_a_half_optima_and_beat_every_other_line() -> None:
    setups = settings(FORMS, zipf(200, 3000, seed=4), rent=rent_of(39_424, 0.08, 2.0, 400.0), passes=50)
    assert len(setups) == 5
    for outcome in simulate(setups[1:]):
        ratio = {line.policy: outcome.ratio(line) for line in outcome.lines}
        assert min(ratio, key=lambda name: ratio[name]) == "adaptive", outcome.setting.name
        assert 1 <= ratio["adaptive"] <= 1.5, outcome.setting.name


def test_the_head_passes_the_threshold_of_parameters() -> None:
    costs = costs_of(FORMS)
    trace = headed(100, 10, costs, seed=1)
    assert np.bincount(trace.ids).max() > (costs.consolidation - costs.encoding) / costs.memory
    with pytest.raises(SpecError, match="million"):
        headed(100, 10, costs_of(formats(PRESETS["paper-2.4b"], record_bytes=1, passes=100)))


def test_rent_weighs_storage_against_work() -> None:
    """An hour of 1 TFLOP/s for 3600 is 1e12 FLOPs for 1; a GB for 30 days for 30 is 1e12 FLOPs a day."""
    assert rent_of(10**9, gb_month=30.0, hour=3600.0, tflops=1.0) == pytest.approx(1e12)
    with pytest.raises(SpecError, match="prices above 0"):
        rent_of(1, 1.0, 0.0, 1.0)


def test_each_setting_adds_its_burden() -> None:
    none, budget, stored, known, both = settings(FORMS, zipf(50, 100), rent=5.0, passes=7)
    assert (none.slots, budget.slots) == (None, 5)
    assert (budget.costs.rent, stored.costs.rent, both.costs.rent) == (0, 5, 5)
    assert known.costs.consolidation == both.costs.consolidation == 7 * budget.costs.consolidation


@pytest.mark.parametrize(("share", "said"), [(0.0, "budget of 0.0"), (1.5, "budget of 1.5"), (0.01, "room for one")])
def test_an_impossible_budget_is_refused(share: float, said: str) -> None:
    with pytest.raises(SpecError, match=said):
        settings(FORMS, zipf(50, 100), rent=0.0, passes=1, share=share)


def test_the_document_and_the_picture_hold_every_line(tmp_path: Path) -> None:
    heard: list[tuple[int, int | None]] = []
    setups = settings(FORMS, zipf(30, 200), rent=1e9, passes=3)[:2]
    outcomes = list(simulate(setups, tell=lambda done, total: heard.append((done, total))))
    made = document(outcomes)
    for setting in made["settings"]:
        assert [line["policy"] for line in setting["lines"]] == list(POLICIES)
        assert [row["policy"] for row in setting["spent"]] == ["optimum", *POLICIES]
        for line, row in zip(setting["lines"], setting["spent"][1:], strict=True):
            assert row["costs"][-1] == pytest.approx(line["cost"])
            assert line["cost"] == pytest.approx(sum(line[k] for k in ("reading", "encoding", "storage", "consolidation")))
    assert heard[0] == (0, 14) and heard[-1] == (14, 14)
    draw_simulation(outcomes, "TFLOP", 1e12, tmp_path / "deep" / "a.png")
    assert (tmp_path / "deep" / "a.png").stat().st_size > 10_000


def test_the_command_prints_a_table_and_plays_a_given_trace(tmp_path: Path) -> None:
    trace = tmp_path / "uses.jsonl"
    trace.write_text("".join(json.dumps({"time": n * 3600, "id": n % 7}) + "\n" for n in range(60)))
    done = CliRunner().invoke(
        app,
        ["simulate", "--preset", "paper-2.4b", "--trace", str(trace), "--budget", "0.3", "--out", str(tmp_path / "a.svg")],
        catch_exceptions=False,
    )
    assert done.exit_code == 0
    assert done.stdout.count("adaptive") == 5 and "60 uses of 7 references, room for 2" in done.stdout
    assert (tmp_path / "a.svg").is_file()
