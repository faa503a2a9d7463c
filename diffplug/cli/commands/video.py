"""`diffplug video`: a video of any length, clip by clip or by windows, into a folder of frames."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from diffplug.cli.console import guarded, print_json, until_stopped
from diffplug.cli.options import Device, Dtype, Guidance, Height, Json, Out, Sampler, Seed, Width

Prompt = Annotated[str, typer.Argument(help="What the video shows.")]
At = Annotated[
    list[str] | None,
    typer.Option("--at", help="A prompt from a frame on, as `96:a lake`; may be given often."),
]
Model = Annotated[
    str, typer.Option(help="moving-shapes (embedded), a folder, or a hub id such as owner/name.")
]
Frames = Annotated[int, typer.Option(min=1, help="Frames of the whole video.")]
Clip = Annotated[int | None, typer.Option(min=1, help="Frames of one clip; else the model's own.")]
Overlap = Annotated[
    int | None, typer.Option(min=1, help="Frames that a clip is given of the one before; else 5, 4 or 1.")
]
Seam = Annotated[str, typer.Option(help="Where clips meet: keep, fade or new.")]
Match = Annotated[str | None, typer.Option(help="Bring colours to the first clip's (anchor) or prefix.")]
Win = Annotated[
    str | None, typer.Option(help="Windows of a text-to-video model instead, FRAMES/OVERLAP as 81/16.")
]
Noise = Annotated[str, typer.Option(help="Of windows: iid, free (FreeNoise) or repeat.")]
First = Annotated[Path | None, typer.Option("--image", help="Picture file that the video begins with.")]
Painter = Annotated[
    str | None, typer.Option("--picture-model", help="Draw the first picture with this model (shapes, ...).")
]
Pictures = Annotated[
    int, typer.Option(min=1, help="Pictures to draw; the best by --reward begins the video.")
]
Candidates = Annotated[int, typer.Option(min=1, help="Clips to draw at every join; one is kept by --reward.")]
Reward = Annotated[str | None, typer.Option(help="A reward's name or a sum, as `0.8*clip + 0.2*steady`.")]
Steps = Annotated[int | None, typer.Option(min=1, max=1000, help="Denoising steps; else the pipeline's own.")]
Fps = Annotated[float, typer.Option(min=0.1, max=100, help="Of the animation.")]


@guarded
def video(
    prompt: Prompt,
    at: At = None,
    model: Model = "moving-shapes",
    frames: Frames = 97,
    clip_frames: Clip = None,
    overlap: Overlap = None,
    seam: Seam = "keep",
    match: Match = None,
    windows: Win = None,
    noise: Noise = "iid",
    image: First = None,
    picture_model: Painter = None,
    pictures: Pictures = 1,
    candidates: Candidates = 1,
    reward: Reward = None,
    sampler: Sampler = None,
    steps: Steps = None,
    guidance: Guidance = None,
    width: Width = None,
    height: Height = None,
    seed: Seed = 0,
    fps: Fps = 12.0,
    out: Out = Path("out/video"),
    device: Device = "auto",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Make a video of any length: clips that continue each other, or windows over one long clip.

    Example: `diffplug video "a red circle" --frames 97 -o out/circle`, or for a text-to-video model
    `diffplug video "a red circle" --windows 16/8 --noise free`

    The same command goes on where it was stopped. Frames are in FOLDER/frames, the animation in
    FOLDER/video.webp, what colours and motion did in FOLDER/report.json.
    """
    _refuse_idle(locals())
    from diffplug.cli.pipeline import load_pipeline

    told, size = _prompts(prompt, at), _window_size(windows)
    pipe = load_pipeline(model, device, dtype, [prompt])
    pipe.set_progress_bar_config(disable=json)
    call = _call(pipe, steps, guidance, width, height)
    with (
        until_stopped(f"what was reached is in {out}: repeat the command to go on"),
        _sampler(pipe, sampler, steps),
    ):
        if windows is not None:
            report = _windowed(pipe, prompt, windows, size, noise, frames, seed, call, out)
        else:
            long = _long(pipe, frames, clip_frames, overlap, seam, match, candidates, reward)
            begin = _beginning(
                pipe, prompt, image, picture_model, pictures, reward, seed, device, dtype, call
            )
            report = long.write(out, seed=seed, **told, **begin, **call)
    path = _animated(out, fps)
    if json:
        print_json({"folder": str(out), "video": str(path), "report": report.as_mapping()})
    else:
        typer.echo(f"{report}\n{path}")


