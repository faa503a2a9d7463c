"""Pairs of pictures: what is read and refused, and the loss as an expected log-ratio."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import diffplug
from diffplug.training.objectives.preference.diffusion_dpo import DiffusionDPO, DiffusionDPOSettings
from diffplug.training.objectives.preference.pso_offline import OfflinePSO, OfflineSettings
from diffplug.training.preference.kernel import Kernel
from diffplug.training.preference.pairs import Pair, PairLatents, read_pairs
from tests.training.preference.test_pso import DOUBLE, gradient, rows, shaken
from tests.training.toy import VP, conditions, network


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("x.png", "y.png", "z.png"):
        Image.new("RGB", (8, 8), (ord(name[0]), 0, 0)).save(tmp_path / name)
    return tmp_path


def written(folder: Path, *lines: Any, name: str = "pairs.jsonl") -> Path:
    file = folder / name
    file.write_text("".join(json.dumps(line) + "\n" if isinstance(line, dict) else line for line in lines))
    return file


def test_a_folder_a_table_and_votes_give_pairs(folder: Path) -> None:
    row = {"prompt": "p", "better": "x.png", "worse": "y.png"}
    written(folder, row)
    (one,) = read_pairs(folder)
    assert (one.prompt, one.better, one.worse) == ("p", folder / "x.png", folder / "y.png")
    votes = written(
        folder,
        {"prompt": "p", "a": "x.png", "b": "y.png", "vote": "b"},
        {"prompt": "q", "a": "x.png", "b": "z.png", "vote": "tie"},
        {"prompt": "r", "a": "x.png", "b": "z.png", "vote": "a"},
        {"prompt": "r", "a": "z.png", "b": "x.png", "vote": "a"},
        name="votes.jsonl",
    )
    (vote,) = read_pairs(votes)
    assert (vote.better, vote.worse) == (folder / "y.png", folder / "x.png")


def test_a_parquet_file_holds_names_or_bytes(folder: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    data = (folder / "x.png").read_bytes()
    table = pa.table({"prompt": ["p"], "better": [{"bytes": data}], "worse": [{"bytes": b"other"}]})
    parquet.write_table(table, folder / "pairs.parquet")
    (one,) = read_pairs(folder / "pairs.parquet")
    assert one.better == data and one.worse == b"other"


def test_a_folder_may_hold_a_parquet_file(folder: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pa.table({"prompt": ["p"], "better": ["x.png"], "worse": ["y.png"]})
    parquet.write_table(table, folder / "pairs.parquet")
    (one,) = read_pairs(folder)
    assert (one.better, one.worse) == (folder / "x.png", folder / "y.png")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("pairs.parquet", b"PAR1 and no more", "objective.pairs: .*pairs.parquet' is no whole parquet file"),
        ("pairs.jsonl", b'{"prompt": "caf\xe9"}', "objective.pairs: .*pairs.jsonl' is no UTF-8 text"),
        ("pairs.csv", b"prompt,better,worse", "neither a .jsonl or .parquet file nor a folder"),
    ],
)
def test_damaged_tables_are_told_in_one_line(folder: Path, name: str, data: bytes, message: str) -> None:
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (folder / name).write_bytes(data)
    with pytest.raises(ValueError, match=message):
        read_pairs(folder / name)


@pytest.mark.pipe
def test_damaged_pictures_are_named_with_their_pair(folder: Path) -> None:
    pipe = diffplug.load("shapes")
    whole = (folder / "x.png").read_bytes()
    (folder / "cut.png").write_bytes(whole[: len(whole) // 2])
    for better, message in (
        (folder / "cut.png", "cut.png' cannot be read"),
        (b"no picture", "cannot be read"),
    ):
        named = f"objective.pairs: the better picture of 'a red circle' is damaged.*{message}"
        with pytest.raises(ValueError, match=named):
            PairLatents.of(pipe, [Pair("a red circle", better, whole)], folder / "cache")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 1 of pairs.jsonl is no JSON"),
        ("[]\n", "is no JSON object"),
        ({"prompt": "p", "better": "x.png"}, "needs prompt, better and worse"),
        ({"prompt": "p", "better": "gone.png", "worse": "x.png"}, "no picture 'gone.png'"),
        ({"prompt": "p", "a": "x.png", "b": "y.png", "vote": "c"}, "vote is 'c'"),
        ({"prompt": "p", "a": "x.png", "b": "y.png", "vote": "tie"}, "none of the 1 rows"),
        ({"prompt": "p", "better": "../x.png", "worse": "x.png"}, "line 1 .*cannot be a file name"),
        ({"prompt": "p", "better": 3, "worse": "x.png"}, "a file name or bytes, got int"),
    ],
)
def test_bad_pairs_are_told_in_one_line(folder: Path, line: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_pairs(written(folder, line))


def test_a_source_that_is_not_there(folder: Path) -> None:
    with pytest.raises(ValueError, match="neither a .jsonl or .parquet file nor a folder"):
        read_pairs(folder / "gone")


def data(n: int = 8) -> PairLatents:
    latents = torch.randn(n, 2, 2, generator=torch.Generator().manual_seed(2), dtype=DOUBLE)
    return PairLatents(latents, conditions(n, DOUBLE), [""] * n)


def offline(**settings: Any) -> OfflinePSO:
    told = OfflineSettings(**{"anchor": 0.0, **settings})
    return OfflinePSO(network(dtype=DOUBLE), Kernel.renoise(VP, 4), data(), told)


@pytest.mark.law
def test_the_loss_is_the_expected_log_ratio_of_the_renoising_step() -> None:
    kernel = Kernel.renoise(VP, 4)
    clean, x0, ref, x = torch.randn(4, 1, 3, generator=torch.Generator().manual_seed(0), dtype=DOUBLE)
    n, step = 200_000, torch.tensor([1])
    z = torch.randn(n, 3, generator=torch.Generator().manual_seed(1), dtype=DOUBLE)
    form = kernel.forms[1]
    following = form.a * clean + form.s * z
    many = step.expand(n)
    drawn = kernel.log_ratio(x.expand(n, 3), x0.expand(n, 3), ref.expand(n, 3), following, many)
    told = kernel.omega(step) * ((clean - ref).square() - (clean - x0).square()).mean(1)
    assert float(drawn.mean()) == pytest.approx(float(told), abs=4 * float(drawn.std()) / math.sqrt(n))


@pytest.mark.law
def test_the_start_is_log_two_and_swapped_pairs_flip_the_gradient() -> None:
    one, other = offline(), offline()
    other.data = PairLatents(one.data.latents.flip(1), one.data.conditions, one.data.prompts)
    assert torch.allclose(one.loss(rows()).errors, torch.full((8,), math.log(2), dtype=DOUBLE))
    g, h = gradient(one, rows()), gradient(other, rows())  # type: ignore[arg-type]
    assert torch.allclose(g, -h, atol=1e-13) and float(g.norm()) > 0


@pytest.mark.law
def test_diffusion_dpo_is_the_same_with_errors_of_eps() -> None:
    beta = 40.0
    objective = DiffusionDPO(
        network(dtype=DOUBLE), Kernel.renoise(VP, 4), data(), DiffusionDPOSettings(beta=beta)
    )
    shaken(objective)  # type: ignore[arg-type]
    given = rows()
    found = objective.loss(given).errors
    again = rows()
    item = again.items(8)
    index, _ = objective.levels(again)
    noise = again.normal(2)
    errors = []
    for side in (0, 1):
        x = VP.noised(objective.data.latents[item, side], noise, torch.zeros_like(index), index)
        told = objective.data.conditions[item]
        net = objective.network
        errors.append(
            (net(x, index, told).eps - noise).square().mean(1)
            - (net.original(x, index, told).eps - noise).square().mean(1)
        )
    # 2 beta omega_eps = beta_dpo, with omega_eps = 1 / 2
    expected = -torch.nn.functional.logsigmoid(-beta / 2 * (errors[0] - errors[1]))
    assert torch.allclose(found, expected, rtol=1e-6)
