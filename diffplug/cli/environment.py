"""What is installed, what the machine offers, what is missing and the command that gets it."""

from __future__ import annotations

import os
import platform
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import diffplug
from diffplug.loading import shapes_folder
from diffplug.registry import REWARDS, SAMPLERS, STEERERS, TRAINERS

__all__ = ["CORE", "EXTRAS", "Finding", "examine"]

CORE = {
    "torch": "2.6",
    "diffusers": "0.40",
    "transformers": "5.0",
    "peft": "0.18",
    "accelerate": "1.10",
    "safetensors": "0.5",
    "numpy": "1.26",
    "scipy": "1.12",
    "pillow": "10.1",
    "typer": "0.15",
    "rich": "13.7",
    "pydantic": "2.7",
}
"""Distributions that diffplug needs, with the oldest version that does."""

EXTRAS = {
    "open_clip_torch": "clip",
    "gradio": "demo",
    "optuna": "search",
    "xformers": "xformers",
    "rdkit": "molecules",
}
"""Optional distributions and the extra that installs each."""

_BACK_ENDS = {
    "flash_attn": "FlashAttention 2",
    "flash_attn_interface": "FlashAttention 3",
    "sageattention": "SageAttention",
    "xformers": "xFormers",
}


@dataclass(frozen=True)
class Finding:
    """One line of the examination; `ok` is None for mere information, `remedy` a command or a sentence."""

    topic: str
    name: str
    state: str
    ok: bool | None = None
    remedy: str = ""


def examine() -> list[Finding]:
    """Every finding, most basic first. Nothing is downloaded and nothing raises; it may import torch."""
    return [*_basics(), *_packages(), *_extras(), *_devices(), *_attention(), *_models(), *_plug_ins()]


def _basics() -> list[Finding]:
    python = platform.python_version()
    fine = sys.version_info >= (3, 10)
    offline = os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"}
    return [
        Finding("system", "diffplug", diffplug.__version__),
        Finding("system", "python", python, fine, "" if fine else "install Python 3.10 or newer"),
        Finding("system", "platform", platform.platform()),
        Finding("system", "hub", "offline (HF_HUB_OFFLINE is set)" if offline else "online"),
    ]


def _packages() -> list[Finding]:
    found = []
    for name, least in CORE.items():
        have = _version(name)
        fine = have is not None and _numbers(have) >= _numbers(least)
        remedy = "" if fine else f'pip install --upgrade "{name}>={least}"'
        found.append(Finding("package", name, have or "missing", fine, remedy))
    if _version("torchvision"):
        found.append(_torchvision())
    return found


def _torchvision() -> Finding:
    """Whether the installed torchvision was built for the installed torch: a wrong pair breaks Diffusers."""
    try:
        import torchvision  # noqa: F401
    except Exception as error:  # a broken build raises whatever its C++ side raises
        remedy = "pip install --upgrade torch torchvision   (or: pip uninstall torchvision)"
        return Finding(
            "package", "torchvision", f"does not fit torch: {error}".splitlines()[0], False, remedy
        )
    return Finding("package", "torchvision", str(_version("torchvision")), True)


def _extras() -> list[Finding]:
    found = []
    for name, extra in EXTRAS.items():
        have = _version(name)
        remedy = "" if have else f'pip install "diffplug[{extra}]"'
        found.append(Finding("extra", name, have or "not installed", True if have else None, remedy))
    return found


def _devices() -> list[Finding]:
    try:
        import torch
    except Exception as error:  # reported, whatever it is: the doctor must finish
        return [
            Finding(
                "device", "torch", f"does not import: {error}".splitlines()[0], False, "pip install torch"
            )
        ]
    found = [
        Finding(
            "device", "cpu", f"{os.cpu_count()} cores, torch uses {torch.get_num_threads()} threads", True
        )
    ]
    for i in range(torch.cuda.device_count()):
        gigabytes = torch.cuda.get_device_properties(i).total_memory / 2**30
        found.append(
            Finding("device", f"cuda:{i}", f"{torch.cuda.get_device_name(i)}, {gigabytes:.0f} GiB", True)
        )
    if torch.backends.mps.is_available():
        found.append(Finding("device", "mps", "Apple GPU", True))
    return found


def _attention() -> list[Finding]:
    found = []
    if find_spec("torch") is not None:
        found.append(Finding("attention", "PyTorch", "scaled-dot-product attention, used by default", True))
    for module, name in _BACK_ENDS.items():
        here = find_spec(module) is not None
        found.append(
            Finding("attention", name, "installed" if here else "not installed (optional)", here or None)
        )
    return found


def _models() -> list[Finding]:
    folder = shapes_folder()
    here = (folder / "model_index.json").is_file()
    remedy = "" if here else "reinstall diffplug: pip install --force-reinstall --no-deps diffplug"
    return [Finding("model", "shapes", str(folder) if here else "missing", here, remedy)]


def _plug_ins() -> list[Finding]:
    registries = {"samplers": SAMPLERS, "steerers": STEERERS, "rewards": REWARDS, "trainers": TRAINERS}
    return [
        Finding("plug-ins", name, ", ".join(registry.names()) or "none")
        for name, registry in registries.items()
    ]


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: "2.6.0+cu124" -> (2, 6, 0)."""
    numbers: list[int] = []
    for part in text.split("+")[0].split("."):
        if not part.isdigit():
            break
        numbers.append(int(part))
    return tuple(numbers)


def as_json(findings: list[Finding]) -> list[dict[str, Any]]:
    """The findings as JSON objects, without empty remedies."""
    return [{k: v for k, v in vars(f).items() if v not in ("", None)} for f in findings]
