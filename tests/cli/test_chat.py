"""`recurrentgemma chat`, `score` and `bench`, and the states of `sample`."""

import json
import math
import os

import pytest


@pytest.fixture
def chat(cli, checkpoint):
    def run(*lines: str, args=()):
        text = "".join(line + "\n" for line in lines)
        return cli("chat", "--checkpoint", checkpoint, "--max-new-tokens", "6", *args,
                   stdin=text.encode())  # fmt: skip

    return run


def test_a_conversation(chat, framework, tmp_path, cli, checkpoint):
    args = ("--framework", framework)
    path = tmp_path / "chat"
    done = chat("Hello", "And?", f"/save {path}", "/quit", "never read", args=args)
    assert (done.code, done.err) == (0, "")
    # The first answer is what `sample --chat` says.
    alone = cli("sample", "Hello", "--chat", "--no-echo", "--checkpoint", checkpoint,
                "--max-new-tokens", "6", *args)  # fmt: skip
    assert done.out.startswith(alone.out)
    assert done.out.endswith(f"saved to {path}\n")
    # Undone and said again it is the same; loaded, it goes on.
    again = chat("Hello", "Other", "/undo", "And?", args=args)
    assert "undone: Other\n" in again.out
    second = done.out.removeprefix(alone.out).removesuffix(f"saved to {path}\n")
    assert again.out.endswith(second)
    on = chat("More", args=(*args, "--load", str(path)))
    assert chat(f"/load {path}", "More", args=args).out == "2 turns\n" + on.out
    reset = chat("Other", "/reset", "Hello", args=args)
    assert reset.out.endswith("begun anew\n" + alone.out)


def test_mistakes_do_not_end_a_chat(chat, tmp_path):
    (tmp_path / "there").write_text("x")
    done = chat("/undo", "/save", "/load /nowhere", f"/load {tmp_path}/there", "/fly", "/help", "")
    assert (done.code, done.err) == (0, "")
    lines = done.out.splitlines()
    assert lines[0] == "nothing to undo"
    assert lines[1] == "/save needs a file"
    assert lines[2] == "/nowhere: No such file or directory"
    assert "there is no complete state file" in lines[3]
    assert lines[4] == "there is no /fly; /help lists what there is"
    assert "/reset" in done.out
    done = chat("Hello", f"/save {tmp_path}/there")
    assert "exists" in done.out
    assert (tmp_path / "there").read_text() == "x"


def test_ctrl_c_stops_an_answer_and_not_the_chat(chat, monkeypatch):
    from recurrentgemma.common.generation.loop import TokenStream

    following = TokenStream.__next__
    calls = []

    def interrupted(stream):
        calls.append(None)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return following(stream)

    monkeypatch.setattr(TokenStream, "__next__", interrupted)
    done = chat("Hello", "And?", "/undo", "/undo", "/undo")
    assert done.code == 0
    assert done.out.count("[stopped]\n") == 1
    assert done.out.endswith("undone: And?\nundone: Hello\nnothing to undo\n")


def test_ctrl_c_before_an_answer_begins(chat, monkeypatch):
    from recurrentgemma.common.tokenizer import Tokenizer

    encode = Tokenizer.encode_turn
    calls = []

    def interrupted(*arguments, **options):
        calls.append(arguments)
        if len(calls) == 1:
            raise KeyboardInterrupt
        return encode(*arguments, **options)

    monkeypatch.setattr(Tokenizer, "encode_turn", interrupted)
    done = chat("Hello", "And?", "/undo", "/undo")
    assert (done.code, done.err) == (0, "")
    assert done.out.startswith(" [stopped]\n")
    assert done.out.endswith("undone: And?\nnothing to undo\n")


def test_ctrl_c_stops_a_command_and_not_the_chat(chat, tmp_path, monkeypatch):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("recurrentgemma.common.generation.sampler.write_state", interrupted)
        patch.setattr("recurrentgemma.common.generation.sampler.read_state", interrupted)
        done = chat("Hello", f"/save {tmp_path}/chat", f"/load {tmp_path}/chat", "/undo", "/undo")
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith(" [/save stopped]\n [/load stopped]\nundone: Hello\nnothing to undo\n")
    assert not list(tmp_path.iterdir())


