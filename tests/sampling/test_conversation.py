"""Conversations: the template exactly, only what is new is read, undo, files, an answer cut off."""

import copy
import json
import pickle
from collections.abc import Generator
from pathlib import Path

import numpy as np
import pytest
from samplers import make_sampler, saying

from recurrentgemma.common.generation.conversation import Conversation
from recurrentgemma.common.generation.prefill import scored
from recurrentgemma.common.model.gemma import GemmaConfig
from recurrentgemma.common.model.state import StateError
from recurrentgemma.common.tokenizer import apply_it_formatter
from recurrentgemma_conversion.readers.huggingface_tokenizer import write_tokenizer_files

STEPS = 8


@pytest.fixture
def sampler(twin: str):
    return make_sampler(twin, is_it_model=True)


def all_tokens(conversation: Conversation) -> list[int]:
    return [token for turn in conversation.turns for token in turn.tokens]


def spoken(sampler, text: str) -> list[int]:
    return [sampler.tokenizer.vocab.piece_to_id(piece) for piece in
            sampler.tokenizer.vocab.encode(text, out_type=str)]  # fmt: skip


def answering(sampler, answers: list[list[int]]) -> None:
    """Makes the sampler say these tokens, one list an answer."""
    saying(sampler, [token for answer in answers for token in answer])


def test_the_template_is_the_published_one(sampler) -> None:
    end = sampler.tokenizer.end_of_turn_id
    answering(sampler, [[*spoken(sampler, "I am."), end], [*spoken(sampler, "No"), end]])
    conversation = Conversation(sampler)
    assert conversation.ask("Who are you?", 50) == "I am."
    assert conversation.ask("Sure?\nReally?", 50) == "No"
    text = (
        "<start_of_turn>user\nWho are you?<end_of_turn>\n<start_of_turn>model\nI am.<end_of_turn>\n"
        "<start_of_turn>user\nSure?\nReally?<end_of_turn>\n<start_of_turn>model\nNo<end_of_turn>"
    )
    assert all_tokens(conversation) == sampler.tokenizer.encode(text)
    assert conversation.state is not None
    assert conversation.state.num_tokens == (len(sampler.tokenizer.encode(text)),)


def test_a_gemma_talks_in_the_same_template(twin: str) -> None:
    """Its state grows with the text; one token begins it, however many turns there are."""
    config = GemmaConfig.from_sizes(3, 2048, 32, 48, 2, 4, 2, 8, sliding_window=6)
    sampler = make_sampler(twin, config=config, is_it_model=True)
    end = sampler.tokenizer.end_of_turn_id
    answering(sampler, [[*spoken(sampler, "I am."), end], [*spoken(sampler, "No"), end]])
    conversation = Conversation(sampler)
    assert [conversation.ask(text, 50) for text in ("Who are you?", "Sure?")] == ["I am.", "No"]
    text = (
        "<start_of_turn>user\nWho are you?<end_of_turn>\n<start_of_turn>model\nI am.<end_of_turn>\n"
        "<start_of_turn>user\nSure?<end_of_turn>\n<start_of_turn>model\nNo<end_of_turn>"
    )
    assert all_tokens(conversation) == sampler.tokenizer.encode(text)
    assert all_tokens(conversation).count(sampler.tokenizer.bos_id) == 1


def test_transformers_reads_the_same_tokens(sampler, tmp_path: Path) -> None:
    """By the template that is written for it, at each turn."""
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("jinja2")
    write_tokenizer_files(tmp_path, sampler.tokenizer)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    end = sampler.tokenizer.end_of_turn_id
    answers = [[*spoken(sampler, text), end] for text in ("I am.", "No")]
    answering(sampler, answers)
    conversation = Conversation(sampler)
    messages: list[dict[str, str]] = []
    for question, answer in zip(("Who are you?", "Sure?\nReally?"), answers, strict=True):
        messages.append({"role": "user", "content": question})
        said = conversation.ask(question, 50)
        ids = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert [*ids, *answer] == all_tokens(conversation)
        messages.append({"role": "assistant", "content": said})
    prompt = sampler._encode(["Who are you?"])[0]
    said = theirs.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert said == prompt


