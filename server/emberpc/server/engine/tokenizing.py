"""From texts to token ids, with the true lengths that batching goes by."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import numpy.typing as npt

# The server's own threads are the parallelism; the library's would compete with them for the same cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tokenizers import Encoding, Tokenizer

from emberpc.server.engine.words import Words
from emberpc.server.errors import FieldPath, Violation, invalid_fields

TokenIds = npt.NDArray[np.int64]

#: A text of more characters than this per token that the model takes is tokenised from its head first: that is
#: mostly enough to see that it is too long, and a text of a megabyte costs no more than one of a page.
_HEAD_CHARACTERS_PER_TOKEN = 32


class Truncation(str, Enum):
    """What to do with a text of more tokens than the model takes."""

    REFUSE = "refuse"
    END = "end"
    START = "start"


@dataclass(frozen=True)
class TokenizedText:
    """Token ids of one text, special tokens and prompt included, and whether the text was cut to fit."""

    ids: TokenIds
    truncated: bool = False


class TextTokenizer:
    """A bundle's tokenizer. Safe to use from several threads.

    Args:
        path: its `tokenizer.json`.
        max_tokens: the most tokens of a text.
    """

    def __init__(self, path: Path, max_tokens: int) -> None:
        self._tokenizer = Tokenizer.from_file(str(path))
        # Foreign files bring their own; here a text is cut on request only, and padded with its batch.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.max_tokens = max_tokens
        self._words = Words.of(self._tokenizer)
        self._room = max_tokens - self._tokenizer.num_special_tokens_to_add(is_pair=False)

    def count(self, texts: Sequence[str], prompt: str) -> list[int]:
        """Return the tokens of each text with its prompt, before any truncation."""
        return [len(ids) for ids in self._ids([prompt + text for text in texts])]

    def tokenize(
        self, texts: Sequence[str], prompt: str, truncation: Truncation, path: FieldPath
    ) -> list[TokenizedText]:
        """Tokenise texts.

        Args:
            texts: the texts.
            prompt: what goes before each of them.
            truncation: what to do with those of more than `max_tokens` tokens.
            path: what the request calls text i, for errors.

        Raises:
            ServiceError: INVALID_ARGUMENT, naming each text that has no tokens, or too many where they are refused.
        """
        heads = [self._head(prompt + text, truncation) for text in texts]
        result = []
        violations = []
        for i, (text, head, ids) in enumerate(zip(texts, heads, self._ids(heads), strict=True)):
            cut = len(head) < len(prompt) + len(text)
            if cut and len(ids) <= self.max_tokens:
                (ids,) = self._ids([prompt + text])  # noqa: PLW2901 - the head did not tell
                cut = False
            if not ids:
                violations.append(Violation(path(i), "has no token that the model knows; give it some text"))
            elif len(ids) <= self.max_tokens:
                result.append(TokenizedText(np.array(ids, dtype=np.int64)))
            elif truncation is Truncation.REFUSE:
                count = f"more than {self.max_tokens}" if cut else str(len(ids))
                violations.append(Violation(path(i), self._too_long(count)))
            else:
                fitting = self._truncate(prompt, head[len(prompt) :], ids, truncation)
                result.append(TokenizedText(np.array(fitting, dtype=np.int64), truncated=True))
        if violations:
            raise invalid_fields(violations)
        return result

    def _ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Return the ids of each text, special ones included."""
        found = [None if self._words is None else self._words.ids(text) for text in texts]
        untold = [text for text, ids in zip(texts, found, strict=True) if ids is None]
        if not untold:
            return [ids for ids in found if ids is not None]
        encodings = iter(self._tokenizer.encode_batch_fast(untold, add_special_tokens=True))
        return [next(encodings).ids if ids is None else ids for ids in found]

    def _too_long(self, count: str) -> str:
        return (
            f"has {count} tokens, the model takes at most {self.max_tokens}; "
            "shorten it, or set the call's `truncation` to END or START"
        )

    def _head(self, text: str, truncation: Truncation) -> str:
        """Return as much of a text as is likely to tell whether it is too long, cut between words."""
        limit = _HEAD_CHARACTERS_PER_TOKEN * self.max_tokens
        if len(text) <= limit or truncation is Truncation.START:
            return text
        head = text[:limit]
        space = max(head.rfind(" "), head.rfind("\n"))
        return head[:space] if space > limit // 2 else head

    def _truncate(self, prompt: str, text: str, ids: list[int], truncation: Truncation) -> list[int]:
        """Return so many of a text's ids, which are too many, that they just fit with its prompt and special tokens."""
        if truncation is Truncation.START:
            # The prompt stands at the start and must stay there: only the text behind it is cut.
            before, encoding = self._unframed([prompt, text])
            encoding.truncate(max(self._room - len(before), 0), direction="left")
            encoding = Encoding.merge([before, encoding], growing_offsets=True)
        elif self._words is not None:
            return self._words.cut(ids, self.max_tokens)
        else:
            (encoding,) = self._unframed([prompt + text])
            encoding.truncate(self._room, direction="right")
        framed: list[int] = self._tokenizer.post_process(encoding, add_special_tokens=True).ids
        return framed

    def _unframed(self, texts: Sequence[str]) -> list[Encoding]:
        """Return the encodings of texts without special tokens."""
        encodings: list[Encoding] = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return encodings
