"""`recurrentgemma sample --input`: JSON lines in and out, whatever goes wrong on the way."""

import gzip
import json
import os
import re
import signal
import subprocess
import sys
import time

import pytest

import recurrentgemma.common.generation.prefill
from recurrentgemma.common.io.jsonl import OutputError, ResultFile

PROMPTS = ["It was", "", "And he said", "“É”", "In the", "x", "Emma"]


SUMMARY = re.compile(r"(\d+ lines?(?:, .*)?): \d+ tokens in [\d.]+ s(?: \([\d.]+ tokens/s\))?\n")


def without_summary(done):
    """A command's outcome without the line of times and speeds at its end."""
    return done._replace(err=SUMMARY.sub("", done.err))


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps(p if i % 2 else {"prompt": p, "id": i}) for i, p in enumerate(PROMPTS)]
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def batch(cli, checkpoint, prompts, tmp_path):
    """Runs a batch on the random checkpoint; the outcome, and the results that there are."""

    def run(*args: str, output="out.jsonl"):
        path = tmp_path / output
        done = cli("sample", "--checkpoint", checkpoint, "--max-new-tokens", "6", "--input",
                   prompts, "--output", path, *args)  # fmt: skip
        lines = path.read_text().split("\n")[:-1] if path.is_file() else []
        return without_summary(done), [json.loads(line) for line in lines if line.startswith("{")]

    return run


def test_results_are_those_of_single_prompts(cli, batch, framework, checkpoint):
    done, results = batch("--framework", framework, "--batch-size", "3", "--logprobs", "2")
    assert done == (0, "", "")
    assert [result["line"] for result in results] == list(range(1, 8))
    assert [result["prompt"] for result in results] == PROMPTS
    for result in (results[0], results[3]):
        (sample,) = result["samples"]
        args = ("sample", result["prompt"], "--json", "--framework", framework)
        alone = cli(*args, "--checkpoint", checkpoint, "--max-new-tokens", "6", "--logprobs", "2")
        assert sample["tokens"] == alone.json["tokens"]
        assert sample["text"] == alone.json["text"]
        assert sample["finish_reason"] == alone.json["finish_reason"]
        assert len(sample["logprobs"]["top"]) == len(sample["tokens"])


def test_a_shared_prompt_is_read_once(cli, batch, checkpoint, framework, tmp_path, monkeypatch):
    state = tmp_path / "shared"
    args = ("sample", "--checkpoint", checkpoint, "--framework", framework, "--max-new-tokens")
    assert cli(*args, "0", "--save-state", state, "It was a truth. " * 9).code == 0
    read = []
    pad = recurrentgemma.common.generation.prefill.pad_left
    monkeypatch.setattr(
        "recurrentgemma.common.generation.prefill.pad_left",
        lambda rows, *others, **options: read.extend(rows) or pad(rows, *others, **options),
    )
    done, results = batch("--framework", framework, "--load-state", state, "--batch-size", "3")
    assert done == (0, "", "")
    assert max(map(len, read)) < 9
    for result in results[:4]:
        alone = cli(*args, "6", "--load-state", state, "--json", result["prompt"]).json
        assert result["samples"][0]["tokens"] == alone["tokens"]
    done, _ = batch("--framework", framework)
    assert f'--load-state was "{state}", is null; --force' in done.err


def test_draws_do_not_depend_on_batches(cli, batch, checkpoint):
    args = ("--temperature", "1.5", "--seed", "7", "-n", "2")
    _, threes = batch(*args, "--batch-size", "3", output="threes")
    _, all_ = batch(*args, "--batch-size", "7", output="all")
    assert threes == all_
    assert [result["seed"] for result in all_] == list(range(8, 15))
    assert all_[0]["samples"][0] != all_[0]["samples"][1]


def test_malformed_lines(batch, prompts):
    good = prompts.read_text().splitlines()
    prompts.write_bytes(
        "\n".join([*good[:2], '{"prompt": ', '{"text": "x"}', good[4]]).encode() + b'\n"caf\xe9"\n'
    )
    done, results = batch("--batch-size", "2")
    assert (done.code, done.out) == (2, "")
    assert f"{prompts}, line 3: not JSON" in done.err
    assert [result["line"] for result in results] == [1, 2]
    done, results = batch("--keep-going", "--batch-size", "4")
    assert done.code == 1
    assert [result["line"] for result in results] == [1, 2, 3, 4, 5, 6]
    assert 'line 4: a string, or an object with a "prompt"' in results[3]["error"]
    assert "line 6: not UTF-8: byte 0xe9" in results[5]["error"]
    assert results[4]["samples"][0]["tokens"]


