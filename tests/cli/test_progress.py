"""Progress: bars with steps on a terminal, a line a minute in a file, silence where asked."""

from __future__ import annotations

import pytest

from diffplug.cli import progress as shown
from diffplug.cli.progress import progress


def test_a_line_a_minute_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    now = [0.0]
    lines = shown._Lines([("pictures", 64)], clock=lambda: now[0])
    for second in range(0, 200, 10):
        now[0] = float(second)
        lines.step(0, second // 10 % 5 + 1, 5)
        if second % 50 == 0:
            lines(0, 4)
    said = capsys.readouterr().err.splitlines()
    assert said == [
        "pictures: 8 of 64 after 1 min, step 2 of 5 of the next, about 7 min left",
        "pictures: 12 of 64 after 2 min, step 3 of 5 of the next, about 9 min left",
        "pictures: 16 of 64 after 3 min, step 4 of 5 of the next, about 9 min left",
    ]


def test_a_terminal_sees_pictures_and_steps(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with progress([("first", 2), ("second", 1)]) as advance:
        assert isinstance(advance, shown._Bars)
        advance.step(0, 3, 20)
        assert advance.bars.tasks[0].fields["steps"] == "step 3/20"
        assert advance.bars.tasks[1].start_time is None
        advance(0, 2)
        assert advance.bars.tasks[1].start_time is not None  # its clock begins when its work does
        assert advance.bars.tasks[0].fields["steps"] == ""
    assert "first" in capsys.readouterr().err


def test_training_tells_a_line_a_minute_without_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    from diffplug.cli.commands.train import _liner, _shown

    with _shown(False) as tell:
        tell("updates", 1, 2, {"loss": 1.0})
    assert capsys.readouterr().err == ""
    times = iter([0.0, 30.0, 61.0, 100.0, 130.0])
    tell = _liner(lambda: next(times))
    for done in range(1, 5):
        tell("updates", done, 9, {"loss": 0.5, "rows_per_second": 2.0})
    assert capsys.readouterr().err.splitlines() == [
        "updates: 2 of 9 after 1 min  loss 0.5  2 images/s",
        "updates: 4 of 9 after 2 min  loss 0.5  2 images/s",
    ]


def test_silence(capsys: pytest.CaptureFixture[str]) -> None:
    with progress([("pictures", 2)], disable=True) as advance:
        advance(0, 2)
        advance.step(0, 1, 2)
    assert capsys.readouterr().err == ""
