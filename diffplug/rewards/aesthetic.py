"""LAION's aesthetic scores: how much people like a picture, from its CLIP ViT-L/14 features alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from diffplug.rewards.image_reward import Head
from diffplug.rewards.networks import NetworkReward
from diffplug.rewards.networks.checkpoints import check_weights, hub_file, load_into, read_weights
from diffplug.rewards.networks.clip_network import ClipNetwork, clip_network

REPOSITORY, FILE = "trl-lib/ddpo-aesthetic-predictor", "aesthetic-model.pth"
"""The hub's copy of sac+logos+ava1-l14-linearMSE.pth."""


class AestheticReward(NetworkReward):
    """A score on a scale that people used from 1 to 10; larger is better, and it is differentiable.

    Prompts do not matter.

    Args:
        head: a file such as sac+logos+ava1-l14-linearMSE.pth (version 2) or sa_0_4_vit_l_14_linear.pth
        (version 1); None takes version 2 from the hub. model, pretrained: the CLIP whose features the head
        was trained on, as in ClipReward.
    """

    def __init__(
        self,
        head: str | Path | None = None,
        *,
        model: str = "ViT-L-14",
        pretrained: str | None = "openai",
        batch: int = 16,
        dtype: str = "float32",
    ) -> None:
        where = None if head is None else str(head)
        if where is not None:
            check_weights(where, "aesthetic head")
        whole = model.startswith("hf-hub:") or Path(model).is_dir()
        super().__init__(_load, where, model, None if whole else pretrained, batch=batch, dtype=dtype)

    @classmethod
    def from_spec(cls, text: str, **options: Any) -> AestheticReward:
        """From the path of a head, or from HEAD@MODEL/WEIGHTS where its CLIP comes from a file too."""
        head, at, clip = text.partition("@")
        if not at:
            return cls(text, **options)
        model, slash, pretrained = clip.partition("/")
        return cls(head or None, model=model, pretrained=pretrained if slash else None, **options)


class _AestheticNetwork(nn.Module):
    def __init__(self, clip: ClipNetwork, head: nn.Module) -> None:
        super().__init__()
        self.clip, self.head = clip, head

    def forward(self, images: Tensor, prompts: list[str]) -> Tensor:
        features = self.clip.image_features(images)
        return self.head(features.to(next(self.head.parameters()).dtype))[:, 0].float()


def read_head(file: Path) -> nn.Module:
    """The head in a file: five linear layers or a single one, told apart by the names of the tensors."""
    what = "aesthetic head"
    state = read_weights(file, what)
    first = "weight" if "weight" in state else "layers.0.weight"
    if first not in state or state[first].ndim != 2:
        raise ValueError(
            f"{what}: the file {str(file)!r} has no matrix 'layers.0.weight' (version 2) or 'weight' "
            f"(version 1): give one of LAION's heads for ViT-L/14."
        )
    width = state[first].shape[1]
    head = nn.Linear(width, 1) if first == "weight" else Head(width)
    load_into(head, state, file, what)
    return head


def _load(head: str | None, model: str, pretrained: str | None) -> nn.Module:
    file = hub_file(REPOSITORY, FILE, "aesthetic head") if head is None else Path(head)
    network = read_head(file)
    clip = clip_network(model, pretrained)
    wanted = next(p for p in network.parameters() if p.ndim == 2).shape[1]
    visual: Any = clip.model.visual
    if (given := getattr(visual, "output_dim", wanted)) != wanted:
        raise ValueError(
            f"aesthetic head: the file {str(file)!r} reads {wanted} features and {model} gives {given}: "
            f"give the CLIP model that the head was trained on."
        )
    return _AestheticNetwork(clip, network)
