"""A conversion killed at any moment leaves the source, and no destination or a whole one."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cases import make_config
from checkpoints import files, write_checkpoint
from sweeps import sweep

from recurrentgemma_conversion import Format, convert

pytest.importorskip("torch.nn", reason="torch is not installed")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks, to be quick")

MOMENTS = sweep(5, 40)
CONFIG = make_config("RA", vocab_size=2048, width=128, mlp_expanded_width=384)
# Forks a child for each line, which converts and tells when it is at one of its calls, upon which
# it is killed: a call, not a time, so that the moments are spread out on a busy machine, too.
SERVER = """
import json, mmap, os, signal, sys
import torch
from recurrentgemma_conversion import convert

calls, shared = 0, mmap.mmap(-1, 8)

def count(frame, event, arg):
    global calls
    calls += 1
    if calls == request["after"]:
        os.write(tell, b"!")

for line in sys.stdin:
    request = json.loads(line)
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        os.close(told)
        sys.setprofile(None if request["after"] is None else count)
        convert(*request["args"], force=request["force"])
        sys.setprofile(None)
        shared[:] = calls.to_bytes(8, "little")
        os._exit(0)
    os.close(tell)
    if os.read(told, 1):
        os.kill(child, signal.SIGKILL)
    os.close(told)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps([code, int.from_bytes(shared[:], "little")]), flush=True)
"""
Run = Callable[..., tuple[int, int]]


@pytest.fixture(scope="module")
def run() -> Iterator[Run]:
    command = [sys.executable, "-c", SERVER]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as server:
        stdin, stdout = server.stdin, server.stdout
        assert stdin is not None
        assert stdout is not None

        def request(*args: str, force: bool, after: int | None) -> tuple[int, int]:
            line = json.dumps({"args": args, "force": force, "after": after})
            stdin.write(line + "\n")
            stdin.flush()
            code, calls = json.loads(stdout.readline())
            return code, calls

        yield request
        stdin.close()


@pytest.mark.parametrize("force", [False, True], ids=["new", "replaced"])
@pytest.mark.parametrize("to", [Format.HUGGINGFACE, Format.KAGGLE_FLAX])
def test_killed(tmp_path: Path, run: Run, to: Format, force: bool) -> None:
    source = write_checkpoint(tmp_path / "source", Format.KAGGLE_TORCH, CONFIG)
    before = files(source)
    place = tmp_path / "place"
    args = (str(source), str(place / "out"), str(to))
    convert(source, tmp_path / "whole", to)
    convert(source, tmp_path / "old", Format.RECURRENTGEMMA, dtype="bfloat16")
    whole, old = files(tmp_path / "whole"), files(tmp_path / "old")
    _, calls = run(*args, force=force, after=0)
    shutil.rmtree(place)
    rng, killed, unfinished = random.Random(os.environ.get("KILLS_SEED", "0")), 0, 0
    for moment in range(MOMENTS):
        place.mkdir()
        if force:
            shutil.copytree(tmp_path / "old", place / "out")
        after = 1 + int(calls * (moment + rng.random()) / MOMENTS)  # spread over the whole
        code, _ = run(*args, force=force, after=after)
        assert code in (0, -signal.SIGKILL)
        killed += code != 0
        unfinished += any(path.name.endswith(".partial") for path in place.iterdir())
        assert files(source) == before
        out = place / "out"
        if out.exists():
            assert files(out) in ([whole, old] if force else [whole])
        if force or not out.exists():
            assert run(*args, force=force, after=None)[0] == 0
        assert files(out) == whole
        if code:  # what the killed one left is gone once another has run
            assert [path.name for path in place.iterdir()] == ["out"]
        shutil.rmtree(place)
    assert killed > MOMENTS // 2  # all, but for those that were done sooner than killed
    assert unfinished > MOMENTS // 2


def test_killed_under_an_archive(tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "source", Format.KAGGLE_FLAX, CONFIG)
    archive = shutil.make_archive(str(tmp_path / "archive"), "tar", source)
    out = tmp_path / "place" / "out"
    code = (
        "import os, signal, sys; from recurrentgemma_conversion import convert, opening; "
        "opening.unpack = lambda *args: os.kill(os.getpid(), signal.SIGKILL); "
        "convert(*sys.argv[1:])"
    )
    arguments = [archive, str(out), str(Format.KAGGLE_FLAX)]
    done = subprocess.run([sys.executable, "-c", code, *arguments], check=False)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    assert len(list(out.parent.iterdir())) == 1
    convert(*arguments)
    assert files(out) == files(source)
    assert list(out.parent.iterdir()) == [out]
    assert {path.name for path in tmp_path.iterdir()} == {"source", "archive.tar", "place"}
