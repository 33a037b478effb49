"""A compressed, counted suffix tree of bounded depth: how often each string stands in a set of texts.

Insert and remove one suffix at a time, so that a long text can be spread over several steps. Texts are removed in the
order they were inserted: every node points into the newest text that visited it, so its label outlives the older ones.
Source: the trees of Oliaro et al., "SuffixDecoding" (2024).

Nodes are numbers and their fields columns of integers. As objects, a store of 50 MB made Python's garbage collector
stop the engine for 0.1 to 0.3 s now and then; it does not look into arrays, nor into a dictionary of integers.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterator

MAX_DEPTH = 32
"""Tokens of a suffix that are inserted: context and continuation together. It bounds the work of an insert, which
visits that many nodes in a text of one token only."""
NODE_BYTES = 150
"""Of a node with its place among its parent's children; measured with tracemalloc on random and on repeated text."""
ROOT = 0
_NONE = 0
"""No sibling, no child: the root is nobody's."""


class SuffixTree:
    """One tree. A node is a string that stands in the texts `counts[node]` times, and so do those between it and its
    parent; its label, what it has beyond its parent, is texts[text_of[node]][starts[node] :][: lengths[node]].

    num_nodes  without the root
    """

    def __init__(self) -> None:
        self.texts: dict[int, array[int]] = {}
        self.counts, self.text_of = array("i", [0]), array("i", [0])
        self.starts, self.lengths = array("i", [0]), array("i", [0])
        # Children by first token, and as a list: the first, and each one's neighbours.
        self._children: dict[int, int] = {}
        self._first, self._after, self._before = array("i", [0]), array("i", [0]), array("i", [0])
        self._free: list[int] = []

    @property
    def num_nodes(self) -> int:
        return len(self.counts) - 1 - len(self._free)

    def insert(self, number: int, first: int) -> int:
        """Count the suffix of texts[number] that begins at `first`; returns how many nodes were visited."""
        text = self.texts[number]
        node, at, end = ROOT, first, min(len(text), first + MAX_DEPTH)
        self.counts[node] += 1
        num_visited = 1
        while at < end:
            num_visited += 1
            child = self._children.get(node << 32 | text[at])
            if child is None:
                self._adopt(node, self._new(1, number, at, end - at), text[at])
                break
            common = self._common(text, at, end, child)
            if common < self.lengths[child]:
                child = self._split(node, child, common)
            self.counts[child] += 1
            self.text_of[child], self.starts[child] = number, at
            node, at = child, at + common
        return num_visited

    def remove(self, number: int, first: int) -> int:
        """Take back an `insert` of the same suffix; returns how many nodes were visited."""
        text = self.texts[number]
        parent, node, at, end = ROOT, ROOT, first, min(len(text), first + MAX_DEPTH)
        self.counts[node] -= 1
        num_visited = 1
        while at < end:
            num_visited += 1
            child = self._children[node << 32 | text[at]]
            self.counts[child] -= 1
            if self.counts[child] == 0:
                # Nothing else passes here, so all below it goes too: it is one unbranched label.
                del self._children[node << 32 | text[at]]
                self._unlink(node, child)
                self._free.append(child)
                break
            parent, node, at = node, child, at + self.lengths[child]
        if node != ROOT:
            self._merge(parent, node)
        return num_visited

    def children(self, node: int) -> Iterator[int]:
        child = self._first[node]
        while child != _NONE:
            yield child
            child = self._after[child]

    def token(self, node: int, used: int = 0) -> int:
        """The token of a node's label behind its first `used`."""
        return self.texts[self.text_of[node]][self.starts[node] + used]

    def is_end(self, node: int, used: int) -> bool:
        """Whether nothing follows the first `used` tokens of the node's label."""
        return used == self.lengths[node] and self._first[node] == _NONE

    def find(self, tail: array[int]) -> tuple[int, int] | None:
        """Where `tail` ends in the tree: the node and how much of its label is used; None = it stands in no text."""
        node, used, at, end = ROOT, 0, 0, len(tail)
        while at < end:
            child = self._children.get(node << 32 | tail[at])
            if child is None:
                return None
            used = min(self.lengths[child], end - at)
            start = self.starts[child]
            if tail[at : at + used] != self.texts[self.text_of[child]][start : start + used]:
                return None
            node, at = child, at + used
        return node, used

    def _new(self, count: int, number: int, start: int, length: int) -> int:
        if self._free:
            node = self._free.pop()
            self.counts[node], self.text_of[node] = count, number
            self.starts[node], self.lengths[node] = start, length
            self._first[node] = _NONE
            return node
        for column, value in (
            (self.counts, count),
            (self.text_of, number),
            (self.starts, start),
            (self.lengths, length),
            (self._first, _NONE),
            (self._after, _NONE),
            (self._before, _NONE),
        ):
            column.append(value)
        return len(self.counts) - 1

    def _adopt(self, parent: int, child: int, token: int) -> None:
        self._children[parent << 32 | token] = child
        after = self._first[parent]
        self._before[child], self._after[child] = _NONE, after
        if after != _NONE:
            self._before[after] = child
        self._first[parent] = child

    def _unlink(self, parent: int, child: int) -> None:
        before, after = self._before[child], self._after[child]
        if before != _NONE:
            self._after[before] = after
        else:
            self._first[parent] = after
        if after != _NONE:
            self._before[after] = before

    def _split(self, parent: int, child: int, length: int) -> int:
        """Cut a child's label after `length` tokens; returns the new upper part."""
        upper = self._new(self.counts[child], self.text_of[child], self.starts[child], length)
        self._unlink(parent, child)
        self._adopt(parent, upper, self.token(child))
        self.starts[child] += length
        self.lengths[child] -= length
        self._adopt(upper, child, self.token(child))
        return upper

    def _merge(self, parent: int, node: int) -> None:
        """Undo a split that nothing needs any more: an only child that is as frequent takes its parent's place."""
        child = self._first[node]
        if child == _NONE or self._after[child] != _NONE or self.counts[child] != self.counts[node]:
            return
        token = self.token(node)
        del self._children[node << 32 | self.token(child)]
        self._unlink(parent, node)
        # The child's newest text went through the node's label right before the child's.
        self.starts[child] -= self.lengths[node]
        self.lengths[child] += self.lengths[node]
        self._adopt(parent, child, token)
        self._free.append(node)

    def _common(self, text: array[int], at: int, end: int, node: int) -> int:
        """How far text[at : end] agrees with the node's label, at least 1 (its first token led here)."""
        start, length = self.starts[node], min(self.lengths[node], end - at)
        other = self.texts[self.text_of[node]]
        if text[at : at + length] == other[start : start + length]:
            return length
        common = 1
        while text[at + common] == other[start + common]:
            common += 1
        return common

    def nodes(self) -> Iterator[tuple[int, tuple[int, ...]]]:
        """Every node but the root with its whole string. For tests."""
        waiting: list[tuple[int, tuple[int, ...]]] = [(ROOT, ())]
        while waiting:
            node, path = waiting.pop()
            for child in self.children(node):
                label = tuple(self.token(child, used) for used in range(self.lengths[child]))
                yield child, (*path, *label)
                waiting.append((child, (*path, *label)))

    def check(self) -> None:
        """Raise AssertionError if counts, labels or links contradict each other. For tests; walks the whole tree."""
        found = list(self.nodes())
        assert len(found) == self.num_nodes == len(self._children), "nodes that were not counted"
        for node, path in found:
            assert self.counts[node] > 0, "a node that nothing visits"
            assert self.lengths[node] > 0, "a node without a label"
            assert len(path) <= MAX_DEPTH, "deeper than any suffix"
            children = list(self.children(node))
            below = sum(self.counts[child] for child in children)
            assert below <= self.counts[node], "more visits below a node than at it"
            assert len(children) != 1 or below < self.counts[node], "a node that should be one with its child"
        for node in (ROOT, *(node for node, _ in found)):
            for child in self.children(node):
                assert self._children[node << 32 | self.token(child)] == child, "a child under the wrong token"
        assert sum(self.counts[child] for child in self.children(ROOT)) == self.counts[ROOT], "lost suffixes"