def _refuse_idle(given: dict[str, Any]) -> None:
    """Raise ValueError for options that would do nothing beside each other."""
    if given["windows"] is not None:
        for name, usual in _OF_CLIPS.items():
            if given[name] != usual:
                option = name.replace("_", "-")
                raise ValueError(
                    f"--{option} is for clips that continue each other: leave it or --windows out"
                )
    elif given["noise"] != "iid":
        raise ValueError("--noise is for windows: add --windows FRAMES/OVERLAP, as 16/8")
    chooses = given["pictures"] > 1 or given["candidates"] > 1
    if chooses and given["reward"] is None:
        raise ValueError("--pictures and --candidates choose by a reward: add --reward")
    if given["reward"] is not None and not chooses:
        raise ValueError("--reward chooses nothing: add --pictures 8 or --candidates 4")
    if given["pictures"] > 1 and given["picture_model"] is None:
        raise ValueError("--pictures draws with --picture-model: name one, as shapes")
    if given["image"] is not None and given["picture_model"] is not None:
        raise ValueError("--image and --picture-model both give the first picture: leave one out")


_OF_CLIPS: dict[str, Any] = {
    "at": None,
    "clip_frames": None,
    "overlap": None,
    "seam": "keep",
    "match": None,
    "image": None,
    "picture_model": None,
    "pictures": 1,
    "candidates": 1,
    "reward": None,
}


def _call(
    pipe: Any, steps: int | None, guidance: float | None, width: int | None, height: int | None
) -> dict[str, Any]:
    """Return the arguments of the pipeline's call that were given. Raises ValueError for unknown ones."""
    import inspect

    asked = {"num_inference_steps": steps, "guidance_scale": guidance, "width": width, "height": height}
    call = {name: value for name, value in asked.items() if value is not None}
    known = inspect.signature(pipe.__call__).parameters
    for name in call:
        if name not in known:
            raise ValueError(f"{type(pipe).__name__} takes no {name}: leave the option out")
    return call


def _sampler(pipe: Any, name: str | None, steps: int | None) -> Any:
    from diffplug.plug import plug
    from diffplug.registry import sampler

    return plug(pipe, *([] if name is None else [sampler(name, pipe, steps)]))


def _prompts(prompt: str, at: Sequence[str] | None) -> dict[str, Any]:
    """Return prompt= or prompts= of a long video. Raises ValueError for what no pipeline can take."""
    from diffplug.recipe.prompt_file import check_prompt

    check_prompt("the prompt", prompt)
    if not at:
        return {"prompt": prompt}
    told = {0: prompt}
    for text in at:
        frame, colon, words = text.partition(":")
        if not colon or not frame.strip().isdecimal() or not words.strip():
            raise ValueError(f"--at {text!r}: write the frame, a colon and the prompt, as '96:a lake'")
        if int(frame) in told:
            raise ValueError(
                f"--at {text!r}: frame {int(frame)} has the prompt {told[int(frame)]!r} already: give one"
            )
        told[int(frame)] = words.strip()
        check_prompt(f"the prompt from frame {int(frame)}", words)
    return {"prompts": told}