def test_a_batch_is_gone_on_with(batch, prompts, tmp_path):
    args = ("--temperature", "1.5", "--seed", "7", "--batch-size", "2")
    _, whole = batch(*args)
    path = tmp_path / "out.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:3]) + lines[3][:-9])  # killed within the fourth
    done, results = batch(*args)
    assert (done.code, results) == (0, whole)
    # All there: nothing is done again.
    before = path.stat().st_mtime_ns
    assert batch(*args) == (done, whole)
    assert path.read_bytes() == b"".join(lines)
    assert path.stat().st_mtime_ns >= before
    # Results of other prompts, or no results at all, are not mixed with these.
    prompts.write_text('"other"\n')
    done, _ = batch(*args)
    assert done.code == 2
    assert "holds the result of another prompt than line 1" in done.err
    path.write_text("my notes\n")
    done, _ = batch(*args)
    assert (done.code, path.read_text()) == (2, "my notes\n")
    assert "its line 1 is no result; --force replaces it" in done.err
    done, results = batch(*args, "--force")
    assert [result["prompt"] for result in results] == ["other"]


@pytest.mark.parametrize(
    "note",
    [
        "my only copy of a note, no newline",
        '{"prompt": "hi"}',
        '{"line": 1, "prompt": "hi"}\n',
        '{"line": true, "samples": []}\n',
        "[" * 100_000 + "\n",
        '{"samples": [], "line": 1}',  # what is written after it would not be a line of its own
    ],
)
def test_what_holds_no_results_is_kept(batch, tmp_path, note):
    path = tmp_path / "out.jsonl"
    path.write_text(note)
    done, _ = batch()
    assert (done.code, done.out) == (2, "")
    assert done.err.endswith(f"{path} is there and its line 1 is no result; --force replaces it\n")
    assert path.read_text() == note


def test_a_tail_is_cut_only_after_results(batch, tmp_path):
    _, whole = batch()
    path = tmp_path / "out.jsonl"
    results = path.read_bytes()
    first = results.splitlines(keepends=True)[0]
    for cut in (1, 5, 10, len(first) - 1):
        path.write_bytes(first + first[:cut])
        assert batch() == ((0, "", ""), whole)
        assert path.read_bytes() == results
    path.write_bytes(first + b"a note")
    done, _ = batch()
    assert "its line 2 is no result" in done.err
    assert path.read_bytes() == first + b"a note"


@pytest.mark.parametrize("force", [(), ("--force",)])
def test_the_input_is_never_the_output(cli, checkpoint, prompts, tmp_path, force):
    before = prompts.read_text()
    link = tmp_path / "link"
    link.symlink_to(prompts)
    for output in (prompts, link):
        done = cli("sample", "--checkpoint", checkpoint, "--input", prompts, "--output", output,
                   *force)  # fmt: skip
        assert (done.code, done.out, prompts.read_text()) == (2, "", before)
        assert f"--input and --output are one file, {output}" in done.err
    # Nor by way of stdin.
    code = "import sys; from recurrentgemma.cli import main; sys.exit(main(sys.argv[1:]))"
    args = ["sample", "--input", "-", "--output", prompts, *force]
    with prompts.open() as stdin:
        command = [sys.executable, "-c", code, *args]
        done = subprocess.run(command, stdin=stdin, capture_output=True, check=False)
    assert (done.returncode, prompts.read_text()) == (2, before)
    assert b"--input and --output are one file" in done.stderr


def test_prompts_from_a_pipe_and_stdin(cli, batch, checkpoint, prompts, tmp_path, monkeypatch):
    _, whole = batch()
    args = ("sample", "--checkpoint", checkpoint, "--max-new-tokens", "6")
    read, write = os.pipe()
    os.write(write, prompts.read_bytes())
    os.close(write)
    path = tmp_path / "piped.jsonl"
    done = cli(*args, "--input", f"/dev/fd/{read}", "--output", path)
    os.close(read)
    assert without_summary(done) == (0, "", "")
    assert [json.loads(line) for line in path.read_text().splitlines()] == whole
    done = cli(*args, "--input", "-", "--output", "-", stdin=prompts.read_bytes())
    assert without_summary(done)._replace(out="") == (0, "", "")
    assert [json.loads(line) for line in done.out.splitlines()] == whole
    done = cli(*args, "--input", "-", "--output", "-", stdin=b'"a"\n\n \n[\n')
    assert done.code == 2
    assert "stdin, line 4: not JSON" in done.err
    assert json.loads(done.out)["prompt"] == "a"
    # A file may have that name.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-").write_text('"a"\n')
    assert cli(*args, "--input", "./-", "--output", "-").out == done.out
    (tmp_path / "-").unlink()
    done_again = cli(*args, "--input", "-", "--output", "./-", stdin=b'"a"\n')
    assert without_summary(done_again) == (0, "", "")
    assert (tmp_path / "-").read_text() == done.out


