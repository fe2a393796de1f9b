"""Choices of the user for what a checkpoint does not show, and the questions that ask for them.

A :class:`Question` lists answers. :meth:`Question.tried` converts the file with each of them before the user reads it,
so that no message advises an option that the converter then refuses.
"""

from __future__ import annotations

import functools
import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moco_d2.convert.parts import check_names
from moco_d2.convert.sources import SOURCES, VIT_SOURCES
from moco_d2.io.checkpoints import CheckpointError
from moco_d2.messages import unknown_name

_NORMS = ("", "GN")
_TRIED = 8  # answers of one question; a file may hold a hundred networks
_JOINED = 4  # answers to successive questions: a prefix, a norm, a source, keys to drop


@dataclass(frozen=True)
class Choice:
    """What the user says that the file does not show.

    Attributes:
        source: the key of a record of ``SOURCES`` or ``VIT_SOURCES``.
        prefix: what the keys of the wanted network start with, with or without the place of its state dict in front;
            None: the prefix of the source.
        norm: ``GN`` for a network with GroupNorm.
        parts: of a detector (``fpn``, ``box_head``), to convert too if the source pretrains them.
        drop: regular expressions; a key that one matches anywhere is left out. The backbone's keys cannot be dropped.
        heads: number of heads of a ViT; 0: by the file or by the usual rule.
    """

    source: str = ""
    prefix: str | None = None
    norm: str = ""
    parts: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()
    heads: int = 0

    def __post_init__(self) -> None:
        """Check the names and the expressions."""
        keys = [source.key for source in (*SOURCES, *VIT_SOURCES)]
        if self.source and self.source not in keys:
            raise ValueError(unknown_name("the source", self.source, keys))
        if self.norm not in _NORMS:
            raise ValueError(f"norm is {self.norm!r}; it must be 'GN' or empty")
        if type(self.heads) is not int or self.heads < 0:
            raise ValueError(f"heads is {self.heads!r}; it must be a positive whole number")
        check_names(self.parts)
        for pattern in self.drop:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(
                    f"--drop {pattern!r} is not a regular expression ({error}); put a backslash before a "
                    "character that is meant literally"
                ) from error

    def options(self) -> str:
        """Return the same as options of ``moco-d2 convert``, as typed into a shell."""
        typed: list[str] = []
        typed += ["--source", self.source] if self.source else []
        typed += ["--prefix", self.prefix] if self.prefix is not None else []
        typed += ["--norm", self.norm] if self.norm else []
        typed += ["--with", ",".join(self.parts)] if self.parts else []
        typed += [word for pattern in dict.fromkeys(self.drop) for word in ("--drop", pattern)]
        typed += ["--heads", str(self.heads)] if self.heads else []
        return " ".join(map(shlex.quote, typed))


@dataclass(frozen=True)
class Answer:
    """One way to answer a question.

    Attributes:
        words: what it does, or means.
        choices: ways to give it, each with the earlier choices; the first that leads to a conversion is shown.
        where: place and prefix of the network that it means; None: whichever network the choices lead to.
    """

    words: str
    choices: tuple[Choice, ...]
    where: str | None = None

    def shown(self, before: Choice) -> str:
        """Return the options to type, and which of those ``before`` to leave out."""
        now = self.choices[0]
        gone = Choice(
            source="" if now.source else before.source,
            prefix=None if now.prefix is not None else before.prefix,
            norm="" if now.norm else before.norm,
            parts=() if now.parts else before.parts,
            drop=tuple(pattern for pattern in before.drop if pattern not in now.drop),
        ).options()
        stays = now.options()
        ways = [f"with {stays}" if stays else "", f"without {gone}" if gone else ""]
        return f"{' and '.join(filter(None, ways))} ({self.words})"


class Question(CheckpointError):
    """A file can be converted once the user has answered a question."""

    def __init__(
        self,
        path: Any,
        found: str,
        choice: Choice,
        answers: Sequence[Answer],
        otherwise: CheckpointError | None = None,
    ) -> None:
        """Remember the answers.

        Args:
            path: the file, for the message.
            found: what was found, and what it leaves open.
            choice: what the user has said so far.
            answers: the likeliest first.
            otherwise: the refusal if no answer leads to a conversion; None: the refusal of the likeliest answer.
        """
        ways = " or ".join(answer.shown(choice) for answer in answers)
        super().__init__(f"{path}: {found}; convert it {ways}")
        self.path, self.found, self.choice, self.answers, self.otherwise = path, found, choice, answers, otherwise

    def tried(self, convert: Callable[[Choice], str]) -> CheckpointError:
        """Return the question with the answers that lead to a conversion, or the refusal if none does.

        If an answer leads to another question, the answers to both are joined.

        Args:
            convert: converts the file with a choice and returns the place and prefix of the network that it took.
        """
        refusals: list[CheckpointError] = []
        ways = self._working(functools.cache(_outcome(convert)), (self.choice,), refusals)
        working = {answer.choices: answer for answer in reversed(list(ways))}
        if working:
            return Question(self.path, self.found, self.choice, list(working.values())[::-1])
        return self.otherwise or next(iter(refusals), CheckpointError(f"{self.path}: {self.found}"))

    def _working(
        self, outcome: _Outcome, before: tuple[Choice, ...], refusals: list[CheckpointError]
    ) -> Iterator[Answer]:
        """Yield the answers that lead to a conversion, each with one choice; ``before``: the choices that led here."""
        for answer in self.answers[:_TRIED]:
            for choice in answer.choices:
                if choice in before or len(before) > _JOINED:
                    continue
                finals = list(_finals(answer, choice, outcome, (*before, choice), refusals))
                finals = [final for final in finals if answer.where in (None, final.where)]
                yield from finals
                if finals:
                    break


_Outcome = Callable[[Choice], "str | CheckpointError"]


def _outcome(convert: Callable[[Choice], str]) -> _Outcome:
    """Return a function that returns the refusal of a conversion instead of raising it."""

    def outcome(choice: Choice) -> str | CheckpointError:
        try:
            return convert(choice)
        except CheckpointError as refusal:
            return refusal

    return outcome


def _finals(
    answer: Answer, choice: Choice, outcome: _Outcome, before: tuple[Choice, ...], refusals: list[CheckpointError]
) -> Iterator[Answer]:
    """Yield the answer that gives a choice, or its joins with the answers to the question that it leads to."""
    got = outcome(choice)
    if isinstance(got, str):
        yield Answer(answer.words, (choice,), got)
    elif isinstance(got, Question):
        refusals += [got.otherwise] if got.otherwise else []
        for final in got._working(outcome, before, refusals):
            words = [*dict.fromkeys([answer.words, *final.words.split("; ")])]
            yield replace(final, words="; ".join(words))
    else:
        refusals.append(got)
