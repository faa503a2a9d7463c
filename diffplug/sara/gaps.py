"""Rising positions as gaps in bytes: 1 byte an entry where more than two in a hundred are chosen.

The gap to the position before, less one, is written in base 255: a byte 255 says "255 more, and go on".
Four-byte positions would make half of a 16-bit file of positions.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["decode", "encode"]

_MORE = 255


def encode(index: Tensor) -> Tensor:
    """Return strictly rising positions [k] from 0 on as uint8 [at least k]."""
    if not len(index):
        return torch.empty(0, dtype=torch.uint8)
    wide = index.long()
    gaps = torch.diff(wide, prepend=wide.new_full((1,), -1)) - 1
    if int(gaps.min()) < 0:
        raise ValueError("positions must rise strictly, from 0 on")
    ends = (gaps // _MORE + 1).cumsum(0) - 1
    out = torch.full((int(ends[-1]) + 1,), _MORE, dtype=torch.uint8)
    out[ends] = (gaps % _MORE).to(torch.uint8)
    return out


def decode(code: Tensor) -> Tensor:
    """Return the positions, int64 [k]; ValueError for a code that breaks off within a gap."""
    if not len(code):
        return torch.empty(0, dtype=torch.long)
    ends = torch.nonzero(code != _MORE)[:, 0]
    if not len(ends) or int(ends[-1]) != len(code) - 1:
        raise ValueError("the positions break off in the middle of a gap")
    return code.long().cumsum(0)[ends] + torch.arange(len(ends))
