"""The program around its commands: help, mistakes, imports, and how it ends."""

import shutil
import signal
import subprocess
import sys

import pytest

import recurrentgemma
from recurrentgemma.cli import main
from recurrentgemma.cli.mistakes import mistake
from recurrentgemma.common.io.checkpoint import CONFIG
from recurrentgemma.common.io.shards import WEIGHTS
from recurrentgemma.common.vocabulary import SENTENCEPIECE

ABSENT = {"jax": ("jax", "jaxlib", "flax", "orbax"), "torch": ("torch",)}


def test_version_and_help(cli):
    assert cli("--version") == (0, f"recurrentgemma {recurrentgemma.__version__}\n", "")
    for args, words in (
        ([], ("sample", "inspect", "--version")),
        (["--help"], ("sample", "inspect", "--version")),
        (["sample", "--help"], ("--framework", "--top-p", "--json", "PROMPT", "bundled")),
        (["inspect", "-h"], ("--preset", "--all", "RECURRENT_GEMMA_2B_V1")),
    ):
        done = cli(*args)
        assert (done.code, done.err) == (0, "")
        assert all(word in done.out for word in words)
        assert max(map(len, done.out.splitlines())) <= 80


def assert_one_line(done, *words: str) -> None:
    assert (done.code, done.out) == (2, "")
    assert done.err.startswith("recurrentgemma: error: ")
    assert done.err.count("\n") == 1
    assert done.err.endswith("\n")
    for word in words:
        assert word in done.err


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("smaple", ["smaple", "recurrentgemma --help"]),
        ("sample a --foo", ["--foo", "recurrentgemma sample --help"]),
        ("sample a b", ["b"]),
        ("sample a --framework tensorflow", ["--framework", "tensorflow", "jax", "torch"]),
        ("sample a --dtype float8", ["--dtype", "float8", "bfloat16"]),
        ("sample a --max-new-tokens -1", ["--max-new-tokens", "recurrentgemma sample --help"]),
        ("sample a --max-new-tokens many", ["--max-new-tokens", "integer"]),
        ("sample a --temperature -1", ["--temperature must be above 0 and finite, got -1.0"]),
        ("sample a --temperature nan", ["--temperature must be", "nan"]),
        ("sample a --top-k 0", ["--top-k must be a positive integer, got 0"]),
        ("sample a --top-p 1.5", ["--top-p must be in (0, 1], got 1.5"]),
        ("sample a --top-p 0 --temperature 0", ["--top-p must be in (0, 1], got 0"]),
        ("sample a --seed -1", ["--seed", "-1"]),
        ("sample a --seed 4294967296", ["--seed", "4294967296"]),
        ("sample a --checkpoint /nowhere", ["no checkpoint folder at /nowhere"]),
        ("inspect /nowhere", ["no checkpoint folder at /nowhere"]),
        ("inspect --preset GEMMA", ["GEMMA", "HAWK_PAPER_7B"]),
    ],
)
def test_mistakes(cli, args, words):
    assert_one_line(cli(*args.split()), *words)


def test_prompts_that_are_no_text(cli, checkpoint):
    args = ("sample", "--checkpoint", checkpoint)
    assert_one_line(cli(*args, stdin=b"caf\xe9"), "UTF-8", "0xe9 at 3")
    assert_one_line(cli(*args, "caf\udce9"), "the prompt must be UTF-8")


