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
        self._room = max_tokens - self._tokenizer.num_special_tokens_to_add(is_pair=False)

    def count(self, texts: Sequence[str], prompt: str) -> list[int]:
        """Return the tokens of each text with its prompt, before any truncation."""
        return [len(encoding) for encoding in self._encode([prompt + text for text in texts])]

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
        encodings = self._encode(heads)
        result = []
        violations = []
        for i, (text, head, encoding) in enumerate(zip(texts, heads, encodings, strict=True)):
            cut = len(head) < len(prompt) + len(text)
            if cut and len(encoding) <= self.max_tokens:
                encoding = self._encode([prompt + text])[0]  # noqa: PLW2901 - the head did not tell
                cut = False
            if not len(encoding):
                violations.append(Violation(path(i), "has no token that the model knows; give it some text"))
            elif len(encoding) <= self.max_tokens:
                result.append(TokenizedText(np.array(encoding.ids, dtype=np.int64)))
            elif truncation is Truncation.REFUSE:
                count = f"more than {self.max_tokens}" if cut else str(len(encoding))
                violations.append(Violation(path(i), self._too_long(count)))
            else:
                result.append(TokenizedText(self._truncate(prompt, head[len(prompt) :], truncation), truncated=True))
        if violations:
            raise invalid_fields(violations)
        return result

    def _encode(self, texts: Sequence[str]) -> list[Encoding]:
        encodings: list[Encoding] = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=True)
        return encodings

    def _too_long(self, count: str) -> str:
        return (
            f"has {count} tokens, the model takes at most {self.max_tokens}; "
            "shorten it, or set `truncation` to END or START"
        )

    def _head(self, text: str, truncation: Truncation) -> str:
        """Return as much of a text as is likely to tell whether it is too long, cut between words."""
        limit = _HEAD_CHARACTERS_PER_TOKEN * self.max_tokens
        if len(text) <= limit or truncation is Truncation.START:
            return text
        head = text[:limit]
        space = max(head.rfind(" "), head.rfind("\n"))
        return head[:space] if space > limit // 2 else head

    def _truncate(self, prompt: str, text: str, truncation: Truncation) -> TokenIds:
        """Return the ids of a text cut so that with its prompt and the special tokens it just fits."""
        if truncation is Truncation.END:
            encoding = self._tokenizer.encode(prompt + text, add_special_tokens=False)
            encoding.truncate(self._room, direction="right")
        else:
            # The prompt stands at the start and must stay there: only the text behind it is cut.
            before = self._tokenizer.encode(prompt, add_special_tokens=False)
            encoding = self._tokenizer.encode(text, add_special_tokens=False)
            encoding.truncate(max(self._room - len(before), 0), direction="left")
            encoding = Encoding.merge([before, encoding], growing_offsets=True)
        return np.array(self._tokenizer.post_process(encoding, add_special_tokens=True).ids, dtype=np.int64)