def test_outputs_that_are_no_files(cli, checkpoint, prompts, tmp_path):
    def to(output):
        return cli("sample", "--checkpoint", checkpoint, "--max-new-tokens", "1",
                   "--input", prompts, "--output", output)  # fmt: skip

    assert without_summary(to("/dev/null")) == (0, "", "")
    for output, reason in (
        ("/dev/full", "No space left on device"),  # which gives zeros without end
        (tmp_path, "Is a directory"),
        (tmp_path / "no" / "x", "No such file or directory"),
        (prompts / "x", "Not a directory"),
    ):
        done = to(output)
        assert (done.code, done.out) == (2, "")
        assert done.err == f"recurrentgemma: error: cannot write {output}: {reason}\n"


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes with names")
def test_a_pipe_with_a_name(cli, checkpoint, prompts, tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE)
    done = cli("sample", "--checkpoint", checkpoint, "--max-new-tokens", "1",
               "--input", prompts, "--output", pipe)  # fmt: skip
    assert without_summary(done) == (0, "", "")
    out, _ = reader.communicate(timeout=300)
    assert [json.loads(line)["prompt"] for line in out.splitlines()] == PROMPTS


def test_prompts_that_are_no_text(batch, prompts):
    prompts.write_text('"ok"\n"\\ud800"\n"\\ud83d\\ude00"\n')
    done, results = batch("--keep-going")
    assert done.code == 1
    assert [result["line"] for result in results] == [1, 2, 3]
    assert results[1]["error"].endswith(r"line 2: not Unicode text: an unpaired surrogate \ud800")
    assert results[2]["prompt"] == "\N{GRINNING FACE}"


def test_a_mistake_leaves_the_output_as_it_was(batch, prompts, tmp_path):
    path = tmp_path / "out.jsonl"
    batch()
    first, *_ = path.read_bytes().splitlines(keepends=True)
    cut = first + first[:20]
    path.write_bytes(cut)
    text = prompts.read_text()
    prompts.write_text("no JSON\n" + text)
    for force in ((), ("--force",)):
        assert batch(*force)[0].code == 2
        assert path.read_bytes() == cut
    prompts.unlink()
    for force in ((), ("--force",)):
        done, _ = batch(*force)
        assert "prompts.jsonl: No such file" in done.err
        assert path.read_bytes() == cut
        batch(*force, output="new")
        assert not (tmp_path / "new").exists()
    # An input without a line is no mistake.
    prompts.write_text("")
    done, results = batch(output="none")
    assert (done, results) == ((0, "", ""), [])
    assert (tmp_path / "none").read_text() == ""


def test_a_file_that_another_process_writes(tmp_path):
    path = tmp_path / "out.jsonl"
    result = {"line": 1, "samples": []}
    file = ResultFile(path)
    with ResultFile(path) as other:
        other.write(result)
        for force in (False, True):
            with pytest.raises(OutputError, match="another process is writing"):
                ResultFile(path, force=force).write(result)
    with pytest.raises(OutputError, match="another process has changed"):
        file.write(result)
    assert ResultFile(path).finished == {1: result}
    assert path.read_text() == json.dumps(result) + "\n"


def test_a_corrected_line_is_done(batch, prompts, tmp_path):
    prompts.write_text('"a"\nno\n"b"\nwrong\n')
    done, results = batch("--keep-going")
    assert (done.code, done.err) == (1, "")
    # As long as it is wrong it counts, and nothing is written again.
    for args in ((), ("--keep-going",)):
        assert batch(*args) == (done, results)
    prompts.write_text('"a"\n"fixed"\n"b"\nwrong\n')
    done, more = batch()
    assert (done.code, done.err) == (1, "")
    assert more[:4] == results  # what was finished stays where it is
    assert [(result["line"], result["prompt"]) for result in more[4:]] == [(2, "fixed")]
    prompts.write_text('"a"\n"fixed"\n"b"\n"right"\n')
    done, all_ = batch()
    assert (done, [result["line"] for result in all_]) == ((0, "", ""), [1, 2, 3, 4, 2, 4])
    assert batch() == (done, all_)
    prompts.write_text('"a"\n"other"\n"b"\n"right"\n')
    assert "holds the result of another prompt than line 2" in batch()[0].err


