"""JSON documents as damage or another program leaves them."""

from hypothesis import strategies as st

# What a damaged header tends to hold.
JUNK = st.one_of(
    st.none(),
    st.booleans(),
    st.sampled_from([-1, 0, 1, 2**31, 2**63, 10**30, 1.5, float("inf"), float("nan")]),
    st.text(max_size=4),
    st.just([]),
    st.just({}),
    st.just([[[]]]),
)


def mutate(value, data: st.DataObject):
    """One value somewhere in a JSON document replaced, removed or renamed."""
    if isinstance(value, dict) and value and data.draw(st.booleans()):
        key = data.draw(st.sampled_from(sorted(value)))
        kind = data.draw(st.sampled_from(["into", "into", "into", "remove", "rename"]))
        if kind == "into":
            return value | {key: mutate(value[key], data)}
        rest = {name: inner for name, inner in value.items() if name != key}
        return rest if kind == "remove" else rest | {data.draw(st.text(max_size=5)): value[key]}
    if isinstance(value, list) and value and data.draw(st.booleans()):
        i = data.draw(st.integers(0, len(value) - 1))
        return [*value[:i], mutate(value[i], data), *value[i + 1 :]]
    return data.draw(JUNK)