def _long(
    pipe: Any,
    frames: int,
    clip_frames: int | None,
    overlap: int | None,
    seam: str,
    match: str | None,
    candidates: int,
    reward: str | None,
) -> Any:
    from diffplug.samplers.video import LongVideo
    from diffplug.steering import ClipSelection

    select = ClipSelection(reward, candidates=candidates) if candidates > 1 else None
    options: dict[str, Any] = {"clip_frames": clip_frames, "overlap": overlap, "seam": seam, "match": match}
    return LongVideo(pipe, frames=frames, select=select, **options)


def _beginning(
    pipe: Any,
    prompt: str,
    image: Path | None,
    picture_model: str | None,
    pictures: int,
    reward: str | None,
    seed: int,
    device: str,
    dtype: str,
    call: dict[str, Any],
) -> dict[str, Any]:
    """Return what the first clip begins with: a file, or the best of some pictures."""
    if image is None and picture_model is None:
        return {}
    if image is not None:
        from PIL import Image, UnidentifiedImageError

        from diffplug.pictures import coloured

        try:
            return {"image": coloured(Image.open(image))}
        except (OSError, UnidentifiedImageError) as error:
            raise ValueError(f"--image {str(image)!r} cannot be read as a picture: {error}") from error
    from diffplug.cli.pipeline import load_pipeline
    from diffplug.samplers.video.chain import ImageThenVideo

    painter = load_pipeline(str(picture_model), device, dtype, [prompt])
    painter.set_progress_bar_config(disable=True)
    judge = reward if pictures > 1 else None
    chain = ImageThenVideo(painter, pipe, pictures=pictures, reward=judge)
    return {"image": chain.picture(prompt, seed=seed, **call)[None]}


def _window_size(windows: str | None) -> tuple[int, int]:
    """Return frames and overlap of windows, as 16/8 says them; (0, 0) where none are asked for."""
    if windows is None:
        return 0, 0
    size, slash, overlap = windows.partition("/")
    if not slash or not size.strip().isdecimal() or not overlap.strip().isdecimal():
        raise ValueError(f"--windows {windows!r}: write FRAMES/OVERLAP, as 16/8")
    return int(size), int(overlap)


def _windowed(
    pipe: Any,
    prompt: str,
    windows: str,
    size: tuple[int, int],
    noise: str,
    frames: int,
    seed: int,
    call: dict[str, Any],
    out: Path,
) -> Any:
    """Write a video made by windows, and return its report."""
    import torch

    from diffplug.pictures import raw_pictures, to_tensor
    from diffplug.plug import plug
    from diffplug.samplers.video import DriftReport, Windows
    from diffplug.samplers.video.clip_loop import LoopState
    from diffplug.samplers.video.request import sampled_by, weights_of
    from diffplug.samplers.video.video_folder import VideoFolder
    from diffplug.video.statistics import clip_statistics

    settings = Windows(frames=size[0], overlap=size[1], noise=noise)
    asked = {"frames": frames, "windows": windows, "noise": noise, "prompt": prompt, "seed": seed}
    model = {"model": type(pipe).__name__, "weights": weights_of(pipe)}
    place = VideoFolder.of(out, {**asked, **model, "sampler": sampled_by(pipe), **call})
    state = place.resumed(LoopState())
    if state.emitted:
        place.finish(state.report)
        return state.report
    generator = torch.Generator().manual_seed(seed)
    with plug(pipe, settings):
        output = pipe(prompt=prompt, num_frames=frames, generator=generator, output_type="pt", **call)
    made = to_tensor(raw_pictures(output))[0]
    report = DriftReport(clips=tuple(clip_statistics(part) for part in made.split(settings.frames)))
    place.add(made, LoopState(1, len(made), made[-1:], made[0], None, report))
    place.finish(report)
    return report


def _animated(out: Path, fps: float) -> Path:
    from diffplug.samplers.video.animation import save_animation

    return save_animation(sorted((out / "frames").glob("*.png")), out / "video.webp", fps=fps, scale=1)
