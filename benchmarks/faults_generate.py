"""Faults that `generate` and its kin once had, each run again: name, was, is.

    python -m benchmarks.faults_generate                  # every reproduction, and a table
    python -m benchmarks.faults_generate --kills 20       # 20 kills with -9 at random moments

Each function reproduces one fault with the package as it stands and returns what happens now.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FAULTS: list[tuple[str, str, Callable[[Path], str]]] = []
"""Name, what happened once, and the function that returns what happens now."""


def fault(name: str, was: str) -> Callable[[Callable[[Path], str]], Callable[[Path], str]]:
    """Return a decorator that puts a reproduction on the list."""

    def listed(function: Callable[[Path], str]) -> Callable[[Path], str]:
        FAULTS.append((name, was, function))
        return function

    return listed


def command(*words: Any) -> tuple[int, str]:
    """Return exit status and the error stream of a command run in this process."""
    from typer.testing import CliRunner

    from diffplug.cli.main import app

    result = CliRunner().invoke(app, [str(word) for word in words])
    return result.exit_code, " | ".join(result.stderr.strip().splitlines()) or "(nothing said)"


def told(*words: Any) -> str:
    """Return status and message of a command, in a line."""
    status, said = command(*words)
    return f"status {status}: {said}"


@fault("pictures of a run that is stopped", "0 files of 640 after 25 s, not one word")
def stopped_run(folder: Path) -> str:
    from diffplug.loading import load
    from diffplug.network.denoiser import wrap_forward

    pipe = load("shapes")
    calls = [0]

    def stops(forward: Any, *args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == 5:
            raise KeyboardInterrupt
        return forward(*args, **kwargs)

    with _loaded(pipe):
        undo = wrap_forward(pipe.unet, stops)
        status, said = command("generate", "a red circle", "-n", 12, "--steps", 2, "--batch", 4, "-o", folder)
        undo()
    return f"status {status}, {len(list(folder.iterdir()))} files: {said}"


@fault("guidance 1e30", "status 0, a black picture")
def absurd_guidance(folder: Path) -> str:
    return told("generate", "a red circle", "--steps", 2, "--guidance", "1e30", "-o", folder)


@fault("weights with a NaN", "status 0, black pictures")
def poisoned_weights(folder: Path) -> str:
    import torch

    from diffplug.loading import load

    pipe = load("shapes")
    pipe.unet.conv_in.weight.data[0, 0, 0, 0] = torch.nan
    with _loaded(pipe):
        return told("generate", "a red circle", "--steps", 3, "-o", folder)


@fault("two processes, one folder", "12 of 360 pictures vanished, both exit 0")
def two_writers(folder: Path) -> str:
    words = [sys.executable, "-m", "diffplug", "generate", "--steps", "1", "-n", "30", "-o", str(folder)]
    pair = [
        subprocess.Popen([*words, p], stdout=subprocess.DEVNULL)  # noqa: S603
        for p in ("a red circle", "a green cross")
    ]
    status = [one.wait() for one in pair]
    return f"status {status}, {len(list(folder.glob('*.png')))} of 60 pictures"


@fault("the same command again", "seed-000000-2.png beside an equal picture")
def rerun(folder: Path) -> str:
    for _ in range(2):
        command("generate", "a red circle", "--steps", 1, "-o", folder)
    return ", ".join(sorted(path.name for path in folder.iterdir()))


@fault("out of memory above 2 rows", "30 lines of traceback, nothing written")
def out_of_memory(folder: Path) -> str:
    import torch

    from diffplug.loading import load
    from diffplug.network.denoiser import wrap_forward

    pipe = load("shapes")

    def short(forward: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        if len(sample) > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return forward(sample, *args, **kwargs)

    with _loaded(pipe):
        undo = wrap_forward(pipe.unet, short)
        status, _ = command("generate", "a red circle", "-n", 3, "--steps", 2, "-o", folder)
        undo()
    return f"status {status}, {len(list(folder.iterdir()))} pictures"


@fault("a reward that writes into its input", "wrong pictures in silence")
def rude_reward(folder: Path) -> str:
    import numpy as np

    from diffplug import load, plug
    from diffplug.seeds import Seeds
    from diffplug.steering import BestOfN

    pipe = load("shapes")
    pipe.set_progress_bar_config(disable=True)

    def run(zero: bool) -> Any:
        def reward(images: Any, prompts: list[str]) -> Any:
            value = images.mean((1, 2, 3)).clone()
            images.mul_(0.0 if zero else 1.0)
            return value

        with plug(pipe, Seeds(0), BestOfN(reward, particles=4)):
            return pipe("a red circle", num_inference_steps=4, output_type="np").images

    return "equal pictures" if np.array_equal(run(True), run(False)) else "other pictures"


@fault("--sampler euler --eta 1", "accepted, no effect, written into the PNG")
def idle_eta(folder: Path) -> str:
    return told("generate", "a red circle", "--steps", 3, "--sampler", "euler", "--eta", 1, "-o", folder)


@fault("compare --run steps=2,particles=4", "accepted")
def idle_particles(folder: Path) -> str:
    return told("compare", "a red circle", "--run", "steps=2,particles=4", "-o", folder)


@fault("the reward 'shapes' and other prompts", "fails at the first scored step")
def late_reward(folder: Path) -> str:
    return told("generate", "a cat", "--steer", "fk", "-o", folder)


@fault("a weight file that is missing", "55 s: builds ViT-H-14 twice, then 'does not exist'")
def missing_reward(folder: Path) -> str:
    start = time.perf_counter()
    said = told("generate", "a red circle", "--steer", "fk", "--reward", "hps:missing.pt", "-o", folder)
    return f"{said} ({time.perf_counter() - start:.1f} s)"


@fault("a prompt that is not UTF-8", "60 lines of traceback")
def no_utf8(folder: Path) -> str:
    return told("generate", "a red \udcff circle", "--steps", 2, "-o", folder)


@fault("a prompt file with a byte order mark", "the mark stays in the first prompt")
def byte_order_mark(folder: Path) -> str:
    from diffplug.recipe.prompt_file import read_prompts

    (folder / "p.txt").write_bytes(b"\xef\xbb\xbfa red circle\r\n")
    return repr(read_prompts(folder / "p.txt")[0].text)


@fault("a long prompt", "cut without a word")
def long_prompt(folder: Path) -> str:
    return told("generate", "a red circle " + "and a blue square " * 12, "--steps", 1, "-o", folder)


@fault("reward code that calls sys.exit(0)", "status 0, nothing written, nothing said")
def leaving_reward(folder: Path) -> str:
    (folder / "r.py").write_text("import sys; sys.exit(0)")
    return told("generate", "a red circle", "--steer", "fk", "--reward", f"{folder}/r.py:f", "-o", folder)


@fault("settings of a float16 picture", "the same as of a float32 one")
def told_dtype(folder: Path) -> str:
    from diffplug.making.png import read_settings

    command("generate", "a red circle", "--steps", 1, "-o", folder)
    settings = read_settings(folder / "seed-000000.png")
    return f"dtype {settings['dtype']}, used {json.dumps(settings['used'])}"


@fault("temporary files of killed runs", "never swept")
def stale_temporaries(folder: Path) -> str:
    from diffplug.files import host, output_folder

    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    (folder / f".seed-000000.tmp-{host()}-{gone.pid}-0123abcd.png").write_bytes(b"half")
    output_folder(folder)
    return f"{len(list(folder.iterdir()))} left"


class _loaded:
    """Commands inside the block get this pipeline, whatever model they name."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe

    def __enter__(self) -> None:
        import diffplug

        self.load = diffplug.load
        diffplug.load = lambda *_, **__: self.pipe

    def __exit__(self, *_: Any) -> None:
        import diffplug

        diffplug.load = self.load


