"""The model of a batch: its name, what its ids say of it, and how a process loads it."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffplug.registry import unknown

__all__ = ["Model"]

_PART = 2**20


@dataclass(frozen=True)
class Model:
    """A model by name, where it runs and how; every process of a batch loads it from this."""

    name: str = "shapes"
    device: str = "auto"
    dtype: str = "auto"
    offload: str = "none"
    vae_tiling: bool = False
    vae_slicing: bool = False

    def load(self, rank: int = 0) -> Any:
        """Return the pipeline; process `rank` of a machine takes the accelerator of that number."""
        from diffplug.placing import Memory, hush, placed

        hush()
        memory = Memory(self.offload, self.vae_tiling, self.vae_slicing)
        pipe = placed(self.name, self._device(rank), self.dtype, memory)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def setup(self) -> dict[str, str]:
        """Return what a picture's settings say of the model."""
        from diffplug.placing import device_of, dtype_of

        return {"model": self.name, "dtype": dtype_of(self.dtype, self.name, device_of(self.device))}

    def identity(self) -> str:
        """Return name, version and dtype: what every id depends on.

        The version of a folder is a hash of its files, so that it may move; that of a hub id its commit.
        """
        from diffplug.loading import shapes_folder

        dtype = self.setup()["dtype"]
        if self.name == "shapes":
            return f"shapes@{_fingerprint(shapes_folder())}:{dtype}"
        if Path(self.name).is_dir():
            return f"folder@{_fingerprint(Path(self.name))}:{dtype}"
        return f"{self.name}@{_commit(self.name)}:{dtype}"

    def _device(self, rank: int) -> str:
        import torch

        if self.device not in ("auto", "cuda") or not torch.cuda.is_available():
            return self.device
        return f"cuda:{rank % torch.cuda.device_count()}"


def _fingerprint(folder: Path) -> str:
    """Return a hash of names, sizes, beginnings and ends of a folder's weights and settings."""
    state = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        if path.suffix not in (".json", ".safetensors", ".txt", ".model") or not path.is_file():
            continue
        size = path.stat().st_size
        state.update(f"{path.relative_to(folder).as_posix()} {size}\n".encode())
        with open(path, "rb") as file:
            state.update(file.read(_PART))
            file.seek(max(0, size - _PART))
            state.update(file.read(_PART))
    return state.hexdigest()[:12]


def _commit(name: str) -> str:
    """Return the commit of a hub's repository that is going to be loaded."""
    from huggingface_hub import hf_hub_download

    if name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise unknown("model", name, ["shapes"], "Or give a folder, or a hub id such as 'owner/name'.")
    try:
        return Path(hf_hub_download(name, "model_index.json")).parent.name[:12]
    except Exception as error:  # the hub's library raises a dozen kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(f"model {name!r} is neither here nor came from the hub: {first[:160]}") from error
