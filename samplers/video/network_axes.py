"""Which arguments of a video network have a frame axis, and how to give it a window of them.

Nothing is guessed: a network that is not in the table is refused. `VideoCall.of(module, args, kwargs)` reads
a call of a known network's forward; `window(start, size)` returns the arguments of a window. Positions are
always those of a clip that begins at 0, as in training.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

__all__ = ["NETWORKS", "Axes", "VideoCall", "axes_of", "shown_channels"]

Arguments = dict[str, Any]
Cut = Callable[["VideoCall", Arguments, slice], None]


@dataclass(frozen=True)
class Axes:
    """A network's frame axis. sample: the argument with the noisy latents. axis: of its frames, and of the
    output's. channels: of its channels. more: what else has to be cut. packed: frames lie among tokens.
    """

    sample: str = "hidden_states"
    axis: int = 2
    channels: int = 1
    more: tuple[Cut, ...] = ()
    packed: bool = False


@dataclass(frozen=True)
class VideoCall:
    """One call of a network: its arguments by name, and how many latent frames it is about."""

    axes: Axes
    arguments: Arguments
    frames: int
    out_channels: int | None

    @classmethod
    def of(cls, module: Any, args: tuple[Any, ...], kwargs: Arguments) -> VideoCall:
        """Read a call of a network's forward. Raises ValueError for a network that is not known."""
        axes, network = axes_of(module), _bare(module)
        signature = inspect.signature(type(network).forward)
        named = dict(signature.bind(network, *args, **kwargs).arguments)
        named.pop("self")
        for name, parameter in signature.parameters.items():
            if parameter.kind is parameter.VAR_KEYWORD:
                named.update(named.pop(name, {}))
        x = named[axes.sample]
        if axes.packed and not named.get("num_frames"):
            named["num_frames"] = _frames_from_coordinates(named, type(network).__name__)
        frames = int(named["num_frames"]) if axes.packed else int(x.shape[axes.axis])
        return cls(axes, named, frames, getattr(network.config, "out_channels", None))

    @property
    def sample(self) -> Tensor:
        """The noisy latents as the network is given them."""
        x: Tensor = self.arguments[self.axes.sample]
        return x

    @property
    def conditions(self) -> int:
        """How many channels beside the noisy latents the network is shown, as picture-to-video models are."""
        if self.axes.packed or self.out_channels is None:
            return 0
        return max(0, self.sample.shape[self.axes.channels] - self.out_channels)

    def window(self, start: int, size: int, *, keep_first: bool = False) -> Arguments:
        """Return the arguments for `size` frames from `start` on.

        keep_first: give the window's first frame the condition channels of the video's.
        """
        part = slice(start, start + size)
        cut = dict(self.arguments)
        x = cut_frames(self.sample, part, self.frames, self.axes.axis, packed=self.axes.packed)
        if keep_first and start and self.conditions:
            x = self._with_first_condition(x)
        cut[self.axes.sample] = x
        for also in self.axes.more:
            also(self, cut, part)
        return cut

    def _with_first_condition(self, x: Tensor) -> Tensor:
        x, axis, channels = x.clone(), self.axes.axis, self.axes.channels
        into = x.select(axis, 0).narrow(channels, self.out_channels or 0, self.conditions)
        into.copy_(self.sample.select(axis, 0).narrow(channels, self.out_channels or 0, self.conditions))
        return x


def axes_of(module: Any) -> Axes:
    """Return the frame axes of a network.

    Raises ValueError, naming it, for one that is not known, and for one that takes frames in groups
    (CogVideoX 1.5), inside which a window would begin.
    """
    for cls in type(_bare(module)).__mro__:
        if cls.__name__ in NETWORKS:
            _check_time_patches(_bare(module))
            return NETWORKS[cls.__name__]
    raise ValueError(
        f"{type(_bare(module)).__name__} is no video network that is known, and which of its axes is time is "
        f"not guessed. Known: {', '.join(sorted(NETWORKS))}"
    )


def shown_channels(module: Any) -> int:
    """Return how many channels beside the noisy latents a network takes, as picture-to-video models do."""
    config = getattr(_bare(module), "config", {})
    told, out = config.get("in_channels"), config.get("out_channels")
    if axes_of(module).packed or told is None or out is None:
        return 0
    return max(0, int(told) - int(out))


def _check_time_patches(network: Any) -> None:
    config = getattr(network, "config", {})
    patch = config.get("patch_size")
    together = config.get("patch_size_t") or (patch[0] if isinstance(patch, (list, tuple)) else 1)
    if together != 1:
        raise ValueError(
            f"this {type(network).__name__} takes latent frames in groups of {together}: windows would begin "
            "inside a group"
        )