def test_commands_and_what_follows_them(chat, tmp_path):
    done = chat("Hello", f"/save\t{tmp_path}/chat", "/quit now", "never read")
    assert (done.code, done.err) == (0, "")
    assert done.out.endswith(f"saved to {tmp_path}/chat\n")


@pytest.mark.parametrize("command", ["sample", "chat"])
@pytest.mark.parametrize(("stop", "words"), [("", "not empty, got ''"), ("\udcff", "Unicode text")])
def test_stop_strings_are_checked_before_anything_is_loaded(
    cli, checkpoint, monkeypatch, command, stop, words
):
    monkeypatch.setattr(f"recurrentgemma.cli.{command}.load_sampler", None)
    prompt = ["x"] if command == "sample" else []
    done = cli(command, *prompt, "--checkpoint", checkpoint, "--stop", stop)
    assert (done.code, done.out) == (2, "")
    assert words in done.err


def test_lines_that_are_no_text(cli, chat, checkpoint):
    args = ("chat", "--checkpoint", checkpoint, "--max-new-tokens", "6")
    done = cli(*args, stdin=b"caf\xe9\nHello\n/load caf\xe9\n")
    assert (done.code, done.err) == (0, "")
    message, rest = done.out.split("\n", 1)
    assert message == "what you say must be UTF-8 text; nothing was said"
    assert rest == chat("Hello").out + "caf?: No such file or directory\n"


def test_saving(chat, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    done = chat("Hello", "/save  two  spaces", "/save two  spaces", "/save ~/h", "/save! ~/h",
                "/save!", "/undo", "/save! ~/h", "/load two  spaces", "/help")  # fmt: skip
    assert (done.code, done.err) == (0, "")
    told = done.out.removeprefix(chat("Hello").out)
    assert told.splitlines()[:8] == [
        "saved to two  spaces",
        "two  spaces exists; /save! two  spaces replaces it",
        "saved to ~/h",
        "saved to ~/h",
        "/save! needs a file",
        "undone: Hello",
        "there is nothing to save: nothing was said yet",
        "1 turns",
    ]
    assert "/save! FILE" in told
    assert {path.name for path in tmp_path.iterdir()} == {"two  spaces", "h"}


def test_seeds_of_a_chat(chat):
    first = chat("Hello", args=("--temperature", "1.5"))
    about, _, seed = first.err.partition(", seed ")
    assert about.endswith("float32 on cpu")
    again = chat("Hello", args=("--temperature", "1.5", "--seed", seed.strip()))
    assert again == first


def test_states(cli, checkpoint, framework, tmp_path):
    def sample(*args: str):
        return cli("sample", "--checkpoint", checkpoint, "--framework", framework, *args)

    path = str(tmp_path / "state")
    whole = sample("It was", "--json", "--max-new-tokens", "9").json["tokens"]
    first = sample("It was", "--json", "--max-new-tokens", "4", "--save-state", path).json
    rest = sample("--json", "--max-new-tokens", "5", "--load-state", path).json
    assert first["tokens"] + rest["tokens"] == whole
    added = sample("more", "--json", "--max-new-tokens", "5", "--load-state", path).json
    assert added["prompt"] == "more"
    done = sample("x", "--save-state", path)
    assert (done.code, done.out) == (2, "")
    assert "exists; --force replaces it" in done.err
    assert sample("x", "--save-state", path, "--force").code == 0


def test_a_state_goes_on_in_several_ways(cli, checkpoint, framework, tmp_path):
    """The text before is read once."""

    def sample(*args: str):
        return cli("sample", "--checkpoint", checkpoint, "--framework", framework, "--json",
                   "--max-new-tokens", "5", "--temperature", "2", "--seed", "1", *args)  # fmt: skip

    path = str(tmp_path / "state")
    sample("It was", "--max-new-tokens", "0", "--save-state", path)
    done = sample("It was", "-n", "2", "--temperature", "0")
    assert done.err == "all samples are the likeliest text: --temperature draws others\n"
    whole = sample("It was", "-n", "3").json["samples"]
    assert sample("-n", "3", "--load-state", path).json["samples"] == whole
    assert len({one["text"] for one in whole}) > 1
    done = sample("x", "-n", "2", "--save-state", str(tmp_path / "other"))
    assert "one text's state is saved: --num-samples must be 1" in done.err


def test_where_a_state_goes(cli, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))

    def sample(*args: str):
        return cli("sample", "--checkpoint", checkpoint, "--json", "--max-new-tokens", "2", *args)

    assert sample("x", "--save-state", "~/state").code == 0
    done = sample("x", "--save-state", "~/state")
    assert f"{tmp_path}/state exists; --force replaces it" in done.err
    assert sample("--load-state", "~/state").code == 0
    # What can be known is said before anything is generated.
    monkeypatch.setattr("recurrentgemma.cli.sample.load_sampler", None)
    for path, reason in (
        (tmp_path / "no" / "state", "No such file or directory"),
        (tmp_path / "state" / "x", "Not a directory"),
        (tmp_path, "Is a directory"),
    ):
        done = sample("x", "--force", "--save-state", str(path))
        assert (done.code, done.out) == (2, "")
        assert done.err == f"recurrentgemma: error: cannot write {path}: {reason}\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_no_state_replaces_a_pipe(cli, checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr("recurrentgemma.cli.sample.load_sampler", None)
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    done = cli("sample", "x", "--checkpoint", checkpoint, "--force", "--save-state", pipe)
    assert (done.code, done.out) == (2, "")
    assert "is a device, a pipe or a socket: nothing may replace it" in done.err