def test_results_of_other_options_are_not_mixed(batch, prompts, tmp_path):
    path = tmp_path / "out.jsonl"
    batch("--stop", "x")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))
    biased = batch("--stop", "x", "--logit-bias", "7=2")[0].err
    assert "other options: --logit-bias was [], is [[7, 2.0]]; --force begins anew" in biased
    done, _ = batch("--max-new-tokens", "5", "--temperature", "1.5", "--seed", "3")
    assert (done.code, done.out) == (2, "")
    assert done.err == (
        f"recurrentgemma: error: {path} holds results of other options: --max-new-tokens was 6, "
        'is 5; --seed was null, is 3; --stop was ["x"], is []; --temperature was 0.0, is 1.5; '
        "--force begins anew\n"
    )
    assert path.read_text() == "".join(lines[:2])
    assert batch("--stop", "x", "--batch-size", "1", "--temperature", "0")[0].code == 0
    assert path.read_text() == "".join(lines)
    assert batch("--max-new-tokens", "5", "--force")[0].code == 0
    # Earlier versions wrote no options.
    olds = [json.loads(line) for line in lines[:2]]
    del olds[0]["options"]
    path.write_text("".join(json.dumps(old) + "\n" for old in olds))
    done, results = batch("--max-new-tokens", "5")
    assert (done.code, results[:2]) == (0, olds)
    assert [result["line"] for result in results] == list(range(1, 8))


def test_draws_with_fresh_seeds_are_gone_on_with(batch, tmp_path):
    path = tmp_path / "out.jsonl"
    batch("--temperature", "1")
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join(lines[:2]))
    done, results = batch("--temperature", "1")
    assert done == (0, "", "")
    assert [json.dumps(result) + "\n" for result in results[:2]] == lines[:2]
    assert len(results) == 7


