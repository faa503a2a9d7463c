"""The engine at `scheduler.step`: from a call of a pipeline to the pictures it hands back."""

from __future__ import annotations
