"""A training run, with a trainer of one number."""

import contextlib
import errno
import json
import math
import os
import resource
import signal
from collections import namedtuple

import numpy as np
import pytest

from recurrentgemma.common.errors import DamagedError, DestinationError, DiskSpaceError
from recurrentgemma.common.io.jsonl import OutputError
from recurrentgemma.common.training.data import Example
from recurrentgemma.common.training.logs import LogFile, read_log
from recurrentgemma.common.training.packing import RowStream, in_order
from recurrentgemma.common.training.run import Interrupted, NonFiniteLossError, Plan, TrainingRun
from recurrentgemma.common.training.run_folder import Best, RunFolder

EXAMPLES = [Example(np.arange(9, dtype=np.int32) + i, np.arange(9) > 0) for i in range(10)]
PLAN = Plan(
    steps=10, batch_size=2, accumulation=1, evaluate_every=3, checkpoint_every=4, log_every=5,
    keep=2, prompts=("a", "b"), sample_tokens=3,
)  # fmt: skip


class Counter:
    """Its weight is the number of steps; its losses are given."""

    model_size = 8

    def __init__(self, losses=None, validation=None, at=None) -> None:
        self.weight = np.zeros(())
        self.losses, self.validation, self.at = losses or {}, validation or {}, at or {}

    @property
    def step(self) -> int:
        return int(self.weight)

    def train_step(self, batches):
        assert all(batch.tokens.shape == (2, 8) for batch in batches)
        self.weight = self.weight + 1
        self.at.get(self.step, lambda: None)()
        loss = self.losses.get(self.step, 1 / self.step)
        return {"loss": loss, "tokens": 16.0, "grad_norm": 1.0, "learning_rate": 0.1}

    def evaluate(self, batches):
        assert batches
        return {"loss": self.validation.get(self.step, 1.0), "perplexity": 1.0, "tokens": 1.0}

    def arrays(self):
        return {"weight": self.weight}

    def load(self, step, arrays):
        assert arrays["weight"] == step
        self.weight = np.array(arrays["weight"])

    def save(self, path, adapters):
        path.mkdir()
        (path / "weights").write_text(str(self.step))

    def sample(self, prompts, tokens):
        return [prompt * tokens for prompt in prompts]

    def memory(self):
        return None


class Listener:
    """Remembers its calls."""

    def __init__(self) -> None:
        self.steps, self.evaluations, self.checkpoints, self.groups = [], [], [], []

    def stepped(self, entries):
        self.steps += entries
        self.groups.append(len(entries))

    def validated(self, entry):
        self.evaluations.append(entry)

    def saved(self, path):
        self.checkpoints.append(path.name)


def make(path, trainer, plan=PLAN, validate=True, progress=None):
    folder, listener = RunFolder(path), Listener()
    if progress is None:
        folder.begin()
    stream = RowStream(EXAMPLES, 8, 0)
    validation = in_order(EXAMPLES[:3], 8, 0, 2) if validate else []
    if progress is not None:
        stream.position = progress.position
    run = TrainingRun(plan, trainer, stream, validation, folder, [listener], progress)
    return run, folder, listener


def test_what_happens_when(tmp_path):
    run, folder, told = make(tmp_path / "run", Counter(validation={3: 0.5, 6: 0.7, 9: 0.4, 10: 2}))
    run()
    assert [entry["step"] for entry in told.steps] == list(range(1, 11))
    # Every fifth step, and before every evaluation and checkpoint.
    assert told.groups == [3, 1, 1, 1, 2, 1, 1]
    assert [entry["step"] for entry in told.evaluations] == [0, 3, 6, 9, 10]
    assert told.evaluations[1]["samples"] == [
        {"prompt": "a", "text": "aaa"},
        {"prompt": "b", "text": "bbb"},
    ]
    # Every fourth step, each that is the best so far, the last.
    assert told.checkpoints == [f"step-{s:07}" for s in (3, 4, 8, 9, 10)]
    assert folder.steps() == [9, 10]
    assert (folder.best / "weights").read_text() == "9"
    assert run.progress.best == Best(9, 0.4)
    assert told.steps[-1]["epoch"] == 1
    assert told.steps[0]["read"] == 16
    assert math.isclose(told.steps[3]["loss"], 0.25)


def test_the_best_is_kept(tmp_path):
    run, folder, _ = make(tmp_path / "run", Counter(validation={3: 0.5}))
    run()
    assert folder.steps() == [3, 8, 10]
    assert os.readlink(folder.best) == "checkpoints/step-0000003"


def test_without_validation(tmp_path):
    run, folder, told = make(tmp_path / "run", Counter(), validate=False)
    run()
    assert not told.evaluations
    assert not folder.best.exists()
    assert folder.steps() == [8, 10]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_loss_that_is_no_number(tmp_path, value):
    run, folder, told = make(tmp_path / "run", Counter({7: value}))
    with pytest.raises(NonFiniteLossError) as caught:
        run()
    last = folder.checkpoint(4)
    assert str(caught.value) == f"the loss is {value} at step 7; the last good checkpoint is {last}"
    assert folder.steps() == [3, 4]  # none after the NaN
    run, folder, told = make(tmp_path / "other", Counter({1: value}))
    with pytest.raises(NonFiniteLossError, match="there is no checkpoint from before"):
        run()
    assert not folder.steps()
    assert not told.steps


