"""Choosing what to fine-tune by search (MemControl, arXiv 2405.19458)."""
