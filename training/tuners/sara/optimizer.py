"""SaRA in one line: an AdamW that chooses, trains and writes the smallest weights of a model by itself.

optimizer = SaRAAdamW(pipe.unet, density=0.05)
...                                                    # loss.backward(); optimizer.step(); zero_grad()
optimizer.tuner.save("style.sara.safetensors")
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from diffplug.registry import unknown
from diffplug.training.tuners.sara.candidates import listed, matches
from diffplug.training.tuners.sara.sara import SaRA

__all__ = ["SaRAAdamW"]


class SaRAAdamW(torch.optim.AdamW):
    """AdamW on the vectors of a `SaRA` of its own, `tuner`.

    model: a module, or modules by name. lr: None for `SaRA.learning_rate`. groups: rates of their own for
    some tensors, [{"include": "down_blocks", "lr": 1e-4}, ...], the first that fits. weight_decay: pulls
    trained weights towards 0, 0 by default. sara: options of `SaRA`. The state holds vectors, moments and
    what has been frozen. Raises ValueError as `SaRA` does, and for groups that match nothing.
    """

    def __init__(
        self,
        model: nn.Module | Mapping[str, nn.Module],
        lr: float | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        groups: Sequence[Mapping[str, Any]] = (),
        foreach: bool | None = None,
        **sara: Any,
    ) -> None:
        tuner = SaRA(model, **sara)
        rate = tuner.learning_rate if lr is None else lr
        super().__init__(
            _grouped(tuner, groups), lr=rate, betas=betas, eps=eps, weight_decay=weight_decay, foreach=foreach
        )
        self.tuner = tuner
        tuner.attach(self)

    def state_dict(self) -> dict[str, Any]:
        """Return AdamW's state, with that of the tuner under "sara"."""
        return {**super().state_dict(), "sara": self.tuner.state_dict()}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Take back what `state_dict` returned, on the same base; the weights follow."""
        if "sara" not in state_dict:
            raise ValueError("this is the state of another optimiser: it has no 'sara'")
        self.tuner.load_state_dict(state_dict["sara"])
        super().load_state_dict({key: value for key, value in state_dict.items() if key != "sara"})


def _grouped(tuner: SaRA, groups: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Return AdamW's groups: those asked for, then one of all the rest."""
    left = dict(tuner.named_parameters())
    out = []
    for group in groups:
        options = dict(group)
        patterns = listed(options.pop("include", ()))
        taken = {name: vector for name, vector in left.items() if matches(name, patterns)}
        if not taken:
            raise unknown("group of tensors", ", ".join(patterns), sorted(tuner.named_parameters()))
        left = {name: vector for name, vector in left.items() if name not in taken}
        out.append({"params": list(taken.values()), **options})
    return [*out, *([{"params": list(left.values())}] if left else [])]
