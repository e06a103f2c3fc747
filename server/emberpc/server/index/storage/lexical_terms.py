"""Preparation of texts and queries for lexical search, so that a query finds a word in different spellings.

Differences of case, accents, invisible characters and most compatibility forms (such as ligatures, widths and
superscripts) are removed. Words in scripts that are written without spaces are split: in texts into characters and
pairs of characters, in queries into pairs. SQLite's tokenizer then splits the prepared texts at spaces and punctuation,
and stems the words of texts and queries.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterator
from itertools import pairwise

_WORD = re.compile(r"[^\W_]+")
#: Maximum number of distinct words of a query that are searched for; further ones are ignored. In scripts without
#: spaces, each pair of adjacent characters counts as a word.
_MAX_WORDS = 256
#: Maximum number of characters of a query that are read; later characters are ignored, since a long query takes long:
#: the preparation of 2 MB of Chinese took 0.8 s.
_MAX_CHARACTERS = 2**16
#: Maximum number of consecutive combining marks that `_stream_safe` keeps. No script needs more on one character.
_MAX_MARKS = 30
#: Characters that `_stream_safe` counts as marks although their combining class is 0: they decompose into marks of
#: other classes.
_MARKS_OF_CLASS_0 = "\u0f73\u0f75\u0f81"
#: Marks that are removed, since a writer may omit them: accents, and the points of Hebrew and Arabic. Other marks stay,
#: since a letter with such a mark is another letter, as in Japanese and in Indian scripts.
_ACCENTS = re.compile(
    "[\u0300-\u036f\u0483-\u0487\u0591-\u05bd\u05bf\u05c1\u05c2\u05c4\u05c5\u05c7\u0610-\u061a\u064b-\u065f\u0670"
    "\u1ab0-\u1aff\u1dc0-\u1dff\u20d0-\u20ff\ufe20-\ufe2f]+"
)
#: Replacements of letters that Unicode does not decompose, such as letters with a stroke and ligatures. The letters are
#: in lower case, since they are replaced after case folding.
_LETTERS = {"đ": "d", "ð": "d", "ø": "o", "ł": "l", "ħ": "h", "ŧ": "t", "ı": "i", "æ": "ae", "œ": "oe"}
_LETTER = re.compile(f"[{''.join(_LETTERS)}]")
#: Invisible code points, which are removed: those that Unicode calls default ignorable (DerivedCoreProperties.txt),
#: such as the soft hyphen, zero width spaces and joiners, variation selectors and bidirectional marks; and two code
#: points that only stretch a word (tatweel of Arabic, lajanyalan of N'Ko).
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u0640\u07fa\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f"
    "\u3164\ufe00-\ufe0f\ufeff\uffa0\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]+"
)
#: Letters, digits and symbols that `_form` may replace by their compatibility form. It keeps fractions, and accents
#: without a letter except Arabic ones. The Hangul letters U+3131 to U+318E are not included: the compatibility forms of
#: two adjacent ones would become one syllable.
_COMPATIBLE = re.compile(
    "[\u00aa\u00b2-\u00b5\u00b9-\u00be\u0132-\u0149\u017f\u01c4-\u01f3\u02b0-\u02e4\u03d0-\u03f9\u0587\u0675-\u0678\u0e33"
    "\u0eb3\u0edc\u0edd\u0f77-\u0f79\u10fc\u1d2c-\u1dbf\u1e9a\u1e9b\u2070-\u20a8\u2100-\u2189\u2460-\u24ea\u2c7c\u2c7d"
    "\u2d6f\u2e9f\u2ef3\u2f00-\u2fd5\u3036-\u303a\u309f\u30ff\u3192-\u319f\u3200-\u33ff\ua69c\ua69d\ua770\ua7f1-\ua7f9"
    "\uab5c-\uab69\ufb00-\ufb06\ufb13-\ufb4f\ufb50-\ufdfc\ufe70-\uffee\U00010781-\U000107ba\U0001d400-\U0001d7ff"
    "\U0001ee00-\U0001eebb\U0001f100-\U0001f251\U0001fbf0-\U0001fbf9]"
)
#: Character by which `_form` recognizes the decomposition of a fraction. Fractions are not replaced: 2½ would become
#: 21⁄2.
_FRACTION_SLASH = "\u2044"
#: Replacing compatibility forms may make a text longer, but to at most twice its number of characters plus this number:
#: of a text that would be longer, `_without_forms` replaces fewer forms. Without a limit, one character may become 20.
_MORE_CHARACTERS = 1000
#: Ranges, for a regular expression, of the letters of scripts that are written without spaces. Korean is among them,
#: since it has no space between a word and its endings.
_UNSPACED = (
    "\u0e01-\u0e30\u0e32\u0e33\u0e40-\u0e46"  # Thai
    "\u0e81-\u0eb0\u0eb2\u0eb3\u0ebd-\u0ec6\u0edc-\u0edf"  # Lao
    "\u1000-\u102a\u103f\u1050-\u1055\u105a-\u105d\u1061\u1065\u1066\u106e-\u1070\u1075-\u1081\u108e"  # Burmese
    "\u1780-\u17b3"  # Khmer
    "\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3"  # Hangul
    "\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff"  # Kana
    "\u2e80-\u2fd5\u3005-\u3007\u3021-\u3029\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"  # Han
)
#: Ranges, for a regular expression, of the marks and dependent vowels of the scripts in `_UNSPACED`. They are split
#: together with the letter before them.
_MARKS = (
    "\u0e31\u0e34-\u0e3a\u0e47-\u0e4e\u0eb1\u0eb4-\u0ebc\u0ec8-\u0ece\u102b-\u103e\u1056-\u1059\u105e-\u1060"
    "\u1062-\u1064\u1067-\u106d\u1071-\u1074\u1082-\u108d\u108f\u17b4-\u17d3\u17dd\u3099\u309a"
)
_CHARACTER = re.compile(f"[{_UNSPACED}][{_MARKS}]*")
_RUN = re.compile(f"(?:[{_UNSPACED}][{_MARKS}]*)+")


class _Forms(dict[str, str]):
    """Cache of `_form`: maps a character to the text that replaces it, its compatibility form (NFKC).

    For most symbols, and for forms that contain a space, the text has a space before and after the form. A character
    without a compatibility form maps to itself. So do fractions, and accents without a letter except Arabic ones.
    """

    def __missing__(self, character: str) -> str:
        found = self[character] = _form(character)
        return found


def _form(character: str) -> str:
    found = unicodedata.normalize("NFKC", character)
    if found == unicodedata.normalize("NFC", character) or _FRACTION_SLASH in found:
        return character
    if found[0] == " ":  # a mark on its own: part of a word in Arabic only
        return found[1:] if unicodedata.category(character) == "Lo" else character
    # A symbol such as ™ gets spaces around its replacement, since it separates words. A symbol whose replacement starts
    # with a letter of a script without spaces gets none, such as a radical, which some texts use as a character.
    symbol = unicodedata.category(character)[0] not in "LNM" and not _CHARACTER.match(found)
    return f" {found} " if symbol or " " in found else found


_FORMS = _Forms()


class _Spaced(dict[int, int]):
    """Maps the codes of letters, numbers, marks and private-use characters to themselves, and other codes to a space.

    Thus the Unicode tables of Python decide where words end, not those of SQLite, which may be of another version.
    """

    def __missing__(self, code: int) -> int:
        category = unicodedata.category(chr(code))
        found = code if category[0] in "LNM" or category == "Co" else ord(" ")
        if code < _CACHED:
            self[code] = found
        return found


#: `_Spaced` caches the results for codes below this number, the codes of most alphabets. A cache of all codes would
#: take much memory.
_CACHED = 0x3000
_SPACED = _Spaced()


def search_text(text: str) -> str | None:
    """Return the text that SQLite indexes instead of `text`: without case, accents, punctuation, compatibility forms.

    Each word in a script without spaces is replaced by its characters and its pairs of adjacent characters, separated
    by spaces. None for a text in ASCII: SQLite indexes `text` itself, and ignores case and punctuation in ASCII.
    """
    if text.isascii():
        return None
    return _RUN.sub(lambda run: f" {' '.join(_characters_and_pairs(run[0]))} ", _folded(text))


def words_of(query: str) -> list[str]:
    """Return the first 256 distinct words of a query, in the query's order, prepared as texts are; not stemmed.

    A word in a script without spaces gives its pairs of adjacent characters, each as a word, since single characters
    are in too many texts. A word of one character gives that character. Of a query of more than 65,536 characters, only
    so many are read, without those after their last space, which may be an incomplete word.
    """
    if len(query) > _MAX_CHARACTERS:
        query = query[:_MAX_CHARACTERS]
        # Drop the last word, which may be incomplete; without a space, keep all.
        query = query.rpartition(" ")[0] or query
    if query.isascii():
        found = _WORD.findall(query.lower())
    else:
        text = _RUN.sub(lambda run: f" {' '.join(_pairs(run[0]))} ", _folded(query))
        found = text.split()
    return [*dict.fromkeys(found)][:_MAX_WORDS]


def _folded(text: str) -> str:
    """Return a text case-folded, without accents and invisible characters.

    Compatibility forms and `_LETTERS` are replaced, and characters that are not part of words become spaces.
    """
    # `_stream_safe` limits the marks after compatibility forms are replaced, since a replacement may contain marks, and
    # before the text is normalized, which takes quadratic time for many marks.
    text = _stream_safe(_INVISIBLE.sub("", _without_forms(text)))
    # Remove accents before case folding: case folding would turn one accent, the iota subscript, into a letter.
    text = _ACCENTS.sub("", unicodedata.normalize("NFD", text)).casefold()
    text = _LETTER.sub(lambda letter: _LETTERS[letter[0]], unicodedata.normalize("NFC", text))
    return text.translate(_SPACED)


def _without_forms(text: str) -> str:
    """Return a text with its compatibility forms replaced (see `_Forms`).

    If the result would have more than twice the characters of the text plus `_MORE_CHARACTERS`, only the forms whose
    replacement is a single character are replaced.
    """
    found = _COMPATIBLE.sub(lambda form: _FORMS[form[0]], text)
    if len(found) > 2 * len(text) + _MORE_CHARACTERS:
        return _COMPATIBLE.sub(lambda form: _FORMS[form[0]] if len(_FORMS[form[0]]) == 1 else form[0], text)
    return found


def _stream_safe(text: str) -> str:
    """Return a text with at most 30 consecutive combining marks; further ones are dropped.

    Only marks that normalization may reorder count: those of a combining class other than 0, and `_MARKS_OF_CLASS_0`.
    Normalization takes quadratic time for such marks: 32 s for 400 KB. No script needs more than 30 on a character
    (Unicode Standard Annex 15, Stream-Safe Text Format).
    """
    kept = []
    run = 0
    for character in text:
        run = run + 1 if unicodedata.combining(character) or character in _MARKS_OF_CLASS_0 else 0
        if run <= _MAX_MARKS:
            kept.append(character)
    return "".join(kept)


def _characters_and_pairs(run: str) -> Iterator[str]:
    before = ""
    for character in _CHARACTER.findall(run):
        if before:
            yield before + character
        yield character
        before = character


def _pairs(run: str) -> list[str]:
    """Return the pairs of adjacent characters of a word in a script without spaces, each pair as a string.

    A character includes its marks. For a word of one character, return that character.
    """
    characters = _CHARACTER.findall(run)
    return [a + b for a, b in pairwise(characters)] or characters
