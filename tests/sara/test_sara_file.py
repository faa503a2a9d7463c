"""Files of sparse deltas: positions in bytes, exact values, and damaged files in one line."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from diffplug.sara import Delta, SparseDelta, load_delta, save_delta
from diffplug.sara.gaps import decode, encode
from diffplug.training import SaRA

pytestmark = pytest.mark.law


@pytest.mark.parametrize(
    "gaps", [[], [0], [254], [255], [509], [510], [0, 254, 255, 0, 509, 510], [2**31 - 2], [2**30, 2**30 - 3]]
)
def test_gaps_round_trip(gaps: list[int]) -> None:
    index = (torch.tensor(gaps, dtype=torch.long) + 1).cumsum(0) - 1
    code = encode(index)
    assert torch.equal(decode(code), index)
    assert code.dtype == torch.uint8 and len(code) == sum(g // 255 + 1 for g in gaps)


@settings(max_examples=50, deadline=None)
@given(st.sets(st.integers(0, 100_000), max_size=200))
def test_any_positions_round_trip(places: set[int]) -> None:
    index = torch.tensor(sorted(places), dtype=torch.long)
    assert torch.equal(decode(encode(index)), index)


def test_positions_that_do_not_rise_or_break_off_are_refused() -> None:
    for odd in ([3, 3], [5, 2], [-1]):
        with pytest.raises(ValueError, match="rise"):
            encode(torch.tensor(odd))
    with pytest.raises(ValueError, match="break off"):
        decode(torch.tensor([3, 255], dtype=torch.uint8))


@pytest.fixture
def delta() -> SparseDelta:
    torch.manual_seed(0)
    tuner = SaRA({"unet": nn.Linear(200, 100), "text_encoder": nn.Linear(30, 40)}, density=0.05)
    with torch.no_grad():
        for vector in tuner.parameters():
            vector.add_(torch.randn(len(vector)))
    return tuner.delta(info={"name": "style"})


@pytest.mark.parametrize("positions", ["gap", "index"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_saved_and_read(delta: SparseDelta, tmp_path: Path, dtype: str, positions: str) -> None:
    file = save_delta(delta, tmp_path / "style", dtype=dtype, positions=positions)  # type: ignore[arg-type]
    assert file.name == "style.sara.safetensors"
    found = load_delta(file)
    assert found.classes == {"unet": "Linear", "text_encoder": "Linear"} and found.info["name"] == "style"
    assert found.info["density"] == pytest.approx(0.05, abs=1e-3)
    before = {(c, n): d for c, n, d in delta.entries()}
    for component, name, one in found.entries():
        own = before[component, name]
        assert torch.equal(one.index, own.index) and one.shape == own.shape
        assert torch.equal(one.values, own.values.to(getattr(torch, dtype)))
        assert torch.equal(one.prints, own.prints)  # type: ignore[arg-type]
    assert (
        file.read_bytes()
        == save_delta(found, tmp_path / "again", dtype=dtype, positions=positions).read_bytes()
    )  # type: ignore[arg-type]


def test_an_entry_costs_three_bytes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    for density in (0.02, 0.05, 0.15):
        tuner = SaRA(nn.Linear(2000, 1000), density=density)
        size = tuner.save(tmp_path / f"{density}").stat().st_size
        assert size / tuner.count <= 3.3


def test_what_a_dtype_cannot_hold_is_refused(tmp_path: Path) -> None:
    big = SparseDelta(
        {"unet": {"w": Delta((2, 2), torch.tensor([1], dtype=torch.int32), torch.tensor([1e6]))}}
    )
    with pytest.raises(ValueError, match="dtype='float32'"):
        save_delta(big, tmp_path / "x")
    assert save_delta(big, tmp_path / "x", dtype="bfloat16").exists()
    with pytest.raises(ValueError, match="unknown dtype 'flaot16'"):
        save_delta(big, tmp_path / "x", dtype="flaot16")


def test_damaged_files_are_one_line(delta: SparseDelta, tmp_path: Path) -> None:
    whole = save_delta(delta, tmp_path / "whole").read_bytes()
    cut = tmp_path / "cut.sara.safetensors"
    for size in (0, 7, 100, len(whole) // 2, len(whole) - 1):
        cut.write_bytes(whole[:size])
        with pytest.raises(ValueError, match="damaged or cut off") as told:
            load_delta(cut)
        assert "\n" not in str(told.value)
    from safetensors.torch import load_file, save_file

    save_file({"w": torch.zeros(2)}, cut)
    with pytest.raises(ValueError, match="no SaRA delta"):
        load_delta(cut)
    with pytest.raises(ValueError, match="there is no SaRA file"):
        load_delta(tmp_path / "missing.sara.safetensors")
    from safetensors import safe_open

    with safe_open(tmp_path / "whole.sara.safetensors", framework="pt") as opened:
        metadata = opened.metadata()
    tensors = load_file(tmp_path / "whole.sara.safetensors")
    for key, change in (
        ("unet.weight.gap", lambda v: v[:-1]),
        (
            "unet.weight.gap",
            lambda v: torch.cat([v[:-1], torch.full((500,), 255, dtype=torch.uint8), v[-1:]]),
        ),
        ("unet.weight.delta", lambda v: v[:-1]),
    ):
        save_file({**tensors, key: change(tensors[key]).contiguous()}, cut, metadata=metadata)
        with pytest.raises(ValueError, match="no whole SaRA file"):
            load_delta(cut)
    index = decode(tensors["unet.weight.gap"]).int()
    index[0] = -1
    listed = {**tensors, "unet.weight.index": index}
    del listed["unet.weight.gap"]
    save_file(listed, cut, metadata=metadata)
    with pytest.raises(ValueError, match="do not rise within its shape"):
        load_delta(cut)
    save_file(tensors, cut, metadata={"sara": metadata["sara"].replace('"version": 1', '"version": 9')})
    with pytest.raises(ValueError, match="version 9"):
        load_delta(cut)
