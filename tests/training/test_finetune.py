"""`diffplug train finetune`: buckets, captions, the loss, priors, and what is refused before any work."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from toy import VP, network
from typer.testing import CliRunner

from diffplug.cli.main import app
from diffplug.training.conditions import Conditions
from diffplug.training.finetune.buckets import batch_of, best_size, bucket_sizes, epoch_length
from diffplug.training.finetune.objective import Finetune, FinetuneSettings, output_error
from diffplug.training.finetune.pictures import Bucket, captions_of
from diffplug.training.noise_path import NoisePath, Prediction
from diffplug.training.objective import Rows


@pytest.mark.law
def test_buckets_have_one_area_and_the_model_s_step() -> None:
    sizes = bucket_sizes(512, 64)
    assert sizes[0] == (512, 512) and (704, 320) not in sizes and (640, 384) in sizes and (384, 640) in sizes
    for width, height in sizes:
        assert width % 64 == height % 64 == 0 and 0.8 * 512**2 <= width * height <= 512**2
        assert 1 / 2 <= width / height <= 2
    assert best_size(1000, 1000, sizes) == (512, 512) and best_size(1600, 1000, sizes)[0] > 512
    with pytest.raises(ValueError, match="multiple of 64"):
        bucket_sizes(500, 64)


@pytest.mark.law
def test_an_epoch_shows_every_picture() -> None:
    counts = [5, 1, 8]
    length = epoch_length(counts, 4)
    seen = [batch_of(counts, 4, update, seed=3) for update in range(length)]
    found = Counter((bucket, item) for bucket, items in seen for item in items)
    assert set(found) == {(b, i) for b, n in enumerate(counts) for i in range(n)}
    assert all(len(items) == 4 for _, items in seen)
    again = [batch_of(counts, 4, length + update, seed=3) for update in range(length)]
    assert again != seen and batch_of(counts, 4, 2, seed=3) == seen[2]


def _bucket(count: int, told: float) -> Bucket:
    latents = torch.randn(count, 2, generator=torch.Generator().manual_seed(int(told)))
    return Bucket((8, 8), latents, Conditions({"told": torch.full((count, 2), told)}), [""] * count)


def _objective(prior: bool = False, **options: Any) -> Finetune:
    null = Conditions({"told": torch.zeros(1, 2)})
    drop = options.pop("drop", 0.0)
    old = [_bucket(4, 2.0)] if prior else []
    return Finetune(network(), [_bucket(6, 1.0)], old, null, FinetuneSettings(**options), drop=drop)


@pytest.mark.law
def test_a_batch_in_parts_is_the_batch() -> None:
    for prior in (False, True):
        objective = _objective(prior, prior_weight=0.5, prior_share=0.25, drop=0.3, snr_gamma=5.0)
        whole = objective.loss(Rows(0, 3, 8, range(8)))
        parts = [objective.loss(Rows(0, 3, 8, part)) for part in (range(0, 3), range(3, 7), range(7, 8))]
        assert torch.allclose(torch.cat([p.errors for p in parts]), whole.errors, rtol=1e-4, atol=1e-6)
        if prior:
            assert whole.weights is not None and whole.weights.tolist() == [1.0] * 6 + [0.5] * 2
            assert {"new", "old"} == set(whole.log)


@pytest.mark.law
def test_timesteps_are_one_of_each_part() -> None:
    index = _objective()._index(Rows(0, 0, 10, range(10)), list(range(10)), 10)
    assert [int((i - 1) // 100) for i in index] == list(range(10))


@pytest.mark.law
def test_the_error_is_of_what_the_network_says() -> None:
    torch.manual_seed(0)
    x0, eps, index = torch.randn(3, 2), torch.randn(3, 2), torch.tensor([1.0, 500, 999])
    for kind in ("epsilon", "v_prediction", "sample"):
        path = NoisePath(VP.abar, kind)
        x = path.noised(x0, eps, torch.zeros(3), index)
        alpha, sigma = (v.float()[:, None] for v in path.levels(index))
        target = {"epsilon": eps, "v_prediction": alpha * eps - sigma * x0, "sample": x0}[kind]
        said = path.predict(target + 0.5, x, index)
        assert torch.allclose(output_error(path, said, x0, eps, index), torch.full((3,), 0.25), rtol=2e-2)
    flow = NoisePath(None, "flow_prediction")
    said = Prediction(x0 + 1.0, eps)
    assert torch.allclose(output_error(flow, said, x0, eps, index), torch.ones(3), atol=1e-5)


@pytest.mark.law
def test_captions_are_dropped_as_often_as_said() -> None:
    objective = _objective(drop=0.25)
    seen = [objective._dropped(_bucket(8, 1.0).conditions, Rows(0, u, 8, range(8))) for u in range(100)]
    share = float((torch.cat([c.leaves["told"] for c in seen])[:, 0] == 0).double().mean())
    assert 0.2 < share < 0.3


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Four small pictures with captions, one of them wide."""
    place = tmp_path / "pictures"
    place.mkdir()
    for i in range(4):
        Image.new("RGB", (128 if i == 3 else 64, 64), (60 * i, 20, 30)).save(place / f"{i}.png")
        (place / f"{i}.txt").write_text(f"a red circle {'on a white background' * (i % 2)}")
    return place


