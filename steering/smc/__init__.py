"""Sequential Monte Carlo without a network: weights, resampling, potentials, filters, islands."""

from __future__ import annotations
