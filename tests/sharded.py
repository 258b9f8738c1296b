"""What the processes of `test_sharding` run; each function is called in all of them together."""

import contextlib
import functools
import io
import math
import os
import signal
from collections import defaultdict
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
from recurrentgemma.common.generation.strategies import Categorical
from recurrentgemma.common.model.config import Config, Layer, ModelConfig
from recurrentgemma.common.model.mixers import Attention, Recurrent, Rope
from recurrentgemma.common.model.state_dict import to_torch, torch_name
from recurrentgemma.common.sharding import share
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
from recurrentgemma.torch.engine import ModelEngine
from recurrentgemma.torch.runtime.processes import gathered, processes_of
from recurrentgemma.torch.runtime.split_tensors import part_of, whole
from recurrentgemma.torch.sharding import shard, sizes_of

Params = Mapping[str, np.ndarray]
CONFIG = make_config("RA")  # nothing divides its sizes
# For "tensor" and "sequence": key heads in groups, a single one, QK-norm, soft caps, a reach, none.
PARTS = ModelConfig(
    vocab_size=1024,
    width=32,
    layers=(
        Layer(Recurrent(32, 4, 3), mlp=32, mlp_bias=True),
        Layer(
            Attention(4, 2, 8, 6, Rope(share=0.5), scale=0.4, soft_cap=2.0, out_bias=True),
            mlp=32,
            mlp_bias=False,
            post_norms=True,
        ),
        Layer(Attention(4, 1, 8, None, Rope(), scale=0.3, qk_norm=True), mlp=32, mlp_bias=True),
    ),
    embedding_scale=4.5,
    soft_cap=3.0,
)
OPTIONS: dict[str, dict[str, Any]] = {
    "adamw": {"optimizer": OptimizerOptions(learning_rate=1e-2, weight_decay=0.1)},
    "sgd": {"optimizer": OptimizerOptions("sgd", learning_rate=0.1, momentum=0.9)},
    "adafactor": {"optimizer": OptimizerOptions("adafactor", learning_rate=1e-2)},
    "lora": {"lora": LoraOptions(rank=2, targets=TARGETS)},
    "lora q8": {"lora": LoraOptions(rank=2, quantize=True)},
}
STRATEGIES = (
    *("data=2", "fsdp=2", "tensor=2", "sequence=2", "data=4", "fsdp=4", "tensor=4"),
    *("fsdp=2,tensor=2", "sequence=4", "fsdp=2,sequence=2"),
)


def config_of(mesh: str | None) -> Config:
    """The model for a mesh."""
    return PARTS if "tensor" in (mesh or "") or "sequence" in (mesh or "") else CONFIG


@functools.cache
def params_of(config: Config) -> Params:
    """Parameters without zeros, which may be sent."""
    return {path: np.array(value) for path, value in make_params(config).items()}


def count_of(mesh: str) -> int:
    """How many processes a mesh takes."""
    return math.prod(int(part.partition("=")[2]) for part in mesh.split(","))


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
    return processes_of(make_mesh(mesh)).rows(batch)


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
    layout, sizes = layout_of(state), sizes_of(make_mesh(mesh))
    result["bytes"] = gathered([layout.num_bytes], make_mesh(mesh))
    result["misplaced"] = misplaced + layout.misplaced
    result["requested"] = sum(
        math.prod(array.shape) * np.dtype(array.dtype).itemsize / share(array.requested, sizes)
        for array in layout.values()
    )
    return result if dist.get_rank() == 0 else {}


