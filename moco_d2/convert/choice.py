"""The user's word where a checkpoint leaves something open, and the questions that ask for it.

A :class:`Question` lists answers. :meth:`Question.tried` converts the file with each of them before the user reads it,
so that a message never advises what the converter then refuses.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from moco_d2.convert.parts import check_names
from moco_d2.convert.sources import SOURCES
from moco_d2.io.checkpoints import CheckpointError
from moco_d2.nearest import unknown_name

_NORMS = ("", "GN")
_TRIED = 8  # answers of one question; a file may hold a hundred networks


@dataclass(frozen=True)
class Choice:
    """What the user says where the file does not.

    Attributes:
        source: the key of a record of ``SOURCES``.
        prefix: what the keys of the wanted network start with, with or without the place of its state dict in front;
            None: whatever the source says.
        norm: ``GN`` for a network with GroupNorm.
        parts: of a detector, ``fpn`` or ``box_head``, to convert too, where the source pretrains them.
        drop: regular expressions; a key in which one is found is left out. They never reach the backbone.
    """

    source: str = ""
    prefix: str | None = None
    norm: str = ""
    parts: tuple[str, ...] = ()
    drop: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Check the names and the expressions."""
        keys = [source.key for source in SOURCES]
        if self.source and self.source not in keys:
            raise ValueError(unknown_name("the source", self.source, keys))
        if self.norm not in _NORMS:
            raise ValueError(f"norm is {self.norm!r}; it must be 'GN' or empty")
        check_names(self.parts)
        for pattern in self.drop:
            try:
                re.compile(pattern)
            except (re.error, OverflowError, RecursionError) as error:
                raise ValueError(
                    f"--drop {pattern!r} is not a regular expression ({error}); put a backslash before a character "
                    "that is meant literally"
                ) from error

    def options(self) -> str:
        """Return the options of ``tools/convert_checkpoint.py`` that say the same, as typed into a shell."""
        said: list[str] = []
        said += ["--source", self.source] if self.source else []
        said += ["--prefix", self.prefix] if self.prefix is not None else []
        said += ["--norm", self.norm] if self.norm else []
        said += ["--with", ",".join(self.parts)] if self.parts else []
        said += [word for pattern in dict.fromkeys(self.drop) for word in ("--drop", pattern)]
        return " ".join(map(shlex.quote, said))


@dataclass(frozen=True)
class Answer:
    """One way to answer a question.

    Attributes:
        words: what it means.
        choices: ways to say it, each with what was said before; the first that leads to a conversion is shown.
    """

    words: str
    choices: tuple[Choice, ...]

    def shown(self, before: Choice) -> str:
        """Return the options to type, and which of those ``before`` to leave out."""
        said = self.choices[0]
        gone = Choice(
            source="" if said.source else before.source,
            prefix=None if said.prefix is not None else before.prefix,
            norm="" if said.norm else before.norm,
            parts=() if said.parts else before.parts,
            drop=tuple(pattern for pattern in before.drop if pattern not in said.drop),
        ).options()
        stays = said.options()
        ways = [f"with {stays}" if stays else "", f"without {gone}" if gone else ""]
        return f"{' and '.join(filter(None, ways))} ({self.words})"


class Question(CheckpointError):
    """A file can be converted once the user has said something."""

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
            found: what is open, and the rule.
            choice: what the user has said so far.
            answers: the likeliest first.
            otherwise: the refusal if no answer leads to a conversion; None: that of the likeliest.
        """
        ways = " or ".join(answer.shown(choice) for answer in answers)
        super().__init__(f"{path}: {found}; convert it {ways}")
        self.path, self.found, self.choice, self.answers, self.otherwise = path, found, choice, answers, otherwise

    def tried(self, convert: Callable[[Choice], object]) -> CheckpointError:
        """Return the question with those answers that lead to a conversion, or the refusal if none does.

        Where an answer leads to another question, the answers to both are joined.

        Args:
            convert: converts the file with a choice.
        """
        refusals: list[CheckpointError] = []
        working = list(self._working(convert, {self.choice}, refusals))
        if working:
            return Question(self.path, self.found, self.choice, working)
        return self.otherwise or next(iter(refusals), CheckpointError(f"{self.path}: {self.found}"))

    def _working(
        self, convert: Callable[[Choice], object], seen: set[Choice], refusals: list[CheckpointError]
    ) -> Iterator[Answer]:
        for answer in self.answers[:_TRIED]:
            for choice in answer.choices:
                if choice in seen:
                    continue
                seen.add(choice)
                found = list(self._finals(answer.words, choice, convert, seen, refusals))
                yield from found
                if found:
                    break

    def _finals(
        self,
        words: str,
        choice: Choice,
        convert: Callable[[Choice], object],
        seen: set[Choice],
        refusals: list[CheckpointError],
    ) -> Iterator[Answer]:
        """Yield the answer that says a choice, or its joins with the answers to the question that it leads to."""
        try:
            convert(choice)
        except Question as further:
            refusals += [further.otherwise] if further.otherwise else []
            for final in further._working(convert, seen, refusals):
                yield final if words == final.words else replace(final, words=f"{words}; {final.words}")
        except CheckpointError as refusal:
            refusals.append(refusal)
        else:
            yield Answer(words, (choice,))
