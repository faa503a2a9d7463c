"""What a state on the way is worth: many samples of its end, or a learned value."""

from __future__ import annotations
