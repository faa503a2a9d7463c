"""Rewards in a line: "0.7*clip + 0.3*aesthetic", "-jpeg", "clip:ViT-B-32/openai", "my_module:my_function".

    sum      = term { (+ | -) term }
    term     = [-] [number *] factor
    factor   = name [: argument] | module:function | file.py:function | (sum) | standard(sum [; mean; std])

Names, modules and files contain hyphens, so a minus between two terms has a blank before it, or a number and
a star behind it: "clip - jpeg", "clip-0.1*jpeg". An argument with a plus, a semicolon, a parenthesis or such
a minus in it stands in quotes: aesthetic:'sac+logos+ava1-l14-linearMSE.pth'.
"""

from __future__ import annotations

import re
from difflib import get_close_matches
from typing import Any

from diffplug.registry import REWARDS, unknown
from diffplug.rewards import built
from diffplug.rewards.user_function import user_function

__all__ = ["parse"]

_NUMBER = re.compile(r"(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", re.IGNORECASE)
_WEIGHT = re.compile(_NUMBER.pattern + r"\s*\*", re.IGNORECASE)
_WEIGHED = re.compile(rf"-\s*{_WEIGHT.pattern}", re.IGNORECASE)
_STANDARD = re.compile(r"standard\s*\(")
_DEEPEST = 20


def parse(spec: str, *, python: bool = True) -> Any:
    """The reward that `spec` describes, ready to call; networks load at their first score.

    `python=False` refuses functions of the user's own, for specs that come from strangers. Raises ValueError
    that quotes the spec and says what is wrong in it.
    """
    reader = _Reader(spec, python)
    reward = reader.sum()
    if reader.at < len(spec):
        raise reader.wrong(f"nothing is expected at {spec[reader.at :]!r}")
    return reward


class _Reader:
    """Reads one spec from left to right."""

    def __init__(self, text: str, python: bool) -> None:
        self.text, self.python = text, python
        self.at = self.depth = 0

    def wrong(self, trouble: str) -> ValueError:
        return ValueError(
            f"reward {self.text!r}: {trouble}. Write it as in '0.7*clip + 0.3*aesthetic' or '-jpeg'."
        )

    def sum(self) -> Any:
        """One or more terms."""
        from diffplug.rewards.compose import Weighted

        terms = [self._term(1.0)]
        while sign := self._sign():
            terms.append(self._term(sign))
        weights, rewards = zip(*terms, strict=True)
        return rewards[0] if weights == (1.0,) else Weighted(rewards, weights)

    def _sign(self) -> float:
        """1 or -1 where another term follows, else 0."""
        self._blanks()
        if self._taken("+"):
            return 1.0
        return -1.0 if self._taken("-") else 0.0

    def _term(self, weight: float) -> tuple[float, Any]:
        self._blanks()
        while self.text[self.at : self.at + 1] in ("-", "+"):
            weight = -weight if self._taken("-") else weight * self._taken("+")
            self._blanks()
        if match := _WEIGHT.match(self.text, self.at):
            weight *= float(match[0].rstrip("* \t"))
            self.at = match.end()
            self._blanks()
        if weight in (float("inf"), float("-inf")):
            raise self.wrong("a weight is too large")
        return weight, self._factor()

    def _factor(self) -> Any:
        if match := _STANDARD.match(self.text, self.at):
            self.at = match.end()
            return self._standardised()
        if self._taken("("):
            inner = self._inner()
            self._close()
            return inner
        return _atom(self._word(), self.python)

    def _standardised(self) -> Any:
        from diffplug.rewards.compose import Standardised

        inner, numbers = self._inner(), []
        while self._taken(";"):
            numbers.append(self._number())
        self._close()
        if len(numbers) not in (0, 2):
            raise self.wrong("standard(...) takes a reward, or a reward; its mean; its deviation")
        return Standardised(inner, mean=numbers[0], std=numbers[1]) if numbers else Standardised(inner)

    def _inner(self) -> Any:
        self.depth += 1
        if self.depth > _DEEPEST:
            raise self.wrong(f"parentheses are nested more than {_DEEPEST} deep")
        found = self.sum()
        self.depth -= 1
        self._blanks()
        return found

    def _number(self) -> float:
        self._blanks()
        sign = -1.0 if self._taken("-") else 1.0
        match = _NUMBER.match(self.text, self.at)
        if not match:
            raise self.wrong(f"a number is expected at {self.text[self.at :]!r}")
        self.at = match.end()
        self._blanks()
        return sign * float(match[0])

    def _word(self) -> str:
        """A name with its argument, up to whatever ends a term; quotes are taken off."""
        word, quoted = "", False
        while self.at < len(self.text) and not self._at_end_of_word():
            sign = self.text[self.at]
            if sign in "'\"":
                end = self.text.find(sign, self.at + 1)
                if end < 0:
                    raise self.wrong(f"the quote {sign} is not closed")
                word, quoted = word + self.text[self.at + 1 : end], True
                self.at = end + 1
            else:
                word += sign
                self.at += 1
        word = word if quoted else word.strip()
        if not word.strip():
            rest = self.text[self.at :]
            raise self.wrong(f"a name is expected at {rest!r}" if rest else "a name is expected at its end")
        return word.strip()

    def _at_end_of_word(self) -> bool:
        if self.text[self.at] != "-":
            return self.text[self.at] in "+;()"
        return self.text[self.at - 1].isspace() or _WEIGHED.match(self.text, self.at) is not None

    def _close(self) -> None:
        if not self._taken(")"):
            raise self.wrong("a parenthesis is not closed")

    def _taken(self, sign: str) -> bool:
        if self.text[self.at : self.at + 1] != sign:
            return False
        self.at += 1
        return True

    def _blanks(self) -> None:
        while self.text[self.at : self.at + 1].isspace():
            self.at += 1


def _atom(word: str, python: bool) -> Any:
    """The reward of a name, with its argument if there is one, or a function of the user's own."""
    name, colon, argument = (part.strip() for part in word.partition(":"))
    if not colon and name.endswith(".py"):
        raise ValueError(f"reward {name!r} is a file: add its function, as {name}:my_reward")
    if not colon or name in REWARDS:
        return _named(name, argument if colon else None, python)
    near = get_close_matches(name.lower(), REWARDS.names(), n=1, cutoff=0.6)
    if not python:
        raise unknown("reward", name, REWARDS.names(), "Python functions are not accepted here.")
    return user_function(word, near[0] if near else None)


def _named(name: str, argument: str | None, python: bool = True) -> Any:
    if name not in REWARDS and "-" in name and all(part in REWARDS for part in name.split("-", 1)):
        first, second = name.split("-", 1)
        raise ValueError(f"unknown reward {name!r}: to subtract, write '{first} - {second}' with blanks")
    found = REWARDS.get(name)
    if not python and getattr(found, "reaches_out", False):
        raise ValueError(f"reward {name!r} opens addresses or downloads: it is not accepted from strangers")
    if argument is None:
        return built(name, found)
    make = getattr(found, "from_spec", None)
    if make is None:
        raise ValueError(f"reward {name!r} takes no argument, got {argument!r}: write {name!r} alone")
    if not argument:
        raise ValueError(f"reward {name!r}: the argument after the colon is missing")
    return make(argument)
