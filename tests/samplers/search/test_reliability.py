"""Searches that are killed, run out of disk, get hostile files, or find what blows up on rare noises."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

optuna = pytest.importorskip("optuna")
pytest.importorskip("sklearn")

from optuna.trial import TrialState  # noqa: E402
from planted import search_space  # noqa: E402
from test_schedules import LEVELS, LINSPACE, SPACE, mixture  # noqa: E402

from diffplug.rollout import Rollouts  # noqa: E402
from diffplug.samplers import search_compensation, tune_schedule  # noqa: E402
from diffplug.samplers.schedule import presets  # noqa: E402
from diffplug.samplers.search.comparison import amplification, blows_up  # noqa: E402
from diffplug.samplers.search.decisions import study as studies  # noqa: E402
from diffplug.samplers.search.leader import LARGEST, Leader, Problems  # noqa: E402
from diffplug.samplers.search.parameters import with_ratios  # noqa: E402
from diffplug.samplers.search.reference import reference_solution  # noqa: E402
from diffplug.samplers.search.settings import Pairs, Settings  # noqa: E402
from diffplug.samplers.search.stages import run_stages  # noqa: E402
from diffplug.testing import tiny  # noqa: E402

SMALL = {"height": 16, "width": 16}
GRIDS = ("linspace",)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFPLUG_CACHE", str(tmp_path / "cache"))


def dead_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def killed_at(place: Path, trial: int, batch: int = 34) -> Any:
    """A study of a process that was killed while it scored a schedule, and what it would have come to."""
    train, runs = mixture(8, 1), [0]

    class Stopping:
        def __getattr__(self, name: str) -> Any:
            return getattr(train, name)

        def final(self, schedule: Any) -> Any:
            runs[0] += 1
            if runs[0] == trial + 1:  # the first one checks the metric
                raise KeyboardInterrupt
            return train.final(schedule)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        # as after kill -9: the trial stays as it is, signed by a process that is gone
        patch.setattr(optuna.Study, "tell", lambda self, t, *v, **k: None if k else TELL(self, t, *v))
        patch.setattr(studies, "sign", lambda trial: None)
        patch.setattr(
            "diffplug.samplers.search.decisions.stage.sign",
            lambda t: t.set_user_attr(studies.WORKER, [platform.node(), dead_process(), "1"]),
        )
        search_space(Stopping(), mixture(8, 2), SPACE, trials=batch, grids=GRIDS, storage=place)


TELL = optuna.Study.tell


@pytest.mark.law
@pytest.mark.parametrize("trial", [3, 19])
def test_a_killed_search_ends_where_an_uninterrupted_one_does(trial: int, tmp_path: Path) -> None:
    whole = search_space(mixture(8, 1), mixture(8, 2), SPACE, trials=34, grids=GRIDS)
    place = tmp_path / "study.log"
    killed_at(place, trial)
    found = search_space(mixture(8, 1), mixture(8, 2), SPACE, trials=34, grids=GRIDS, storage=place)
    assert found.schedule == whole.schedule and found.presets == whole.presets
    sound = [t for t in found.study.trials if t.state != TrialState.FAIL]
    assert not [t for t in sound if t.state == TrialState.RUNNING] and len(sound) == 34
    ours, theirs = (
        sorted(str(sorted(t.params.items())) for t in each) for each in (sound, whole.study.trials)
    )
    assert ours == theirs


def test_a_process_that_is_alive_keeps_its_trial() -> None:
    study = optuna.create_study()
    for pid in (os.getpid(), dead_process()):
        trial = study.ask()
        studies.sign(trial)
        if pid != os.getpid():
            trial.set_user_attr(studies.WORKER, [platform.node(), pid, "1"])
    study.ask().set_user_attr(studies.WORKER, ["another host", 1, "1"])
    studies.bury(study)
    states = [each.state for each in study.get_trials()]
    assert states == [TrialState.RUNNING, TrialState.FAIL, TrialState.RUNNING]


@pytest.mark.parametrize("directions", [["minimize", "maximize"], ["maximize"]])
def test_a_study_that_does_not_minimise_one_value_is_refused(directions: list[str], tmp_path: Path) -> None:
    place = tmp_path / "s.log"
    storage = studies.storage_of(place)
    optuna.create_study(storage=storage, study_name="4 evaluations", directions=directions)
    with pytest.raises(ValueError, match=r"s.log' does not minimise one value.*maximize: take another file"):
        search_space(mixture(8, 1), mixture(8, 2), SPACE, trials=30, grids=GRIDS, storage=place)


def test_a_database_that_another_process_is_making_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    make, calls = optuna.create_study, []

    def racing(**options: Any) -> Any:
        calls.append(1)
        if len(calls) < 3:
            raise RuntimeError("UNIQUE constraint failed: alembic_version.version_num")
        return make(**options)

    monkeypatch.setattr(optuna, "create_study", racing)
    monkeypatch.setattr(studies, "sleep", lambda seconds: None)
    assert studies.open_study(None, "n", {"a": 1}).study_name == "n" and len(calls) == 3


def test_links_and_urls_that_lost_a_slash_are_refused(tmp_path: Path) -> None:
    target, link = tmp_path / "other.db", tmp_path / "out.db"
    link.symlink_to(target)
    with pytest.raises(ValueError, match=r"out.db' is a link"):
        studies.open_study(link, "n", {})
    with pytest.raises(ValueError, match="'mysql:/host/x' is neither a file nor the URL"):
        studies.open_study("mysql:/host/x", "n", {})
    assert not target.exists() and not Path("mysql:").exists()


@pytest.mark.pipe
def test_a_cache_that_cannot_be_written_costs_a_warning(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("in the way")
    pipe = tiny("sd15")
    runs = Rollouts(pipe, ["a", "b"], [0, 1], 3, options=SMALL)
    with pytest.warns(UserWarning, match="converged latents are not kept"):
        found = reference_solution(runs, pipe.scheduler, blocked / "cache")
    assert torch.isfinite(found).all()


@pytest.mark.pipe
def test_a_reward_that_turns_nan_is_named_with_its_step(tmp_path: Path) -> None:
    calls = []

    def fading(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        calls.append(1)
        return images.mean((1, 2, 3)) * (float("nan") if images.requires_grad and len(calls) > 3 else 1.0)

    told = {"steps": 4, "batch": 2, "validation": 2, "test": 2, "truth_steps": 6, "tail": 0, "options": SMALL}
    start = presets.ddim(3, "linspace", final="sigma_min")
    with pytest.raises(ValueError, match=r"fading.*"):
        tune_schedule(tiny("sd15"), ["a", "b", "c"], start, fading, 2.0, **told)  # type: ignore[arg-type]


@pytest.mark.pipe
def test_a_device_without_float64_is_searched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real, cpu, host = torch.Tensor.double, torch.Tensor.cpu, set()

    def moved(x: Any, *a: Any, **k: Any) -> Any:
        y = cpu(x, *a, **k).view(x.shape)
        host.add(y.data_ptr())
        return y

    def double(x: Any) -> Any:
        if x.ndim == 4 and x.data_ptr() not in host:
            raise TypeError("this device has no float64")
        return real(x)

    monkeypatch.setattr(torch.Tensor, "cpu", moved)
    monkeypatch.setattr(torch.Tensor, "double", double)
    more: dict[str, Any] = {"truth_steps": 4, "options": SMALL, "cache": tmp_path, "tail": 2}
    found = search_compensation(tiny("sd15"), ["a", "b"], 3, guidance_scale=5.0, rungs=("ratios",), **more)
    assert found.schedule.nfe == 3


@pytest.mark.law
def test_the_amplification_is_that_of_weights_that_cancel() -> None:
    """Second-order extrapolation on a coarse grid; DDIM's weights are shares of a whole."""
    assert amplification(presets.ddim(6, LINSPACE), LEVELS) == pytest.approx(1.0, abs=1e-2)
    plain = presets.unipc(6, LINSPACE, disable_corrector=(0,))
    wild = with_ratios(plain, {2: 0.5, 3: 1.9, 4: 0.5, 5: 1.9})
    mild, strong = amplification(plain, LEVELS), amplification(wild, LEVELS)
    assert mild is not None and strong is not None and strong > 2 * mild
    analytic = amplification(SPACE.schedule(SPACE.values(presets.dpmpp(4, "karras"))), LEVELS)
    assert analytic is not None and 0.9 < analytic < LARGEST


