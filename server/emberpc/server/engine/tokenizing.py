"""Tokenize texts, with limits on the work for long texts."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from pathlib import Path

import numpy as np
import numpy.typing as npt

# The server runs the tokenizer on several threads of its own. Threads of the library would compete with them for the
# same cores.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from tokenizers import Encoding, Tokenizer, models

from emberpc.bundle.contents import Contents
from emberpc.server.engine.word_cache import WordCache
from emberpc.server.errors import FieldPath, Violation, invalid_fields, items_of

TokenIds = npt.NDArray[np.int64]

#: A text is long if it has more characters, prompt included, than this number times the model's length limit in tokens.
#: A `WordCache` cuts a long text into pieces of about that many characters. `tokenize` tokenizes a long text alone, and
#: if possible only until the text is known to exceed the length limit. In one piece, 2 MB of punctuation would take
#: 325 MB of memory.
_CHARACTERS_PER_TOKEN = 32
#: Factor by which the tokenized head of a long text grows from one try to the next, for tokenizers without a
#: `WordCache`. The head is the first part of the text.
_GROWTH = 4
#: Maximum number of characters of texts that are tokenized together in one call of the tokenizer. A single text may
#: have more.
_TOGETHER = 2**17
#: Maximum number of characters of a text that the tokenizer reads in one call; more only if the model's length limit
#: needs more. It limits a text for a tokenizer without a `WordCache`, and a piece of a text for others: 2 MB in one
#: piece took 5.5 s and 840 MB. A byte-level BPE tokenizer takes 0.6 s and 60 MB for this number, and cannot be stopped
#: meanwhile.
_MAX_AT_ONCE = 2**18


#: Returns the path of text i in most requests: `texts[i]`.
_TEXTS = items_of("texts")


class Truncation(str, Enum):
    """Handling of a text with more tokens than the model reads.

    REFUSE: the text is an error. END: the end of the text is cut off. START: its start is cut off, and the prompt is
    kept.
    """

    REFUSE = "refuse"
    END = "end"
    START = "start"


class AbandonedError(Exception):
    """Tokenizing was stopped, since the caller of the call left."""


def never() -> bool:
    """Return False. To be passed as `stop` for work that is never stopped."""
    return False


@dataclass(frozen=True)
class TokenizedText:
    """Token ids of one text, int64 (tokens,), with special tokens and prompt, and whether the text was truncated."""

    ids: TokenIds
    truncated: bool = False


class TextTokenizer:
    """The tokenizer of a bundle. Thread-safe.

    Args:
        path: the `tokenizer.json` of the bundle.
        max_tokens: length limit of a text, in tokens, with prompt and special tokens.
        contents: reads the file, and keeps its bytes; None: the file is read from disk.

    Raises:
        BundleError: the file cannot be read.
        Exception: the file is no tokenizer; the library has no narrower error.
    """

    def __init__(self, path: Path, max_tokens: int, contents: Contents | None = None) -> None:
        self._tokenizer = Tokenizer.from_buffer((contents or Contents()).read(path))
        # The tokenizer.json of a foreign folder may truncate and pad. Here the call decides about truncation, and each
        # batch pads its own texts.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.max_tokens = max_tokens
        self._words = WordCache.of(self._tokenizer)
        #: Maximum number of tokens of a text and its prompt without special tokens.
        self._max_bare = max_tokens - self._tokenizer.num_special_tokens_to_add(is_pair=False)

    @property
    def _long(self) -> int:
        """Maximum number of characters of a short text, prompt included. Longer texts are split if possible."""
        return _CHARACTERS_PER_TOKEN * self.max_tokens

    @property
    def _max_at_once(self) -> int:
        """Maximum number of characters of a text, or of a piece of a text, that the tokenizer reads in one call."""
        return max(_MAX_AT_ONCE, self._long)

    @property
    def highest_id(self) -> int:
        """The highest token id, added tokens included."""
        return max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=0)

    def count(
        self,
        texts: Sequence[str],
        prompt: str,
        stop: Callable[[], bool] = never,
        path: FieldPath = _TEXTS,
    ) -> list[int]:
        """Return the number of tokens of each text, with prompt and special tokens, before any truncation.

        Args:
            texts: the texts.
            prompt: the prompt before each text.
            stop: returns whether to stop, since the caller left; called before each group of texts or piece of a text.
            path: returns the path of text i in the request, for errors.

        Raises:
            ServiceError: INVALID_ARGUMENT, naming each text that has more characters than one call of the tokenizer may
                read, and that cannot be cut into pieces.
            AbandonedError: `stop` returned True.
        """
        if self._words is None:
            maximum = self._max_at_once - len(prompt)
            if too_long := [i for i, text in enumerate(texts) if len(text) > maximum]:
                raise invalid_fields([Violation(path(i), self._unread(texts[i], "count its parts")) for i in too_long])
            return [len(ids) for ids in self._short([prompt + text for text in texts], stop)]
        frame, counts, violations = len(self._words.framed([])), [], []
        for i, text in enumerate(texts):
            pieces = self._words.pieces(prompt + text, self._long)
            if max(map(len, pieces)) > self._max_at_once:
                violations.append(Violation(path(i), self._unread(text, "count its parts")))
            else:
                counts.append(frame + sum(len(self._bare(piece, stop)) for piece in pieces))
        if violations:
            raise invalid_fields(violations)
        return counts

    def tokenize(
        self,
        texts: Sequence[str],
        prompt: str,
        truncation: Truncation,
        path: FieldPath,
        stop: Callable[[], bool] = never,
    ) -> list[TokenizedText]:
        """Return the token ids of each text, in the order of the texts.

        Args:
            texts: the texts.
            prompt: the prompt before each text.
            truncation: handling of a text that has more tokens than the model reads.
            path: returns the path of text i in the request, for errors.
            stop: returns whether to stop, since the caller left; called before each group of short texts, and before
                each piece or head of a long text.

        Raises:
            ServiceError: INVALID_ARGUMENT, naming each text that has no token, that has too many tokens under REFUSE,
                or of which the tokenizer reads only a part that does not exceed the length limit. Special tokens count
                as tokens. A part is read if the text cannot be cut into pieces.
            AbandonedError: `stop` returned True.
        """
        short = self._short([prompt + text for text in texts if len(prompt) + len(text) <= self._long], stop)
        result = []
        violations = []
        for i, text in enumerate(texts):
            if len(prompt) + len(text) <= self._long:
                ids, head = next(short), prompt + text
            else:
                ids, head = self._read(prompt + text, truncation, stop)
            if not ids:
                violations.append(Violation(path(i), "has no token that the model knows; give it some text"))
            elif len(ids) <= self.max_tokens and len(head) < len(prompt) + len(text):
                violations.append(Violation(path(i), self._unread(text, "shorten it")))
            elif len(ids) <= self.max_tokens:
                result.append(TokenizedText(np.array(ids, dtype=np.int64)))
            elif truncation is Truncation.REFUSE:
                read = len(head) == len(prompt) + len(text)
                count = str(len(ids)) if read else f"more than {self.max_tokens}"
                violations.append(Violation(path(i), self._too_long(count)))
            else:
                fitting = self._truncate(prompt, text, head, ids, truncation, stop)
                result.append(TokenizedText(np.array(fitting, dtype=np.int64), truncated=True))
        if violations:
            raise invalid_fields(violations)
        return result

    def _short(self, texts: Sequence[str], stop: Callable[[], bool]) -> Iterator[list[int]]:
        """Yield the token ids of each text, with special tokens. Groups of texts are tokenized in one call.

        Raises:
            AbandonedError: `stop` returned True before a group.
        """
        together: list[str] = []
        characters = 0
        for text in texts:
            if together and characters + len(text) > _TOGETHER:
                yield from self._ids(together, stop)
                together, characters = [], 0
            together.append(text)
            characters += len(text)
        yield from self._ids(together, stop)

    def _ids(self, texts: Sequence[str], stop: Callable[[], bool]) -> list[list[int]]:
        """Return the token ids of each text, with special tokens.

        Raises:
            AbandonedError: `stop` returned True. It is called once, before the first text.
        """
        if stop():
            raise AbandonedError
        found = [None if self._words is None else self._words.ids(text) for text in texts]
        unknown = [text for text, ids in zip(texts, found, strict=True) if ids is None]
        if not unknown:
            return [ids for ids in found if ids is not None]
        encodings = iter(self._tokenizer.encode_batch_fast(unknown, add_special_tokens=True))
        return [next(encodings).ids if ids is None else ids for ids in found]

    def _bare(self, piece: str, stop: Callable[[], bool]) -> list[int]:
        """Return the token ids of a piece without special tokens.

        Raises:
            AbandonedError: `stop` returned True. It is called once, before the piece is tokenized.
        """
        if stop():
            raise AbandonedError
        ids = None if self._words is None else self._words.bare(piece)
        if ids is None:
            ids = self._unframed([piece])[0].ids
        return ids

    def _read(self, whole: str, truncation: Truncation, stop: Callable[[], bool]) -> tuple[list[int], str]:
        """Tokenize a part of a long text: if possible, enough to know whether the text exceeds the length limit.

        The part is the head of the text; with Truncation.START it is the end of the text. The part is the whole text,
        or has more tokens than the length limit, or ends in the middle of a text that cannot be cut into pieces, since
        one call of the tokenizer would have to read too much. The part then has the maximum number of characters that
        one call may read, or, without a `WordCache`, at least half of them, cut at white space.

        Args:
            whole: prompt and text.
            truncation: decides at which end the part lies.
            stop: returns whether to stop, since the caller left.

        Returns:
            The token ids of the part, with special tokens, and the part.

        Raises:
            AbandonedError: `stop` returned True.
        """
        if self._words is not None:
            backwards = truncation is Truncation.START
            bare, head = self._read_pieces(self._words, whole, self._max_bare + 1, stop, backwards=backwards)
            return self._words.framed(bare), head
        if truncation is Truncation.START:
            tail = self._tail(whole)
            return self._ids([tail], stop)[0], tail
        length = self._long
        while True:
            head, last = whole[:length], length >= min(len(whole), self._max_at_once)
            blank = max(head.rfind(" "), head.rfind("\n")) if length < len(whole) else 0
            if cut_at_blank := blank > length // 2:
                head = head[:blank]
            (ids,) = self._ids([head], stop)
            if last or (len(ids) > self.max_tokens and (cut_at_blank or self._exceeds_limit(head))):
                return ids, head
            length = min(length * _GROWTH, self._max_at_once)

    def _exceeds_limit(self, head: str) -> bool:
        """Return whether a text exceeds the length limit, by its head, which has too many tokens and may cut a word.

        WordPiece and word-level models give a word of too many characters a single token. So the tokens of the last
        word of the head do not count: the text may have fewer.
        """
        if not isinstance(self._tokenizer.model, models.WordPiece | models.WordLevel):
            return True
        (encoding,) = self._tokenizer.encode_batch([head], add_special_tokens=False)
        words: list[int | None] = encoding.word_ids
        return bool(sum(word != words[-1] for word in words) > self._max_bare)

    def _tail(self, text: str) -> str:
        """Return the end of a text, as long as one call of the tokenizer may read; the whole text if it is that short.

        If the first half of a cut-off end has a blank or a newline, the end starts there.
        """
        if len(text) <= self._max_at_once:
            return text
        tail = text[-self._max_at_once :]
        space = min((at for at in (tail.find(" "), tail.find("\n")) if at >= 0), default=0)
        return tail[space:] if space < len(tail) // 2 else tail

    def _read_pieces(
        self, words: WordCache, text: str, enough: int, stop: Callable[[], bool], *, backwards: bool = False
    ) -> tuple[list[int], str]:
        """Tokenize a text piece by piece, from its start, or with `backwards` from its end, until there are enough ids.

        Args:
            words: cuts the text.
            text: the text.
            enough: number of token ids; with at least this many, no further piece is tokenized.
            stop: returns whether to stop, since the caller left; called before each piece.
            backwards: whether to begin with the last piece.

        Returns:
            The token ids in the order of the text, without special tokens, and the part of the text that was tokenized.
            The part ends in the middle of a piece that is too long for one call of the tokenizer.

        Raises:
            AbandonedError: `stop` returned True.
        """
        pieces: deque[str] = deque(words.pieces(text, self._long))
        read: list[str] = []
        ids: list[int] = []
        while pieces and len(ids) < enough:
            whole = pieces.pop() if backwards else pieces.popleft()
            maximum = self._max_at_once
            piece = whole[-maximum:] if backwards else whole[:maximum]
            found = self._bare(piece, stop)
            ids = found + ids if backwards else ids + found
            read.append(piece)
            if len(piece) < len(whole):
                break  # the text cannot be cut here, so the ids of its next part may differ from those of the text
        return ids, "".join(reversed(read) if backwards else read)

    def _unread(self, text: str, remedy: str) -> str:
        return (
            f"has {len(text)} characters, and the model's tokenizer reads at most {self._max_at_once} of one text; "
            f"{remedy}"
        )

    def _too_long(self, count: str) -> str:
        return (
            f"has {count} tokens, the model takes at most {self.max_tokens}; "
            "shorten it, or set the call's `truncation` to END or START"
        )

    def _truncate(
        self, prompt: str, text: str, head: str, ids: list[int], truncation: Truncation, stop: Callable[[], bool]
    ) -> list[int]:
        """Return the token ids of a truncated text, with prompt and special tokens: at most as many as the model reads.

        With START, the prompt is not cut. If prompt and special tokens exceed the length limit, the result does too.

        Args:
            prompt: the prompt before the text.
            text: the text.
            head: the start of prompt and text, which exceeds the length limit; not used with START.
            ids: token ids of the head, with special tokens; not used with START.
            truncation: END or START.
            stop: returns whether to stop, since the caller left.

        Raises:
            AbandonedError: `stop` returned True.
        """
        if truncation is Truncation.START:
            # The prompt is kept whole. Only the text after it is truncated.
            if self._words is not None:
                before = self._bare(prompt, stop)
                kept = max(self._max_bare - len(before), 0)
                bare, _ = self._read_pieces(self._words, text, kept, stop, backwards=True)
                return self._words.framed([*before, *bare[max(len(bare) - kept, 0) :]])
            start, encoding = self._unframed([prompt, self._tail(text)])
            encoding.truncate(max(self._max_bare - len(start), 0), direction="left")
            encoding = Encoding.merge([start, encoding], growing_offsets=True)
        elif self._words is not None:
            return self._words.cut(ids, self.max_tokens)
        else:
            (encoding,) = self._unframed([head])
            encoding.truncate(self._max_bare, direction="right")
        framed: list[int] = self._tokenizer.post_process(encoding, add_special_tokens=True).ids
        return framed

    def _unframed(self, texts: Sequence[str]) -> list[Encoding]:
        """Return the encodings of texts without special tokens."""
        encodings: list[Encoding] = self._tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)
        return encodings
