"""Control tokens in a request's own text, such as <end_of_turn>: encoded as the plain text that they are.

A tokenizer takes them for the template's. It cuts a text at special tokens and encodes the pieces between; so the pieces
that hold the request are encoded here, without looking for special tokens in them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

__all__ = ["ControlTokens"]

_STAND_IN = "Xylophone{}x"  # ordinary text, which no template looks for
_LEADS = ("", "a", "\n", ".")
"""Texts before a piece, since some tokenizers put a space before the first text that they are given."""


@dataclass(frozen=True)
class _Piece:
    """Tokens between two special tokens."""

    text: str
    ids: list[int]


@dataclass(frozen=True)
class ControlTokens:
    """The special tokens of a tokenizer."""

    tokenizer: Any

    @cached_property
    def _ids(self) -> dict[str, int]:
        added = getattr(self.tokenizer, "added_tokens_decoder", {})
        special = {str(token): index for index, token in added.items() if token.special}
        named = zip(self.tokenizer.all_special_tokens, self.tokenizer.all_special_ids, strict=True)
        return {text: index for text, index in {**dict(named), **special}.items() if text}

    @cached_property
    def _special(self) -> set[int]:
        return set(self._ids.values()) - {self.tokenizer.unk_token_id}  # which ordinary text can become

    @cached_property
    def _pattern(self) -> re.Pattern[str]:
        longest_first = sorted(self._ids, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, longest_first)) or r"(?!)")

    def within(self, text: str) -> list[str]:
        """The distinct special tokens whose text occurs in a text, in order."""
        return list(dict.fromkeys(self._pattern.findall(text)))

    def encode_plainly(self, render: Callable[[str], str], request: str) -> list[int] | None:
        """Token ids of a rendered request, with special tokens from the template alone; None if that is impossible.

        Args:
            render: renders a request.
            request: text with special tokens in it.
        """
        if not getattr(self.tokenizer, "is_fast", False):
            return None
        stand_ins = {text: _STAND_IN.format(chr(97 + index)) for index, text in enumerate(self.within(request))}
        if len(stand_ins) > 26 or any(stand_in in request for stand_in in stand_ins.values()):
            return None
        rendered = render(self._pattern.sub(lambda found: stand_ins[found[0]], request))
        ids: list[int] = []
        for part in self._parts(rendered):
            plain = [part] if isinstance(part, int) else self._restored(part, stand_ins)
            if plain is None:
                return None
            ids += plain
        return ids

    def _parts(self, text: str) -> Iterator[int | _Piece]:
        """The special tokens of a text, and the pieces between them."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
        ids: Sequence[int] = encoded["input_ids"]
        cuts = [index for index, token in enumerate(ids) if token in self._special]
        begin, start = 0, 0
        for cut in [*cuts, len(ids)]:
            end, resume = encoded["offset_mapping"][cut] if cut < len(ids) else (len(text), len(text))
            if cut > begin:
                yield _Piece(text[start:end], list(ids[begin:cut]))
            if cut < len(ids):
                yield ids[cut]
            begin, start = cut + 1, resume

    def _restored(self, piece: _Piece, stand_ins: dict[str, str]) -> list[int] | None:
        """Token ids of a piece with the request's own text in place of stand-ins.

        None unless the piece with stand-ins, encoded in the same way, has the tokens that it has in the whole text.
        """
        own = piece.text
        for text, stand_in in stand_ins.items():
            own = own.replace(stand_in, text)
        if own == piece.text:
            return piece.ids
        for lead in _LEADS:
            before = self._without_special(lead)
            placed, plain = (self._without_special(lead + text) for text in (piece.text, own))
            if placed == [*before, *piece.ids] and plain[: len(before)] == before and not self._special & {*plain}:
                return plain[len(before) :]
        return None

    def _without_special(self, text: str) -> list[int]:
        """Token ids of a text without special tokens."""
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])
