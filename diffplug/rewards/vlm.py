"""Any vision-language model as a reward: how much likelier "yes" is than "no" (after arXiv 2404.01291)."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffplug.checks import check_whole
from diffplug.rewards.networks.checkpoints import hub_file

QUESTION = 'Does this picture show "{prompt}"? Answer with one word, yes or no.'
_YES, _NO = ("yes", "Yes", " yes", " Yes", "YES"), ("no", "No", " no", " No", "NO")
_LOADING = threading.RLock()


class VlmReward:
    """logit(yes) - logit(no) of a model that is shown a picture and asked about its prompt.

    Any image-text-to-text model of transformers, as Qwen/Qwen2.5-VL-3B-Instruct: its own chat template puts
    picture and question together, and one forward pass gives the first word. What counts is the log of the
    summed chances of several spellings. The scale is that of log odds, 0 in doubt.

    model: a folder or a hub id; loaded at the first score, without remote code, safetensors alone. question:
    with {prompt} where the prompt goes. batch: pictures in one pass. dtype: "auto" is the checkpoint's own.
    device: where the model runs; by default the GPU if there is one. Raises ValueError for a question without
    {prompt}, and, when it is loaded, for a folder that is no such model.
    """

    reaches_out = True
    needs = "a model: write vlm:Qwen/Qwen2.5-VL-3B-Instruct, or vlm: and a folder"
    differentiable = False

    def __init__(
        self,
        model: str,
        *,
        question: str = QUESTION,
        batch: int = 4,
        dtype: str = "auto",
        device: str | None = None,
    ) -> None:
        if "{prompt}" not in question:
            raise ValueError(
                f"question={question!r} never mentions the prompt: write {{prompt}} where it goes"
            )
        check_whole("batch", batch)
        if not isinstance(model, str) or not model:
            raise ValueError(f"model={model!r}: give a folder, or the hub id of a vision-language model")
        self.model, self.question, self.batch, self.dtype, self.device = model, question, batch, dtype, device
        self._loaded: tuple[Any, Any, list[list[int]]] | None = None

    @classmethod
    def from_spec(cls, text: str) -> VlmReward:
        """From a folder or hub id."""
        return cls(text)

    def prepare(self) -> None:
        """Load the model now."""
        with _LOADING:
            if self._loaded is None:
                self._loaded = self._load()

    @torch.no_grad()
    def __call__(self, images: Tensor, prompts: list[str]) -> Tensor:
        """Return log odds of yes [n] float64 for pictures [n, 3, h, w] in [0, 1]."""
        self.prepare()
        found, start, size = [], 0, self.batch
        while start < len(images):
            part = slice(start, start + size)
            try:
                found.append(self._odds(images[part], prompts[part]))
            except torch.OutOfMemoryError:
                if size == 1:
                    raise
                size = -(-size // 2)
                continue
            start += size
        return torch.cat(found)

    def _odds(self, images: Tensor, prompts: list[str]) -> Tensor:
        from diffusers.utils.pil_utils import numpy_to_pil

        if self._loaded is None:
            raise RuntimeError("the model is not loaded")
        model, processor, words = self._loaded
        pictures = numpy_to_pil(images.detach().float().clamp(0, 1).movedim(1, -1).cpu().numpy())
        texts = [self._asked(processor, prompt) for prompt in prompts]
        given = processor(
            text=texts, images=[[picture] for picture in pictures], padding=True, return_tensors="pt"
        )
        logits = model(**given.to(model.device)).logits[:, -1].double().cpu()
        yes, no = (logits[:, ids].logsumexp(-1) for ids in words)
        return yes - no

    def _asked(self, processor: Any, prompt: str) -> str:
        """Return the conversation as the model's template writes it; the prompt is data, never a template."""
        words = self.question.replace("{prompt}", prompt)
        turn = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": words}]}
        return str(processor.apply_chat_template([turn], add_generation_prompt=True, tokenize=False))

    def _load(self) -> tuple[Any, Any, list[list[int]]]:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        if not Path(self.model).is_dir():  # without a connection each of many files would be tried again
            hub_file(self.model, "config.json", "the vision-language model")
        try:
            processor = AutoProcessor.from_pretrained(self.model)
            model = AutoModelForImageTextToText.from_pretrained(
                self.model, dtype=self.dtype, use_safetensors=True
            )
        except Exception as error:
            reason = str(error).partition("\n")[0]
            raise ValueError(
                f"{self.model!r} does not load as a vision-language model of transformers: {reason}"
            ) from error
        tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"  # the last place of every row is the answer's
        device = self.device or ("cuda" if torch.cuda.is_available() else "cpu")
        return (
            model.eval().requires_grad_(False).to(device),
            processor,
            [_ids(tokenizer, w) for w in (_YES, _NO)],
        )


def _ids(tokenizer: Any, words: tuple[str, ...]) -> list[int]:
    """Return the first tokens of spellings; those that are a word of their own, where there are any."""
    split = [tokenizer.encode(word, add_special_tokens=False) for word in words]
    whole = sorted({ids[0] for ids in split if len(ids) == 1})
    return whole or sorted({ids[0] for ids in split if ids and tokenizer.decode(ids[:1]).strip()})