def test_a_loss_that_is_no_number_is_skipped(tmp_path):
    plan = PLAN._replace(skip_nonfinite=True)
    run, folder, told = make(tmp_path / "run", Counter({2: math.nan, 7: math.inf}), plan=plan)
    run()
    assert folder.steps()[-1] == 10
    skipped = {entry["step"]: entry for entry in told.steps if "skipped" in entry}
    assert {step: entry["skipped"] for step, entry in skipped.items()} == {
        2: "the loss is nan",
        7: "the loss is inf",
    }
    assert all(entry["loss"] is None for entry in skipped.values())


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_ends_after_the_step(tmp_path, number):
    before = signal.getsignal(number)
    trainer = Counter(at={7: lambda: os.kill(os.getpid(), number)})
    run, folder, told = make(tmp_path / "run", trainer)
    with pytest.raises(Interrupted) as caught:
        run()
    assert signal.getsignal(number) is before
    assert (caught.value.signal, caught.value.checkpoint) == (number, folder.checkpoint(7))
    assert told.steps[-1]["step"] == 7
    progress, arrays = folder.load(folder.steps()[-1])
    assert (progress.step, progress.best) == (7, Best(3, 1.0))
    resumed = Counter()
    resumed.load(progress.step, arrays)
    run, folder, told = make(tmp_path / "run", resumed, progress=progress)
    run()
    assert [entry["step"] for entry in told.steps] == [8, 9, 10]
    assert [entry["step"] for entry in told.evaluations] == [9, 10]


def test_a_signal_after_a_step_ends_after_the_next(tmp_path):
    run, folder, told = make(tmp_path / "run", Counter(), PLAN._replace(log_every=1))

    def stepped(entries):
        if entries[-1]["step"] == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    told.stepped = stepped
    with pytest.raises(Interrupted) as caught:
        run()
    assert caught.value.checkpoint == folder.checkpoint(3)
    assert folder.steps() == [3]


def test_a_second_signal_does_not_wait(tmp_path):
    def twice():
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)

    run, folder, _ = make(tmp_path / "run", Counter(at={2: twice}))
    with pytest.raises(KeyboardInterrupt):
        run()
    assert not folder.steps()


def test_a_full_disk(tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")
    run, folder, _ = make(tmp_path / "run", Counter())
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage(10**9, 10**9, 0))
    with pytest.raises(DiskSpaceError, match="too little room"):
        run()
    assert not folder.checkpoints.exists()
    monkeypatch.undo()

    class Filling(Counter):
        def save(self, path, adapters):
            if self.step > 3:
                raise OSError(errno.ENOSPC, "No space left on device")
            super().save(path, adapters)

    run, folder, _ = make(tmp_path / "other", Filling())
    with pytest.raises(DiskSpaceError, match="became full"):
        run()
    assert folder.steps() == [3]
    assert not list(folder.checkpoints.glob(".*"))


def test_a_log_that_cannot_grow(tmp_path):
    log = LogFile(tmp_path / "log", 0)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, limits[1]))
    try:
        log.write({"step": 1})
        with pytest.raises(OutputError, match=r"cannot write .*: File too large"):
            log.write({"step": 2})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert [entry["step"] for entry in read_log(tmp_path / "log")] == [1]
    with contextlib.suppress(OutputError):
        log.close()


def test_logs_are_cut_where_the_run_goes_on(tmp_path):
    path = tmp_path / "log.jsonl"
    log = LogFile(path, 0)
    for step in range(1, 6):
        log.write({"step": step, "loss": 1 / step})
    log.close()
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 6, "lo')
    assert [entry["step"] for entry in read_log(path)] == [1, 2, 3, 4, 5]
    log = LogFile(path, 3)
    log.write({"step": 4, "loss": 1 / 4})
    log.write({"step": 5, "loss": 1 / 5})
    log.close()
    assert path.read_bytes() == whole
    assert read_log(tmp_path / "none") == []
    with pytest.raises(OutputError, match="cannot write"):
        LogFile(tmp_path / "no" / "log", 0)


def test_what_was_killed_is_cleared_away(tmp_path):
    folder = RunFolder(tmp_path / "run")
    folder.begin()
    for name in (".step-0000004.abc.partial", ".step-0000002.removed.partial"):
        (folder.checkpoints / name).mkdir(parents=True)
        (folder.checkpoints / name / "half").write_text("x")
    (folder.path / ".loss.png.abc.partial").write_text("x")
    assert folder.steps() == []
    folder.clean()
    assert [path.name for path in folder.path.rglob("*")] == ["checkpoints"]


def test_a_damaged_checkpoint_is_named(tmp_path):
    run, folder, _ = make(tmp_path / "run", Counter())
    run()
    progress = folder.checkpoint(10) / "training" / "progress.json"
    assert json.loads(progress.read_text())[0] == 10
    for text in ("{", "[1]", "null"):
        progress.write_text(text)
        with pytest.raises(DamagedError, match="cannot be resumed from"):
            folder.load(10)


def test_no_other_folder_is_emptied(tmp_path):
    folder = RunFolder(tmp_path / "mine")
    folder.path.mkdir()
    folder.require_free(force=False)
    (folder.path / "thesis.tex").write_text("x")
    for force in (False, True):
        with pytest.raises(DestinationError, match="no folder of a training run"):
            folder.require_free(force=force)
    folder.options.write_text("")
    with pytest.raises(DestinationError, match="--resume continues it, --force replaces it"):
        folder.require_free(force=False)
    folder.require_free(force=True)
    folder.begin()
    # A run that was killed before it wrote its options may begin again.
    (folder.path / ".run.toml.abcd1234.partial").write_text("length = ")
    folder.require_free(force=False)
    folder.begin()
    folder.options.write_text("")
    folder.clean()
    assert [path.name for path in folder.path.iterdir()] == ["run.toml"]