def test_what_was_generated_is_printed_before_it_is_saved(cli, checkpoint, tmp_path, monkeypatch):
    from recurrentgemma.common.errors import DestinationError

    def full(path, *args, **options):
        raise DestinationError(f"the disk of {path} became full")

    monkeypatch.setattr("recurrentgemma.common.generation.sampler.write_state", full)
    args = ("sample", "x", "--checkpoint", checkpoint, "--save-state", tmp_path / "state")
    done = cli(*args, "--json")
    assert json.loads(done.out)["tokens"]
    done = cli(*args)
    assert (done.code, done.out[0]) == (2, "x")
    assert done.err.splitlines()[1].startswith("torch, float32" if "torch" in done.err else "jax")


def test_samples_stops_and_log_probabilities(cli, checkpoint):
    def sample(*args: str):
        return cli("sample", "It was", "--checkpoint", checkpoint, "--max-new-tokens", "8", *args)

    done = sample("--json", "-n", "3", "--temperature", "1.5", "--seed", "1").json
    assert len({tuple(one["tokens"]) for one in done["samples"]}) == 3
    text = sample("-n", "2", "--temperature", "1.5", "--seed", "1", "--no-echo").out
    assert text == "\n---\n".join(one["text"] for one in done["samples"][:2]) + "\n"
    plain = sample("--json").json
    stopped = sample("--json", "--stop-id", str(plain["tokens"][3])).json
    assert stopped["finish_reason"] == "stop_id"
    assert stopped["tokens"] == plain["tokens"][: plain["tokens"].index(plain["tokens"][3]) + 1]
    stop = plain["text"][4:7]
    stopped = sample("--json", "--stop", "\0", "--stop", stop).json
    assert stopped["finish_reason"] == "stop_string"
    assert stopped["text"] == plain["text"][: plain["text"].index(stop)]
    places = sample("--json", "--logprobs", "2").json["logprobs"]
    assert [place["top_tokens"][0] for place in places] == plain["tokens"]  # greedy
    assert all(place["chosen"] == place["top"][0] >= place["top"][1] for place in places)


