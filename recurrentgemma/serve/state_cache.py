"""States worth keeping: what the model has read once, it need not read again."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable, Sequence
from typing import Any

LEAST_TOKENS = 64  # reading fewer takes less than looking after a state


class _Node:
    """A place in the trie: the tokens from the root to here, and maybe the state after them."""

    def __init__(self, edge: tuple[Hashable, ...], parent: _Node | None) -> None:
        self.edge, self.parent = edge, parent
        self.children: dict[Hashable, _Node] = {}
        self.state: Any = None
        self.nbytes = 0


class StateCache:
    """States by the tokens that they have read, in a trie; the least recently used go first.

    Attributes:
      most_bytes: The bytes that all states have at most.
      nbytes: The bytes that they have.
    """

    def __init__(self, most_bytes: int) -> None:
        self.most_bytes, self.nbytes = most_bytes, 0
        self._root = _Node((), None)
        self._used: OrderedDict[_Node, None] = OrderedDict()

    def __len__(self) -> int:
        return len(self._used)

    def find(self, salt: str, tokens: Sequence[int]) -> tuple[int, Any]:
        """The state that has read the longest beginning of the tokens, and its length.

        Without one the length is 0 and the state None.
        """
        key: tuple[Hashable, ...] = (salt, *tokens)
        node, at, best, length = self._root, 0, None, 0
        while (child := node.children.get(key[at]) if at < len(key) else None) is not None:
            if key[at : at + len(child.edge)] != child.edge:
                break
            node, at = child, at + len(child.edge)
            if node.state is not None:
                best, length = node, at - 1
        if best is None:
            return 0, None
        self._used.move_to_end(best)
        return length, best.state

    def keep(self, salt: str, tokens: Sequence[int], state: Any, nbytes: int) -> None:
        """Keeps the state after these tokens, and forgets others to make room."""
        if nbytes > self.most_bytes:
            return
        node = self._node((salt, *tokens))
        self.nbytes += nbytes - node.nbytes
        node.state, node.nbytes = state, nbytes
        self._used[node] = None
        self._used.move_to_end(node)
        while self.nbytes > self.most_bytes:
            self._forget(next(iter(self._used)))

    def _node(self, key: tuple[Hashable, ...]) -> _Node:
        """The node of a key; makes it where it is missing, and cuts an edge that ends beyond it."""
        node = self._root
        while key:
            child = node.children.get(key[0])
            if child is None:
                child = node.children[key[0]] = _Node(key, node)
            same = _common(key, child.edge)
            if same < len(child.edge):
                middle = node.children[key[0]] = _Node(child.edge[:same], node)
                child.edge, child.parent = child.edge[same:], middle
                middle.children[child.edge[0]] = child
                child = middle
            node, key = child, key[same:]
        return node

    def _forget(self, node: _Node) -> None:
        del self._used[node]
        self.nbytes -= node.nbytes
        node.state, node.nbytes = None, 0
        while node.parent is not None and node.state is None and len(node.children) < 2:
            parent = node.parent
            if not node.children:
                del parent.children[node.edge[0]]
                node = parent
                continue
            (child,) = node.children.values()
            parent.children[node.edge[0]] = child
            child.edge, child.parent = node.edge + child.edge, parent
            return


def _common(one: Sequence[Hashable], other: Sequence[Hashable]) -> int:
    """How many first items of two sequences are equal."""
    pairs = enumerate(zip(one, other, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(one), len(other)))
