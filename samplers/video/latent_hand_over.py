"""Hand-over of latents, without a round trip through the decoder (Wan 2.2 TI2V; experimental).

The first latent of a causal autoencoder stands for one frame, all others for c. So the tail of a clip cannot
simply lead the next: the frame that is to be first is encoded alone, which makes it a proper first latent,
and the O - 1 latents after it are kept as they are. This is CausVid's hand-over (arXiv 2412.07772).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from diffplug.samplers.video.replaced import replaced
from diffplug.samplers.video.window_plan import latents_of, temporal_compression

__all__ = ["LATENTS", "handed_latents"]

LATENTS = "latents"


@contextmanager
def handed_latents(pipe: Any, prefix: Tensor | None, carried: dict[str, Tensor]) -> Iterator[None]:
    """A block in which a call of Wan 2.2 TI2V continues the last clip with the latents that it ended with.

    carried: has the latents of the clip before, and after the call this clip's.
    """
    known = 0 if prefix is None else latents_of(len(prefix), temporal_compression(pipe), "overlap")
    if known > 1 and LATENTS not in carried:
        raise ValueError("the latents of the clip before are gone: take overlap=1, or start anew")
    tail = carried[LATENTS][:, :, -(known - 1) :] if known > 1 else None
    with (
        replaced(pipe, "prepare_latents", _preparing(pipe.prepare_latents, tail)),
        replaced(pipe.vae, "decode", _keeping(pipe, pipe.vae.decode, carried)),
    ):
        yield


def _preparing(prepare: Callable[..., Any], tail: Tensor | None) -> Callable[..., Any]:
    """Return a preparation of latents whose condition is the first latent and, after it, `tail`."""

    def prepared(*args: Any, **kwargs: Any) -> Any:
        latents, condition, free = prepare(*args, **kwargs)
        if tail is None:
            return latents, condition, free
        known, free = condition.new_zeros(latents.shape), free.clone()
        known[:, :, :1] = condition[:, :, :1]
        known[:, :, 1 : 1 + tail.shape[2]] = tail.to(known)
        free[:, :, : 1 + tail.shape[2]] = 0
        return latents, known, free

    return prepared


def _keeping(pipe: Any, decode: Callable[..., Any], carried: dict[str, Tensor]) -> Callable[..., Any]:
    """Return a decode that remembers the latents it is given, as the network sees them."""

    def decoded(z: Tensor, *args: Any, **kwargs: Any) -> Any:
        mean, std = (
            z.new_tensor(values).reshape(1, -1, 1, 1, 1)
            for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
        )
        carried[LATENTS] = ((z - mean) / std).detach().clone()
        return decode(z, *args, **kwargs)

    return decoded
