"""How much a model repeats its training pictures: distances to them, and what a caption alone gives away.

    AMD = mean over generated g of min over training r of (1 - cos(f_g, f_r))        0: copies, higher: less
    d   = |eps(x_t, t, c) - eps(x_t, t, none)| / sqrt(dim)                            high: memorised captions

AMD is the divisor of MiFID (arXiv 1911.07023's MiFID, torchmetrics); d is the statistic of Wen et al. (ICLR
2024). MemControl (arXiv 2405.19458) chooses what to fine-tune by such figures.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from diffplug.training.conditions import Conditions
from diffplug.training.network import Network

__all__ = ["average_minimum_distance", "condition_norm", "copied_groups", "pixel_features", "tile_distance"]


def average_minimum_distance(generated: Tensor, training: Tensor, *, chunk: int = 4096) -> float:
    """Return AMD of features [g, d] to features [r, d]; 0 where every picture is a copy.

    Compare it with the AMD of real pictures that were held out: far below is copying. Costs g r d products,
    `chunk` training rows at a time. Raises ValueError for empty features and other widths.
    """
    if not len(generated) or not len(training) or generated.shape[1:] != training.shape[1:]:
        raise ValueError(
            f"features of shapes {tuple(generated.shape)} and {tuple(training.shape)}: give [n, d] each"
        )
    g = torch.nn.functional.normalize(generated.double(), dim=1)
    nearest = torch.full((len(g),), float("inf"), dtype=torch.float64, device=g.device)
    for part in training.split(chunk):
        r = torch.nn.functional.normalize(part.to(g), dim=1)
        nearest = torch.minimum(nearest, 1 - (g @ r.T).amax(1))
    return float(nearest.clamp(min=0).mean())


@torch.no_grad()
def condition_norm(
    network: Network,
    latents: Tensor,
    conditions: Conditions,
    null: Conditions,
    *,
    timesteps: Sequence[float] = (0.1, 0.3, 0.5, 0.7, 0.9),
    seed: int = 0,
) -> Tensor:
    """Return d of each latent with its caption, averaged over noise levels, [n].

    timesteps: shares of the training timesteps. seed: of the noise, the same for all that is compared.
    null: condition of the empty prompt, one row. Costs 2 n evaluations a level, without gradients.
    """
    n, path = len(latents), network.path
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(seed)).to(latents)
    total = torch.zeros(n, dtype=torch.float64)
    for share in timesteps:
        index = torch.full((n,), max(1.0, float(round(share * path.train_steps))), dtype=torch.float64)
        x = path.noised(latents, noise, torch.zeros_like(index), index)
        gap = network(x, index, conditions).eps - network(x, index, null.expand(n)).eps
        total += gap.flatten(1).double().cpu().square().mean(1).sqrt()
    return total / len(timesteps)


def tile_distance(one: Tensor, other: Tensor, tiles: int = 4) -> Tensor:
    """Return the largest root mean square difference over tiles x tiles parts of pictures, [n].

    one, other: [n, c, h, w] in [0, 1]. Two pictures are near only where every part is (arXiv 2301.13188);
    divided by the numbers of pixels, so that a threshold does not depend on their size.
    """
    squared = (one - other).square().mean(1, keepdim=True)
    return torch.nn.functional.adaptive_avg_pool2d(squared, tiles).flatten(1).amax(1).sqrt()


def copied_groups(
    images: Tensor, threshold: float = 0.1, *, least: int = 3, tiles: int = 4
) -> list[list[int]]:
    """Return groups of at least `least` pictures of one prompt that are near each other: a memorised picture.

    images: [n, c, h, w], draws from different seeds. Groups are connected: each member is near some other.
    """
    n = len(images)
    near = torch.stack(
        [tile_distance(image.expand_as(images), images, tiles) < threshold for image in images]
    )
    groups, left = [], set(range(n))
    while left:
        group, edge = set(), {min(left)}
        while edge:
            group |= edge
            edge = {j for i in edge for j in torch.nonzero(near[i])[:, 0].tolist()} - group
        left -= group
        if len(group) >= least:
            groups.append(sorted(group))
    return groups


def pixel_features(images: Tensor, side: int = 16) -> Tensor:
    """Return pictures [n, 3, h, w] as features [n, 3 side^2]: shrunk, each with its own mean taken off.

    For small worlds; of photographs take an image encoder's.
    """
    small = torch.nn.functional.adaptive_avg_pool2d(images.float(), side)
    return (small - small.mean((2, 3), keepdim=True)).flatten(1)
