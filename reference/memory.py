"""What of a text stands in training: its longest run of tokens inside one training document, by searching."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np

BETWEEN = 2**32 - 1  # Stands between documents; no id is as large.


class Training:
    """Training documents, as one string of bytes that is searched.

    Args:
        documents: The ids of each.
    """

    def __init__(self, documents: Sequence[Sequence[int]]):
        self.begins = np.cumsum([0, *(len(ids) + 1 for ids in documents)])
        self.text = _bytes([id for ids in documents for id in (*ids, BETWEEN)])

    def places(self, run: Sequence[int]) -> Iterator[int]:
        """Yield where a run begins, in tokens of all documents laid end to end."""
        wanted = _bytes(run)
        at = self.text.find(wanted)
        while at >= 0:
            if at % 4 == 0:  # An id has four bytes; elsewhere it is the halves of two.
                yield at // 4
            at = self.text.find(wanted, at + 1)

    def longest_run(self, text: Sequence[int], least: int) -> tuple[int, int, int]:
        """Return the tokens of the longest run, how often training holds one so long, and its first document.

        Args:
            least: A shorter run counts as none: 0 tokens, 0 times, document -1.
        """
        size = least - 1
        for begin in range(len(text)):
            while begin + size < len(text) and any(True for _ in self.places(text[begin : begin + size + 1])):
                size += 1
        if size < least:
            return 0, 0, -1
        found = [
            at for begin in range(len(text) - size + 1) for at in self.places(text[begin : begin + size])
        ]
        return size, len(found), int(np.searchsorted(self.begins, min(found), "right")) - 1


def _bytes(ids: Sequence[int]) -> bytes:
    return np.array(ids, np.uint32).tobytes()
