"""Encodings that are kept change no bit, are made once, and are not kept where they could be wrong."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from diffplug import load
from diffplug.network.prompt_encodings import PromptEncodings, text_encoders
from diffplug.seeds import Seeds
from diffplug.testing import tiny


@pytest.fixture(scope="module")
def shapes() -> Any:
    pipe = load("shapes")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _latents(pipe: Any, prompts: list[str], **call: Any) -> torch.Tensor:
    from diffplug import plug

    with plug(pipe, Seeds(list(range(len(prompts))))):
        return pipe(prompts, num_inference_steps=2, output_type="latent", **call).images


def test_pictures_are_the_same_and_each_prompt_is_encoded_once(shapes: Any) -> None:
    prompts = ["a red circle", "a blue square", "a red circle", "a red circle"]
    wanted = _latents(shapes, prompts, guidance_scale=5.0)
    kept = PromptEncodings()
    with kept.on(shapes):
        for _ in range(2):
            assert torch.equal(_latents(shapes, prompts, guidance_scale=5.0), wanted)
    assert (kept.encoded, kept.hits) == (3, 13)  # two prompts, and the empty one of guidance
    assert "forward" not in vars(shapes.text_encoder)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux", "pixart", "qwenimage", "lumina2", "wan"])
def test_an_encoding_does_not_depend_on_what_is_beside_it(family: str) -> None:
    pipe = tiny(family)
    encoders = text_encoders(pipe)
    if not encoders:
        pytest.skip("it has no text encoder")
    for name, encoder in encoders.items():
        ids = torch.tensor([[3, 4, 5, 6], [5, 3, 2, 1], [3, 4, 5, 6]])
        kept = PromptEncodings()
        with kept.on(pipe), torch.no_grad():
            three = encoder(input_ids=ids, output_hidden_states=True)
            one = encoder(input_ids=ids[1:2], output_hidden_states=True)
            plain = encoder(input_ids=ids)
        assert (kept.encoded, kept.hits) == (4, 3), name
        assert torch.equal(three[0][1:2], one[0]) and torch.equal(three[0][0], three[0][2]), name
        assert all(
            torch.equal(a[1:2], b) for a, b in zip(three.hidden_states, one.hidden_states, strict=True)
        )
        assert "hidden_states" not in plain or plain.hidden_states is None
        torch.testing.assert_close(three[0], encoder(input_ids=ids)[0])


def test_what_may_not_be_kept_goes_through(shapes: Any) -> None:
    encoder, ids = shapes.text_encoder, torch.tensor([[3, 4], [5, 6]])
    kept = PromptEncodings()
    with kept.on(shapes):
        assert encoder(ids)[0].requires_grad
        with torch.no_grad():
            encoder(ids, position_ids=torch.tensor([[0, 1]]))  # a row for all
    assert (kept.encoded, kept.hits) == (0, 0)


def test_an_adapter_is_seen_once_the_old_is_forgotten(shapes: Any) -> None:
    ids, kept = torch.tensor([[3, 4]]), PromptEncodings()
    norm = [one for one in shapes.text_encoder.modules() if isinstance(one, torch.nn.LayerNorm)][-1]
    with kept.on(shapes), torch.no_grad():
        before = shapes.text_encoder(ids)[0].clone()
        norm.bias += 1
        try:
            assert torch.equal(shapes.text_encoder(ids)[0], before)
            kept.clear()
            assert not torch.equal(shapes.text_encoder(ids)[0], before)
        finally:
            norm.bias -= 1


def test_the_longest_unused_go_first(shapes: Any) -> None:
    rows, kept = [torch.tensor([[3, i]]) for i in range(4, 8)], PromptEncodings(most_bytes=1)
    with kept.on(shapes), torch.no_grad():
        for row in rows + rows[-1:] + rows[:1]:
            shapes.text_encoder(row)
    assert (kept.encoded, kept.hits) == (5, 1)
