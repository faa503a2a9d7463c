"""Measurements behind the claims: each module runs ours and the peers in one process and prints a table."""
