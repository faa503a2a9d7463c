"""Studies on disk: nothing is lost, nothing is mixed up, several processes share one."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

optuna = pytest.importorskip("optuna")
pytest.importorskip("sklearn")

from optuna.trial import TrialState  # noqa: E402
from planted import search_space  # noqa: E402
from test_schedules import SPACE, mixture, searcher  # noqa: E402

from diffplug.samplers.search.decisions.study import storage_of  # noqa: E402
from diffplug.samplers.search.metric import LatentError  # noqa: E402
from diffplug.samplers.search.result import SearchResult  # noqa: E402

GRIDS = ("linspace",)


def search(storage: Any, trials: int = 30, *, metric: str = "mean", **more: Any) -> SearchResult:
    return search_space(
        mixture(8, 1), mixture(8, 2), SPACE, trials=trials, grids=GRIDS, storage=storage,
        metric=LatentError(metric), **more,
    )  # fmt: skip


@pytest.mark.law
def test_an_interrupted_search_goes_on_and_loses_nothing(tmp_path: Path) -> None:
    place = tmp_path / "deep" / "study.log"
    seen: list[float] = []

    def stop(spent: float, best: float) -> None:
        seen.append(spent)
        if len(seen) == 15:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        search(place, on_trial=stop)
    again: list[float] = []
    found = search(place, on_trial=lambda spent, best: again.append(spent))
    whole = search(None)
    assert seen[-1] == 15 and again[0] == 16 and len(again) == 15
    assert len(found.study.trials) == 30 and found.spent == 30
    presets = [t.user_attrs["preset"] for t in found.study.trials if "preset" in t.user_attrs]
    assert len(presets) == len(set(presets)) == 5  # of eight, three are the same at four steps
    assert found.history[:15] == whole.history[:15]
    assert search(place, trials=31).spent == 31


@pytest.mark.law
def test_a_schedule_that_was_being_run_is_not_counted(tmp_path: Path) -> None:
    train, runs = mixture(8, 1), [0]

    class Stopping:
        def __getattr__(self, name: str) -> Any:
            return getattr(train, name)

        def final(self, schedule: Any) -> Any:
            runs[0] += 1
            if runs[0] == 12:
                raise KeyboardInterrupt
            return train.final(schedule)

    place = tmp_path / "study.log"
    with pytest.raises(KeyboardInterrupt):
        search_space(Stopping(), mixture(8, 2), SPACE, trials=30, grids=GRIDS, storage=place)  # type: ignore[arg-type]
    found = search(place)
    assert found.spent == 30 and len(found.study.trials) == 31


def test_studies_of_something_else_are_refused(tmp_path: Path) -> None:
    place = tmp_path / "study.log"
    search(place, told={"model": "a"})
    with pytest.raises(ValueError, match=r"study.log' is one of metric 'latent-mse', .* 'latent-mse:median'"):
        search(place, told={"model": "a"}, metric="median")
    with pytest.raises(ValueError, match=r"is one of model 'a', this search has 'b': take another file"):
        search(place, told={"model": "b"})
    foreign = optuna.create_study(study_name="4 evaluations", storage=storage_of(tmp_path / "other.log"))
    foreign.add_trial(optuna.trial.create_trial(value=1.0))
    with pytest.raises(ValueError, match="is one of evaluations None, this search has 4"):
        search(tmp_path / "other.log")


def test_a_file_that_holds_no_studies_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "note.db"
    path.write_text("this is no database at all, but long enough to be looked at" * 20)
    with pytest.raises(ValueError, match=r"note.db' cannot be opened as a study .*: take another file"):
        search(path)
    assert path.read_text().startswith("this is no database")


def test_places_for_studies(tmp_path: Path) -> None:
    assert storage_of(None) is None and storage_of("postgresql://host/x") == "postgresql://host/x"
    assert storage_of(tmp_path / "a.db") == f"sqlite:///{tmp_path / 'a.db'}"
    assert type(storage_of(tmp_path / "a.log")).__name__ == "JournalStorage"


@pytest.mark.law
def test_two_workers_share_the_work(tmp_path: Path) -> None:
    """Both stop once the budget is used together. The one that ends first may miss the other's last trial;
    the one that ends last, and everybody who asks later, has the best of both."""
    from concurrent.futures import ThreadPoolExecutor

    place = tmp_path / "study.log"
    with ThreadPoolExecutor(2) as workers:
        found = list(workers.map(lambda seed: search(place, trials=34, seed=seed), (0, 1)))
    trials = found[0].study.get_trials()
    assert sorted(t.number for t in trials) == list(range(len(trials))) and 34 <= len(trials) <= 35
    presets = [t.user_attrs["preset"] for t in trials if "preset" in t.user_attrs]
    assert {"DDIM, linspace", "UniPC-2, linspace"} <= set(presets)
    best = min(t.value for t in trials if t.state == TrialState.COMPLETE)
    assert min(each.finalists[0][0] for each in found) == best
    later = search(place, trials=34)
    assert later.finalists[0][0] == best and len(later.study.trials) == len(trials)


def test_a_refused_metric_leaves_no_study_and_a_refused_study_costs_no_run(tmp_path: Path) -> None:
    place, train = tmp_path / "study.log", mixture(8, 1)

    class Holes(LatentError):
        def marks(self, problem: Any, final: Any) -> Any:
            return super().marks(problem, final) * float("nan")

    with pytest.raises(ValueError, match="8 of 8 numbers that are not finite"):
        search_space(train, mixture(8, 2), SPACE, trials=30, grids=GRIDS, storage=place, metric=Holes())
    assert not place.exists()
    search(place)
    before = train.network_cache.evaluated
    with pytest.raises(ValueError, match="is one of metric 'latent-mse'"):
        search_space(train, train, SPACE, trials=30, grids=GRIDS, storage=place, metric=LatentError("log"))
    assert train.network_cache.evaluated == before


@pytest.mark.law
@pytest.mark.parametrize(("year", "presets"), [(None, 5), (2000, 5), (9999, 4)])
def test_a_preset_that_was_interrupted_is_run_again(year: int | None, presets: int) -> None:
    """Stopped by hand, or run by a process that is gone; not while another process is at it."""
    train, runs, storage = mixture(8, 1), [0], optuna.storages.InMemoryStorage()

    class Stopping:
        def __getattr__(self, name: str) -> Any:
            return getattr(train, name)

        def final(self, schedule: Any) -> Any:
            runs[0] += 1
            if runs[0] == 4:  # the first one checks the metric
                raise KeyboardInterrupt
            return train.final(schedule)

    with pytest.raises(KeyboardInterrupt):
        search_space(Stopping(), mixture(8, 2), SPACE, trials=30, grids=GRIDS, storage=storage)  # type: ignore[arg-type]
    if year is not None:
        study = optuna.load_study(study_name="4 evaluations", storage=storage)
        (lost,) = (t for t in study.trials if t.state == TrialState.FAIL)
        told = {"params": lost.params, "distributions": lost.distributions}
        running = optuna.trial.create_trial(state=TrialState.RUNNING, **told)
        running.datetime_start = datetime(year, 1, 1)
        study.add_trial(running)
    done = [t for t in search(storage).study.trials if t.state == TrialState.COMPLETE]
    assert len({t.user_attrs["preset"] for t in done if "preset" in t.user_attrs}) == presets


@pytest.mark.law
@pytest.mark.parametrize("method", ["random", "tpe", "s3"])
def test_what_goes_on_does_not_begin_again(method: str) -> None:
    storage = optuna.storages.InMemoryStorage()
    search(storage, trials=30, method=searcher(method))
    trials = search(storage, trials=50, method=searcher(method)).study.get_trials()
    assert len(trials) == 50 == len({tuple(sorted(t.params.items())) for t in trials})
