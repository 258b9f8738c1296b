"""What the processes of `test_sharding` run; each function is called in all of them together."""

import contextlib
import io
import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from cases import make_config, make_params
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from recurrentgemma.common.errors import DestinationError, MismatchError, TokenizerError
from recurrentgemma.common.model.config import Config
from recurrentgemma.common.model.state_dict import to_torch, torch_name
from recurrentgemma.common.training.batch import Batch
from recurrentgemma.common.training.lora import TARGETS, LoraOptions
from recurrentgemma.common.training.optimization import OptimizerOptions
from recurrentgemma.torch import (
    Griffin,
    Sampler,
    create_train_state,
    evaluate,
    layout_of,
    load_checkpoint,
    load_state,
    load_tokenizer,
    loss_fn,
    make_mesh,
    parameters,
    save_checkpoint,
    save_state,
    state_arrays,
    train_step,
)
from recurrentgemma.torch.runtime.processes import gathered
from recurrentgemma.torch.sharding import part_of, shard, whole

Params = Mapping[str, np.ndarray]
CONFIG = make_config("RA")
PARAMS = {path: np.array(value) for path, value in make_params(CONFIG).items()}
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": OptimizerOptions(learning_rate=1e-2, weight_decay=0.1)},
    "sgd": {"optimizer": OptimizerOptions("sgd", learning_rate=0.1, momentum=0.9)},
    "adafactor": {"optimizer": OptimizerOptions("adafactor", learning_rate=1e-2)},
    "lora": {"lora": LoraOptions(rank=2, targets=TARGETS)},
    "lora q8": {"lora": LoraOptions(rank=2, quantize=True)},
}
STRATEGIES = ("fsdp=2", "data=2", "fsdp=4", "data=4")


def model_of(config: Config, params: Params, mesh: str | None) -> Griffin:
    """A model in float64 with these parameters, split over a mesh if one is named."""
    model = Griffin(config, device="meta", dtype=torch.float64)
    if mesh is not None:
        shard(model, make_mesh(mesh))
    places = model.state_dict()
    tensors = {torch_name(path): to_torch(path, value) for path, value in params.items()}
    values = {
        name: part_of(torch.from_numpy(np.array(value, order="C")), places[name])
        for name, value in tensors.items()
    }
    model.load_state_dict(values, assign=True)
    return model


def state_of(config: Config, params: Params, mesh: str | None, options: Mapping[str, Any]) -> Any:
    """A training state in float64."""
    model = model_of(config, params, mesh)
    return create_train_state(model, state_dtype=torch.float64, **options)


def rows_of(batch: Batch, mesh: str | None) -> Batch:
    """The rows of this process."""
    if mesh is None:
        return batch
    rank, count = dist.get_rank(), dist.get_world_size()
    rows = len(batch.tokens) // count
    return Batch(*(z[rank * rows : (rank + 1) * rows] for z in batch))


def steps(state: Any, batches: list[Batch], mesh: str | None = None) -> dict[str, Any]:
    """Everything that steps on batches lead to, as whole arrays."""
    metrics = []
    for batch in batches:
        state, found = train_step(state, rows_of(batch, mesh))
        metrics.append([float(found[name]) for name in ("loss", "tokens", "grad_norm")])
    tensors = parameters(state).state_dict()
    return {
        "state": state_arrays(state),
        "model": {name: whole(tensor).numpy() for name, tensor in tensors.items()},
        "metrics": np.array(metrics),
        "evaluated": evaluate(state, [rows_of(batch, mesh) for batch in batches]),
    }


def train(
    config: Config, params: Params, mesh: str, options: Any, batches: list[Batch]
) -> dict[str, Any]:
    """Steps on a mesh, with the bytes that every process keeps and what is not as requested."""
    state = state_of(config, params, mesh, options)
    misplaced = layout_of(state).misplaced
    result = steps(state, batches, mesh)
    result["bytes"] = gathered([layout_of(state).num_bytes], make_mesh(mesh))
    result["misplaced"] = misplaced + layout_of(state).misplaced
    return result if dist.get_rank() == 0 else {}


