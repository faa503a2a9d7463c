"""The step-aware preference model: identity, layout, loss; and that one learns on noised pairs."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

import diffplug
from diffplug.training.preference.pair_loss import soft_pair_loss
from diffplug.training.preference.step_preference import (
    StepJudge,
    StepPreference,
    resized,
    time_embedding,
    weighted_by_prompt,
)


def clip() -> Any:
    from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    text = CLIPTextConfig(**sizes, vocab_size=40, max_position_embeddings=8, eos_token_id=39)
    vision = CLIPVisionConfig(**sizes, image_size=16, patch_size=8)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=24)).eval()


def tokens(prompts: list[str], **options: Any) -> dict[str, Tensor]:
    rows = [[1 + ord(c) % 38 for c in prompt[:3].ljust(3)] + [39] for prompt in prompts]
    ids = torch.tensor(rows)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


@pytest.mark.law
def test_untrained_it_is_its_clip_at_every_timestep() -> None:
    base = clip()
    images = torch.rand(3, 3, 20, 24, generator=torch.Generator().manual_seed(1))
    inputs = tokens(["one", "two", "six"])
    with torch.no_grad():
        told = base(**inputs, pixel_values=resized(images, 16)).logits_per_image.diagonal()
        model = StepPreference(base, tokens).eval()
        texts = model.texts(["one", "two", "six"])
        for t in (0.0, 251.0, 999.0):
            assert torch.allclose(model(images, torch.full((3,), t), texts), told, atol=1e-5)
        for part in base.t_embedder.mlp.parameters():
            part.add_(0.1)
        base.vision_model.encoder.layers[0].adaLN_modulation[1].weight.add_(0.1)
        assert not torch.allclose(model(images, torch.full((3,), 9.0), texts), told, atol=1e-3)


@pytest.mark.law
def test_the_layout_is_the_published_one(tmp_path: Path) -> None:
    model = StepPreference(clip(), tokens)
    names = set(model.state_dict())
    for name in (
        "model.t_embedder.mlp.0.weight", "model.t_embedder.mlp.2.bias", "model.logit_scale",
        "model.vision_model.encoder.layers.1.adaLN_modulation.1.weight", "model.visual_projection.weight",
        "model.vision_model.adaLN_modulation.1.bias",
        "model.vision_model.encoder.layers.0.self_attn.q_proj.weight",
        "model.text_model.encoder.layers.0.mlp.fc1.weight", "model.vision_model.pre_layrnorm.weight",
    ):  # fmt: skip
        assert name in names, name
    state = {name: torch.randn_like(value) for name, value in model.state_dict().items()}
    state["model.text_model.embeddings.position_ids"] = torch.arange(8)[None]
    torch.save(state, tmp_path / "judge.bin")
    model.load(tmp_path / "judge.bin")
    assert torch.equal(model.state_dict()["model.logit_scale"], state["model.logit_scale"])
    less = {n: v for n, v in state.items() if "layers.0.adaLN" not in n}
    save_file(less, tmp_path / "less.safetensors")
    with pytest.raises(ValueError, match=r"adaLN_modulation.1.bias' is missing \(2 in all\)"):
        model.load(tmp_path / "less.safetensors")


@pytest.mark.law
def test_the_loss_has_its_least_value_where_labels_are_met() -> None:
    first, second = torch.tensor([2.0, 0.3], requires_grad=True), torch.tensor([0.5, 0.3])
    for label in (0.0, 1.0, 0.5):
        one = soft_pair_loss(first, second, torch.full((2,), label))
        other = soft_pair_loss(second, first, torch.full((2,), 1 - label))
        assert torch.allclose(one, other)
    tie = soft_pair_loss(first, second, torch.full((2,), 0.5))
    assert float(tie[1]) == pytest.approx(0, abs=1e-6) and float(tie[0]) > 0
    expected = -math.log(1 / (1 + math.exp(-1.5)))
    assert float(soft_pair_loss(first, second, torch.ones(2))[0].detach()) == pytest.approx(expected)
    assert weighted_by_prompt(["a", "a", "b"]).tolist() == pytest.approx([0.25, 0.25, 0.5])


@pytest.mark.law
def test_time_is_told_by_waves_and_pictures_are_cut_to_a_square() -> None:
    found = time_embedding(torch.tensor([0.0, 3.0]))
    assert found.shape == (2, 256) and found[0].tolist() == [1.0] * 128 + [0.0] * 128
    assert float(found[1, 128]) == pytest.approx(math.sin(3.0), abs=1e-6)
    assert float(found[1, 255]) == pytest.approx(math.sin(3.0 * 10_000 ** (-127 / 128)), abs=1e-6)
    flat = resized(torch.full((1, 3, 10, 30), 0.5), 16)
    assert flat.shape == (1, 3, 16, 16)
    assert float(flat[0, 0, 0, 0]) == pytest.approx((0.5 - 0.48145466) / 0.26862954, abs=1e-5)


@pytest.mark.law
def test_a_judge_learns_on_noised_pairs_and_judges_steps(tmp_path: Path) -> None:
    from diffplug.training.config import OptimizerSettings, RunSettings
    from diffplug.training.objectives.preference.step_preference import StepPreferenceTraining
    from diffplug.training.preference.pairs import PairLatents
    from diffplug.training.trainer import Trainer
    from tests.training.toy import conditions, network

    generator = torch.Generator().manual_seed(0)
    latents = torch.randn(32, 2, 2, generator=generator)
    latents[:, 0, 0], latents[:, 1, 0] = 1.5, -1.5

    def images(x: Tensor) -> Tensor:
        return x[:, :1, None, None].mul(0.3).sigmoid().expand(-1, 3, 16, 16)

    net = network()
    net.denoiser.forward = lambda x, timestep, told, return_dict=True: (torch.zeros_like(x),)  # type: ignore[method-assign]
    model = StepPreference(clip(), tokens)
    data = PairLatents(latents, conditions(32), [f"{i % 5}" for i in range(32)])
    objective = StepPreferenceTraining(model, net, data, images)
    Trainer(
        objective, RunSettings(updates=30, batch=16), OptimizerSettings(lr=2e-3, ema=0.0, warmup=0),
        folder=tmp_path, cpu=True,
    ).run()  # fmt: skip
    judge = StepJudge(model, images)
    scores = judge(torch.tensor([[1.5, 0], [-1.5, 0]]), ["1", "1"], 100.0)
    assert scores.dtype == torch.float64 and float(scores[0]) > float(scores[1])


@pytest.mark.law
def test_predictions_are_guided_as_the_roll_outs_that_are_judged() -> None:
    from diffplug.training.objective import Rows
    from diffplug.training.objectives.preference.step_preference import StepPreferenceTraining
    from diffplug.training.preference.pairs import PairLatents
    from tests.training.toy import conditions, network

    net, data = network(), PairLatents(torch.randn(4, 2, 2), conditions(4), list("abcd"))
    item, index = torch.arange(4), torch.tensor([900.0, 600, 300, 50])

    def seen(guidance: float) -> torch.Tensor:
        made = StepPreferenceTraining(
            StepPreference(clip(), tokens), net, data, lambda x: x, guidance=guidance
        )
        return made.seen(item, index, Rows(0, 0, 4, range(4)))

    noise = Rows(0, 0, 4, range(4)).normal(2)
    clean, told = data.latents.transpose(0, 1).flatten(0, 1), data.conditions.leaves["told"].repeat(2, 1)
    alpha, sigma = (v[:, None].float() for v in net.path.levels(index.repeat(2)))
    x = alpha * clean + sigma * noise.repeat(2, 1)

    def by_hand(words: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            eps = net.denoiser(x, (index.repeat(2) - 1).float(), words)[0]
        return (x - sigma * eps) / alpha

    free, plain = by_hand(torch.zeros_like(told)), by_hand(told)
    assert torch.allclose(seen(1.0), plain, atol=1e-4)
    assert torch.allclose(seen(5.0), free + 5 * (plain - free), rtol=1e-4, atol=1e-3)


def test_a_saved_judge_is_opened_again(tmp_path: Path) -> None:
    from transformers import AutoTokenizer, CLIPConfig, CLIPModel

    tokenizer = AutoTokenizer.from_pretrained(
        Path(diffplug.__file__).parent / "shapes" / "weights" / "tokenizer"
    )
    config: Any = clip().config
    config.text_config.vocab_size = len(tokenizer)
    model = StepPreference(CLIPModel(CLIPConfig.from_dict(config.to_dict())), tokenizer).eval()
    model.save(tmp_path)
    again = StepPreference.open(tmp_path).eval()
    images, t = torch.rand(2, 3, 16, 16), torch.tensor([5.0, 500.0])
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "config.json").write_bytes((tmp_path / "config.json").read_bytes())
    (bare / "judge.bin").write_bytes(b"no weights")
    with pytest.raises(ValueError, match="needs config.json and tokenizer of the CLIP"):
        StepPreference.open(bare)
    with pytest.raises(ValueError, match="judge.bin' cannot be read"):
        model.load(bare / "judge.bin")
    with torch.no_grad():
        words = ["a red circle", "a blue square"]
        assert torch.equal(model(images, t, model.texts(words)), again(images, t, again.texts(words)))
