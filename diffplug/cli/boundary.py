"""Where commands end: every error is one line and a status, whatever was raised and whoever raised it."""

from __future__ import annotations

import functools
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NoReturn, TypeVar

import typer
from typer.core import TyperGroup

__all__ = ["BAD_INPUT", "Commands", "guarded", "until_stopped"]

BAD_INPUT = 2
"""Exit status for anything that another input, or another machine, would cure."""

INTERRUPTED = 130
"""Exit status after Ctrl-C, as shells have it."""

TERMINATED = 143
"""Exit status after SIGTERM."""

_LONGEST = 800
_QUOTED = re.compile(r"""(?<!\w)'([^'\n]*)'(?!\w)|(?<!\w)"([^"\n]*)"(?!\w)""")
_ClickException: type[Exception] = typer.BadParameter.__mro__[
    2
]  # typer brings its own copy of click, or click
_OURS = (typer.Exit, typer.Abort, _ClickException)
_LESS = {
    "batch": "--batch",
    "max_rows": "--max-rows",
    "rows": "--rows",
    "particles": "--particles",
    "frames": "--frames",
    "windows": "--windows",
    "width": "--width and --height",
}
"""Options by which a command asks for less, by the names of their parameters."""

_SPARING = {"dtype": "--dtype bfloat16", "offload": "--offload model", "vae_tiling": "--vae-tiling"}
"""Options that spare memory."""

_debug = False
_options: ContextVar[frozenset[str]] = ContextVar("options", default=frozenset())
"""The parameters of the command that runs."""

Command = TypeVar("Command", bound=Callable[..., Any])


class Terminated(KeyboardInterrupt):
    """SIGTERM, raised where the program was."""


class Commands(TyperGroup):
    """A group of commands whose usage errors are one line too, and that takes --debug in any place."""

    def main(
        self,
        args: Sequence[str] | None = None,
        prog_name: str | None = None,
        complete_var: str | None = None,
        standalone_mode: bool = True,
        windows_expand_args: bool = True,
        **extra: Any,
    ) -> Any:
        global _debug
        words, _debug = _without_debug(list(sys.argv[1:] if args is None else args))

        def run() -> Any:
            return super(Commands, self).main(words, prog_name, complete_var, standalone_mode=False, **extra)

        if not standalone_mode:
            return run()
        try:
            status = run()
        except typer.Abort:
            status = INTERRUPTED
        except _ClickException as error:
            status = _usage(error, words)
        sys.exit(status if isinstance(status, int) else 0)


def _without_debug(words: list[str]) -> tuple[list[str], bool]:
    """Return the words without --debug, as far as options go, and whether it was among them."""
    end = words.index("--") if "--" in words else len(words)
    kept = [word for word in words[:end] if word != "--debug"] + words[end:]
    return kept, len(kept) < len(words)


def _usage(error: Any, words: Sequence[str] = ()) -> int:
    """Tell a usage error of a command line; what is no error (no command given) prints the help."""
    if type(error).__name__ == "NoArgsIsHelpError":
        error.show()
        return BAD_INPUT
    command = getattr(getattr(error, "ctx", None), "command_path", "") or "diffplug"
    message = error.format_message().rstrip()
    option = getattr(getattr(error, "param", None), "opts", ())
    if (value := _value_of(option, words)) is not None and repr(value) not in message:
        message = message.replace(": ", f", {value!r}: ", 1)
    end = "" if message.endswith((".", "?")) else "."
    _tell(f"{message}{end} `{command} --help` lists what there is.")
    return BAD_INPUT


def _value_of(option: Sequence[str], words: Sequence[str]) -> str | None:
    """Return the last value that a command line gives an option; None where it gives none."""
    found = None
    for word, after in zip(words, [*words[1:], None], strict=True):
        name, is_, value = word.partition("=")
        if word in option and after is not None:
            found = after
        elif is_ and name in option:
            found = value
    return found