def test_an_answer_cut_short_is_closed_by_the_next_turn(sampler) -> None:
    answering(sampler, [spoken(sampler, "I am"), spoken(sampler, "No.")])
    conversation = Conversation(sampler)
    conversation.ask("Who?", len(spoken(sampler, "I am")))
    conversation.ask("What?", len(spoken(sampler, "No.")))
    text = (
        "<start_of_turn>user\nWho?<end_of_turn>\n<start_of_turn>model\nI am<end_of_turn>\n"
        "<start_of_turn>user\nWhat?<end_of_turn>\n<start_of_turn>model\nNo."
    )
    assert all_tokens(conversation) == sampler.tokenizer.encode(text)


def test_each_turn_reads_only_what_is_new(sampler) -> None:
    """And says what a model that reads everything again would say."""
    read = []
    prefill = sampler.engine.prefill
    sampler.engine.prefill = lambda cache, tokens, pos: (
        read.append(int((pos >= 0).sum())) or prefill(cache, tokens, pos)
    )
    conversation = Conversation(sampler)
    conversation.ask("In the beginning. " * 20, STEPS)
    first = sum(read)
    read.clear()
    conversation.ask("And?", STEPS)
    # The last token said, the turn's template and its words, but the last.
    assert sum(read) == len(conversation.turns[1].tokens) - STEPS < first / 3
    tokens = all_tokens(conversation)
    expected = np.concatenate([scores for scores, _ in scored(sampler.engine, tokens, True)])
    np.testing.assert_array_equal(expected[-STEPS:].argmax(-1), tokens[-STEPS:])


def test_undo_and_reset(sampler) -> None:
    conversation = Conversation(sampler)
    assert conversation.undo() is None
    conversation.ask("One", STEPS)
    kept = all_tokens(conversation)
    answer = conversation.ask("Two", STEPS)
    turn = conversation.undo()
    assert turn is not None
    assert (turn.user, turn.model) == ("Two", answer)
    assert all_tokens(conversation) == kept
    assert conversation.ask("Two", STEPS) == answer
    conversation.reset()
    assert (conversation.turns, conversation.state) == ([], None)
    conversation.ask("One", STEPS)
    assert all_tokens(conversation) == kept


def test_forks(sampler) -> None:
    conversation = Conversation(sampler)
    conversation.ask("One", STEPS)
    for fork in (copy.copy(conversation), copy.deepcopy(conversation)):
        assert fork.sampler is sampler
        fork.ask("Two", STEPS)
        assert (said(fork), said(conversation)) == (["One", "Two"], ["One"])
        fork.undo()
        fork.undo()
        assert (said(fork), said(conversation)) == ([], ["One"])


def test_a_long_conversation_holds_few_states(sampler) -> None:
    """What was said before them is read again, once it is gone back to."""
    conversation = Conversation(sampler)
    answers = [conversation.ask(f"Number {i}", 3) for i in range(12)]
    assert sum(state is not None for state in conversation._earlier) <= 8
    for place in range(11, -1, -1):
        turn = conversation.undo()
        assert turn is not None
        assert turn.model == answers[place]
        assert said(conversation) == [f"Number {i}" for i in range(place)]
        if place in (10, 2, 0):
            assert conversation.ask(f"Number {place}", 3) == answers[place]
            conversation.undo()


