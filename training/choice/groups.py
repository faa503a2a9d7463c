"""Groups of a denoiser's tensors that a search switches on and off, read from its module tree.

U-Nets: down, middle and up blocks, each with its attention and its residual part. Transformers: thirds of
each list of blocks, with their attention and the rest. What stands outside all blocks is "rest".
"""

from __future__ import annotations

import re

from torch import nn

from diffplug.sara.targets import named_weights

__all__ = ["block_groups"]

_UNET = re.compile(r"^(down|mid|up)_blocks?\.")


def block_groups(denoiser: nn.Module) -> dict[str, list[str]]:
    """Return the names of tensors of two axes or more by group; each tensor belongs to one."""
    lists = {name: len(part) for name, part in denoiser.named_children() if isinstance(part, nn.ModuleList)}
    groups: dict[str, list[str]] = {}
    for name, weight in named_weights(denoiser).items():
        if weight.ndim > 1:
            groups.setdefault(_group(name, lists), []).append(name)
    return dict(sorted(groups.items()))


def _group(name: str, lists: dict[str, int]) -> str:
    kind = "attention" if "attn" in name or "attentions" in name else "other"
    if found := _UNET.match(name):
        return f"{found[1]} {'attention' if kind == 'attention' else 'resnet'}"
    top, _, rest = name.partition(".")
    if lists.get(top, 0) >= 3:
        third = ("first", "middle", "last")[3 * int(rest.partition(".")[0]) // lists[top]]
        return f"{top} {third} {kind}"
    return "rest"