def kills(n: int, root: Path, *, model: str = "shapes", seed: int = 0, images: int = 24) -> dict[str, Any]:
    """Return what n kills with -9 of `generate` did: each at a random moment, then the same command again.

    Each run is a fork of this process, which has its libraries and the model loaded once. A kill waits for a
    random number of files, and then a random part of the time that a batch takes.
    """
    import torch

    import diffplug

    torch.set_num_threads(1)
    diffplug.load(model)
    words = ["generate", "a red circle", "a green cross", "--model", model, "--steps", "2", "--device", "cpu"]
    words += ["-n", str(images // 2), "--batch", "4", "--json", "-o"]
    start = time.perf_counter()
    _completed([*words, str(root / "whole")])
    length, whole = time.perf_counter() - start, digests(root / "whole")
    chance = random.Random(seed)
    figures: dict[str, Any] = {"kills": 0, "lost": 0, "damaged": 0, "equal": 0, "left": [], "temporaries": 0}
    for number in range(n):
        folder = root / str(number)
        folder.mkdir()
        _killed(
            [*words, str(folder)], folder, chance.randrange(images), chance.random() * length * 4 / images
        )
        part, found = digests(folder), digests(folder, hidden=True)
        figures["kills"] += 1
        figures["left"].append(len(part))
        figures["temporaries"] += len(found) - len(part)
        figures["damaged"] += sum(whole.get(name) != digest for name, digest in part.items())
        _completed([*words, str(folder)])
        after = digests(folder, hidden=True)
        figures["lost"] += sum(after.get(name) != digest for name, digest in part.items())
        figures["equal"] += after == whole
    return figures


def digests(folder: Path, *, hidden: bool = False) -> dict[str, str]:
    """Return a hash of every file in a folder, hidden ones only where asked for."""
    files = [path for path in folder.iterdir() if hidden or not path.name.startswith(".")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def _fork(words: list[str]) -> int:
    """Return the process of a command that runs in a fork of this one, silently."""
    child = os.fork()
    if child:
        return child
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    from diffplug.cli.main import app

    status = 1
    try:
        app(words)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 0
    finally:
        os._exit(status)


def _completed(words: list[str]) -> None:
    status = os.waitstatus_to_exitcode(os.waitpid(_fork(words), 0)[1])
    if status:
        raise RuntimeError(f"{words} ended with status {status}")


def _killed(words: list[str], folder: Path, files: int, seconds: float) -> None:
    """Run a command and kill it with -9 some seconds after that many files are there."""
    child = _fork(words)
    while len(digests(folder)) < files and os.waitpid(child, os.WNOHANG) == (0, 0):
        time.sleep(0.001)
    time.sleep(seconds)
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass  # it was done before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=0, help="only kill `generate` so often")
    parser.add_argument("--model", default="shapes")
    parser.add_argument("--only", default="", help="faults whose name has these words")
    given = parser.parse_args()
    if given.kills:
        with tempfile.TemporaryDirectory() as root:
            print(json.dumps(kills(given.kills, Path(root), model=given.model)))
        return
    for name, was, function in FAULTS:
        if given.only in name:
            with tempfile.TemporaryDirectory() as folder:
                print(f"{name}\n    was: {was}\n    is:  {function(Path(folder))}", flush=True)


if __name__ == "__main__":
    main()