def test_killed_and_full(forks, batch, checkpoint, tmp_path):
    """Every finished line is there, and the same command goes on after it."""
    pytest.importorskip("torch.nn")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps(PROMPTS[0]) for _ in range(400)) + "\n")
    path = tmp_path / "killed.jsonl"
    options = ("--max-new-tokens", "6", "--batch-size", "1", "--framework", "torch")
    args = ("sample", "--checkpoint", checkpoint, "--input", prompts, *options, "--output")
    process = forks.start(*args, path)
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    lines = path.read_bytes().splitlines(keepends=True)
    finished = [json.loads(line) for line in lines if line.endswith(b"\n")]
    assert 3 <= len(finished) < 400
    assert [result["line"] for result in finished] == list(range(1, len(finished) + 1))

    prompts.write_text("\n".join(json.dumps(prompt) for prompt in PROMPTS) + "\n")
    full = tmp_path / "full.jsonl"
    process = forks.run(*args, full, file_size=700)
    assert process.returncode == 2
    assert "cannot write" in process.stderr
    assert "File too large; the lines before are kept" in process.stderr
    assert process.stderr.count("\n") == 1
    kept = full.read_bytes()
    assert len(kept) == 700
    assert 0 < kept.count(b"\n") < len(PROMPTS)
    done, results = batch("--framework", "torch", output="full.jsonl")
    assert done.code == 0
    assert results == batch("--framework", "torch", output="whole.jsonl")[1]
    assert full.read_bytes().startswith(kept)


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ("--input x", "--input and --output go together"),
        ("--output x", "--input and --output go together"),
        ("prompt --input x --output y", "--input takes the place of PROMPT"),
        ("prompt --logprobs 2", "--logprobs needs --json, or --input and --output"),
        ("prompt --save-state x -n 2", "--num-samples must be 1"),
        ("prompt --load-state x --chat", "recurrentgemma chat --load"),
        ("prompt --stop ", "--stop must be strings that are not empty"),
        ("prompt --stop-id 99999", "--stop-id must be tokens of the vocabulary of 2048, got 99999"),
        ("prompt --min-p 2", "--min-p must be in [0, 1], got 2.0"),
        ("prompt --repetition-penalty 0", "--repetition-penalty must be above 0"),
        ("prompt --frequency-penalty inf", "--frequency-penalty must be"),
        ("prompt --logit-bias 7", "--logit-bias must be ID=B, such as 108=-5, got '7'"),
        ("prompt --logit-bias -7=1", "--logit-bias must have token ids, got -7"),
        ("prompt --logit-bias 9999=1", "--logit-bias must have tokens of the vocabulary of 2048"),
        ("prompt --num-samples 0", "--num-samples"),
        ("prompt --logprobs -1", "--logprobs"),
        ("prompt --load-state /nowhere", "/nowhere: No such file"),
    ],
)
def test_mistakes(cli, args, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = cli("sample", *args.split(" "))
    assert (done.code, done.out) == (2, "")
    assert words in done.err
    assert done.err.count("\n") == 1


def test_fields_of_a_line_are_kept(batch, prompts):
    lines = [
        {"id": "a", "prompt": "It was", "label": {"x": [1, None]}},
        {"prompt": [2, 300, 5], "id": 7},
        {"id": "m", "messages": [{"role": "system", "content": "Be brief."},
                                 {"role": "user", "content": "Who?<end_of_turn>"}]},
        {"prompt": "x", "samples": 1},
        {"prompt": [2, -1]},
        {"prompt": "x", "messages": []},
        {"messages": [{"role": "assistant", "content": "Hi"}]},
    ]  # fmt: skip
    prompts.write_text("".join(json.dumps(line) + "\n" for line in lines))
    done, results = batch("--keep-going")
    assert "line 3 has messages, which need --chat" in done.err
    done, results = batch("--keep-going", "--chat")
    assert done.code == 1
    for line, result in zip(lines[:3], results, strict=False):
        assert line.items() <= result.items()
        assert result["samples"][0]["tokens"]
    for result, words in zip(
        results[3:],
        ("rename samples", "got -1 as token 1", "is expected", "the last user"),
        strict=True,
    ):
        assert words in result["error"]
    assert ["options" in result for result in results] == [True] + [False] * 6


def test_token_ids_are_read_as_they_stand(cli, batch, prompts, tokenizer):
    texts = ["It was", "“É”"]
    prompts.write_text("".join(json.dumps(text) + "\n" for text in texts))
    _, whole = batch()
    prompts.write_text("".join(f"{tokenizer.encode(text)}\n" for text in texts))
    _, ids = batch(output="ids.jsonl")
    assert [r["samples"] for r in ids] == [r["samples"] for r in whole]


def test_compressed_files(batch, prompts, tmp_path):
    _, whole = batch()
    packed = prompts.with_suffix(".jsonl.gz")
    packed.write_bytes(gzip.compress(prompts.read_bytes()))
    out = tmp_path / "out.jsonl.gz"
    done, _ = batch("--input", packed, "--output", out)
    assert done == (0, "", "")
    assert [json.loads(line) for line in gzip.decompress(out.read_bytes()).splitlines()] == whole
    before = out.read_bytes()
    # Killed within a line: that line and those after it are done again.
    for cut in (1, 30, len(before) // 2):
        out.write_bytes(before[:-cut])
        batch("--input", packed, "--output", out)
        lines = gzip.decompress(out.read_bytes()).splitlines()
        assert [json.loads(line) for line in lines] == whole
    out.write_bytes(b"my notes")
    done, _ = batch("--input", packed, "--output", out)
    assert "its line 1 is no result; --force replaces it" in done.err
    assert out.read_bytes() == b"my notes"
    packed.write_bytes(packed.read_bytes()[:-9])
    assert "is a damaged gzip file" in batch("--input", packed, "--output", out, "--force")[0].err


def test_the_summary(cli, checkpoint, prompts, tmp_path):
    args = ("sample", "--checkpoint", checkpoint, "--max-new-tokens", "2", "--input", prompts,
            "--output", tmp_path / "out", "--keep-going")  # fmt: skip
    prompts.write_text('"a"\nno\n"b"\n')
    for parts in ("3 lines, 1 with an error", "3 lines, 3 done before, 1 with an error"):
        done = cli(*args)
        (summary,) = SUMMARY.fullmatch(done.err).groups()  # pyright: ignore[reportOptionalMemberAccess]
        assert (done.code, summary) == (1, parts)