class _Sent(TorchDispatchMode):
    """Counts the bytes of each collective operation, by its name.

    PyTorch's `CommDebugMode` counts the same operations, but fails where a block is computed again.
    """

    def __init__(self) -> None:
        super().__init__()
        self.found: dict[str, list[int]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        space, _, name = func._schema.name.rpartition("::")
        if space in ("c10d", "_c10d_functional"):
            tensors = [z for z in tree_leaves(args) if isinstance(z, torch.Tensor)]
            self.found[name].append(max(z.nbytes for z in tensors))
        return func(*args, **(kwargs or {}))


def sent(config: Config, params: Params, mesh: str, batch: Batch) -> dict[str, list[int]]:
    """The bytes of each collective operation in a step, by its kind."""
    state = state_of(config, params, mesh, {})
    with _Sent() as counted:
        train_step(state, rows_of(batch, mesh))
    return dict(counted.found)


def own_loop(config: Config, params: Params, batch: Batch) -> tuple[float, dict[str, np.ndarray]]:
    """The value and the gradients of `loss_fn`."""
    model = model_of(config, params, "fsdp=-1")
    loss, metrics = loss_fn(model, rows_of(batch, "fsdp=-1"))
    loss.backward()
    assert float(loss.detach()) == float(metrics["loss"])
    named = model.named_parameters()
    gradients = {name: whole(p.grad).numpy() for name, p in named if p.grad is not None}
    return float(loss.detach()), gradients


def draw(config: Config, seed: int, dtype: torch.dtype, mesh: str) -> dict[str, np.ndarray]:
    """Initial values on a mesh."""
    torch.manual_seed(seed)
    model = Griffin(config, dtype=dtype, mesh=make_mesh(mesh))
    return {name: whole(p).float().numpy() for name, p in model.state_dict().items()}


def check_loading(folder: Path, text: str) -> None:
    """A checkpoint is read in parts, computes the same, and is saved as a whole."""
    mesh = make_mesh(text)
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
        logits = [model(tokens, places)[0].numpy() for model in (split, single)]
    np.testing.assert_allclose(*logits, rtol=1e-4 if "tensor" in text else 0, atol=1e-4)
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


def check_sampling(config: Config, params: Params, mesh: str) -> None:
    """Logits and states are those of one process, in a prompt, in steps, and from either's state.

    The text of the bundled model is, too.
    """
    engines = [ModelEngine(model_of(config, params, place)) for place in (mesh, None)]
    prompt = np.array([[3, 4, 5, 6, 7, 8, 9], [1, 2, 3, 1, 2, 3, 5]])
    places = np.array([[-1, -1, 0, 1, 2, 3, 4], [0, 1, 2, 0, 1, 2, 3]])
    caches = [engine.begin(2) for engine in engines]
    for step in range(3):
        logits = []
        for i, engine in enumerate(engines):
            found, _, caches[i] = engine.score(caches[i], prompt, places, prompt)
            logits.append(found[torch.from_numpy(places >= 0)])
        np.testing.assert_allclose(*logits, rtol=1e-10, atol=1e-12)
        arrays = [engine.to_numpy(cache) for engine, cache in zip(engines, caches, strict=True)]
        for block, fields in arrays[1].items():
            for name, value in fields.items():
                np.testing.assert_allclose(arrays[0][block][name], value, 1e-10, 1e-12)
        caches = [engine.from_numpy(arrays[step % 2]) for engine in engines]
        prompt, places = prompt[:, -1:] + step, places[:, -1:] + 1
    tokenizer, texts = load_tokenizer(), []
    for place in (make_mesh(mesh), None):
        sampler = Sampler(load_checkpoint(dtype=torch.float32, mesh=place), tokenizer)
        texts += [sampler(["In the", "And"], 6).text]
        sampler = Sampler(sampler.model, tokenizer, sampling=Categorical(temperature=0.8))
        texts[-1] += sampler(["In the"], 6, rng=3).text
    assert texts[0] == texts[1]


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
        ("fsdp=1", "must take all 2 processes"),
        ("fsdp=3", "needs 3 devices"),
        ("rows=2", "has the axes"),
    ):
        with _raises(ValueError, words):
            make_mesh(text)
    with _raises(ValueError, "tensor=2 must divide vocab_size 31; sizes that fit: 1"):
        model_of(config, params, "tensor=2")
    state, rank = state_of(PARTS, params_of(PARTS), "tensor=2", {}), dist.get_rank()
    with _raises(ValueError, "share rows must give the same: 0 and 1 do not"):
        train_step(state, batch._replace(tokens=batch.tokens + rank))
    state = state_of(PARTS, params_of(PARTS), "sequence=2", {})
    with _raises(ValueError, "the tokens of a row must be divisible by sequence=2, got 15"):
        train_step(state, Batch(*(z[:, :15] for z in batch)))
    state = state_of(config, params, "fsdp=2", {})
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
