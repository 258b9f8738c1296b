"""Examples from JSON lines, and the rows that hold them."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recurrentgemma.common.io.checkpoint import load_tokenizer
from recurrentgemma.common.tokenizer import apply_it_formatter
from recurrentgemma.common.training.data import DataError, Example, hold_out, read_examples
from recurrentgemma.common.training.packing import Position, RowStream, TooLong, cut, in_order, pack

PAD = 0


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer()


@pytest.fixture
def read(tmp_path, tokenizer):
    def read(*values, **options):
        path = tmp_path / "data.jsonl"
        lines = [v if isinstance(v, bytes) else json.dumps(v).encode() for v in values]
        path.write_bytes(b"\n".join(lines) + b"\n")
        return read_examples(path, tokenizer, **options)

    return read


def document(size: int, first: int = 100, prompt: int = 1) -> Example:
    return Example(np.arange(first, first + size, dtype=np.int32), np.arange(size) >= prompt)


def test_a_text_is_predicted_from_its_first_token(read, tokenizer):
    (example,) = read({"text": "In the beginning", "id": 3})
    tokens = tokenizer.encode("In the beginning")
    assert example.tokens.tolist() == [*tokens, tokenizer.eos_id]
    assert example.counts.tolist() == [False] + [True] * len(tokens)
    (example,) = read({"text": "In the beginning"}, b"", b"  ", eos=False)
    assert example.tokens.tolist() == tokens


def test_of_a_prompt_with_a_completion_the_completion_counts(read, tokenizer):
    (example,) = read({"prompt": "Say it:\n", "completion": "it was"})
    prompt = tokenizer.encode("Say it:\n")
    assert example.tokens[: len(prompt)].tolist() == prompt  # what a sampler reads
    assert tokenizer.decode(example.tokens[len(prompt) :].tolist()) == "it was"
    assert example.tokens[-1] == tokenizer.eos_id
    assert example.counts.tolist() == [i >= len(prompt) for i in range(len(example.tokens))]


def test_of_a_conversation_the_model_s_turns_count(read, tokenizer):
    roles = ("user", "model", "user", "assistant")
    words = ("Who?", "Emma.", "And he?", "Mr. Knightley.")
    turns = zip(roles, words, strict=True)
    (example,) = read({"messages": [{"role": r, "content": c} for r, c in turns]})
    end = tokenizer.end_of_turn_id
    first = tokenizer.encode(apply_it_formatter("Who?"))
    second = tokenizer.encode("\n" + apply_it_formatter("And he?"))[1:]
    answers = [[*tokenizer.encode(words[i])[1:], end] for i in (1, 3)]
    parts = (first, answers[0], second, answers[1])
    assert example.tokens.tolist() == [token for part in parts for token in part]
    assert example.counts.tolist() == [i % 2 == 1 for i, part in enumerate(parts) for _ in part]


def test_bad_lines_are_named_by_number_and_reason(read, tmp_path, tokenizer):
    turn = {"role": "user", "content": "x"}
    lines = {
        b'{"text": ': "not JSON",
        b'{"text": "caf\xe9"}': "not UTF-8: byte 0xe9",
        b"[1, 2]": 'an object with "text"',
        b'{"title": "x"}': 'an object with "text"',
        b'{"text": "x", "prompt": "y"}': 'an object with "text"',
        b'{"text": 7}': "'text' must be a string, got int",
        b'{"text": ""}': "'text' is empty",
        b'{"prompt": "x"}': "'completion' must be a string, got NoneType",
        b'{"prompt": "x", "completion": ""}': "'completion' is empty",
        b'{"messages": "x"}': "'messages' must be a list",
        b'{"messages": []}': "the roles must be user, model",
        json.dumps({"messages": [turn]}).encode(): "the roles must be user, model",
        json.dumps({"messages": [turn, {"role": "model"}]}).encode(): "'content' must be a string",
        json.dumps({"messages": [{"role": "system", "content": "x"}, turn]}).encode(): "'system'",
        json.dumps({"messages": [{"role": ["user"], "content": "x"}]}).encode(): "the roles must",
    }
    for line, reason in lines.items():
        with pytest.raises(DataError, match=r"data\.jsonl, line 2: ") as caught:
            read({"text": "x"}, line, {"text": "y"})
        assert reason in str(caught.value)
    with pytest.raises(DataError, match=r"line 1: .*\n(.*\n){4}  and 3 more$"):
        read(*[b"x"] * 8)
    (tmp_path / "empty.jsonl").write_text("\n\n")
    with pytest.raises(DataError, match=r"empty\.jsonl holds no examples"):
        read_examples(tmp_path / "empty.jsonl", tokenizer)


def test_a_path_and_a_tokenizer_as_users_have_them(read, tmp_path, tokenizer):
    expected = read({"text": "In the beginning"})[0].tokens.tolist()
    path = str(tmp_path / "data.jsonl")
    assert read_examples(path, tokenizer.vocab)[0].tokens.tolist() == expected


def test_what_is_too_long():
    examples = [document(4), document(11, 200), document(5, 300), document(12, 400, prompt=6)]
    skipped = cut(examples, 4, TooLong.SKIP)
    assert [e.tokens[0] for e in skipped.examples] == [100, 300]
    assert (skipped.too_long, skipped.empty) == (2, 0)
    truncated = cut(examples, 4, TooLong.TRUNCATE)
    assert [len(e.tokens) for e in truncated.examples] == [4, 5, 5]
    assert (truncated.too_long, truncated.empty) == (2, 1)  # only the last one's prompt was left
    with pytest.raises(DataError, match="no example has anything to predict within 4 tokens"):
        cut(examples[3:], 4, TooLong.TRUNCATE)
    for stride in (0, 5):
        with pytest.raises(ValueError, match="stride from 1 to length"):
            cut(examples, 4, stride=stride)


@given(
    st.lists(st.integers(2, 40), min_size=1, max_size=8),
    st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.integers(1, n))),
)
def test_windows_predict_every_token_once(sizes, lengths):
    length, stride = lengths
    examples = [document(size, 100 * (i + 1)) for i, size in enumerate(sizes)]
    pieces = cut(examples, length, TooLong.SPLIT, stride).examples
    predicted = [token for p in pieces for token in p.tokens[p.counts].tolist()]
    assert predicted == [token for e in examples for token in e.tokens[1:].tolist()]
    for piece in pieces:
        assert piece.places <= length
        assert not piece.counts[0]
        assert (np.diff(piece.tokens) == 1).all()
        # A later window repeats tokens of the one before as context.
        if piece.tokens[0] % 100:
            assert piece.counts.argmax() == length - stride + 1


@given(st.lists(st.integers(1, 9), min_size=1, max_size=60))
def test_packing_keeps_documents_whole(sizes):
    rows = pack(sizes, 9)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(sum(sizes[i] for i in row) <= 9 for row in rows)
    if len(rows) > 1:  # first-fit leaves at most one row half empty
        assert sum(2 * sum(sizes[i] for i in row) <= 9 for row in rows) <= 1


@pytest.mark.parametrize("packed", [True, False])
def test_rows_hold_documents_and_positions(packed):
    examples = [document(size, 100 * (i + 1), 2) for i, size in enumerate((4, 9, 3, 6, 2, 5))]
    examples = cut(examples, 8).examples  # leaves out one of two prompt tokens
    stream = RowStream(examples, 8, PAD, seed=3, packed=packed)
    rows = stream.rows_in_epoch()
    assert rows < len(examples) if packed else rows == len(examples)
    batch = stream.take(rows)
    padding = batch.segment_pos < 0
    assert (np.diff(padding.astype(int), axis=1) <= 0).all()  # on the left alone
    assert (batch.tokens[padding] == PAD).all()
    assert not batch.weights[padding].any()
    held = np.where(padding, -1, batch.tokens // 100)
    np.testing.assert_array_equal(batch.targets[~padding], batch.tokens[~padding] + 1)
    np.testing.assert_array_equal(batch.segment_pos[~padding], batch.tokens[~padding] % 100)
    np.testing.assert_array_equal(batch.weights[~padding], batch.segment_pos[~padding] > 0)
    assert sorted(set(held[~padding].tolist())) == [1, 2, 3, 4, 6]
    assert [part.dtype for part in batch] == [np.int32, np.int32, np.int32, np.float32]


def test_a_stream_goes_on_from_its_position():
    examples = [document(2 + i % 7, 100 * (i + 1)) for i in range(23)]

    def stream(seed: int) -> RowStream:
        return RowStream(examples, 8, PAD, seed=seed)

    whole = stream(5)
    rows = 2 * whole.rows_in_epoch()
    taken = whole.take(rows)
    assert whole.position.epoch >= 1
    for first in (0, 1, rows // 2, rows - 1):
        before = stream(5)
        before.take(first)
        after = stream(5)
        after.position = Position(*json.loads(json.dumps(before.position)))
        rest = after.take(rows - first)
        for one, other in zip(rest, taken, strict=True):
            np.testing.assert_array_equal(one, other[first:])
        assert after.position == whole.position
    assert (stream(6).take(rows).tokens != taken.tokens).any()
    # Each epoch has each document once.
    epoch = stream(5)
    count = epoch.rows_in_epoch()
    starts = epoch.take(count)
    assert (starts.segment_pos == 0).sum() == len(examples)


def test_validation_batches_are_of_one_size():
    examples = [document(size, 100 * (i + 1)) for i, size in enumerate((9, 9, 5, 5, 9))]
    batches = in_order(examples, 8, PAD, 3)
    assert [batch.tokens.shape for batch in batches] == [(3, 8)] * 2
    assert sum(batch.weights.sum() for batch in batches) == 8 * 4
    assert not batches[1].weights[1:].any()
    assert len(in_order(examples, 8, PAD, 3, packed=False)) == 2


def test_a_share_is_held_out():
    examples = [document(3, 100 * i) for i in range(20)]
    train, held_out = hold_out(examples, 0.1, seed=0)
    assert (len(train), len(held_out)) == (18, 2)
    firsts = [int(e.tokens[0]) for e in (*train, *held_out)]
    assert sorted(firsts) == [100 * i for i in range(20)]
    assert [e.tokens[0] for e in hold_out(examples, 0.1, seed=0)[1]] == firsts[18:]
    assert len(hold_out(examples, 0.001, seed=0)[1]) == 1
    with pytest.raises(DataError, match="none are left to train on"):
        hold_out(examples[:1], 0.5, seed=0)
