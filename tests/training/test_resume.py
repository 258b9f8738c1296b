"""A run that was stopped in any way resumes as if it had not been.

HYPOTHESIS_PROFILE=long pytest tests/training/test_resume.py -k killed
"""

import os
import random
import shutil
import signal
import time
from pathlib import Path

import pytest
from forks import Forked
from sweeps import sweep

from recurrentgemma.common.training.run_folder import RunFolder
from recurrentgemma_conversion.readers.native import NativeReader

KILLS, STEPS = sweep((2, 20), (10, 200))


def final(folder: Path) -> dict[str, bytes]:
    """The final bytes of a run: the model, and the last checkpoint with its state."""
    checkpoints = sorted((folder / "checkpoints").iterdir())
    files = [*(folder / "model").rglob("*"), *checkpoints[-1].rglob("*.safetensors")]
    return {str(f.relative_to(folder)): f.read_bytes() for f in files if f.is_file()}


def require_readable(folder: Path) -> None:
    """Every visible checkpoint is whole."""
    run = RunFolder(folder)
    for step in run.steps():
        opened = NativeReader(run.checkpoint(step))
        assert all(opened.shards.read(name).size for name in opened.shards.tensors)
        progress, arrays = run.load(step)
        assert progress.step == step
        assert isinstance(arrays, dict)
        assert all(array.sum() == array.sum() for array in arrays.values())
    assert not run.best.is_symlink() or NativeReader(run.best)


def _lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def wait_for(run: Forked, folder: Path, step: int) -> None:
    """Waits until a process has made its folder and logged so many steps."""
    log = folder / "train_log.jsonl"
    deadline = time.monotonic() + 240
    while not (folder.exists() and _lines(log) >= step):
        assert run.poll() is None, run.stderr
        assert time.monotonic() < deadline
        time.sleep(0.002)


def ended(run: Forked, *codes: int) -> str:
    """A process's messages, after it ended with one of these codes."""
    assert run.wait() in codes, run.stderr
    return run.stderr


def test_resumed_after_being_killed(forks, corpus, command, framework, train, losses):
    options = {"steps": STEPS, "log_every": 1, "checkpoint_every": 4, "evaluate_every": 10}
    assert train(framework, out=corpus / "whole", **options).code == 0
    draw = random.Random(os.environ.get("KILLS_SEED", framework))
    moments = [0, *sorted(draw.randint(1, STEPS // 2) for _ in range(KILLS - 1))]
    folder, killed = corpus / "run", 0
    words = command(framework, resume=True, **options)
    for step in moments:
        run = forks.start(*words)
        wait_for(run, folder, step)
        time.sleep(draw.random() * (0.05 if step else 0.1))  # step 0: before the first
        run.send_signal(signal.SIGKILL)
        ended(run, -signal.SIGKILL, 0)  # 0 if the signal came late
        killed += run.returncode != 0
        if folder.exists():
            require_readable(folder)
    assert killed
    assert train(framework, resume=True, **options).code == 0
    require_readable(folder)
    assert final(folder) == final(corpus / "whole")
    for name in ("train", "validation"):
        assert losses(name) == losses(name, out="whole")
    assert not list(folder.rglob(".*"))


def test_a_signal_saves_and_leaves(forks, corpus, command, losses):
    pytest.importorskip("torch.nn")
    framework, number = "torch", signal.SIGTERM
    options = {"steps": 400, "log_every": 1, "checkpoint_every": 1000, "evaluate_every": 1000}
    run = forks.start(*command(framework, out=corpus / "run", **options))
    wait_for(run, corpus / "run", 3)
    run.send_signal(number)
    assert ended(run, 128 + number).splitlines()[-1].endswith("is written; --resume continues")
    (step,) = RunFolder(corpus / "run").steps()
    assert losses()[-1][0] == step < 400
    require_readable(corpus / "run")


def test_resumed_is_uninterrupted_in_every_way_of_training(corpus, framework, train, losses):
    """In this process; the run resumes from the last checkpoint but one."""
    ways = {
        "adafactor": {"optimizer": "adafactor", "accumulation": 2, "batch_size": 1, "pack": False},
        "lora": {
            "lora_rank": 2,
            "optimizer": "sgd",
            "warmup_steps": 2,
            "dtype": "bfloat16",
            "validation": None,
            "validation_share": 0.1,
        },
    }
    for name, options in ways.items():
        out = corpus / name
        assert train(framework, out=out, **options).code == 0
        whole, logged = final(out), losses(out=name)
        shutil.rmtree(out / "model")
        shutil.rmtree(out / "checkpoints" / "step-0000006")
        assert RunFolder(out).steps()[-1] < 6
        assert train(framework, out=out, resume=True, **options).code == 0
        assert final(out) == whole
        assert losses(out=name) == logged
        # The next time nothing is left to do.
        assert train(framework, out=out, resume=True, **options).code == 0
        assert final(out) == whole


def test_going_on_in_the_other_framework(corpus, both_frameworks, train, losses):
    assert train("jax").code == 0
    expected = dict(losses())
    shutil.rmtree(corpus / "run" / "checkpoints" / "step-0000006")
    assert train("torch", resume=True).code == 0
    assert dict(losses()) == pytest.approx(expected, rel=1e-4)
