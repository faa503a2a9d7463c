"""Guidance inside joint attention, where prompt and picture are one sequence: SD3, FLUX, FLUX.2,
Qwen-Image, Z-Image.

The prompt's tokens change from layer to layer, so the negative prompt needs a stream of its own: the network
runs on two rows a picture, the same picture with either prompt. In every layer the picture's tokens of both
rows get the guided attention, so both rows go on with the same picture and only their texts differ. Whatever
else the network is told, the pooled embedding too, is the positive prompt's in both rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from diffplug.intercept import original_class, undo_all
from diffplug.network.denoiser import wrap_forward
from diffplug.samplers.negative.call import check_unguided
from diffplug.samplers.negative.cross_attention import output_projection, unwrapped
from diffplug.samplers.negative.network import arguments_by_name, compiled_anew, noise_time
from diffplug.samplers.negative.state import Encoded, NegativeState

__all__ = ["JOINT", "guide_joint"]

Formula = Callable[[Tensor, Tensor, Any], Tensor]


@dataclass(frozen=True)
class Joint:
    """How a denoiser is called. sample, text, time: names of its arguments; mask: of the text's, where it
    has one.

    lists: whether rows are the items of lists (Z-Image). shared: arguments that are the same for all rows.
    """

    sample: str = "hidden_states"
    text: str = "encoder_hidden_states"
    time: str = "timestep"
    mask: str | None = None
    lists: bool = False
    shared: tuple[str, ...] = ("img_ids", "txt_ids")


JOINT = {
    "SD3Transformer2DModel": Joint(),
    "FluxTransformer2DModel": Joint(),
    "Flux2Transformer2DModel": Joint(),
    "QwenImageTransformer2DModel": Joint(mask="encoder_hidden_states_mask"),
    "ZImageTransformer2DModel": Joint(sample="x", text="cap_feats", time="t", lists=True),
}


def guide_joint(
    pipe: Any, network: Any, state: NegativeState, options: Any, formula: Formula
) -> Callable[[], None]:
    """Let the joint attention of a network be guided by `formula` while `state` has a negative; return the
    undo.
    """
    model = unwrapped(network)
    name = original_class(model).__name__
    call = _Call(pipe, network, state, JOINT[name], options.until)
    around = torch.compiler.disable(call.__call__, recursive=False)
    undos = [compiled_anew(network), wrap_forward(network, around)]
    for module, hook in _hooks(model, name, call, lambda a, b: formula(a, b, options)):
        before = isinstance(module, nn.Linear)
        undos.append(
            (module.register_forward_pre_hook if before else module.register_forward_hook)(hook).remove
        )
    return undo_all(undos)


class _Call:
    """One call of the network: on two rows a picture while the negative prompt acts."""

    def __init__(self, pipe: Any, network: Any, state: NegativeState, joint: Joint, until: float) -> None:
        self.pipe, self.network, self.state, self.joint, self.until = pipe, network, state, joint, until
        self.acts = False
        self.text_tokens = self.picture_tokens = 0

    def __call__(self, forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if not self.state.ready():
            return forward(*args, **kwargs)
        check_unguided(self.pipe)
        self.state.same.check(self.pipe)
        told, joint = arguments_by_name(self.network, args, kwargs), self.joint
        if self.until > 0 and float(noise_time(self.network, told[joint.time]).max()) < self.until:
            return forward(*args, **kwargs)
        n = len(told[joint.sample])
        doubled = self._doubled(told, n)
        self.state.tried = self.acts = True
        try:
            return _first(forward(**doubled), n)
        finally:
            self.acts = False

    def _doubled(self, told: dict[str, Any], n: int) -> dict[str, Any]:
        """Return the arguments of two rows a picture, the second with the negative prompt."""
        joint, text = self.joint, told[self.joint.text]
        negative = self.state.aligned(len(text), text)
        out = {name: value if name in joint.shared else _twice(value, n) for name, value in told.items()}
        if joint.lists:
            out[joint.sample] = [*told[joint.sample]] * 2
            out[joint.text] = [*text, *(row.to(text[0].device, text[0].dtype) for row in negative.text)]
            self.text_tokens, self.picture_tokens = 0, _padded_tokens(told)
            return out
        positive = Encoded(text, told.get(joint.mask) if joint.mask else None)
        out[joint.text], mask = _joined(positive, negative, masked=joint.mask is not None)
        if joint.mask:
            out[joint.mask] = mask
        self.text_tokens, self.picture_tokens = out[joint.text].shape[1], 0
        return out


def _hooks(
    model: Any, name: str, call: _Call, formula: Callable[[Tensor, Tensor], Tensor]
) -> Iterator[tuple[nn.Module, Callable[..., Any]]]:
    """Yield the modules at which merged heads pass, each with the hook that guides them there."""

    def guided(heads: Tensor, start: int, stop: int | None, width: int | None = None) -> Tensor:
        """Guide the picture's tokens of both rows; other tokens, and channels from `width` on, stay."""
        part = heads[:, start:stop, :width]
        half = len(part) // 2
        same = formula(part[:half], part[half:])
        out = heads.clone()
        out[:, start:stop, :width] = torch.cat([same, same])
        call.state.acted = True
        return out

    def at_picture(module: Any, args: tuple[Any, ...]) -> Any:
        return (guided(args[0], 0, None), *args[1:]) if call.acts else None

    def at_sequence(module: Any, args: tuple[Any, ...], out: Tensor) -> Any:
        return guided(out, call.text_tokens, None) if call.acts else None

    if name == "ZImageTransformer2DModel":

        def at_unified(module: Any, args: tuple[Any, ...]) -> Any:
            return (guided(args[0], 0, call.picture_tokens), *args[1:]) if call.acts else None

        for block in model.layers:
            yield output_projection(block.attention), at_unified
        return
    for block in model.transformer_blocks:
        yield output_projection(block.attn), at_picture
    for block in getattr(model, "single_transformer_blocks", ()):
        inner = getattr(block.attn, "inner_dim", None)
        if isinstance(getattr(block.attn, "to_out", None), nn.Linear):  # FLUX.2: heads and the MLP in one

            def at_both(module: Any, args: tuple[Any, ...], width: Any = inner) -> Any:
                return (guided(args[0], call.text_tokens, None, width), *args[1:]) if call.acts else None

            yield block.attn.to_out, at_both
        else:
            yield block.attn, at_sequence


