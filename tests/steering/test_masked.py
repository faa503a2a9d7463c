"""Discrete diffusion: the same engine steers sequences of tokens and Amused's token maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AmusedPipeline, AmusedScheduler, UVit2DModel, VQModel

from benchmarks.steering.chain import ChainRule
from diffplug.intercept import intercept_step
from diffplug.plug import plug
from diffplug.steering import (
    SVDD,
    FeynmanKac,
    ManySamples,
    MaskedDiffusionScheduler,
    MaskedSequencePipeline,
    NoiseSearch,
    Scoring,
)
from diffplug.steering.engine.score_times import every_call
from diffplug.steering.engine.step import ParticleSteps
from diffplug.steering.smc.filter import ParticleFilter
from diffplug.steering.smc.potentials import Difference
from diffplug.testing.closed_form.masked_tokens import (
    LENGTH,
    MASK,
    STEPS,
    STRENGTH,
    TARGET_MEAN,
    MaskedModel,
    Z,
)
from diffplug.testing.encoders import clip_encoder
from diffplug.testing.tokenizers import clip_tokenizer

MODEL = MaskedModel()


class Exact(torch.nn.Module):
    """The enumerated model as a network: logits of its exact marginals."""

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits [n, 4, 3]."""
        return MODEL.marginals[MODEL.number(tokens)].clamp(min=1e-30).log()


def zeros(tokens: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Return the number of zeros of sequences [n, 4]."""
    assert tokens.shape[1:] == (LENGTH,)
    return MODEL.reward(tokens)


def sequences() -> MaskedSequencePipeline:
    """Return a pipeline of the enumerated model."""
    return MaskedSequencePipeline(Exact(), MaskedDiffusionScheduler(mask_token_id=MASK), LENGTH)


@pytest.mark.law
def test_the_engine_is_exact_on_a_discrete_scheduler() -> None:
    pipe, k, groups = sequences(), 8, 5000
    rule = ChainRule(
        k,
        every_call,
        lambda count: ParticleFilter(
            groups=count,
            particles=k,
            potential=Difference(strength=STRENGTH, tilt="rising"),
            generators=[torch.Generator().manual_seed(3)],
            ess_threshold=0.7,
        ),
    )
    engine = ParticleSteps(rule, lambda step: MODEL.reward(step.x0))
    undo = intercept_step(pipe.scheduler, engine)
    generator = torch.Generator().manual_seed(0)
    x = pipe(batch_size=k * groups, num_inference_steps=STEPS, generator=generator).images
    undo()
    logw, log_z, _ = engine.filter.finish(MODEL.reward(x))
    ratio = log_z.exp() / Z
    assert abs(float(ratio.mean()) - 1) < 4 * float(ratio.std()) / groups**0.5
    weights = ratio[:, None] * torch.softmax(logw, -1)
    pooled = float((weights * MODEL.reward(x).reshape(groups, k)).sum() / weights.sum())
    assert pooled == pytest.approx(TARGET_MEAN, abs=0.06)


@pytest.mark.pipe
@pytest.mark.parametrize("value", [None, ManySamples(draws=3)])
def test_steerers_take_sequences(value: Any) -> None:
    pipe = sequences()
    steerer = SVDD(zeros, particles=10, strength=STRENGTH, scoring=Scoring(value=value))
    means = []
    for seed in range(12):
        with plug(pipe, steerer):
            out = pipe(num_inference_steps=STEPS, generator=torch.Generator().manual_seed(seed)).images
        assert out.shape == (1, LENGTH)
        assert out.dtype == torch.int64
        means.append(float(zeros(out, [])[0]))
    assert sum(means) / len(means) > 1.5, "0.49 without steering"


class Small(torch.nn.Module):
    """A masked-token network: all places at once through two layers."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.body = torch.nn.Sequential(
            torch.nn.Linear(LENGTH * 4, width), torch.nn.SiLU(), torch.nn.Linear(width, LENGTH * 3)
        )

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return logits [n, 4, 3]."""
        hot = torch.nn.functional.one_hot(tokens, 4).float().flatten(1)
        return self.body(hot).reshape(-1, LENGTH, 3)


@pytest.fixture(scope="module")
def trained() -> Small:
    """Return a network trained on samples of the joint law, masked at random, by cross-entropy."""
    generator = torch.Generator().manual_seed(0)
    whole = MODEL.states[(MODEL.states != MASK).all(-1)]
    law = torch.tensor([0.0, 0.5, 1.0])[whole].sum(-1) + (whole[:, 1:] == whole[:, :-1]).sum(-1)
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(0)
        network = Small()
        optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
        for step in range(1500):
            optimizer.param_groups[0]["lr"] = 1e-2 * (1 - step / 1500)
            x = whole[torch.multinomial(law.exp(), 256, replacement=True, generator=generator)]
            hidden = torch.rand(x.shape, generator=generator) < torch.rand(256, 1, generator=generator)
            logits = network(x.masked_fill(hidden, MASK))
            loss = torch.nn.functional.cross_entropy(logits[hidden], x[hidden])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return network.eval()


@pytest.mark.pipe
def test_a_trained_network_is_steered_towards_the_tilted_law(trained: Small) -> None:
    with torch.no_grad():
        learned = trained(MODEL.states).softmax(-1)
    gap = (learned - MODEL.marginals)[MODEL.states == MASK].abs()
    assert float(gap.max()) < 0.12 and float(gap.mean()) < 0.02, "it has not learned the law"
    pipe = MaskedSequencePipeline(trained, MaskedDiffusionScheduler(mask_token_id=MASK), LENGTH)
    steerer = FeynmanKac(
        zeros,
        particles=256,
        strength=STRENGTH,
        returns="all",
        scoring=Scoring(at="every", value=ManySamples(draws=8)),
    )
    with plug(pipe, steerer):
        x = pipe(num_inference_steps=STEPS, generator=torch.Generator().manual_seed(1)).images
    assert steerer.report is not None
    weights = torch.softmax(steerer.report.final_log_weights[0], -1)
    assert float((weights * zeros(x, [])).sum()) == pytest.approx(TARGET_MEAN, abs=0.35)
    assert float(steerer.report.log_z[0].exp()) == pytest.approx(Z, rel=0.35)


@pytest.fixture(scope="module")
def amused() -> Any:
    """Return a tiny Amused pipeline with random weights."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {"block_out_channels": [8], "layers_per_block": 1, "norm_num_groups": 4}
    pipe = AmusedPipeline(
        vqvae=VQModel(
            **sizes, latent_channels=8, num_vq_embeddings=32, sample_size=8, lookup_from_codebook=True,
            mid_block_add_attention=False,
        ),
        tokenizer=clip_tokenizer(),
        text_encoder=clip_encoder(projection=True),
        transformer=UVit2DModel(
            hidden_size=8, cond_embed_dim=32, micro_cond_encode_dim=2, micro_cond_embed_dim=10,
            encoder_hidden_size=32, vocab_size=32, codebook_size=8, in_channels=8, block_out_channels=8,
            num_res_blocks=1, downsample=True, upsample=True, block_num_heads=1, num_hidden_layers=1,
            num_attention_heads=1, intermediate_size=8, sample_size=8,
        ),
        scheduler=AmusedScheduler(mask_token_id=31),
    )  # fmt: skip
    pipe.set_progress_bar_config(disable=True)
    for part in (pipe.vqvae, pipe.transformer, pipe.text_encoder):
        part.eval()
    return pipe


