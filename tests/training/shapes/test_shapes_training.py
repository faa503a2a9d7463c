"""The recipe: seeded, resumable at any step, and ending in a folder that plain Diffusers reads."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from diffusers import StableDiffusionPipeline
from torch import Tensor, nn
from typer.testing import CliRunner

from diffplug.shapes.captions import VOCABULARY, captioned_scenes, parse, phrase, sample_prompts
from diffplug.shapes.model import TOKENS, autoencoder, byte_pair_merges, denoiser, text_encoder, tokenizer
from diffplug.training.shapes import train
from diffplug.training.shapes.denoiser import (
    DenoiserRecipe,
    Latents,
    encode_scenes,
    mixed_timesteps,
    stratified_timesteps,
    train_denoiser,
)
from diffplug.training.shapes.loop import Loop
from diffplug.training.shapes.text_encoder import Reader, TextRecipe, classes, layout, train_text
from diffplug.training.shapes.train import app


def small_run(
    folder: Path, *, minutes: float | None = None, steps: int = 12
) -> tuple[Loop, dict[str, Tensor]]:
    torch.manual_seed(0)
    part = nn.Linear(4, 4)

    def loss(step: int) -> tuple[Tensor, dict[str, float]]:
        x = torch.randn(8, 4)
        value = (part(x) - x.flip(1)).square().mean()
        return value, {"loss": value.item()}

    loop = Loop(folder, cpu=True, minutes=minutes, save_every=5)
    return loop, loop.run({"part": part}, loss, steps=steps, lr=1e-2, ema=0.9)["part"]


@pytest.mark.law
def test_a_resumed_run_equals_an_uninterrupted_one(tmp_path: Path) -> None:
    _, whole = small_run(tmp_path / "whole")
    for _ in range(12):  # every start is stopped after one step
        loop, pieces = small_run(tmp_path / "pieces", minutes=0.0)
    assert not loop.stopped_early
    assert all(torch.equal(whole[name], pieces[name]) for name in whole)
    losses = [
        json.loads(line)["loss"] for line in (tmp_path / "pieces" / "log.jsonl").read_text().splitlines()
    ]
    assert losses == [
        json.loads(line)["loss"] for line in (tmp_path / "whole" / "log.jsonl").read_text().splitlines()
    ]


@pytest.mark.law
def test_every_word_is_one_token_and_every_caption_fits(tmp_path: Path) -> None:
    words = tokenizer()
    assert all(len(words(word).input_ids) == 3 for word in VOCABULARY)
    prompts = [p for split in ("train", "test") for p in sample_prompts(200, kind="three", split=split)]
    lengths = [len(words(p).input_ids) for p in prompts]
    assert max(lengths) <= TOKENS
    words.save_pretrained(tmp_path)
    again = type(words).from_pretrained(tmp_path)
    assert again(prompts[:20]).input_ids == words(prompts[:20]).input_ids
    assert words.decode(words("a zebra").input_ids, skip_special_tokens=True).strip() == "a zebra"


@pytest.mark.law
def test_byte_pairs_merge_the_commonest_first_and_ties_by_the_alphabet() -> None:
    merges = byte_pair_merges({"abc", "ab", "xbc"})
    assert merges == [("b", "c</w>"), ("a", "b</w>"), ("a", "bc</w>"), ("x", "bc</w>")]


@pytest.mark.law
def test_classes_tell_every_content_apart() -> None:
    told = parse("a large red circle to the left of a blue square on a grey background")
    rows = classes(told)
    assert rows.shape == (3, 5) and not rows[2, :4].any() and (rows[:, 4] == rows[0, 4]).all()
    swapped = classes(parse("a blue square to the right of a large red circle on a grey background"))
    assert (swapped[[1, 0, 2]] == rows).all()
    others = [
        "a red circle left of a blue square",
        "a large red circle above a blue square on a grey background",
    ]
    assert all((classes(parse(other)) != rows).any() for other in others)


@pytest.mark.law
def test_the_layout_says_what_stands_in_each_direction() -> None:
    told = parse("a large red circle to the left of a blue square on a grey background")
    rows = layout(told)
    left, right = classes(told)[:2, :2]
    assert (rows[0] == left).all() and (rows[1] == right).all() and not rows[2:].any()
    assert (layout(parse("a blue square right of a red circle")) == rows).all()
    assert (layout(parse("a red circle above a blue square"))[2] == left).all()
    assert not layout(parse("a red circle and a blue square")).any()


@pytest.mark.law
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_text_encoder_learns_to_read_what_it_has_not_seen(tmp_path: Path) -> None:
    """After 150 steps of 64 the heads read most facts of prompts whose contents were held out."""
    words, rng = tokenizer(), np.random.default_rng(0)
    told = [content for _, content in captioned_scenes(rng, 400)]
    recipe = TextRecipe(steps=150, batch=64)
    text, reader = train_text(recipe, Loop(tmp_path, cpu=True), told, words)
    prompts = [phrase(content, rng) for _, content in captioned_scenes(rng, 100, split="test")]
    ids = words(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids
    with torch.no_grad():
        read = torch.stack([row.argmax(-1) for row in reader(text(ids).last_hidden_state)], dim=-1)
    wanted = torch.from_numpy(np.stack([classes(parse(prompt)) for prompt in prompts]))
    assert (read == wanted).double().mean() > 0.9


@pytest.mark.law
def test_timesteps_cover_the_schedule_evenly() -> None:
    t = stratified_timesteps(50, torch.device("cpu"))
    assert torch.equal(t // 20, torch.arange(50))
    mixed = mixed_timesteps(50, 800, torch.device("cpu"))
    assert torch.equal(mixed[:25] // 40, torch.arange(25))
    assert torch.equal((mixed[25:] - 800) // 8, torch.arange(25))


@pytest.mark.law
def test_a_third_of_the_pictures_without_a_caption_show_one_object_beside_their_natural_share() -> None:
    told = [content for _, content in captioned_scenes(np.random.default_rng(0), 500)]
    data, recipe = Latents(torch.zeros(500, 4, 16, 16), told), DenoiserRecipe(batch=400, drop=0.25)
    rows, captions = data.draw(np.random.default_rng(1), recipe)
    dropped = np.array([not caption for caption in captions])
    assert 0.15 < dropped.mean() < 0.35
    single = np.array([len(told[row].nouns) == 1 for row in rows])
    natural = single[~dropped].mean()
    assert 0.1 < natural < 0.3
    assert abs(single[dropped].mean() - (1 + 2 * natural) / 3) < 0.1
    assert all(
        parse(caption).key == told[row].key for row, caption in zip(rows, captions, strict=True) if caption
    )


@pytest.mark.law
def test_bfloat16_training_leaves_a_network_of_single_precision(tmp_path: Path) -> None:
    """The averaged network is float32, runs without autocast, and its processors are Diffusers' defaults."""
    words = tokenizer()
    torch.manual_seed(0)
    unet, text = denoiser(), text_encoder(words)
    stock = {type(each) for each in unet.attn_processors.values()}
    recipe = DenoiserRecipe(steps=2, batch=8, scenes=64, dtype=torch.bfloat16)
    data = encode_scenes(autoencoder(), recipe, tmp_path / "latents.safetensors")
    parts = {"unet": unet, "text": text, "words": words, "reader": Reader(text.config.hidden_size)}
    unet, text = train_denoiser(recipe, Loop(tmp_path, cpu=True), data, **parts)
    assert {p.dtype for p in unet.parameters()} == {torch.float32}
    assert {type(each) for each in unet.attn_processors.values()} == stock
    assert not any(part._forward_pre_hooks for part in unet.modules())
    states = text(words(["a red circle"], return_tensors="pt").input_ids).last_hidden_state
    assert unet(torch.randn(1, 4, 16, 16), 500, states).sample.isfinite().all()


