"""Errors as the page tells them: one line to the user, everything else to the terminal."""

from __future__ import annotations

import functools
import inspect
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from diffplug.messages import reason

__all__ = ["told"]


def told(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function, or generator function, for Gradio whose errors are told in one line."""
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def generator(*args: Any) -> Iterator[Any]:
            try:
                yield from function(*args)
            except Exception as error:
                raise _shown(error) from None

        return generator

    @functools.wraps(function)
    def wrapper(*args: Any) -> Any:
        try:
            return function(*args)
        except Exception as error:
            raise _shown(error) from None

    return wrapper


def _shown(error: Exception) -> Exception:
    """Return Gradio's error: what a ValueError says; of others only that there was one."""
    import html

    import gradio as gr

    if isinstance(error, (ValueError, TimeoutError)):
        text = reason(error)
    else:
        traceback.print_exception(error)
        text = "something broke; the terminal says what"
    return gr.Error(html.escape(text, quote=False), print_exception=False)
