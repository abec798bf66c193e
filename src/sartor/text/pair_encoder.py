"""Byte-level BPE straight from the tables of a vocabulary, for the first texts of a process.

``tokenizers`` encodes long texts several times faster, but first makes dictionaries of the whole
vocabulary, which takes longer than loading a model. So the first few thousand characters are
encoded here, with the same result, and it is asked when more come.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence, Set
from functools import cached_property

from sartor.text.pretokenizers import PreTokenizer
from sartor.text.sentencepiece import Splitter
from sartor.text.tokenizer import Encoder
from sartor.text.vocabulary import Merge, Vocabulary

CHARACTERS = 16_384
"""Text that is encoded here; about as much as can be in the time that ``tokenizers`` needs to
make itself ready."""

_LONGEST_WORD = 200
"""Merging here takes quadratic time; longer words go to ``tokenizers`` at once."""


class PairEncoder:
    """BPE on tables at first, then what ``complete`` makes.

    ``added`` are tokens that are found in the text before anything else, ``special`` those of
    them that are control tokens.
    """

    def __init__(
        self,
        vocabulary: Vocabulary,
        rule: PreTokenizer,
        added: Mapping[str, int],
        special: Set[int],
        complete: Callable[[], Encoder],
        characters: int = CHARACTERS,
    ) -> None:
        self._vocabulary = vocabulary
        self._rule = rule
        self._added = Splitter(added)
        self._special = special
        self._complete = complete
        self._completed: Encoder | None = None
        self._left = characters
        self._lock = threading.Lock()
        self._characters: dict[str, int | None] = {}
        self._merges: dict[tuple[int, int], Merge | None] = {}
        self._cache: dict[str, list[int]] = {}

    def encode(self, text: str, parse_special: bool) -> list[int]:
        """Token ids without bos and eos."""
        with self._lock:
            if self._completed is None:
                self._left -= len(text)
                ids = None if self._left < 0 else self._encode(text, parse_special)
                if ids is not None:
                    return ids
                self._completed = self._complete()
                self._cache.clear()
        return self._completed.encode(text, parse_special)

    def _encode(self, text: str, parse_special: bool) -> list[int] | None:
        """None where a word is too long."""
        ids: list[int] = []
        plain: list[str] = []
        for piece, token in self._added.split(text):
            if token is None or (token in self._special and not parse_special):
                plain.append(piece)
                continue
            if not self._encode_span("".join(plain), ids):
                return None
            plain.clear()
            ids.append(token)
        return ids if self._encode_span("".join(plain), ids) else None

    def _encode_span(self, text: str, ids: list[int]) -> bool:
        """Appends the ids of a text without added tokens; False where a word is too long."""
        for word in self._words(text) if text else ():
            if len(word) > _LONGEST_WORD:
                return False
            found = self._cache.get(word)
            if found is None:
                found = self._cache[word] = self._encode_word(word)
            ids += found
        return True

    @cached_property
    def _words(self) -> Callable[[str], Sequence[str]]:
        """Cuts text into words spelled in the GPT-2 alphabet."""
        from tokenizers import normalizers  # imported where used: engines may get ids alone

        normalizer = normalizers.NFC() if self._rule.nfc else None
        pre_tokenizer = self._rule.build()

        def words(text: str) -> list[str]:
            if normalizer is not None:
                text = normalizer.normalize_str(text)
            return [word for word, _ in pre_tokenizer.pre_tokenize_str(text)]

        return words

    def _encode_word(self, word: str) -> list[int]:
        if self._rule.whole_words and (token := self._vocabulary.find(word)) is not None:
            return [token]
        ids = [token for c in word if (token := self._character(c)) is not None]
        while True:
            # The lowest rank first, and of equal ones the leftmost.
            found = [(m, i) for i in range(len(ids) - 1) if (m := self._merge(*ids[i : i + 2]))]
            if not found:
                return ids
            merge, at = min(found)
            ids[at : at + 2] = [merge.token]

    def _character(self, character: str) -> int | None:
        if character not in self._characters:
            self._characters[character] = self._vocabulary.find(character)
        return self._characters[character]

    def _merge(self, left: int, right: int) -> Merge | None:
        pair = (left, right)
        if pair not in self._merges:
            self._merges[pair] = self._vocabulary.merge(left, right)
        return self._merges[pair]