def test_files(twin: str, sampler, tmp_path) -> None:
    conversation = Conversation(sampler)
    with pytest.raises(ValueError, match="there is nothing to save"):
        conversation.save(tmp_path / "chat")
    conversation.ask("“Öne”", STEPS)
    conversation.ask("Two", STEPS)
    conversation.save(tmp_path / "chat")
    again = Conversation(make_sampler(twin, is_it_model=True))
    again.load(tmp_path / "chat")
    assert again.turns == conversation.turns
    assert again.ask("Three", STEPS) == conversation.ask("Three", STEPS)
    # What came before a loaded turn is read again.
    for _ in range(2):
        again.undo()
        conversation.undo()
    assert again.ask("Other", STEPS) == conversation.ask("Other", STEPS)
    assert again.turns == conversation.turns
    sampler.save_state(tmp_path / "state", sampler.prefill("x"))
    with pytest.raises(StateError, match="is a state, but holds no conversation"):
        again.load(tmp_path / "state")
    assert again.turns == conversation.turns


def test_ctrl_c_stops_the_answer_alone(sampler) -> None:
    conversation = Conversation(sampler)
    whole = conversation.ask("One", 12)
    conversation.reset()
    feed, calls = sampler.engine.feed, []

    def interrupted(*args):
        result = feed(*args)
        calls.append(None)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return result

    sampler.engine.feed = interrupted
    with pytest.raises(KeyboardInterrupt):
        conversation.ask("One", 12)
    assert len(conversation.turns) == 1
    assert whole.startswith(conversation.turns[0].model)
    assert conversation.turns[0].tokens[-5:] != ()
    conversation.ask("Two", 12)
    assert len(conversation.turns) == 2
    opening = sampler.tokenizer.encode(apply_it_formatter("One"))
    assert all_tokens(conversation)[: len(opening)] == opening


def test_a_loop_left_early_keeps_what_was_said(sampler) -> None:
    conversation = Conversation(sampler)
    answer = conversation.send("One", 12)
    first = next(answer)
    answer.close()
    assert [turn.model for turn in conversation.turns] == [first]


def said(conversation: Conversation) -> list[str]:
    """What the user said, once turns and state are seen to agree."""
    tokens = all_tokens(conversation)
    if not tokens:
        assert conversation.state is None
    else:
        assert conversation.state is not None
        assert conversation.state.num_tokens == (len(tokens),)
        assert conversation.state.seen[0].sum() == len(set(tokens))
    return [turn.user for turn in conversation.turns]


def test_what_is_done_next_ends_a_running_answer(sampler, tmp_path) -> None:
    """And keeps what was said; the old answer can do nothing any more."""
    earlier = Conversation(sampler)
    earlier.ask("zero", 4)
    earlier.save(tmp_path / "zero")

    def interrupted() -> tuple[Conversation, Generator[str], str]:
        conversation = Conversation(sampler)
        answer = conversation.send("one", 12)
        return conversation, answer, next(answer)

    conversation, answer, first = interrupted()
    conversation.ask("two", 6)
    assert list(answer) == []
    assert said(conversation) == ["one", "two"]
    assert conversation.turns[0].model == first
    conversation, answer, first = interrupted()
    turn = conversation.undo()
    assert turn is not None
    assert (turn.model, list(answer), said(conversation)) == (first, [], [])
    conversation, answer, first = interrupted()
    conversation.reset()
    assert (list(answer), said(conversation)) == ([], [])
    conversation, answer, first = interrupted()
    conversation.load(tmp_path / "zero")
    assert (list(answer), said(conversation)) == ([], ["zero"])
    conversation, answer, first = interrupted()
    conversation.save(tmp_path / "one")
    assert (list(answer), said(conversation)) == ([], ["one"])
    again = Conversation(sampler)
    again.load(tmp_path / "one")
    assert again.turns == conversation.turns
    assert again.ask("two", 6) == conversation.ask("two", 6)


def test_an_answer_that_was_not_begun_says_nothing(sampler) -> None:
    conversation = Conversation(sampler)
    answer = conversation.send("one", 12)
    conversation.ask("two", 6)
    assert (list(answer), said(conversation)) == ([], ["two"])
    for _ in conversation.send("three", 12):
        break
    assert said(conversation) == ["two", "three"]  # at once: nobody can iterate any more


