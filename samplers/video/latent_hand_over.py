"""Hand-over of latents, without a round trip through the decoder (Wan 2.2 TI2V; experimental).

The first latent of a causal autoencoder stands for one frame, all others for c. So the tail of a clip cannot
simply lead the next: the frame that is to be first is encoded alone, which makes it a proper first latent,
and the O - 1 latents after it are kept as they are. This is CausVid's hand-over (arXiv 2412.07772).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import Tensor

from diffplug.samplers.video.window_plan import latents_of, temporal_compression

__all__ = ["LatentHandOver"]


class LatentHandOver:
    """Keeps the latents of the last clip, and puts their tail into the next call of Wan 2.2 TI2V."""

    def __init__(self) -> None:
        self.last: Tensor | None = None

    @contextmanager
    def around(self, pipe: Any, prefix: Tensor | None) -> Iterator[None]:
        """A block in which a call continues the last clip with the latents that it ended with."""
        known = 0 if prefix is None else latents_of(len(prefix), temporal_compression(pipe), "overlap")
        if known > 1 and self.last is None:
            raise ValueError(
                "the latents of the clip before are gone: latents cannot be resumed, take overlap=1 or start "
                "anew"
            )
        tail = self.last[:, :, -(known - 1) :] if known > 1 and self.last is not None else None
        with ExitStack() as undo:
            undo.callback(_replaced(pipe, "prepare_latents", self._preparing(pipe.prepare_latents, tail)))
            undo.callback(_replaced(pipe.vae, "decode", self._keeping(pipe, pipe.vae.decode)))
            yield

    def _preparing(self, prepare: Callable[..., Any], tail: Tensor | None) -> Callable[..., Any]:
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

    def _keeping(self, pipe: Any, decode: Callable[..., Any]) -> Callable[..., Any]:
        """Return a decode that remembers the latents it is given, as the network sees them."""

        def decoded(z: Tensor, *args: Any, **kwargs: Any) -> Any:
            mean, std = (
                z.new_tensor(values).reshape(1, -1, 1, 1, 1)
                for values in (pipe.vae.config.latents_mean, pipe.vae.config.latents_std)
            )
            self.last = ((z - mean) / std).detach().clone()
            return decode(z, *args, **kwargs)

        return decoded


def _replaced(owner: Any, name: str, method: Callable[..., Any]) -> Callable[[], None]:
    """Put a method on an object and return what takes it away again."""
    own = vars(owner).get(name)
    vars(owner)[name] = method

    def undo() -> None:
        vars(owner).pop(name, None)
        if own is not None:
            vars(owner)[name] = own

    return undo
