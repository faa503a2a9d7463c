"""What tuners other than LoRA leave: sparse deltas, and adapters that only peft reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from diffplug.intercept import Undo
from diffplug.samplers.few_step.adapter import NAME, adapters_of, unwrap
from diffplug.samplers.few_step.catalogue import Row
from diffplug.samplers.few_step.weights_file import read_weights
from diffplug.sara.file import load_delta
from diffplug.sara.loaded import load_sara, loaded_sara, unload_sara

__all__ = ["put_on_tuned"]


def put_on_tuned(row: Row, component: str, module: Any, file: Path, strength: float) -> tuple[str, Undo]:
    """Put a row's sparse delta or adapter on a module; return how, and the undo."""
    if row.kind == "peft":
        return "runtime", _adapter(row, module, file)
    taken = loaded_sara(module)
    name = next(n for n in (row.name, *(f"{row.name}-{i}" for i in range(2, 1000))) if n not in taken)
    target = {component: module}
    load_sara(target, load_delta(file), strength, name)
    return "sparse", lambda: unload_sara(target, name)


def _adapter(row: Row, module: Any, file: Path) -> Undo:
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING
    from peft.utils import PeftType, set_peft_model_state_dict

    state, metadata = read_weights(file)
    try:
        told = json.loads(metadata["peft"])
        made = PEFT_TYPE_TO_CONFIG_MAPPING[PeftType(str(told["peft_type"]).rpartition(".")[2])]
    except (KeyError, ValueError, TypeError) as error:
        raise ValueError(
            f"{file.name} of {row.name} holds no config of peft ({error}): train it anew"
        ) from error
    if others := adapters_of(module):
        raise ValueError(f"{row.name} cannot act beside the adapter {others[0]!r}: unload that first")
    known = made.__dataclass_fields__
    config = made(**{key: value for key, value in told.items() if key in known and key != "peft_type"})
    module.add_adapter(config, adapter_name=NAME)

    def undo() -> None:
        if NAME in adapters_of(module):
            unwrap(module, lambda layer: True)
            del module.peft_config
            module._hf_peft_config_loaded = False

    missed = set_peft_model_state_dict(module, state, adapter_name=NAME)
    strange = list(getattr(missed, "unexpected_keys", None) or [])
    if strange:
        undo()
        raise ValueError(f"{file.name} of {row.name} fits no layer of this model: {strange[0]!r} is unknown")
    for name, value in module.named_parameters():
        if f".{NAME}." in f"{name}.":
            value.requires_grad_(False)
    return undo
