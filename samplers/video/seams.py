"""What happens where two clips meet: whose frames are shown, and whether colours are matched first."""

from __future__ import annotations

import torch
from torch import Tensor

from diffplug.video.statistics import ClipStatistics, Join, clip_statistics, jump_ratio, psnr

__all__ = ["MATCHES", "SEAMS", "faded", "joined_frames", "matched", "measured_join"]

SEAMS = ("keep", "fade", "new")
MATCHES = ("anchor", "prefix")


def joined_frames(seam: str, kept: Tensor, rendered: Tensor) -> Tensor:
    """Return the p frames of the result where a clip's last frames are another's first ones.

    kept: of the earlier clip [p, 3, h, w]. rendered: the later clip's version of them. seam: "keep" shows the
    earlier ones, "new" the later, "fade" goes linearly from one to the other (which ghosts what moves).
    """
    if seam == "keep":
        return kept
    return rendered if seam == "new" else faded(kept, rendered)


def faded(kept: Tensor, rendered: Tensor) -> Tensor:
    """Return a cross-fade; the first frame is nearly the earlier clip's, the last nearly the later's."""
    p = len(kept)
    share = (torch.arange(p, dtype=torch.float32) + 1) / (p + 1)
    share = share[:, None, None, None]
    return (1 - share) * kept + share * rendered


def matched(clip: Tensor, have: ClipStatistics, want: ClipStatistics, strength: float = 1.0) -> Tensor:
    """Return a clip [f, 3, h, w] whose channels are scaled and shifted so that `have` becomes `want`.

    strength: 1 all of the way, 0 none. The result stays in [0, 1]. A flat channel is shifted only.
    """
    mean, std = (torch.tensor(v).reshape(3, 1, 1).to(clip) for v in (have.mean, have.std))
    to_mean, to_std = (torch.tensor(v).reshape(3, 1, 1).to(clip) for v in (want.mean, want.std))
    ratio = torch.where(std > 1e-6, to_std / std.clamp(min=1e-6), torch.ones_like(std))
    moved = (clip - mean) * ratio + to_mean
    return torch.lerp(clip, moved, strength).clamp(0, 1)


def match_clip(clip: Tensor, kept: Tensor, first: ClipStatistics, match: str, strength: float) -> Tensor:
    """Return a later clip with its colours brought to those of the first clip, or of the kept prefix."""
    if match == "anchor":
        return matched(clip, clip_statistics(clip), first, strength)
    return matched(clip, clip_statistics(clip[: len(kept)]), clip_statistics(kept), strength)


def measured_join(frame: int, kept: Tensor, clip: Tensor) -> Join:
    """Return how a clip meets the frames that it was given. frame: number of its first new frame."""
    p = len(kept)
    return Join(frame=frame, seam=psnr(kept, clip[:p]), jump=jump_ratio(kept[-1], clip[p:]))