def test_no_stdin(checkpoint, monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", None)
    assert main(["sample", "--checkpoint", str(checkpoint)]) == 2
    assert "there is no prompt" in capsys.readouterr().err


def test_chat_with_a_tokenizer_without_turns(cli, checkpoint, monkeypatch):
    monkeypatch.setattr("recurrentgemma.common.tokenizer.END_OF_TURN", "<no such piece>")
    assert_one_line(cli("sample", "a", "--chat", "--checkpoint", checkpoint), "<end_of_turn>")


def test_missing_extras(cli, monkeypatch):
    for missing in ("torch", "jax"):
        monkeypatch.setitem(sys.modules, missing, None)
        done = cli("sample", "a", "--framework", missing)
        assert_one_line(done, f"pip install 'recurrentgemma[{missing}]'")
    both = "pip install 'recurrentgemma[torch]' or pip install 'recurrentgemma[jax]'"
    assert_one_line(cli("sample", "a"), both)


def test_broken_checkpoints(cli, checkpoint, tmp_path):
    def broken(name: str):
        return shutil.copytree(checkpoint, tmp_path / name)

    (tmp_path / "empty").mkdir()
    done = cli("inspect", tmp_path / "empty")
    assert_one_line(done, CONFIG, WEIGHTS)
    (broken("config") / CONFIG).write_text("{")
    assert_one_line(cli("inspect", tmp_path / "config"), CONFIG)
    weights = broken("weights") / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:-9])
    assert_one_line(cli("sample", "a", "--checkpoint", tmp_path / "weights"), WEIGHTS)
    (broken("tokenizer") / SENTENCEPIECE).write_bytes(b"no model")
    assert_one_line(cli("sample", "a", "--checkpoint", tmp_path / "tokenizer"), SENTENCEPIECE)
    # A long list of differences stays a list, under a line that says what it is.
    config = broken("other") / CONFIG
    config.write_text(config.read_text().replace('"width": 32', '"width": 64'))
    done = cli("inspect", tmp_path / "other")
    assert (done.code, done.out) == (2, "")
    first, *rest = done.err.splitlines()
    assert first.startswith("recurrentgemma: error: ")
    assert f"({len(rest)} differences):" in first
    # A short one is joined.
    config.write_text((checkpoint / CONFIG).read_text().replace("2048", "2047"))
    assert_one_line(cli("inspect", tmp_path / "other"), "(1 difference): embedder")


def test_only_mistakes_are_told_in_a_line(cli, monkeypatch):
    def raising(error: BaseException):
        def detect(*_):
            raise error

        monkeypatch.setattr("recurrentgemma_conversion.opening.detect", detect)
        return cli("inspect")

    assert_one_line(raising(PermissionError(13, "Permission denied", "x/y")), "x/y: Permission")
    assert raising(KeyboardInterrupt()) == (130, "", "")
    for defect in (RuntimeError("one"), ValueError("not raised in the package"), OSError("no")):
        with pytest.raises(type(defect)) as caught:
            raising(defect)
        assert caught.value is defect
        assert mistake(defect) is None
    # Nor is what a library raises right below the package's own code.
    monkeypatch.setattr("recurrentgemma_conversion.opening.detect", lambda *_: [].remove(0))
    with pytest.raises(ValueError, match="not in list"):
        cli("inspect")


def start(absent: tuple[str, ...], *commands: list[str]) -> subprocess.Popen:
    """Runs commands in an interpreter in which importing any of `absent` fails."""
    code = (
        f"import sys\nfor name in {absent!r}: sys.modules[name] = None\n"
        f"from recurrentgemma.cli import main\nsys.exit(max(map(main, {commands!r})))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def test_inspect_and_help_need_no_framework(checkpoint):
    commands = [["--help"], ["sample", "--help"], ["--version"], ["inspect", str(checkpoint)]]
    process = start(ABSENT["jax"] + ABSENT["torch"], *commands)
    out, err = process.communicate()
    assert (process.returncode, err) == (0, b"")
    assert b"final_norm.scale" in out


def start_sampling(framework: str, checkpoint) -> subprocess.Popen:
    """Samples for ever without the other framework; returns once there is text."""
    (other,) = ABSENT.keys() - {framework}
    command = ["sample", "It was", "--checkpoint", str(checkpoint), "--max-new-tokens", "1000000"]
    process = start(ABSENT[other], [*command, "--framework", framework])
    assert process.stdout is not None
    assert process.stdout.read(30).startswith(b"It was"), process.communicate()[1].decode()
    return process


def test_torch_alone_and_ctrl_c(checkpoint):
    pytest.importorskip("torch.nn")
    process = start_sampling("torch", checkpoint)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=300)
    assert (process.returncode, err) == (130, b"")


def test_jax_alone_and_a_closed_pipe(checkpoint):
    pytest.importorskip("flax.linen")
    process = start_sampling("jax", checkpoint)
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.wait(timeout=300) == 141
    assert process.stderr.read() == b""
    process.stderr.close()


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX shells")
@pytest.mark.parametrize(
    ("redirected", "code", "words"),
    [
        (">&-", 0, ""),
        ("2>&-", 0, ""),
        (">/dev/full", 2, "recurrentgemma: error: cannot write the output: No space left"),
    ],
)
def test_output_that_goes_nowhere(redirected: str, code: int, words: str) -> None:
    command = f"{sys.executable} -m recurrentgemma inspect {redirected}"
    done = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    assert done.stderr.startswith(words)
    assert done.stderr.count("\n") == bool(words)