def cut_frames(x: Tensor, part: slice, frames: int, axis: int, *, packed: bool = False) -> Tensor:
    """Return some frames of a tensor; packed: axis 1 holds the tokens of one frame after the other's."""
    if packed:
        return x.unflatten(1, (frames, -1))[:, part].flatten(1, 2)
    return x.narrow(axis, part.start, part.stop - part.start)


def _bare(module: Any) -> Any:
    """Return a network itself, where it was compiled."""
    return getattr(module, "_orig_mod", module)


def _token_timesteps(call: VideoCall, cut: Arguments, part: slice) -> None:
    """Cut timesteps that are given token by token (Wan 2.2 TI2V, LTX from a picture)."""
    t = cut.get("timestep")
    if isinstance(t, Tensor) and t.ndim == 2 and t.shape[1] % call.frames == 0 and t.shape[1] > 1:
        cut["timestep"] = cut_frames(t, part, call.frames, 1, packed=True)


def _control(call: VideoCall, cut: Arguments, part: slice) -> None:
    """Cut VACE's control video; reference pictures are latents in front of it, which shift every frame."""
    control = cut.get("control_hidden_states")
    if control is None:
        return
    if control.shape[2] != call.frames:
        raise ValueError(
            f"the control video has {control.shape[2]} latent frames and the video {call.frames}: windows of "
            "both would not lie on each other"
        )
    cut["control_hidden_states"] = control[:, :, part]


def _first_positions(call: VideoCall, cut: Arguments, part: slice) -> None:
    """Give rotary positions, one row a token, of the first window: a clip begins at 0 (CogVideoX)."""
    rotary = cut.get("image_rotary_emb")
    if rotary is not None:
        size = part.stop - part.start
        cut["image_rotary_emb"] = tuple(rows[: len(rows) // call.frames * size] for rows in rotary)


def _frames_and_coordinates(call: VideoCall, cut: Arguments, part: slice) -> None:
    """Say how many frames a window has; coordinates begin at 0 (LTX)."""
    cut["num_frames"] = part.stop - part.start
    coordinates = cut.get("video_coords")
    if coordinates is not None:
        rows = cut_frames(coordinates.transpose(1, 2), part, call.frames, 1, packed=True).transpose(1, 2)
        rows = rows.clone()
        rows[:, 0] -= rows[:, 0].amin(-1, keepdim=True)
        first = coordinates[:, 0].amin(-1, keepdim=True)
        rows[:, 0] += first
        cut["video_coords"] = rows


def _frames_from_coordinates(named: Arguments, name: str) -> int:
    """Return the number of latent frames of a call that gives coordinates instead (LTX with conditions)."""
    coordinates = named.get("video_coords")
    if coordinates is None:
        raise ValueError(f"this call of {name} says neither num_frames nor video_coords: it cannot be cut")
    times = torch.unique(coordinates[0, 0])
    if coordinates.shape[-1] % len(times):
        raise ValueError(f"this call of {name} has frames of several sizes: it cannot be cut into windows")
    return len(times)


def _frame_rows(call: VideoCall, cut: Arguments, part: slice) -> None:
    """Cut what has one row a frame, in the order of the batch (AnimateDiff's prompt embeddings)."""
    rows = len(call.sample) * call.frames
    states = cut.get("encoder_hidden_states")
    if isinstance(states, Tensor) and len(states) == rows:
        cut["encoder_hidden_states"] = states.unflatten(0, (-1, call.frames))[:, part].flatten(0, 1)
    for name in ("down_block_additional_residuals", "mid_block_additional_residual"):
        if cut.get(name) is not None:
            raise ValueError("a ControlNet's features have no windows: leave the ControlNet or Windows out")


_PLAIN = Axes()
NETWORKS: dict[str, Axes] = {
    "WanTransformer3DModel": Axes(more=(_token_timesteps,)),
    "WanVACETransformer3DModel": Axes(more=(_token_timesteps, _control)),
    "SkyReelsV2Transformer3DModel": Axes(more=(_token_timesteps,)),
    "HunyuanVideoTransformer3DModel": _PLAIN,
    "MochiTransformer3DModel": _PLAIN,
    "LatteTransformer3DModel": _PLAIN,
    "CogVideoXTransformer3DModel": Axes(axis=1, channels=2, more=(_first_positions,)),
    "LTXVideoTransformer3DModel": Axes(more=(_frames_and_coordinates, _token_timesteps), packed=True),
    "UNetMotionModel": Axes(sample="sample", more=(_frame_rows,)),
    "UNetSpatioTemporalConditionModel": Axes(sample="sample", axis=1, channels=2),
}
"""The frame axes of the networks that are known, by the name of their class."""