def _joined(positive: Encoded, negative: Encoded, *, masked: bool) -> tuple[Tensor, Tensor | None]:
    """Return both texts in one batch, [2 n, tokens, d], and their mask; without one, of equal lengths."""
    a, b = positive.text, negative.text.to(positive.text.device, positive.text.dtype)
    if a.shape[1] == b.shape[1] and positive.mask is None and negative.mask is None:
        return torch.cat([a, b]), None
    if not masked:
        raise ValueError(
            f"the negative prompt has {b.shape[1]} tokens, the prompt {a.shape[1]}, and this network "
            "takes no mask: "
            "give embeddings of one length, or the same max_sequence_length"
        )
    length = max(a.shape[1], b.shape[1])
    masks = [_mask(text, part.mask) for text, part in ((a, positive), (b, negative))]
    texts = [nn.functional.pad(text, (0, 0, 0, length - text.shape[1])) for text in (a, b)]
    return torch.cat(texts), torch.cat(
        [nn.functional.pad(mask, (0, length - mask.shape[1])) for mask in masks]
    )


def _mask(text: Tensor, mask: Tensor | None) -> Tensor:
    return (
        torch.ones(text.shape[:2], dtype=torch.bool, device=text.device)
        if mask is None
        else mask.to(text.device).bool()
    )


def _padded_tokens(told: dict[str, Any]) -> int:
    """Return how many tokens Z-Image makes of a picture: its patches, filled up to a multiple of 32."""
    _, frames, height, width = told["x"][0].shape
    patch, depth = told.get("patch_size", 2), told.get("f_patch_size", 1)
    count = (frames // depth) * (height // patch) * (width // patch)
    return count + (-count) % 32


def _twice(value: Any, n: int) -> Any:
    """Return an argument for twice as many rows: tensors of n rows, at any depth, and plain lists of n,
    repeated.
    """
    if isinstance(value, Tensor):
        return torch.cat([value, value]) if value.ndim and len(value) == n else value
    if (
        isinstance(value, list)
        and len(value) == n
        and not any(isinstance(item, (Tensor, dict)) for item in value)
    ):
        return [*value, *value]
    if type(value) in (list, tuple):
        return type(value)(_twice(item, n) for item in value)
    return {name: _twice(item, n) for name, item in value.items()} if type(value) is dict else value


def _first(out: Any, n: int) -> Any:
    """Return an output with its first n rows."""
    if isinstance(out, Tensor):
        return out[:n]
    if isinstance(out, tuple):
        return (_first(out[0], n), *out[1:])
    if isinstance(out, list):
        return out[:n]
    out.sample = _first(out.sample, n)
    return out