def test_what_is_said_must_be_text(sampler) -> None:
    conversation = Conversation(sampler)
    for text, message in (
        (None, "a message must be a str or token ids, got NoneType: None"),
        (b"x", "a message must be a str or token ids, got bytes: b'x'"),
        ("a\ud800", r"text must be Unicode text, got an unpaired surrogate, '\\ud800', at 1"),
    ):
        with pytest.raises(ValueError, match=message):
            conversation.ask(text, 2)  # pyright: ignore[reportArgumentType]
    for ids in (5, None):
        with pytest.raises(ValueError, match="stop_ids must be a sequence of token ids, got"):
            conversation.ask("x", 2, stop_ids=ids)
    assert said(conversation) == []


@pytest.mark.parametrize(
    "turns",
    [
        "5",
        "[]",
        "{}",
        "[" * 100_000,
        "[[1, 2, [3]]]",
        '[["a", "b"]]',
        '[["a", "b", [2, 99999]]]',
        '[["a", "b", [2, "3"]]]',
        '[["a", "b", [2.5]]]',
        '[["a", "b", []]]',
        '[["a", "b", [2]]]',
    ],
)
def test_damaged_conversations(sampler, tmp_path, turns: str) -> None:
    conversation = Conversation(sampler)
    sampler.save_state(tmp_path / "chat", sampler.prefill("x"), notes={"conversation": turns})
    with pytest.raises(StateError, match="chat is no whole conversation: "):
        conversation.load(tmp_path / "chat")
    assert said(conversation) == []


def test_turns_of_another_conversation_are_refused(sampler, tmp_path) -> None:
    conversation = Conversation(sampler)
    conversation.ask("x", 2)
    assert conversation.state is not None
    for tokens in ([*all_tokens(conversation)[:-1], 99999], all_tokens(conversation)[:-1]):
        notes = {"conversation": json.dumps([["x", "y", tokens]])}
        sampler.save_state(tmp_path / "chat", conversation.state, notes=notes, force=True)
        with pytest.raises(StateError, match="its turns are not what its state has read"):
            conversation.load(tmp_path / "chat")
    assert said(conversation) == ["x"]


def test_bad_options_say_nothing(twin: str, sampler) -> None:
    conversation = Conversation(sampler)
    with pytest.raises(ValueError, match="stop_strings must be"):
        conversation.send("x", 5, stop_strings=[""])
    assert (conversation.turns, conversation.state) == ([], None)
    sampler.tokenizer.end_of_turn_id = None
    for use in (
        lambda: Conversation(sampler),
        lambda: sampler(["x"], 1),
        lambda: make_sampler(twin, vocab=sampler.tokenizer, is_it_model=True),
    ):
        with pytest.raises(ValueError, match="no <end_of_turn>: the model was not tuned to chat"):
            use()


def test_display(sampler) -> None:
    from rich.console import Console

    conversation = Conversation(sampler)
    answer = conversation.ask("<b>[bold]1 & 2", STEPS)
    page = conversation._repr_html_()
    assert "&lt;b&gt;[bold]1 &amp; 2" in page
    assert "<b>[bold]" not in page
    assert page.startswith("<div class='tex2jax_ignore mathjax_ignore'>")
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(conversation)
    console.file.close()
    text = console.export_text()
    assert "<b>[bold]1 & 2" in text
    assert answer.split("\n")[0].strip()[:20] in text


@pytest.mark.parametrize("again", [copy.deepcopy, lambda c: pickle.loads(pickle.dumps(c))])
def test_survives_at_any_moment(sampler, again) -> None:
    """Before the first word, after an answer, within one, and after undoing."""
    conversation = Conversation(sampler)

    def check(answered: Conversation) -> None:
        copied = again(answered)
        assert copied.turns == answered.turns
        assert copied.ask("And then?", 4) == copy.copy(answered).ask("And then?", 4)

    check(conversation)
    conversation.ask("One", 4)
    check(conversation)
    within = conversation.send("Two", 8)
    next(within)
    check(conversation)
    conversation.undo()
    check(conversation)