class _Sent(TorchDispatchMode):
    """Counts the bytes of weights and gradients that are gathered and scattered, and how often."""

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = {"_allgather_base_": [], "_reduce_scatter_base_": []}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.rpartition("::")[2]
        if name in self.found:
            tensors = [z for z in tree_leaves(args) if isinstance(z, torch.Tensor)]
            self.found[name].append(max(z.nbytes for z in tensors))
        return func(*args, **(kwargs or {}))


def sent(config: Config, params: Params, batch: Batch) -> dict[str, list[int]]:
    """The bytes of each collective operation of FSDP in a step, by its kind."""
    state = state_of(config, params, "fsdp=-1", {})
    with _Sent() as counted:
        train_step(state, rows_of(batch, "fsdp=-1"))
    return counted.found


def own_loop(config: Config, params: Params, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
    """The value and the gradients of `loss_fn`."""
    model = model_of(config, params, "fsdp=-1")
    loss, metrics = loss_fn(model, rows_of(batch, "fsdp=-1"))
    loss.backward()
    assert float(loss.detach()) == float(metrics["loss"])
    named = model.named_parameters()
    gradients = {name: whole(p.grad).numpy() for name, p in named if p.grad is not None}
    return float(loss.detach()), gradients


def draw(config: Config, seed: int, dtype: torch.dtype) -> dict[str, np.ndarray]:
    """Initial values on a mesh."""
    torch.manual_seed(seed)
    model = Griffin(config, dtype=dtype, mesh=make_mesh())
    return {name: whole(p).float().numpy() for name, p in model.state_dict().items()}


def check_loading(folder: Path) -> None:
    """A checkpoint is read in parts, computes the same, and is saved as a whole."""
    mesh = make_mesh()
    single = load_checkpoint(dtype=torch.float32)
    split = load_checkpoint(dtype=torch.float32, mesh=mesh)
    kept = 0
    expected = single.state_dict()
    for name, part in split.state_dict().items():
        kept += part.to_local().untyped_storage().nbytes()
        assert torch.equal(part.full_tensor(), expected.pop(name))
    assert not expected
    total = sum(p.nbytes for p in single.parameters())
    assert kept <= total / dist.get_world_size() * 1.02
    tokens, places = np.arange(1, 13)[None], np.arange(12)[None]
    with torch.no_grad():
        assert torch.equal(split(tokens, places)[0], single(tokens, places)[0])
    tokenizer = load_tokenizer()
    answers = [Sampler(m, tokenizer)(["In the", "And"], 6).text for m in (split, single)]
    assert answers[0] == answers[1]
    with _raises(ValueError, "either a device or a mesh"):
        load_checkpoint(device="cpu", mesh=mesh)
    save_checkpoint(folder, split, tokenizer)
    saved = load_checkpoint(folder).state_dict()
    for name, tensor in single.state_dict().items():
        assert torch.equal(saved.pop(name), tensor)
    rank = dist.get_rank()
    before = sorted(path.name for path in folder.parent.iterdir())
    with _raises(RuntimeError if rank else DestinationError, "force=True"):
        save_checkpoint(folder, split, tokenizer)
    if rank == 0:  # which by the time another looks may be writing again
        assert sorted(path.name for path in folder.parent.iterdir()) == before
    save_checkpoint(folder, split, tokenizer, force=True)
    _check_refusing(split, rank, folder.with_name("refused"))


def _check_refusing(split: Griffin, rank: int, folder: Path) -> None:
    """No process waits for another where what is to be saved is wrong."""
    import tokenizers

    from recurrentgemma.common.tokenizer import Tokenizer

    pieces = ["<bos>", "<eos>", *map(str, range(2047))]
    vocab = tokenizers.models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "0")
    large = Tokenizer(tokenizers.Tokenizer(vocab))
    with _raises(RuntimeError if rank else TokenizerError, "and the vocabulary 2048"):
        save_checkpoint(folder, split, large)
    split.register_parameter("extra", torch.nn.Parameter(torch.zeros(2)))
    del split.final_norm.scale
    with _raises(MismatchError, "missing final_norm.scale"):
        save_checkpoint(folder, split, load_tokenizer())
    assert not folder.exists()


