"""Rules: which calls are scored, with what log weights, and how particles are selected."""

from __future__ import annotations
