"""The recipe of the Shapes CLIP: its captions, its files, its resuming; and the reward that reads them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_clip import as_pil
from typer.testing import CliRunner

from diffplug import rewards
from diffplug.rewards.networks.clip_network import clip_network
from diffplug.rewards.networks.shapes_clip_model import clip_config, clip_model, clip_tokenizer, save_clip
from diffplug.rewards.shapes_clip import ShapesClipReward, shapes_clip_folder
from diffplug.shapes.captions import VOCABULARY, captioned_scenes, phrase
from diffplug.shapes.grading import grade
from diffplug.shapes.model import TOKENS
from diffplug.shapes.rendering import render
from diffplug.training.shapes.clip import ClipRecipe, also_true, app, changed, preferred, train_clip, true_of
from diffplug.training.shapes.loop import Loop

open_clip = pytest.importorskip("open_clip")
WORDS = clip_tokenizer()
TINY = clip_config(WORDS, width=32, vision_width=2, text_layers=1)
RECIPE = ClipRecipe(steps=3, batch=6)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return train_clip(RECIPE, Loop(tmp_path_factory.mktemp("run"), cpu=True), TINY, WORDS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, trained: Any) -> Path:
    folder = tmp_path_factory.mktemp("clip") / "result"
    save_clip(trained, WORDS, TINY, folder)
    return folder


@pytest.mark.law
@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000))
def test_captions_are_true_and_changed_ones_are_not(seed: int) -> None:
    rng = np.random.default_rng(seed)
    pairs = captioned_scenes(rng, 4)
    other = [changed(told, rng) for _, told in pairs]
    assert all(true_of(told, scene) for scene, told in pairs)
    assert not any(true_of(told, scene) for (scene, _), told in zip(pairs, other, strict=True))
    images = render([scene for scene, _ in pairs])
    assert not grade(images, [phrase(told, rng) for told in other]).strict.any()


@pytest.mark.law
def test_pairs_that_count_neither_way() -> None:
    pairs = captioned_scenes(np.random.default_rng(0), 3)
    scenes, told = zip(*pairs, strict=True)
    found = also_true([*scenes, scenes[0]], [*told, told[0], told[1]])
    assert not found.diagonal().any()  # a scene's own caption
    expected = [
        [i != j and true_of(text, scene) for j, text in enumerate([*told, told[0], told[1]])]
        for i, scene in enumerate([*scenes, scenes[0]])
    ]
    assert found.tolist() == expected
    assert found[0, 3] and found[3, 0] and found[1, 4]


def test_the_tokenizer_covers_the_grammar_and_its_end_comes_last() -> None:
    assert all(len(WORDS(word, add_special_tokens=False).input_ids) == 1 for word in VOCABULARY)
    pairs = captioned_scenes(np.random.default_rng(1), 300)
    captions = [phrase(told, np.random.default_rng(i)) for i, (_, told) in enumerate(pairs)]
    assert max(len(ids) for ids in WORDS(captions).input_ids) <= TOKENS
    assert WORDS.eos_token_id == len(WORDS) - 1 and WORDS.pad_token_id == WORDS.eos_token_id


def test_the_shipped_size_stays_below_four_mebibytes(tmp_path: Path) -> None:
    save_clip(clip_model(clip_config(WORDS)), WORDS, clip_config(WORDS), tmp_path / "full")
    assert sum(file.stat().st_size for file in (tmp_path / "full").iterdir()) < 4 * 2**20


def test_a_stopped_run_goes_on_to_the_same_weights(tmp_path: Path, trained: Any) -> None:
    stopped = Loop(tmp_path / "run", cpu=True, minutes=0)
    train_clip(RECIPE, stopped, TINY, WORDS)
    assert stopped.stopped_early
    again = train_clip(RECIPE, Loop(tmp_path / "run", cpu=True), TINY, WORDS)
    for key, value in trained.state_dict().items():
        assert torch.equal(value, again.state_dict()[key]), key


@pytest.mark.contract
def test_open_clip_loads_the_folder_without_this_package(folder: Path, trained: Any) -> None:
    name = f"local-dir:{folder}"
    model, _, transform = open_clip.create_model_and_transforms(name)
    prompts = ["a red circle", "a small blue square above a green cross", "one yellow star"]
    ids = open_clip.get_tokenizer(name)(prompts)
    assert torch.equal(ids, WORDS(prompts, padding="max_length", return_tensors="pt").input_ids)
    scenes = [scene for scene, _ in captioned_scenes(np.random.default_rng(2), 3)]
    images = (render(scenes) * 255).round() / 255
    with torch.no_grad():
        inputs = torch.stack([transform(picture) for picture in as_pil(images)])
        image = model.eval().encode_image(inputs, normalize=True)
        cosines = (image * model.encode_text(ids, normalize=True)).sum(-1)
        own = trained.encode_image(images * 2 - 1, normalize=True)
    assert torch.allclose(image, own, atol=5e-3)  # half precision in the file
    for reward in (ShapesClipReward(folder), rewards.get(f"shapes-clip:{folder}")):
        assert torch.allclose(reward(images, prompts), cosines.double(), atol=1e-5)  # type: ignore[operator]


def test_missing_weights_name_the_recipe(tmp_path: Path) -> None:
    images = torch.rand(1, 3, 64, 64)
    with pytest.raises(ValueError, match=r"weights are missing.*`python -m diffplug.training.shapes.clip`"):
        ShapesClipReward(tmp_path)(images, ["a red circle"])


def test_the_shipped_weights_know_everything_but_the_side() -> None:
    folder = shapes_clip_folder()
    assert sum(file.stat().st_size for file in folder.iterdir()) < 4 * 2**20
    network: Any = clip_network(str(folder), None)
    shares = preferred(network.model.eval(), WORDS, n=150, split="test")
    assert shares["all"] > 0.88
    assert all(shares[kind] > 0.93 for kind in ("colour", "shape", "size", "background"))
    scenes, told = zip(*captioned_scenes(np.random.default_rng(3), 8, "test"), strict=True)
    images = render(scenes).requires_grad_(True)
    scores = rewards.get("shapes-clip")(images, [phrase(text, np.random.default_rng(0)) for text in told])
    scores.sum().backward()
    assert images.grad is not None and bool((images.grad.flatten(1).norm(dim=1) > 0).all())


def test_preference_is_a_share(trained: Any) -> None:
    shares = preferred(trained, WORDS, n=20)
    assert all(0 <= share <= 1 for share in shares.values()) and shares == preferred(trained, WORDS, n=20)
    assert {"all", "colour", "shape", "size", "background", "converse", "relation", "exchange"} == set(shares)


def test_the_command(tmp_path: Path) -> None:
    words = ["-o", str(tmp_path / "run"), "--into", str(tmp_path / "clip"), "--steps", "1", "--batch", "2"]
    done = CliRunner().invoke(app, [*words, "--device", "cpu", "--check", "10"])
    assert done.exit_code == 0, done.output
    assert "prefers the true caption" in done.output
    scores = ShapesClipReward(tmp_path / "clip")(torch.rand(2, 3, 64, 64), ["a red circle", "a blue cross"])
    assert scores.shape == (2,) and scores.isfinite().all()
    wrong = CliRunner().invoke(app, ["--device", "tpu"])
    assert wrong.exit_code == 2 and "take auto, cpu or cuda" in wrong.output
