"""What a state on the way is worth: many samples of its end, or a learned value."""

from __future__ import annotations

from typing import TYPE_CHECKING

from diffplug.lazy import hand_on

if TYPE_CHECKING:
    from diffplug.steering.engine.rule import State as State
    from diffplug.steering.engine.rule import Value as Value
    from diffplug.steering.values.fitting import fit_value as fit_value
    from diffplug.steering.values.learned import LearnedValue as LearnedValue
    from diffplug.steering.values.many_samples import ManySamples as ManySamples

_HOMES = {
    "LearnedValue": "diffplug.steering.values.learned",
    "ManySamples": "diffplug.steering.values.many_samples",
    "State": "diffplug.steering.engine.rule",
    "Value": "diffplug.steering.engine.rule",
    "fit_value": "diffplug.steering.values.fitting",
}

__all__ = [*_HOMES]
__getattr__, __dir__ = hand_on(__name__, _HOMES)
