"""Few-step checkpoints by name: a catalogue of recipes, and the plug that sets one on a pipeline."""

from __future__ import annotations