def test_score(cli, checkpoint, framework, tmp_path, tokenizer, monkeypatch):
    path = tmp_path / "text"
    path.write_text("It was a truth – é")
    args = ("score", path, "--checkpoint", checkpoint, "--framework", framework)
    report = cli(*args, "--json").json
    assert report["tokens"] == tokenizer.encode("It was a truth – é")[1:]
    assert len(report["logprobs"]) == len(report["pieces"]) == len(report["tokens"])
    assert report["logprob"] == pytest.approx(sum(report["logprobs"]))
    mean = report["logprob"] / len(report["tokens"])
    assert report["perplexity"] == pytest.approx(math.exp(-mean))
    size = len(path.read_bytes())
    assert report["bits_per_byte"] == pytest.approx(-report["logprob"] / math.log(2) / size)
    done = cli(*args, "--per-token")
    *lines, summary = done.out.splitlines()
    assert len(lines) == len(report["tokens"])
    assert summary.startswith(f"{len(lines)} tokens, log-probability {report['logprob']:.4f}, ")
    path.write_text("One\n\nTwo\nend")
    report = cli(*args, "--json").json
    lines = cli(*args, "--per-token").out.splitlines()[:-1]
    assert [line.split(maxsplit=1)[1] for line in lines] == [repr(p) for p in report["pieces"]]
    path.write_text("")
    assert cli(*args, "--json").json["perplexity"] is None
    assert cli("score", "-", *args[2:], stdin=b"It was").out.startswith("2 tokens, ")
    assert "stdin must be UTF-8" in cli("score", "-", *args[2:], stdin=b"caf\xe9").err
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-").write_text("It was")
    assert cli("score", "./-", *args[2:]).out.startswith("2 tokens, ")
    path.write_bytes(b"caf\xe9")
    assert "must be UTF-8 text, got byte 0xe9 at 3" in cli(*args).err
    assert "/nowhere: No such file" in cli("score", "/nowhere").err


def test_bench(cli, checkpoint, framework):
    args = ("bench", "--framework", framework, "--prompt-tokens", "40", "--new-tokens", "4")
    report = cli(*args, "--checkpoint", checkpoint, "--batch-size", "2", "--json").json
    assert (report["batch_size"], report["prompt_tokens"], report["new_tokens"]) == (2, 40, 4)
    for name in ("first_token_s", "prefill_tokens_per_second", "decode_tokens_per_second",
                 "peak_memory_bytes", "weight_bytes", "weight_bytes_per_second",
                 "memory_bytes_per_second"):  # fmt: skip
        assert report[name] > 0
    done = cli(*args, "--checkpoint", checkpoint)
    assert [line.split("  ")[0] for line in done.out.splitlines()] == [
        "model", "prefill", "first token", "decode", "peak memory"]  # fmt: skip
    for wrong in (("--random",), ("--preset", "HAWK_PAPER_7B")):
        done = cli(*args, *wrong)
        assert (done.code, done.out) == (2, "")
        assert "--preset NAME and --random go together" in done.err


def test_bench_of_random_weights(cli, framework, monkeypatch):
    from recurrentgemma.common.model import presets

    small = presets.Preset.HAWK_PAPER_7B.config_dict | {
        "width": 32, "mlp_expanded_width": 48, "num_heads": 2, "lru_width": 16,
        "block_types": presets.Preset.HAWK_PAPER_7B.config_dict["block_types"][:2]}  # fmt: skip
    monkeypatch.setitem(presets._PRESETS, presets.Preset.HAWK_PAPER_7B, small)
    report = cli(
        "bench",
        "--preset",
        "hawk_paper_7b",
        "--random",
        "--framework",
        framework,
        "--prompt-tokens",
        "5",
        "--new-tokens",
        "2",
        "--dtype",
        "bfloat16",
        "--json",
    )
    assert json.loads(report.out)["model"] == "HAWK_PAPER_7B"
    assert report.json["weight_bytes"] > 256_000 * 32 * 2