class _Rare:
    """Final samples of size 1, and of size 20 for some noises where the schedule is a wild one."""

    def __init__(self, n: int, wild: Any, every: int) -> None:
        self.n, self.wild, self.every = n, wild, every

    def final(self, schedule: Any) -> Any:
        found = np.ones((self.n, 4))
        if schedule == self.wild:
            found[:: self.every] = 20.0
        return found


@pytest.mark.law
def test_one_noise_in_two_hundred_shows_and_such_a_schedule_is_not_kept() -> None:
    wild, tame = presets.unipc(4, LINSPACE), presets.ddim(4, LINSPACE)
    tail: Any = _Rare(Settings().pairs.tail, wild, 200)
    assert blows_up(tail, wild, tame) and not blows_up(tail, tame, wild) and not blows_up(tail, tame, tame)
    with pytest.raises(ValueError, match="tail=-1"):
        Pairs(tail=-1)
    train, judge = mixture(16, 1), mixture(16, 2)
    found = run_stages(Problems(train, judge), 4, LINSPACE, stages=("grid",))
    assert found.improved and found.stages[0].amplification is not None
    kept = found.stages[0].schedule
    unsound = Problems(train, judge, tail=_Rare(100, kept, 5))  # type: ignore[arg-type]
    unsound.tail.network_cache = train.network_cache  # type: ignore[union-attr]
    again = run_stages(unsound, 4, LINSPACE, stages=("grid",))
    assert again.schedule != kept


@pytest.mark.law
def test_what_amplifies_too_much_never_leads() -> None:
    from diffplug.samplers.search.comparison import PairedComparison
    from diffplug.samplers.search.metric import LatentError

    leader = Leader(PairedComparison(mixture(8, 1), LatentError(), prune=False), None, limit=1.01)
    leader.watch(presets.dpmpp(4, "karras"))
    assert not leader.seen
    leader.watch(presets.ddim(4, "karras"))
    assert leader.seen == [presets.ddim(4, "karras")]
