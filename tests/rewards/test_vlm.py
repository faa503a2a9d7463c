"""A vision-language model as a reward: yes against no, by a model of the real class with random weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Qwen2_5_VLProcessor, Qwen2VLImageProcessor

from diffplug import rewards
from diffplug.rewards.vlm import VlmReward, _ids
from diffplug.testing.encoders import qwen_vl_encoder
from diffplug.testing.tokenizers import qwen_tokenizer

PICTURES = torch.rand(3, 3, 56, 56, generator=torch.Generator().manual_seed(0))
PROMPTS = ["a red circle", "a very long prompt about a green cross, {braces} and all", "a blue square"]
_CHAT = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}"
    "{% if c['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>{% else %}{{ c['text'] }}"
    "{% endif %}{% endfor %}<|im_end|>\n{% endfor %}<|im_start|>assistant\n"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a tiny Qwen2.5-VL with its processor."""
    place = tmp_path_factory.mktemp("vlm")
    tokenizer = qwen_tokenizer()
    marks = ["<|image_pad|>", "<|video_pad|>", "<|vision_start|>", "<|vision_end|>"]  # 259 to 262
    tokenizer.add_tokens(marks, special_tokens=True)
    tokenizer.pad_token = "<|endoftext|>"  # noqa: S105  no password
    torch.manual_seed(0)
    model = qwen_vl_encoder().eval()
    model.save_pretrained(place)
    Qwen2_5_VLProcessor(
        image_processor=Qwen2VLImageProcessor(min_pixels=56 * 56, max_pixels=56 * 56),
        tokenizer=tokenizer,
        video_processor=_video_processor(),
        chat_template=_CHAT,
    ).save_pretrained(place)
    return place


def _video_processor() -> Any:
    from transformers import Qwen2VLVideoProcessor

    return Qwen2VLVideoProcessor()


@pytest.mark.pipe
def test_yes_against_no_by_picture_and_prompt(folder: Path) -> None:
    reward = VlmReward(str(folder), batch=2)
    scores = rewards.score(reward, PICTURES, PROMPTS)
    assert scores.shape == (3,) and bool(torch.isfinite(scores).all())
    alone = torch.cat([reward(PICTURES[i : i + 1], PROMPTS[i : i + 1]) for i in range(3)])
    torch.testing.assert_close(scores, alone, atol=1e-4, rtol=1e-4)  # padding changes nothing
    assert not torch.allclose(scores[:1], reward(PICTURES[1:2], PROMPTS[:1])), "the picture does not matter"
    assert not torch.allclose(scores[:1], reward(PICTURES[:1], ["a dog"])), "the prompt does not matter"
    turned = VlmReward(str(folder), question="Is {prompt} missing?")
    assert not torch.allclose(scores[:1], turned(PICTURES[:1], PROMPTS[:1]))


def test_spellings_become_tokens() -> None:
    tokenizer = qwen_tokenizer()
    letters = {tokenizer.decode([i]) for i in _ids(tokenizer, ("yes", "Yes", " yes"))}
    assert letters == {"y", "Y"}  # bytes only: the first letters


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="never mentions the prompt"):
        VlmReward("somewhere", question="Is it good?")
    with pytest.raises(ValueError, match="batch=0"):
        VlmReward("somewhere", batch=0)
    with pytest.raises(ValueError, match="model='': give a folder"):
        VlmReward("")
    with pytest.raises(ValueError, match="reward 'vlm' needs a model"):
        rewards.get("vlm")
    with pytest.raises(ValueError, match="does not load as a vision-language model"):
        VlmReward(str(tmp_path)).prepare()
    with pytest.raises(ValueError, match="'config.json' of the hub repository 'owner/none' is not here"):
        VlmReward("owner/none").prepare()
    assert isinstance(rewards.get("vlm:some/folder"), VlmReward)  # nothing is loaded yet
