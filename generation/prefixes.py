"""Keys and values of what was read, kept between requests, in pages that are found by their tokens.

A page holds a few tokens, and hangs under the page before it: a radix tree over pages (as SGLang's
RadixAttention, arXiv:2312.07104, has it over texts). Every path begins at the first token of a text, so that
a page's positions are the same in all texts that share it. Hence it holds for every kind of position: a
table's, a rotation's by the position alone, and a scaling's by the length of the text (dynamic, longrope)
within its first context, past which no cache is kept at all.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

PAGE = 16  # tokens of a page


def shared(a: Sequence[int], b: Sequence[int]) -> int:
    """Return with how many tokens two texts begin alike."""
    pairs = enumerate(zip(a, b, strict=False))
    return next((i for i, (x, y) in pairs if x != y), min(len(a), len(b)))


class _Page:
    """A page, or the root, which holds none; `held` is (n_layer, 2, H_kv, PAGE, D)."""

    def __init__(self, ids: tuple[int, ...], held: Tensor | None, parent: _Page | None):
        self.ids, self.held, self.parent = ids, held, parent
        self.following: dict[tuple[int, ...], _Page] = {}


class PrefixCache:
    """A store of pages, of which the least used go first.

    A page that is used makes all pages before it used after it, so that the least used one is a leaf.

    Args:
        most_bytes: The bound of all pages together; 0 keeps nothing.
    """

    def __init__(self, most_bytes: int):
        self.most_bytes, self.bytes = most_bytes, 0
        self.root = _Page((), None, None)
        self.used: OrderedDict[_Page, None] = OrderedDict()  # the least used first

    def known(self, ids: Sequence[int]) -> int:
        """Return how many of a text's first tokens are held; never all, since the last one is read anew."""
        path, more = self._path(ids)
        return min(PAGE * len(path) + (more[1] if more else 0), len(ids) - 1)

    def find(self, ids: Sequence[int]) -> Tensor | None:
        """Return keys and values (n_layer, 2, H_kv, known, D) of its first tokens, None for none."""
        path, more = self._path(ids)
        pages = [*path, more[0]] if more else path
        self._use(pages)
        held = [page.held for page in pages if page.held is not None]
        return torch.cat(held, dim=3)[..., : self.known(ids), :] if self.known(ids) > 0 else None

    def keep(self, ids: Sequence[int], held: Callable[[int, int], Tensor]) -> None:
        """Keep a text that was read; `held` returns keys and values of its tokens from one to another."""
        path, _ = self._path(ids)
        self._use(path)
        first, end = len(path), len(ids) // PAGE
        if first >= end or not self.most_bytes:
            return
        new = held(first * PAGE, end * PAGE)
        if not new.isfinite().all():
            return
        of_page = new[..., :PAGE, :].numel() * new.element_size()
        end = min(end, first + (self.most_bytes - of_page * first) // of_page)
        self._free(max(0, end - first) * of_page)
        page = path[-1] if path else self.root
        for number in range(first, end):
            start = (number - first) * PAGE
            part = new[..., start : start + PAGE, :].clone()
            following = _Page(tuple(ids[number * PAGE : (number + 1) * PAGE]), part, page)
            page.following[following.ids] = following
            page = following
            self.bytes += of_page
            path.append(page)
        self._use(path)

    def _path(self, ids: Sequence[int]) -> tuple[list[_Page], tuple[_Page, int] | None]:
        """Return the pages that are wholly a text's, and one that begins as it goes on, with how far."""
        path, page = list[_Page](), self.root
        while found := page.following.get(tuple(ids[PAGE * len(path) : PAGE * (len(path) + 1)])):
            path.append(page := found)
        rest, best = ids[PAGE * len(path) : PAGE * (len(path) + 1)], None
        for other in page.following.values():
            same = shared(other.ids, rest)
            if same > (best[1] if best else 0):
                best = other, same
        return path, best

    def _use(self, pages: Sequence[_Page]) -> None:
        for page in reversed(pages):
            self.used[page] = None
            self.used.move_to_end(page)

    def _free(self, n: int) -> None:
        """Drop the least used pages until n bytes are free."""
        while self.used and self.bytes + n > self.most_bytes:
            page, _ = self.used.popitem(last=False)
            assert page.held is not None and page.parent is not None and not page.following
            del page.parent.following[page.ids]
            self.bytes -= page.held.numel() * page.held.element_size()
