"""`recurrentgemma sample --input`: JSON lines in and out, whatever goes wrong on the way."""

import json
import resource
import signal
import subprocess
import sys
import time

import pytest

PROMPTS = ["It was", "", "And he said", "“É”", "In the", "x", "Emma"]


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
        lines = path.read_text().split("\n") if path.exists() else []
        return done, [json.loads(line) for line in lines if line.startswith("{")]

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
    assert done.err == "3 of the lines have an error\n"
    assert [result["line"] for result in results] == [1, 2, 3, 4, 5, 6]
    assert "line 4: a string or an object with a string" in results[3]["error"]
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


def start(checkpoint, prompts, path, limit: int = resource.RLIM_INFINITY) -> subprocess.Popen:
    """Runs a batch in a process that may write files of so many bytes."""
    code = (
        f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))\n"
        "from recurrentgemma.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    args = ["sample", "--checkpoint", checkpoint, "--max-new-tokens", "6", "--input", prompts,
            "--output", path, "--batch-size", "1", "--framework", "torch"]  # fmt: skip
    command = [sys.executable, "-B", "-c", code, *map(str, args)]
    return subprocess.Popen(command, stderr=subprocess.PIPE)


def test_killed_and_full(batch, checkpoint, tmp_path):
    """Every finished line is there, and the same command goes on after it."""
    pytest.importorskip("torch.nn")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("\n".join(json.dumps(PROMPTS[0]) for _ in range(400)) + "\n")
    path = tmp_path / "killed.jsonl"
    process = start(checkpoint, prompts, path)
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_bytes().count(b"\n") >= 3):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    lines = path.read_bytes().splitlines(keepends=True)
    finished = [json.loads(line) for line in lines if line.endswith(b"\n")]
    assert 3 <= len(finished) < 400
    assert [result["line"] for result in finished] == list(range(1, len(finished) + 1))

    prompts.write_text("\n".join(json.dumps(prompt) for prompt in PROMPTS) + "\n")
    full = tmp_path / "full.jsonl"
    process = start(checkpoint, prompts, full, limit=700)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2
    assert b"cannot write" in err
    assert b"File too large; the lines before are kept" in err
    assert err.count(b"\n") == 1
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
        ("prompt --load-state x -n 2", "--num-samples must be 1"),
        ("prompt --load-state x --chat", "recurrentgemma chat --load"),
        ("prompt --stop ", "stop_strings must be strings that are not empty"),
        ("prompt --stop-id 99999", "stop_ids must be tokens of the vocabulary of 2048, got 99999"),
        ("prompt --min-p 2", "min_p must be in [0, 1], got 2.0"),
        ("prompt --repetition-penalty 0", "repetition_penalty must be above 0"),
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