def guarded(command: Command) -> Command:
    """Return `command` with each error told in one line, and exit status 2, instead of a traceback.

    Ctrl-C gives status 130. What nobody expected is called a bug, and --debug shows where it was raised.
    """

    @functools.wraps(command)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        _options.set(frozenset(kwargs))
        try:
            with _warnings_in_a_line(), _terminations():
                return command(*args, **kwargs)
        except _OURS:
            raise
        except KeyboardInterrupt as error:
            with until_stopped("before anything was finished"):
                raise error
        except (Exception, SystemExit) as error:
            if _debug:
                traceback.print_exc()
            _fail(sentence(error))

    return wrapper  # type: ignore[return-value]


def sentence(error: BaseException) -> str:
    """Return what an error says to a person: what happened, and what to do."""
    from diffplug.network.memory import is_out_of_memory

    text = str(error) or type(error).__name__
    if isinstance(error, ModuleNotFoundError):
        return f"{text}. `diffplug doctor` tells what is missing and how to get it."
    if isinstance(error, (ValueError, OSError)):
        return text
    if isinstance(error, MemoryError) and error.args:
        return text
    if "torch" in sys.modules and is_out_of_memory(error):
        return _not_enough()
    if isinstance(error, SystemExit):
        return f"code that was loaded ended the program (sys.exit({error.code!r})): nothing more was made"
    if isinstance(error, RecursionError):
        return "something that was read is nested too deeply"
    if type(error).__name__ == "SafetensorError":
        return f"weights could not be read or written: {text}"
    if reward := vars(error).get("_diffplug_reward"):
        return f"the reward {reward!r} raised {type(error).__name__}: {text}"
    return (
        f"unexpected {type(error).__name__}: {text}. This is a bug, here or in a library: --debug shows where"
    )


def _not_enough() -> str:
    """Return what helps where memory ran out: those of a command's options that take less."""
    known = _options.get()
    less = [option for name, option in _LESS.items() if name in known]
    sparing = [option for name, option in _SPARING.items() if name in known]
    lower = f"lower {', '.join(less)}" if less else "ask for less at once"
    return f"memory ran out: {lower}{', or try ' if sparing else ''}{', '.join(sparing)}"


@contextmanager
def until_stopped(how_to_go_on: str | Callable[[], str]) -> Iterator[None]:
    """A block in which Ctrl-C or SIGTERM ends the command with this line, and exit status 130 or 143."""
    with _terminations():
        try:
            yield
        except KeyboardInterrupt as error:
            said = how_to_go_on if isinstance(how_to_go_on, str) else how_to_go_on()
            typer.echo(f"stopped: {said}", err=True)
            raise typer.Exit(TERMINATED if isinstance(error, Terminated) else INTERRUPTED) from None


@contextmanager
def _terminations() -> Iterator[None]:
    """Raise SIGTERM as an exception inside the block, so that files and the terminal are left in order."""

    def stop(*_: Any) -> NoReturn:
        signal.signal(signal.SIGTERM, before)  # a second one ends at once
        raise Terminated

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _warnings_in_a_line() -> Iterator[None]:
    """UserWarnings appear as `warning: ...` on the error stream, without file and line."""
    with warnings.catch_warnings():

        def show(message: Warning | str, category: type[Warning], *_: Any, **__: Any) -> None:
            typer.secho(f"warning: {_in_a_line(str(message))}", fg="yellow", err=True)

        warnings.simplefilter("ignore")
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = show
        yield


def _fail(message: str) -> NoReturn:
    _tell(message)
    raise typer.Exit(BAD_INPUT)


def _tell(message: str) -> None:
    typer.secho(f"error: {_in_a_line(message)}", fg="red", err=True)


def _in_a_line(text: str) -> str:
    """Return a text in one line, with long values cut in their middle and an end to it all."""
    line = _QUOTED.sub(_shortened, " ".join(text.split()))
    line = line.encode("utf-8", "backslashreplace").decode("utf-8")
    return line if len(line) <= _LONGEST else f"{line[: _LONGEST - 4].rstrip()} ..."


def _shortened(match: re.Match[str]) -> str:
    """Return a quoted value of 80 characters; names of files stay whole, for they are to be copied."""
    value, mark = match[1] or match[2] or "", match[0][0]
    if len(value) <= 80 or ("/" in value and " " not in value and len(value) < 300):
        return match[0]
    return f"{mark}{value[:60]}...{value[-15:]}{mark}"