@pytest.mark.pipe
@pytest.mark.slow
def test_from_a_folder_to_pictures(folder: Path, tmp_path: Path) -> None:
    told = [
        "run.updates=2",
        "run.batch=2",
        "validation.count=1",
        "validation.sheet=1",
        "objective.prior=a red circle",
    ]
    told += ["objective.prior_count=1", "tuner.density=0.02", "optimizer.warmup=0", "optimizer.ema=0.0"]
    command = ["train", "finetune", str(folder), "--tuner", "sara", "--json", "-o", str(tmp_path / "run")]
    command += ["--cache", str(tmp_path / "cache"), *(word for one in told for word in ("--set", one))]
    done = CliRunner().invoke(app, command)
    assert done.exit_code == 0, done.output
    student = tmp_path / "run" / "student"
    from diffplug import load, plug
    from diffplug.samplers import FewStep
    from diffplug.sara import load_delta, loaded_sara

    delta = load_delta(student / "adapter.sara.safetensors")
    moved = sum(int((one.values != 0).sum()) for _, _, one in delta.entries())
    assert set(delta.components) == {"unet"} and moved > 0.9 * len(delta)
    assert "fine-tuned on 4 pictures" in (student / "README.md").read_text()
    pipe = load("shapes")
    with plug(pipe, FewStep(str(student), strength=0.5)):
        assert loaded_sara(pipe) == {"finetuned": 0.5}
        assert pipe("a red circle", num_inference_steps=8, output_type="latent").images is not None
    assert loaded_sara(pipe) == {}


def listed(folder: Path, lines: str) -> None:
    (folder / "metadata.jsonl").write_text(lines)


@pytest.mark.pipe
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "0.txt").unlink(), "'0.png' has no caption"),
        (lambda f: (f / "0.txt").write_text(" "), "'0.png' has no caption"),
        (lambda f: (f / "0.txt").write_bytes(b"\xff\xfe\xff"), "no UTF-8"),
        (lambda f: (f / "0.png").write_bytes(b"no picture"), "cannot be read as a picture"),
        (lambda f: [p.unlink() for p in f.iterdir()], "holds no pictures"),
        (lambda f: listed(f, '{"file_name": "0.png", "text": ""}'), "'0.png' has no caption"),
        (
            lambda f: listed(f, '{"file_name": "0.png", "text": null}'),
            "line 1 of metadata.jsonl has the text",
        ),
        (lambda f: listed(f, '{"file_name": "7.png", "text": "x"}'), "has no picture '7.png'"),
        (lambda f: listed(f, ""), "lists no pictures"),
        (lambda f: (f / "metadata.jsonl").write_bytes(b"\xff\xfe"), "no UTF-8"),
    ],
)
def test_bad_folders_are_one_line(folder: Path, change: Any, message: str, tmp_path: Path) -> None:
    change(folder)
    done = CliRunner().invoke(app, ["train", "finetune", str(folder), "-o", str(tmp_path / "run")])
    assert done.exit_code == 2 and message in done.output.replace("\n", " ")


@pytest.mark.pipe
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--tuner", "sarra"], "Did you mean 'sara'"),
        (["--set", "data.size=60"], "multiple of"),
        (["--set", "objective.prior=missing.txt"], "no file or folder 'missing.txt'"),
        (["--set", "objective.prior=a red circle", "--set", "run.batch=1"], "take a larger batch"),
        (["--set", "student.guidance=3.0"], "objective.guidance"),
        (["--tuner", "sara", "--set", "tuner.density=0"], "density must be above 0"),
        (["--pictures", "elsewhere"], "two folders"),
        (["--set", "objective.triger=x"], "objective.trigger"),
        (["--set", "objective.guidance=nan"], "objective.guidance is nan"),
        (["--set", "objective.prior_weight=2"], "would do nothing without objective.prior"),
        (["--set", "objective.snr_floor=1"], "would do nothing without objective.snr_gamma"),
        (["--set", "data.prompts=x.txt"], "data.prompts='x.txt' would do nothing"),
    ],
)
def test_bad_options_are_one_line(folder: Path, words: list[str], message: str, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["train", "finetune", str(folder), "-o", str(tmp_path / "run"), *words])
    assert done.exit_code == 2 and message in done.output.replace("\n", " "), done.output
    assert not (tmp_path / "run" / "student").exists()


@pytest.mark.pipe
def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    for told, message in (("missing", "there is no folder"), ("missing.toml", "no config file")):
        done = CliRunner().invoke(
            app, ["train", "finetune", str(tmp_path / told), "-o", str(tmp_path / "run")]
        )
        assert done.exit_code == 2 and message in done.output.replace("\n", " ")
    Image.new("RGB", (8, 8)).save(tmp_path / "one.png")
    done = CliRunner().invoke(
        app, ["train", "finetune", str(tmp_path / "one.png"), "-o", str(tmp_path / "run")]
    )
    assert done.exit_code == 2 and "give the folder that it is in" in done.output.replace("\n", " ")
    done = CliRunner().invoke(app, ["train", "finetune", "-o", str(tmp_path / "run")])
    assert done.exit_code == 2 and "Give their folder" in done.output.replace("\n", " ")


@pytest.mark.law
def test_captions(folder: Path) -> None:
    (folder / "2.txt").unlink()
    found = captions_of(folder, caption="a thing", trigger="sketch, ")
    assert [text for _, text in found][2] == "sketch, a thing" and len(found) == 4
    with pytest.raises(ValueError, match="no folder"):
        captions_of(folder / "missing")
    listed(folder, '{"file_name": "0.png", "text": ""}\n{"file_name": "1.png", "text": "a dot"}')
    assert [text for _, text in captions_of(folder, caption="a thing")] == ["a thing", "a dot"]


@pytest.mark.pipe
def test_pictures_for_a_method_without_are_refused(folder: Path, tmp_path: Path) -> None:
    done = CliRunner().invoke(app, ["train", "trajectory", str(folder), "-o", str(tmp_path / "run")])
    assert done.exit_code == 2 and "data.pictures would do nothing" in done.output.replace("\n", " ")