def red(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
    """Return the mean of red, magnified."""
    assert images.shape[1:] == (3, 8, 8)
    return 300.0 * images[:, 0].mean((1, 2))


def run(pipe: Any, *plugs: Any, prompt: Any = ("a", "b"), seed: int = 0) -> torch.Tensor:
    """Return the pictures of a short call."""
    generator = torch.Generator().manual_seed(seed)
    with plug(pipe, *plugs):
        return pipe(list(prompt), num_inference_steps=5, output_type="pt", generator=generator).images


@pytest.mark.pipe
def test_amused_keeps_its_groups_together(amused: Any) -> None:
    plain = run(amused, prompt=["a", "a", "b", "b"])
    same = run(amused, FeynmanKac(lambda i, p: [0.5] * len(i), particles=2, returns="all"))
    assert torch.equal(plain, same), "a constant reward changes nothing"
    seen: list[list[str]] = []

    def reward(images: torch.Tensor, prompts: list[str]) -> torch.Tensor:
        seen.append(prompts)
        return red(images, prompts)

    steerer = FeynmanKac(reward, particles=2, strength=5.0)
    assert len(run(amused, steerer)) == 2
    assert seen[0] == ["a", "a", "b", "b"]
    torch.testing.assert_close(
        steerer.report.final_rewards.amax(-1), red(run(amused, steerer), []).double(), rtol=1e-4, atol=1e-3
    )


@pytest.mark.pipe
@pytest.mark.parametrize("value", [None, ManySamples(draws=2)])
def test_amused_is_steered(amused: Any, value: Any) -> None:
    gain = 0.0
    for seed in range(4):
        steerer = SVDD(red, particles=4, strength=10.0, returns="all", scoring=Scoring(value=value))
        steered = run(amused, steerer, prompt=["a"], seed=seed)
        gain += float(red(steered, []).mean() - red(run(amused, prompt=["a"] * 4, seed=seed), []).mean())
    assert gain > 0
    with pytest.raises(ValueError, match="masked tokens, which are all the same"):
        run(amused, NoiseSearch(red, particles=2))
