"""Loading by name: what loads is float32 on the CPU, what does not is told in a line that names it."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

import diffplug
from diffplug import loading


@pytest.mark.pipe
def test_a_folder_loads_in_float32(tiny_folder: Path) -> None:
    pipe = diffplug.load(tiny_folder)
    assert type(pipe).__name__ == "StableDiffusionPipeline"
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}


@pytest.mark.pipe
def test_a_dtype_asked_for_is_kept(tiny_folder: Path) -> None:
    assert diffplug.load(tiny_folder, dtype=torch.bfloat16).unet.dtype == torch.bfloat16


@pytest.mark.parametrize("name", ["shape", "Shapes", "/nowhere/at-all", "./missing", "a/b/c", ""])
def test_unknown_models(name: str) -> None:
    with pytest.raises(ValueError, match="unknown model .* Known: moving-shapes, shapes. Or give a folder"):
        diffplug.load(name)


def test_a_hub_id_that_cannot_be_had() -> None:
    with pytest.raises(ValueError, match="model 'diffplug-tests/no-such-model' is no folder here"):
        diffplug.load("diffplug-tests/no-such-model")


def test_a_folder_without_a_pipeline(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no pipeline: model_index.json is missing"):
        diffplug.load(tmp_path)


@pytest.mark.parametrize("damage", ["cut", "empty", "noise"])
def test_a_damaged_weight_file_is_named(tmp_path: Path, tiny_folder: Path, damage: str) -> None:
    folder = tmp_path / "model"
    shutil.copytree(tiny_folder, folder)
    file = next((folder / "unet").glob("*.safetensors"))
    whole = file.read_bytes()
    file.write_bytes({"cut": whole[:-7], "empty": b"", "noise": b"\xff" * 64}[damage])
    with pytest.raises(
        ValueError, match=rf"weight file '.*{file.name}' is damaged .* copy it again"
    ) as caught:
        diffplug.load(folder)
    assert "\n" not in str(caught.value)


@pytest.mark.pipe
def test_the_embedded_model_is_float32_whatever_is_stored(
    tmp_path: Path, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    diffplug.load(tiny_folder, dtype=torch.float16).save_pretrained(tmp_path)
    monkeypatch.setattr(loading, "shapes_folder", lambda: tmp_path)
    pipe = diffplug.load("shapes")
    assert {pipe.unet.dtype, pipe.vae.dtype, pipe.text_encoder.dtype} == {torch.float32}
    assert pipe.safety_checker is None


def test_the_embedded_model_that_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loading, "shapes_folder", lambda: tmp_path)
    with pytest.raises(ValueError, match="model_index.json is missing. Reinstall"):
        diffplug.load("shapes")


@pytest.mark.pipe
def test_shapes_loads_and_paints() -> None:
    pipe = diffplug.load("shapes")
    pipe.set_progress_bar_config(disable=True)
    picture = pipe("a large red circle", num_inference_steps=2, output_type="np").images[0]
    assert picture.shape == (64, 64, 3)
