"""Keys and values of the tokens that were read, kept between the steps of generation (generation/rows.py).

The cache belongs to generation, which makes it, passes it to the model and drops it when the texts are done.
All rows end in one column; padding, document -1, stands before the shorter ones. Rows leave, move and join
while others go on.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class KVCache:
    """Keys and values (B, H_kv, max_length, D) of each layer, and document ids (B, max_length).

    The memory is taken once, at the first call, when the model shows its shape, dtype and device.

    Args:
        n_layer: Layers of the model.
        max_length: Most tokens a row will hold, padding included.
    """

    def __init__(self, n_layer: int, max_length: int):
        self.max_length = max_length
        self.rows = 0  # Rows of the last call; the memory may hold more, of rows that left.
        self.length = 0  # Counts this call's tokens as soon as `extend_documents` has run.
        self._start = 0
        # Whether some row has padding behind its first token, where tokens were forgotten.
        self.holes = False
        self._mixed = False  # Whether some row holds more than one document, as padded rows do.
        self._documents: Tensor | None = None
        self._keys: list[Tensor | None] = [None] * n_layer
        self._values: list[Tensor | None] = [None] * n_layer

    def extend_documents(self, document_ids: Tensor) -> Tensor | None:
        """Append (B, T) document ids; returns (B, length), or None where each row holds one document.

        Comes before the call's `update`s. Where it is None no mask has to be made.

        Raises:
            ValueError: The tokens do not fit.
        """
        self._start, self.length = self.length, self.length + document_ids.size(1)
        if self.length > self.max_length:
            raise ValueError(
                f"{self.length} tokens do not fit a cache of {self.max_length}; give it a larger max_length"
            )
        self.rows = document_ids.size(0)
        self._documents = self._extended(self._documents, document_ids, 1)
        if not self._mixed:
            first = self._documents[: self.rows, :1]
            self._mixed = not torch.equal(document_ids, first.expand_as(document_ids))
        return self._read() if self._mixed else None

    def update(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, H_kv, T, D); returns all so far, (B, H_kv, length, D)."""
        self._keys[layer] = keys = self._extended(self._keys[layer], k, 2)
        self._values[layer] = values = self._extended(self._values[layer], v, 2)
        return keys[: self.rows].narrow(2, 0, self.length), values[: self.rows].narrow(2, 0, self.length)

    def select(self, rows: Sequence[int]) -> None:
        """Keep these rows (n,) in this order: drops finished rows, copies and reorders beams.

        Where what moves comes from behind the n rows that stay, only that is copied.
        """
        assert self._documents is not None, "nothing was read yet"
        n, device = len(rows), self._documents.device
        moved = [place for place, row in enumerate(rows) if place != row]
        in_place = n <= self.rows and all(rows[place] >= n for place in moved)
        index = torch.tensor([rows[place] for place in moved] if in_place else rows, device=device).long()
        places = torch.tensor(moved, device=device).long()

        def selected(x: Tensor | None, dim: int) -> Tensor | None:
            """Copy only the columns that were written."""
            if x is None or (in_place and not moved):
                return x
            written = x.narrow(dim, 0, self.length)
            if in_place:
                written.index_copy_(0, places, written.index_select(0, index))
                return x
            new = x.new_empty(n, *x.shape[1:])
            torch.index_select(written, 0, index, out=new.narrow(dim, 0, self.length))
            return new

        self._documents = selected(self._documents, 1)
        for layer in range(len(self._keys)):
            self._keys[layer] = selected(self._keys[layer], 2)
            self._values[layer] = selected(self._values[layer], 2)
        self.rows = n
        if self._mixed:  # The padded rows may be those that left.
            self._mixed = self._holds_several()

    def join(self, parts: Sequence[KVCache], max_length: int | None = None) -> None:
        """Take the rows of other caches, one cache after the other, behind its own.

        What the rows hold ends in one column; before a shorter one stands padding, document -1. Columns that
        are padding in every row go, and so does memory of rows that left.

        Args:
            max_length: Most tokens a row will hold from now on; None leaves it as it is.
        """
        self.max_length = max_length or self.max_length
        parts = [part for part in (self, *parts) if part.rows]
        for part in parts:
            part.close_holes()
        firsts = [part._first_column() for part in parts]
        lengths = [part.length - first for part, first in zip(parts, firsts, strict=True)]
        length = max(lengths)

        def joined(buffers: Sequence[Tensor | None], dim: int, fill: int) -> Tensor | None:
            there = [buffer for buffer in buffers if buffer is not None]
            if not there:  # A layer that was left out of a model, by a guard that looks at some blocks.
                return None
            shape = [sum(part.rows for part in parts), *there[0].shape[1:]]
            shape[dim] = self.max_length
            new, row = there[0].new_empty(shape), 0
            for buffer, part, first, own in zip(there, parts, firsts, lengths, strict=True):
                place = new[row : row + part.rows]
                place.narrow(dim, 0, length - own).fill_(fill)
                place.narrow(dim, length - own, own).copy_(buffer[: part.rows].narrow(dim, first, own))
                row += part.rows
            return new

        documents = joined([part._documents for part in parts], 1, -1)
        for layer in range(len(self._keys)):
            self._keys[layer] = joined([part._keys[layer] for part in parts], 2, 0)
            self._values[layer] = joined([part._values[layer] for part in parts], 2, 0)
        assert documents is not None, "every row has read a token"
        self._documents, self.rows, self.length = documents, len(documents), length
        self._mixed = self._holds_several()

    def fill(self, held: Tensor) -> None:
        """Begin one row with the keys and values (n_layer, 2, H_kv, T, D) of its first tokens."""
        self._start, self.length, self.rows = 0, held.size(3), 1
        documents = torch.zeros(1, held.size(3), dtype=torch.long, device=held.device)
        self._documents = self._extended(None, documents, 1)
        for layer, (keys, values) in enumerate(held[:, :, None]):
            self._keys[layer] = self._extended(None, keys, 2)
            self._values[layer] = self._extended(None, values, 2)

    def held(self, row: int, start: int, end: int) -> Tensor:
        """Copy keys and values (n_layer, 2, H_kv, end - start, D) of a row's tokens from one to another."""
        columns = self._columns_of(row)[start:end]
        pairs = zip(self._keys, self._values, strict=True)
        parts = [x[row].index_select(1, columns) for pair in pairs for x in pair if x is not None]
        return torch.stack(parts).unflatten(0, (-1, 2))

    def forget(self, counts: Sequence[int]) -> None:
        """Forget the last tokens of each row, so many (rows,): they were proposed and not taken."""
        fewest = min(counts)
        self.length -= fewest
        for row, n in enumerate(counts):
            if n > fewest:
                assert self._documents is not None
                self._documents[row, self.length - (n - fewest) : self.length] = -1
                self.holes = self._mixed = True

    def close_holes(self) -> None:
        """Move the tokens of each row together, so that all padding stands before them."""
        if not self.holes:
            return
        columns = [self._columns_of(row) for row in range(self.rows)]
        length = max(map(len, columns))

        def moved(x: Tensor, dim: int, fill: int) -> Tensor:
            new = torch.full_like(x, fill)
            for row, own in enumerate(columns):
                new[row].narrow(dim, length - len(own), len(own)).copy_(x[row].index_select(dim, own))
            return new

        assert self._documents is not None
        documents = moved(self._documents, 0, -1)
        self._keys = [None if x is None else moved(x, 1, 0) for x in self._keys]
        self._values = [None if x is None else moved(x, 1, 0) for x in self._values]
        self._documents, self.length, self.holes = documents, length, False
        self._mixed = self._holds_several()

    def _columns_of(self, row: int) -> Tensor:
        """Return the columns of a row's own tokens, in their order."""
        return (self._read()[row] >= 0).nonzero()[:, 0]

    @property
    def bytes(self) -> int:
        """The memory of keys and values, of rows that left too."""
        buffers = (x for x in (*self._keys, *self._values) if x is not None)
        return sum(x.numel() * x.element_size() for x in buffers)

    @property
    def places(self) -> int:
        """The rows that the memory has room for."""
        return 0 if self._documents is None else self._documents.size(0)

    def _read(self) -> Tensor:
        assert self._documents is not None
        return self._documents[: self.rows, : self.length]

    def _first_column(self) -> int:
        """Return the first column that is not padding in every row."""
        return int((self._read() >= 0).any(0).int().argmax())

    def _holds_several(self) -> bool:
        read = self._read()
        return not torch.equal(read, read[:, :1].expand_as(read))

    def _extended(self, buffer: Tensor | None, x: Tensor, dim: int) -> Tensor:
        if buffer is None:
            buffer = x.new_zeros(*x.shape[:dim], self.max_length, *x.shape[dim + 1 :])
        buffer[: self.rows].narrow(dim, self._start, x.size(dim)).copy_(x)
        return buffer
