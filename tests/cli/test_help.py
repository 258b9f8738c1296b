"""`--help` at 80 columns, and the completions of a shell."""

import re

import pytest

from recurrentgemma.cli.app import COMMANDS, NAME, program

# A value, a form of values, or all values.
WORD = re.compile(r"[A-Z]+([=:,]([A-Z]+|\.\.\.))*|[a-z0-9_-]+(\|[a-z0-9_-]+)+")


@pytest.mark.parametrize("name", ["", *COMMANDS])
def test_help(cli, name):
    done = cli(*name.split(), "--help")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "…" not in done.out
    panels = [line for line in lines if line[:1] in tuple("╭│╰")]
    assert {(len(line), line[0] + line[-1]) for line in panels} == {
        (80, s) for s in ("╭╮", "││", "╰╯")
    }
    command = program().commands[name] if name else program()
    words = set(done.out.replace("/--", " --").replace(",", " ").split())
    for parameter in command.params:
        if parameter.param_type_name == "argument":
            assert WORD.fullmatch(parameter.metavar or parameter.name.upper())
        elif not parameter.hidden:
            assert words >= {*parameter.opts, *parameter.secondary_opts}
            assert parameter.help
            assert parameter.help.endswith(".")
            if not parameter.is_flag:
                assert WORD.fullmatch(parameter.metavar), parameter.name
                assert words >= {*parameter.metavar.replace(",", " ").split()}
    assert words >= {"-h", "--help"}


def test_help_says_defaults_and_choices(cli):
    page = " ".join(cli("train", "--help").out.replace("│", " ").split())
    assert "--state-dtype float32|bfloat16|float16 Dtype of the optimiser's state and its " in page
    assert (
        "--pack/--no-pack Several examples in a row, or each in its own. Default: --pack." in page
    )
    assert "Repeatable. Default: attention, recurrent, mlp." in page
    assert "--seed N Seed of the order and of initial values. Default: 0." in page
    assert "│ [PATH]  " in cli("inspect", "-h").out
    assert "│ SOURCE  " in cli("convert", "-h").out


@pytest.mark.parametrize(
    ("typed", "completions"),
    [
        ("s", ["sample", "serve", "score"]),
        ("sample --temp", ["--temperature"]),
        ("sample --framework ", ["jax", "torch"]),
        ("train --on-nonfinite s", ["stop", "skip"]),
    ],
)
def test_shells_complete(cli, monkeypatch, capsys, typed, completions):
    words = f"{NAME} {typed}"
    monkeypatch.setenv("_RECURRENTGEMMA_COMPLETE", "complete_bash")
    monkeypatch.setenv("COMP_WORDS", words)
    monkeypatch.setenv("COMP_CWORD", str(words.count(" ")))
    with pytest.raises(SystemExit) as ended:
        cli()
    assert ended.value.code == 0
    assert capsys.readouterr().out.split() == completions


def test_a_shell_learns_to_complete(cli, monkeypatch, capsys):
    monkeypatch.setenv("_RECURRENTGEMMA_COMPLETE", "source_bash")
    with pytest.raises(SystemExit) as ended:
        cli()
    assert ended.value.code == 0
    assert f"complete -o default -F _{NAME}_completion {NAME}\n" in capsys.readouterr().out
