"""Schedules from elsewhere: the forty of USF in their own file layout, and grids for elsewhere."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import UniPCMultistepScheduler
from usf_document import NONE, document
from usf_schedules import usf_schedules

from diffplug.samplers.model_noise import NoiseLevels
from diffplug.samplers.schedule import presets
from diffplug.samplers.solver.compile import compile_schedule
from diffplug.samplers.usf import export_grid, load_ems, load_usf

SD: dict[str, Any] = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
LEVELS = NoiseLevels.from_scheduler(UniPCMultistepScheduler(**SD))


def save(path: Path, value: Any) -> Path:
    torch.save(value, path)
    return path


USF = usf_schedules()


@pytest.mark.law
@pytest.mark.parametrize("name", USF)
def test_the_forty_survive_their_own_layout(name: str, tmp_path: Path) -> None:
    """Steps, first step and nodes; times as if they were those of EDM, which is exact."""
    schedule = USF[name]
    times = [math.exp(-lam) for lam in schedule.nodes.values]
    told = document(schedule, times)
    path = save(tmp_path / "one.pth", [told, np.float64(3.25)] if "lsun" in name else told)
    found = load_usf(path, "edm", mean=(0.0,))
    assert found.steps == schedule.steps
    first = "mean" if schedule.first == "zero_x0" else schedule.first  # EDM's x / sigma: the data are 0
    assert found.first == first and found.mean == (None if first == "model" else (0.0,))
    np.testing.assert_allclose(found.nodes.values, schedule.nodes.values, atol=1e-12)
    assert found.skips == (pytest.approx(0.9), 1.0)
    assert found.meta.get("score") == (3.25 if "lsun" in name else None)


@pytest.mark.law
@pytest.mark.parametrize("name", ["stable_diffusion_nfe5", "cifar10_sde_nfe5"])
def test_times_of_discrete_and_continuous_models(name: str, tmp_path: Path) -> None:
    """The first two interior times of the published lists."""
    discrete = name.startswith("stable")
    times = [1, 0.7350307, 0.5233757, 0.3162254, 0.2044142, 0.001431784]
    continuous = [1, 0.7014272, 0.5599988, 0.4101445, 0.2196064, 0.06616189, 0.0006581547]
    path = save(tmp_path / "a.pth", document(USF[name], times if discrete else continuous))
    found = load_usf(path, LEVELS if discrete else "vp", mean=(0.0,))
    np.testing.assert_allclose(found.nodes.values, USF[name].nodes.values, atol=1e-5)


@pytest.mark.law
def test_a_schedule_that_needs_statistics_says_so_when_it_is_run(tmp_path: Path) -> None:
    path = save(tmp_path / "v3.pth", document(USF["stable_diffusion_nfe3"], [1, 0.5984315, 0.4131815, 0.001]))
    found = load_usf(path, LEVELS)
    with pytest.raises(ValueError, match=r"step 1: param 'ems' needs the model's statistics"):
        compile_schedule(found, LEVELS)


@pytest.mark.law
def test_statistics_of_dpm_solver_v3_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "0.0001_1.0_30_1024"
    folder.mkdir()
    arrays = {name: np.random.default_rng(i).normal(size=(31, 3, 2, 2)) for i, name in enumerate("lsb")}
    np.savez(folder / "l.npz", l=arrays["l"])
    with pytest.raises(ValueError, match=r"1024': sb.npz is not there: a folder of DPM-Solver-v3 holds"):
        load_ems(folder, "vp")
    np.savez(folder / "sb.npz", s=arrays["s"])
    with pytest.raises(ValueError, match="sb.npz' holds no array 'b'"):
        load_ems(folder, "vp")
    np.savez(folder / "sb.npz", s=arrays["s"], b=arrays["b"])
    found = load_ems(folder, "vp")
    assert found.shape == (3, 2, 2) and np.array_equal(found.b, arrays["b"])
    ends = [-0.5 * math.log(math.expm1(2 * (t**2 * 19.9 / 4 + t * 0.05))) for t in (1.0, 1e-4)]
    np.testing.assert_allclose(found.lambdas[[0, -1]], ends, rtol=1e-9)
    assert len(load_ems(folder.rename(tmp_path / "7.5_30_8"), LEVELS).lambdas) == 31
    np.savez(tmp_path / "7.5_30_8" / "l.npz", l=np.array([Evil()], dtype=object))
    with pytest.raises(ValueError, match="l.npz' holds no array 'l'"):
        load_ems(tmp_path / "7.5_30_8", LEVELS)


class Evil:
    def __reduce__(self) -> Any:
        return (print, ("code of the file was run",))


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
def test_foreign_objects_are_refused_by_name_and_not_built(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = save(tmp_path / "evil.pth", {"timesteps": Evil()})
    with pytest.raises(ValueError, match=r"evil.pth.*it holds .*print.*only numbers, texts, lists"):
        load_usf(path, "edm")
    (tmp_path / "plain.pth").write_bytes(pickle.dumps({"timesteps": Evil()}))
    with pytest.raises(ValueError, match=r"plain.pth"):
        load_usf(tmp_path / "plain.pth", "edm")
    assert "code of the file" not in capsys.readouterr().out


def test_bad_files_are_named(tmp_path: Path) -> None:
    told = document(USF["lsun_nfe4"], [math.exp(-lam) for lam in USF["lsun_nfe4"].nodes.values])
    with pytest.raises(ValueError, match="does not exist"):
        load_usf(tmp_path / "none.pth", "edm")
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(ValueError, match=r"text.pth"):
        load_usf(tmp_path / "text.pth", "edm")
    with pytest.raises(ValueError, match="no solver schedule of USF: it lacks timesteps"):
        load_usf(save(tmp_path / "other.pth", {"weights": torch.zeros(2)}), "edm")
    with pytest.raises(ValueError, match="afs 'half' is unknown: allowed are no_afs"):
        load_usf(save(tmp_path / "afs.pth", {**told, "afs": "half"}), "edm")
    with pytest.raises(ValueError, match="begins with the mean of the data, which is not in the file"):
        load_usf(save(tmp_path / "mean.pth", {**told, "afs": "average_x0"}), "edm")
    with pytest.raises(ValueError, match="step 2 is incomplete"):
        load_usf(save(tmp_path / "short.pth", {**told, "start_points": [-1, -1]}), "edm")
    wrong = [{**NONE, "type": "implicit"}, *told["corrector_types"][1:]]
    with pytest.raises(ValueError, match="step 0: corrector type 'implicit': only 'pseudo'"):
        load_usf(save(tmp_path / "pece.pth", {**told, "corrector_types": wrong}), "edm")
    with pytest.raises(ValueError, match="times 'ddim' is unknown: allowed are edm, vp"):
        load_usf(save(tmp_path / "good.pth", told), "ddim")


@pytest.mark.law
def test_grids_leave_as_plain_lists() -> None:
    schedule = presets.unipc(5, "karras")
    sigmas, times = export_grid(schedule, LEVELS), export_grid(schedule, LEVELS, "timesteps")
    assert len(sigmas) == 6 and len(times) == 5 and sigmas[-1] == 0
    np.testing.assert_allclose(LEVELS.sigma_of_time(np.array(times)), sigmas[:-1], rtol=1e-5)
    assert sigmas == sorted(sigmas, reverse=True)
    with pytest.raises(ValueError, match="kind 'lambda': allowed are sigmas and timesteps"):
        export_grid(schedule, LEVELS, "lambda")


@pytest.mark.law
def test_statistics_ask_where_their_times_end_unless_a_name_or_a_model_says(tmp_path: Path) -> None:
    folder = tmp_path / "my_statistics"
    folder.mkdir()
    arrays = {name: np.zeros((9, 3, 1, 1)) for name in "lsb"}
    np.savez(folder / "l.npz", l=arrays["l"])
    np.savez(folder / "sb.npz", s=arrays["s"], b=arrays["b"])
    for times in ("edm", "vp"):
        with pytest.raises(
            ValueError, match=r"my_statistics': the folder's name does not say .*: give ends="
        ):
            load_ems(folder, times)
    found = load_ems(folder, "edm", ends=(0.002, 80.0))
    np.testing.assert_allclose(found.lambdas[[0, -1]], [-math.log(80.0), -math.log(0.002)])
    assert len(load_ems(folder, LEVELS).lambdas) == 9


@pytest.mark.law
def test_singlestep_presets_may_have_empty_entries_beyond_their_order(tmp_path: Path) -> None:
    told = document(presets.ddim(3, "linspace"), [1, 0.7, 0.4, 0.01])
    told["derivative_types"] = [[{"estimate": "Difference_0", "active_points": []}]] * 3
    told["skip_coefficients"] = None
    assert load_usf(save(tmp_path / "s.pth", told), LEVELS).steps == presets.ddim(3, "linspace").steps


@pytest.mark.law
@pytest.mark.parametrize(
    "change",
    [
        {"afs": []}, {"afs": ["x"]}, {"orders": 5}, {"orders": [float("nan")] * 3}, {"timesteps": None},
        {"timesteps": [1e308, 1, 0.5, 0.1]}, {"timesteps": [2.0, -1.0, 0.5, 0.1]}, {"corrector_types": 1},
        {"skip_coefficients": ["a"]}, {"prediction_types": [{}] * 3}, {"orders": [float("inf")] * 3},
        {"derivative_types": [[{"active_points": [0]}]] * 3, "orders": [2] * 3}, {"start_points": [None] * 3},
    ],
)  # fmt: skip
@pytest.mark.parametrize("times", ["edm", "vp", LEVELS], ids=["edm", "vp", "model"])
def test_files_with_values_of_a_wrong_kind_are_one_line(change: Any, times: Any, tmp_path: Path) -> None:
    told = {**document(presets.ddim(3, "linspace"), [1, 0.7, 0.4, 0.01]), "skip_coefficients": None, **change}
    try:
        load_usf(save(tmp_path / "m.pth", told), times)
    except ValueError as error:
        assert "m.pth" in str(error) and len(str(error)) < 600


def test_what_is_no_pickle_is_one_line(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    whole = save(tmp_path / "w.pth", document(presets.ddim(3, "linspace"), [1, 0.7, 0.4, 0.01])).read_bytes()
    texts = [b"a red circle\n", b"", b"PK\x03\x04", whole[: len(whole) // 2]]
    for _ in range(40):
        damaged = bytearray(whole)
        damaged[int(rng.integers(len(whole)))] ^= 1 << int(rng.integers(8))
        texts.append(bytes(damaged))
    for i, text in enumerate(texts):
        path = tmp_path / f"{i}.pth"
        path.write_bytes(text)
        try:
            load_usf(path, LEVELS)
        except ValueError as error:
            assert path.name in str(error)