@pytest.mark.pipe
@pytest.mark.slow
def test_the_whole_recipe_in_a_few_steps(tmp_path: Path) -> None:
    arguments = ["-o", str(tmp_path), "--device", "cpu", "--scenes", "64"]
    arguments += ["--vae-steps", "2", "--text-steps", "2", "--steps", "2"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    folder = tmp_path / "pipeline"
    assert result.output.strip().endswith(str(folder))
    assert not [path for path in folder.rglob("*.json") if str(tmp_path) in path.read_text("utf-8")]
    assert not list(folder.rglob("*.bin")) and list(folder.rglob("*.safetensors"))
    pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    image = pipe("a red circle", num_inference_steps=2, output_type="np").images
    assert image.shape == (1, 64, 64, 3) and np.isfinite(image).all()


def test_latents_of_another_recipe_are_refused(tmp_path: Path) -> None:
    cache = tmp_path / "latents.safetensors"
    data = encode_scenes(autoencoder(), DenoiserRecipe(scenes=64), cache)
    assert data.means.shape == (64, 4, 16, 16) and len(data.told) == 64
    with pytest.raises(ValueError, match="holds 64 latents, the recipe asks for 128: remove it"):
        encode_scenes(autoencoder(), DenoiserRecipe(scenes=128), cache)


def test_imitated_bfloat16_is_warned_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise typer.Exit(0)

    monkeypatch.setattr(train, "finished_vae", stop)
    for imitated in (True, False):
        monkeypatch.setattr(train, "_imitates_bfloat16", lambda found=imitated: found)
        words = ["-o", str(tmp_path), "--device", "cpu", "--dtype", "bfloat16"]
        result = CliRunner().invoke(app, words)
        assert result.exit_code == 0
        assert ("take --dtype float32" in result.output) == imitated


def test_an_unknown_dtype_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["-o", str(tmp_path), "--dtype", "int8"])
    assert result.exit_code == 2 and "take float32 or bfloat16" in result.output


def test_an_unknown_device_is_refused(tmp_path: Path) -> None:
    result = CliRunner().invoke(app, ["-o", str(tmp_path), "--device", "tpu"])
    assert result.exit_code == 2 and "take auto, cpu or cuda" in result.output
