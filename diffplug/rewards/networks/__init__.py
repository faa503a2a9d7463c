"""What rewards that are networks share: loading, batches, features of text, and the networks themselves."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffplug.lazy import hand_on

if TYPE_CHECKING:
    from diffplug.rewards.networks.network_reward import NetworkReward as NetworkReward
    from diffplug.rewards.networks.network_reward import TextFeatures as TextFeatures
    from diffplug.rewards.networks.network_reward import in_batches as in_batches
    from diffplug.rewards.networks.network_reward import on_cpu as on_cpu

_HOMES = dict.fromkeys(
    ("NetworkReward", "TextFeatures", "in_batches", "on_cpu"), "diffplug.rewards.networks.network_reward"
)

__all__ = [*_HOMES]
__getattr__, __dir__ = hand_on(__name__, _HOMES)
