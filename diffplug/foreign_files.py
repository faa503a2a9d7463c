"""Files of other programs' formats: whatever their readers raise on damaged ones becomes one line."""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from diffplug.files import read_bytes
from diffplug.messages import reason

__all__ = ["LARGEST_ARRAY", "damaged", "read_array"]

LARGEST_ARRAY = 64 * 2**20  # bytes of a file of numbers


@contextmanager
def damaged(path: str | os.PathLike[str], what: str) -> Iterator[None]:
    """Raise ValueError, with the file's name and what it is not, for whatever a reader raises on bad content.

    what: as in "holds no {what}". The system's own refusals (OSError: missing, a folder) pass as they are.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # readers raise almost anything: TokenError, BadZipFile, MemoryError
        raise ValueError(f"{os.fspath(path)!r} holds no {what}: {reason(error)}") from error


def read_array(path: str | os.PathLike[str], what: str, name: str | None = None) -> Any:
    """Return the array in a `.npy` file of at most 64 MiB, or one by its name in a `.npz` file.

    Pickled arrays are refused. what: it should hold. Raises ValueError, with the file's name, where it is
    damaged or lacks the name.
    """
    import numpy as np

    data = read_bytes(path, limit=LARGEST_ARRAY)
    with damaged(path, what), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = np.load(io.BytesIO(data), allow_pickle=False)
        if name is not None and name not in getattr(found, "files", ()):
            raise ValueError(f"it has no array {name!r}")
        return found if name is None else found[name]
