"""Where the seconds of a steered Shapes run go, and what the engine itself takes."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from statistics import median
from time import perf_counter
from typing import Any

import torch
from diffusers import AutoencoderTiny

from diffplug.network.denoiser import count_network
from diffplug.plug import plug
from diffplug.seeds import generators
from diffplug.shapes import sample_prompts
from diffplug.steering import SVDD, FeynmanKac, Scoring


@dataclass
class Clock:
    """Seconds of the pipeline's own decoder and text encoder."""

    decode: float = 0.0
    encode: float = 0.0


@contextmanager
def clocked(pipe: Any) -> Iterator[Clock]:
    """A Clock that runs while the block does."""
    clock = Clock()
    decode, encode = pipe.vae.decode, pipe.encode_prompt

    def timed(part: str, call: Any) -> Any:
        def run(*args: Any, **kwargs: Any) -> Any:
            start = perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                setattr(clock, part, getattr(clock, part) + perf_counter() - start)

        return run

    pipe.vae.decode, pipe.encode_prompt = timed("decode", decode), timed("encode", encode)
    try:
        yield clock
    finally:
        del pipe.vae.decode, pipe.encode_prompt


def measure(pipe: Any, *, steps: int = 20, particles: int = 8, repeats: int = 5) -> dict[str, Any]:
    """Medians over repeats: shares of a Feynman-Kac run, and a preview's scoring against a network call."""
    rows = [_shares(pipe, steps, particles, repeat) for repeat in range(repeats + 1)][1:]
    shares = {name: median(row[name] for row in rows) for name in rows[0]}
    previews = [_preview(pipe, steps, particles, repeat) for repeat in range(repeats + 1)][1:]
    return {
        "shares": shares,
        "rest, bar": 0.03,
        "preview scoring / network call": median(previews),
        "preview, bar": 1.0,
    }


def _call(pipe: Any, steerer: Any, steps: int, seed: int) -> None:
    prompt = sample_prompts(1, seed=seed, kind="relation")[0]
    with plug(pipe, steerer) as plugged:
        plugged(prompt, num_inference_steps=steps, guidance_scale=5.0, eta=1.0, generator=generators(seed, 1))


def _shares(pipe: Any, steps: int, particles: int, seed: int) -> dict[str, float]:
    """Shares of the seconds of a run.

    "rest" is what lies outside network, decoding and reward: the pipeline's own (prompt, solver, PIL), which
    the same call without a steerer has as well ("pipeline"), and that of the steering.
    """
    steerer = FeynmanKac("shapes", particles=particles)
    with clocked(pipe) as clock:
        _call(pipe, steerer, steps, seed)
    report = steerer.report
    assert report is not None  # noqa: S101  # it has run
    total = report.total_seconds
    decode = max(clock.decode, report.decode_seconds)
    rest = total - report.network_seconds - decode - report.reward_seconds
    with clocked(pipe) as plain, count_network(pipe) as network:
        start = perf_counter()
        pipe(
            sample_prompts(1, seed=seed, kind="relation")[0],
            num_inference_steps=steps,
            guidance_scale=5.0,
            eta=1.0,
            num_images_per_prompt=particles,
            generator=generators(seed, particles),
        )
        outside = perf_counter() - start - network.seconds - plain.decode
    return {
        "network": report.network_seconds / total,
        "decode": decode / total,
        "reward": report.reward_seconds / total,
        "rest": rest / total,
        "pipeline": outside / total,
        "steering": (rest - outside) / total,
    }


@torch.no_grad()
def _preview(pipe: Any, steps: int, particles: int, seed: int) -> float:
    """Seconds of decoding and rating a scored call with a small decoder, over those of a network call."""
    torch.manual_seed(0)
    preview = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8),
        decoder_block_out_channels=(8, 8, 8),
        num_encoder_blocks=(1, 1, 1),
        num_decoder_blocks=(1, 1, 1),
    ).eval()
    steerer = SVDD("shapes", particles=particles, returns="all", scoring=Scoring(preview=preview))
    _call(pipe, steerer, steps, seed)
    report = steerer.report
    assert report is not None  # noqa: S101  # it has run
    calls = len(report.calls)
    scoring = (report.decode_seconds + report.reward_seconds * calls / (calls + 1)) / calls
    return scoring / (report.network_seconds / report.network_calls)
