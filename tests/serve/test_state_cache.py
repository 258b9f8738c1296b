"""The trie of states: the longest beginning that is kept, within so many bytes."""

from hypothesis import given
from hypothesis import strategies as st

from recurrentgemma.serve.state_cache import StateCache

KEYS = st.lists(st.integers(0, 2), max_size=7).map(tuple)
STEPS = st.lists(st.tuples(st.sampled_from("ab"), KEYS, st.integers(1, 40), st.booleans()))


@given(steps=STEPS)
def test_it_finds_what_a_plain_table_finds(steps) -> None:
    cache, table = StateCache(100), {}  # a dict keeps the order of use
    for salt, tokens, nbytes, keeps in steps:
        if keeps:
            cache.keep(salt, tokens, (salt, tokens), nbytes)
            table.pop((salt, tokens), None)
            table[salt, tokens] = nbytes
            while sum(table.values()) > 100:
                table.pop(next(iter(table)))
        kept = [key for key in table if key[0] == salt and tokens[: len(key[1])] == key[1]]
        longest = max(kept, key=lambda key: len(key[1]), default=None)
        if longest is not None:
            table[longest] = table.pop(longest)
        found = cache.find(salt, tokens)
        assert found == ((0, None) if longest is None else (len(longest[1]), longest))
        assert (len(cache), cache.nbytes) == (len(table), sum(table.values()))
        assert _nodes(cache._root) <= 2 * len(table) + 1


def _nodes(node) -> int:
    return 1 + sum(map(_nodes, node.children.values()))


def test_a_state_that_is_too_large_is_not_kept() -> None:
    cache = StateCache(10)
    cache.keep("", (1,), "small", 10)
    cache.keep("", (2,), "large", 11)
    assert (cache.find("", (1, 5)), cache.find("", (2, 5))) == ((1, "small"), (0, None))
