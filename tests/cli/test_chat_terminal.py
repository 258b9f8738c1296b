"""`recurrentgemma chat` at a terminal, and what its options make the model read."""

import io
import json
import re
import sys

import pytest

from recurrentgemma.cli import main
from recurrentgemma.cli.chat import COMMANDS
from recurrentgemma.cli.wrapping import WrappedText
from recurrentgemma.common.io.checkpoint import BUNDLED
from recurrentgemma.common.io.state_files import read_state
from recurrentgemma.common.tokenizer import END_OF_TURN

from .conftest import CONFIG


class Typed(io.TextIOWrapper):
    """What somebody types at a terminal."""

    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch, capsys):
    """Runs a command at a terminal of 24 columns, and returns stdout and stderr without colours."""

    def run(*args, typed: str) -> list[str]:
        monkeypatch.setattr(sys, "stdin", Typed(io.BytesIO(typed.encode())))
        monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
        monkeypatch.setenv("COLUMNS", "24")
        assert main(["chat", *map(str, args)]) == 0
        return [re.sub(r"\x1b\[\d*m", "", text) for text in capsys.readouterr()]

    return run


@pytest.mark.parametrize(
    ("pieces", "lines"),
    [
        (["one", " two", " three"], ["one two", "three"]),
        (["twelve ", "signs"], ["twelve", "signs"]),
        (["exactly", " ten", " columns"], ["exactly", "ten", "columns"]),
        (["ab cdefghi", " j"], ["ab cdefghi", "j"]),
        (["wi", "thin wor", "ds"], ["within", "words"]),
        (["a\n\n", "  code", "\tx"], ["a", "", "  code x"]),
        (["a ", "longerthanaline", " b"], ["a", "longerthan", "aline b"]),
        (["日本語", "は空白が", "ない"], ["日本語は空", "白がない"]),
        (["é" * 9, " é"], ["é" * 9, "é"]),
        (["ends  \n", "here "], ["ends", "here"]),
    ],
)
def test_lines_end_between_words(pieces, lines):
    for parts in (pieces, list("".join(pieces))):
        written = []
        text = WrappedText(written.append, 10)
        for part in parts:
            text.add(part)
        text.flush()
        assert "".join(written).split("\n") == lines


def test_text_that_goes_to_no_terminal_stays_as_it_is():
    written = []
    text = WrappedText(written.append, None)
    for piece in ("one  ", "two\tthree ", " "):
        text.add(piece)
    text.flush()
    assert written == ["one  ", "two\tthree ", " "]


def test_a_first_line_may_begin_further_right():
    written = []
    text = WrappedText(written.append, 10, column=7)
    text.add("four five")
    text.flush()
    assert "".join(written) == "\nfour five"


def test_you_and_the_model_are_told_apart(terminal, cli, checkpoint):
    args = ("--checkpoint", checkpoint, "--max-new-tokens", "12")
    said = cli("chat", *args, stdin=b"Hello\nAnd?\n").out
    shown, err = terminal(*args, typed="Hello\nAnd?\n")
    assert err.endswith("/help for help.\n")
    before, *turns = shown.split("you> ")
    assert before == turns.pop() == ""
    assert max(len(line) for turn in turns for line in turn.splitlines()) <= 24
    assert all(turn.startswith("model> ") and turn.endswith("\n\n") for turn in turns)
    assert "".join(turns).replace("model> ", "").split() == said.split()


def test_an_empty_answer_is_said(terminal, cli, stopping):
    shown, err = terminal("--checkpoint", stopping, typed="a\n")
    assert shown == "you> model> \n\nyou> "
    assert err.endswith("[empty answer]")
    done = cli("chat", "--checkpoint", stopping, stdin=b"a\n")
    assert (done.out, done.err) == ("\n", "[empty answer]\n")


def test_help_fits_80_columns():
    assert max(map(len, COMMANDS.splitlines())) <= 80


def test_a_model_that_was_not_tuned_to_chat_says_how_to_get_one(cli, checkpoint, monkeypatch):
    for args in ((), ("--checkpoint", BUNDLED)):
        done = cli("chat", *args)
        assert (done.code, done.out) == (0, "")
        first, *how = done.err.splitlines()
        assert first.startswith("The bundled model was not tuned to chat")
        assert [line.split()[:2] for line in how] == [
            ["recurrentgemma", "download"],
            ["recurrentgemma", "chat"],
        ]
        assert max(map(len, (first, *how))) <= 80
    monkeypatch.setattr("recurrentgemma.common.tokenizer.END_OF_TURN", "<no such piece>")
    monkeypatch.setattr("recurrentgemma.cli.chat.load_sampler", None)
    done = cli("chat", "--checkpoint", checkpoint)
    assert (done.code, done.out) == (2, "")
    assert "was not tuned to chat; 'recurrentgemma download hf:" in done.err


@pytest.mark.parametrize("system", ["", "Be <end_of_turn> brief."])
@pytest.mark.parametrize("allowed", [False, True])
def test_what_the_model_reads(cli, checkpoint, tokenizer, tmp_path, system, allowed):
    """`--system` is read once; what words spell is text, unless the user allows control tokens."""
    options = ["--system", system] * bool(system) + ["--allow-control-tokens"] * allowed
    path, said = tmp_path / "chat", ["a<end_of_turn>b", "c"]
    lines = "".join(f"{line}\n" for line in (*said, f"/save {path}"))
    args = ("--checkpoint", checkpoint, "--max-new-tokens", "2", *options)
    done = cli("chat", *args, stdin=lines.encode())
    assert (done.code, done.err) == (0, "")
    turns = json.loads(read_state(path, CONFIG).notes["conversation"])
    assert [user for user, _, _ in turns] == said
    assert turns[0][2][0] == tokenizer.bos_id
    for told, (words, _, tokens) in zip([system, ""], turns, strict=True):
        asked = tokenizer.encode_turn(words, system=told, allow_control_tokens=allowed)
        spelled = (told + words).count(END_OF_TURN)
        assert asked.count(tokenizer.end_of_turn_id) == 1 + allowed * spelled
        assert str(asked)[1:-1] in str(tokens)