def check_mistakes(config: Config, params: Params, batch: Batch, folder: Path) -> None:
    """Every process gets an error that says what is wrong, and none waits for another."""
    for text, words in (
        ("tensor=2", "in PyTorch a mesh is one of data, fsdp"),
        ("fsdp=1", "must take all 2 processes"),
        ("fsdp=3", "needs 3 devices"),
        ("rows=2", "has the axes"),
    ):
        with _raises(ValueError, words):
            make_mesh(text)
    state, rank = state_of(config, params, "fsdp=2", {}), dist.get_rank()
    with _raises(ValueError, r"got [1, 2] batches"):
        train_step(state, [batch] * (1 + rank))
    empty = Batch(*(z[: 2 * rank] for z in batch))
    with _raises(ValueError, "of at least [0, 2] rows"):
        train_step(state, empty)
    save_state(folder, state)
    with _raises(RuntimeError if rank else DestinationError, "force=True"):
        save_state(folder, state)
    with _raises(ValueError, "no training state at"):
        load_state(folder.with_name("missing"), state)
    other = state_of(config, params, "fsdp=2", {"optimizer": torch.optim.SGD})
    with _raises(ValueError, "unexpected mu."):
        load_state(folder, other)


def save_after(
    folder: Path,
    config: Config,
    params: Params,
    mesh: str | None,
    options: Any,
    batches: list[Batch],
) -> None:
    """Steps, then a save."""
    state = state_of(config, params, mesh, options)
    for batch in batches:
        state, _ = train_step(state, rows_of(batch, mesh))
    save_state(folder, state, force=True)


def resume(
    folder: Path, config: Config, params: Params, mesh: str | None, options: Any, batch: Batch
) -> tuple[dict[str, np.ndarray], float]:
    """The arrays of a saved state, and the loss of the next step."""
    state = load_state(folder, state_of(config, params, mesh, options))
    arrays = {name: np.array(array) for name, array in state_arrays(state).items()}
    _, metrics = train_step(state, rows_of(batch, mesh))
    return arrays, float(metrics["loss"])


def die_in_a_save(folder: Path, config: Config, params: Params, victim: int) -> str:
    """One process is killed while all write; the other gets an error."""
    from torch.distributed.checkpoint.filesystem import FileSystemWriter

    write, writer = FileSystemWriter.write_data, FileSystemWriter

    def killed(self: Any, *args: Any) -> Any:
        result = write(self, *args)
        if dist.get_rank() == victim:
            os.kill(os.getpid(), signal.SIGKILL)
        return result

    setattr(writer, "write_data", killed)  # noqa: B010  # pyright takes no assignment
    try:
        save_state(folder, state_of(config, params, "fsdp=2", {}), force=True)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return ""


def command_with_another_seed(*args: str) -> tuple[int, str, str]:
    """`command`, where each process is given its own number as the seed."""
    return command(*args, "--seed", str(dist.get_rank()))


def command(*args: str) -> tuple[int, str, str]:
    """The exit code of a command, and what it prints."""
    from recurrentgemma.cli import main

    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code: Any = main(list(args))
        except SystemExit as ended:
            code = ended.code
    return code or 0, out.getvalue(), err.getvalue()


@contextlib.contextmanager
def _raises(kind: type[BaseException], words: str):
    """As `pytest.raises`, which is not imported in the processes."""
    try:
        yield
    except kind as error:
        found = str(error)
    else:
        raise AssertionError(f"no {kind.__name__} with {words!r}")
    assert words in found, f"{words!r} is not in {found}"
