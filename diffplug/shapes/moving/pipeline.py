"""The pipeline of Moving Shapes: videos from a prompt, a picture, or the last frames of another video."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.utils import BaseOutput
from diffusers.utils.torch_utils import randn_tensor
from torch import Tensor

from diffplug.pictures import to_tensor
from diffplug.shapes.moving.model import (
    LATENT_CHANNELS,
    LONG_FRAMES,
    PREFIX_FRAMES,
    WINDOW_FRAMES,
    normalised,
    plain,
    shown_latents,
    velocity,
)

__all__ = ["MovingShapesOutput", "MovingShapesPipeline"]


@dataclass
class MovingShapesOutput(BaseOutput):
    """The videos of a call: `frames`, [n, f, 3, 64, 64] in [0, 1], arrays, or lists of PIL pictures."""

    frames: Any


class MovingShapesPipeline(DiffusionPipeline):
    """A video pipeline with the arguments that Diffusers' own have; 64x64 pixels, one latent a frame.

    The network has seen clips of 16 frames (and some up to 97), and clips of which the first frame, or the
    first four, were given. `prefix_frames` says so to whoever continues videos.
    """

    model_cpu_offload_seq = "text_encoder->transformer->vae"
    _callback_tensor_inputs = ("latents", "prompt_embeds")
    vae_scale_factor_temporal = 1
    vae_scale_factor = 4
    prefix_frames = PREFIX_FRAMES
    trained_frames = (WINDOW_FRAMES, LONG_FRAMES)

    def __init__(self, vae: Any, text_encoder: Any, tokenizer: Any, transformer: Any, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(
            vae=vae,
            text_encoder=text_encoder,
            tokenizer=tokenizer,
            transformer=transformer,
            scheduler=scheduler,
        )
        self.video_processor = VaeImageProcessor(vae_scale_factor=self.vae_scale_factor)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | Sequence[str] = "",
        image: Any = None,
        video: Any = None,
        num_frames: int = WINDOW_FRAMES,
        num_inference_steps: int = 20,
        guidance_scale: float = 3.0,
        num_videos_per_prompt: int = 1,
        generator: torch.Generator | list[torch.Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict[str, Any]] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> MovingShapesOutput | tuple[Any]:
        """Return videos.

        prompt: as the Shapes model's ("a red circle and a blue square on a black background"), "" for any.
        image: the first frame (PIL, array, or tensor [1, 3, 64, 64] in [0, 1]). video: the first frames, 1 or
        4 of them ([f, 3, 64, 64]). num_frames: 16 by training, 97 at most. guidance_scale: above 1 the
        network runs twice a step. output_type: "pil", "np", "pt" or "latent".
        Raises ValueError for a prefix of another length, image together with video, and bad numbers.
        """
        prompts = [prompt] if isinstance(prompt, str) else list(prompt)
        prompts = [one for one in prompts for _ in range(num_videos_per_prompt)]
        prefix = self._prefix(image, video, num_frames)
        states = self.encode_prompt(prompts)
        guided = guidance_scale > 1
        if guided:
            states = torch.cat([self.encode_prompt([""] * len(prompts)), states])
        self.scheduler.set_timesteps(num_inference_steps, device=self._execution_device)
        latents = self.prepare_latents(len(prompts), num_frames, states.dtype, generator, latents)
        shown = self.prepare_condition(prefix, latents)
        with self.progress_bar(total=num_inference_steps) as bar:
            for i, t in enumerate(self.scheduler.timesteps):
                x = torch.cat([latents, shown], 1)
                x = torch.cat([x, x]) if guided else x
                x0 = self.transformer(
                    hidden_states=x,
                    timestep=t.expand(len(x)),
                    encoder_hidden_states=states,
                    return_dict=False,
                )[0]
                if guided:
                    free, told = x0.chunk(2)
                    x0 = free + guidance_scale * (told - free)
                output = velocity(latents, x0, t)
                latents = self.scheduler.step(output, t, latents, return_dict=False)[0]
                if callback_on_step_end is not None:
                    known = {"latents": latents, "prompt_embeds": states}
                    wanted = {name: known[name] for name in callback_on_step_end_tensor_inputs}
                    latents = callback_on_step_end(self, i, t, wanted).pop("latents", latents)
                bar.update()
        frames = latents if output_type == "latent" else self._decoded(latents, output_type)
        self.maybe_free_model_hooks()
        return MovingShapesOutput(frames=frames) if return_dict else (frames,)

    def encode_prompt(self, prompt: list[str]) -> Tensor:
        """Return the states of the text encoder, [n, 32, 128]."""
        ids = self.tokenizer(prompt, padding="max_length", truncation=True, return_tensors="pt").input_ids
        states: Tensor = self.text_encoder(ids.to(self._execution_device)).last_hidden_state
        return states.to(self.transformer.dtype)

    def prepare_latents(
        self, n: int, num_frames: int, dtype: torch.dtype, generator: Any, latents: Tensor | None = None
    ) -> Tensor:
        """Return the initial noise [n, 4, f, 16, 16], or the latents given."""
        shape = (n, LATENT_CHANNELS, num_frames, 16, 16)
        if latents is not None:
            if tuple(latents.shape) != shape:
                raise ValueError(f"latents have the shape {tuple(latents.shape)}, this call needs {shape}")
            return latents.to(self._execution_device, dtype)
        return randn_tensor(shape, generator=generator, device=self._execution_device, dtype=dtype)

    def prepare_condition(self, prefix: Tensor | None, latents: Tensor) -> Tensor:
        """Return what is shown beside the noise: known latents and their mask, [n, 5, f, 16, 16]."""
        shown = latents.new_zeros(len(latents), LATENT_CHANNELS + 1, *latents.shape[2:])
        if prefix is not None:
            pixels = 2 * prefix.to(self._execution_device, self.vae.dtype) - 1
            mean = self.vae.encode(pixels).latent_dist.mean.float() * self.vae.config.scaling_factor
            known = normalised(mean).movedim(0, 1)
            shown[:, :LATENT_CHANNELS, : len(prefix)] = known.to(shown)
            counts = torch.full((len(latents),), len(prefix), device=shown.device)
            shown[:, :LATENT_CHANNELS] = shown_latents(shown[:, :LATENT_CHANNELS], counts)
            shown[:, LATENT_CHANNELS, : len(prefix)] = 1
        return shown

    def _prefix(self, image: Any, video: Any, num_frames: int) -> Tensor | None:
        """Return the known first frames, [p, 3, 64, 64], None where nothing is known."""
        if image is not None and video is not None:
            raise ValueError("image and video were both given: a video's first frame is its picture")
        if not isinstance(num_frames, int) or not num_frames >= 1:
            raise ValueError(f"num_frames must be a whole number of at least 1, got {num_frames!r}")
        given = image if video is None else video
        if given is None:
            return None
        several = isinstance(given, (list, tuple, Tensor)) or getattr(given, "ndim", 0) == 4
        frames = to_tensor(given if several else [given])
        frames = frames.reshape(-1, *frames.shape[-3:])
        if len(frames) not in self.prefix_frames or len(frames) >= num_frames:
            known = " or ".join(map(str, self.prefix_frames))
            raise ValueError(
                f"{len(frames)} first frames were given for {num_frames}: this model continues {known}, and "
                "fewer than num_frames"
            )
        if frames.shape[1:] != (3, 64, 64):
            raise ValueError(f"first frames have the shape {tuple(frames.shape[1:])}, not (3, 64, 64)")
        return frames

    def _decoded(self, latents: Tensor, output_type: str) -> Any:
        """Return the frames of latents, 64 at a time: the autoencoder knows single pictures only."""
        n, frames = len(latents), latents.shape[2]
        z = plain(latents).movedim(2, 1).flatten(0, 1).to(self.vae.dtype) / self.vae.config.scaling_factor
        pixels = torch.cat([self.vae.decode(part, return_dict=False)[0] for part in z.split(64)])
        done = self.video_processor.postprocess(pixels.float(), output_type=output_type)
        if output_type == "pil":
            return [done[i * frames : (i + 1) * frames] for i in range(n)]
        return done.reshape(n, frames, *done.shape[1:])
