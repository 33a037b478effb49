"""A compressed, counted suffix tree of bounded depth: how often each string stands in a set of texts.

Insert and remove one suffix at a time, so that a long text can be spread over several steps. Texts are removed in the
order they were inserted: every node points into the newest text that visited it, so its label outlives the older ones.
Source: the trees of Oliaro et al., "SuffixDecoding" (2024).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

MAX_DEPTH = 32
"""Tokens of a suffix that are inserted: context and continuation together. It bounds the work of an insert, which
visits that many nodes in a text of one token only."""
NODE_BYTES = 190
"""Of a node with its place in its parent's children; measured with tracemalloc on random and on repeated text."""


class Node:
    """A string that stands in the texts `count` times; its label is text[start : start + length].

    The strings between a node's parent and the node itself stand there just as often.
    """

    __slots__ = ("children", "count", "length", "start", "text")

    def __init__(self, count: int, text: list[int], start: int, length: int) -> None:
        self.count, self.text, self.start, self.length = count, text, start, length
        self.children: dict[int, Node] | None = None


class SuffixTree:
    """One tree. `num_nodes` without the root."""

    def __init__(self) -> None:
        self.root = Node(0, [], 0, 0)
        self.num_nodes = 0

    def insert(self, text: list[int], first: int) -> int:
        """Count text[first :], up to MAX_DEPTH tokens of it; returns how many nodes were visited.

        The text must not change afterwards.
        """
        node, at, end = self.root, first, min(len(text), first + MAX_DEPTH)
        node.count += 1
        num_visited = 1
        while at < end:
            num_visited += 1
            if node.children is None:
                node.children = {}
            child = node.children.get(text[at])
            if child is None:
                node.children[text[at]] = Node(1, text, at, end - at)
                self.num_nodes += 1
                break
            common = _common(text, at, end, child)
            if common < child.length:
                child = self._split(node, child, common)
            child.count += 1
            child.text, child.start = text, at
            node, at = child, at + common
        return num_visited

    def remove(self, text: list[int], first: int) -> int:
        """Take back an `insert` of the same suffix; returns how many nodes were visited."""
        node, at, end = self.root, first, min(len(text), first + MAX_DEPTH)
        node.count -= 1
        num_visited = 1
        while at < end:
            num_visited += 1
            assert node.children is not None, "only what was inserted is removed"
            child = node.children[text[at]]
            child.count -= 1
            if child.count == 0:
                # Nothing else passes here, so all below it goes too: it is one unbranched label.
                del node.children[text[at]]
                self.num_nodes -= 1
                break
            node, at = child, at + child.length
        self._merge(node)
        return num_visited

    def _split(self, parent: Node, child: Node, length: int) -> Node:
        """Cut a child's label after `length` tokens; returns the new upper part."""
        upper = Node(child.count, child.text, child.start, length)
        parent.children[child.text[child.start]] = upper  # type: ignore[index]  # it has this child
        child.start += length
        child.length -= length
        upper.children = {child.text[child.start]: child}
        self.num_nodes += 1
        return upper

    def _merge(self, node: Node) -> None:
        """Undo a split that nothing needs any more: an only child that stands as often as its parent."""
        if node is self.root or not node.children or len(node.children) > 1:
            return
        (child,) = node.children.values()
        if child.count == node.count:
            # The child's newest text went through the parent's label right before the child's.
            node.text, node.start = child.text, child.start - node.length
            node.length += child.length
            node.children = child.children
            self.num_nodes -= 1

    def find(self, tail: Sequence[int]) -> tuple[Node, int] | None:
        """Where `tail` ends in the tree: the node and how much of its label is used; None = it stands in no text."""
        node, used, at, end = self.root, 0, 0, len(tail)
        while at < end:
            child = node.children.get(tail[at]) if node.children else None
            if child is None:
                return None
            used = min(child.length, end - at)
            if tail[at : at + used] != child.text[child.start : child.start + used]:
                return None
            node, at = child, at + used
        return node, used

    def nodes(self) -> Iterator[tuple[Node, int]]:
        """Every node but the root, with the depth of its parent, in tokens."""
        waiting = [(self.root, 0)]
        while waiting:
            node, depth = waiting.pop()
            for child in (node.children or {}).values():
                yield child, depth
                waiting.append((child, depth + child.length))

    def check(self) -> None:
        """Raise AssertionError if counts or labels contradict each other. For tests; walks the whole tree."""
        found = 0
        for node, depth in self.nodes():
            found += 1
            assert node.count > 0, "a node that nothing visits"
            assert node.length > 0, "a node without a label"
            assert depth + node.length <= MAX_DEPTH, "deeper than any suffix"
            assert node.start + node.length <= len(node.text), "a label beyond its text"
            below = sum(child.count for child in (node.children or {}).values())
            assert below <= node.count, "more visits below a node than at it"
            if node.children is not None and len(node.children) == 1:
                assert below < node.count, "a node that should be one with its child"
            for token, child in (node.children or {}).items():
                assert child.text[child.start] == token, "a child under the wrong token"
        assert found == self.num_nodes, "nodes that were not counted"
        assert sum(child.count for child in (self.root.children or {}).values()) == self.root.count, "lost suffixes"


def _common(text: list[int], at: int, end: int, node: Node) -> int:
    """How far text[at : end] agrees with the node's label, at least 1 (its first token led here)."""
    start, length = node.start, min(node.length, end - at)
    if text[at : at + length] == node.text[start : start + length]:
        return length
    common, other = 1, node.text
    while text[at + common] == other[start + common]:
        common += 1
    return common
