"""A model split over processes: each has its part, and together they load and save it."""

from pathlib import Path
from typing import Any

import pytest
import tokenizers

pytest.importorskip("torch.nn", reason="torch is not installed")
import numpy as np
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torch.multiprocessing.spawn import spawn

from recurrentgemma.common.errors import DestinationError, MismatchError, TokenizerError
from recurrentgemma.common.tokenizer import Tokenizer
from recurrentgemma.torch import Griffin, load_checkpoint, load_tokenizer, save_checkpoint
from recurrentgemma.torch.sharding import shard
from tolerances import assert_close

TOKENS = np.arange(1, 13)[None]
POSITIONS = np.arange(12)[None]


def check(rank: int, world: int, store: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=world)
    mesh = init_device_mesh("cpu", (world,))
    whole = load_checkpoint(dtype=torch.float32)
    sharded = load_checkpoint(dtype=torch.float32, sharding=mesh)
    kept = 0
    parameters = whole.state_dict()
    for name, part in sharded.state_dict().items():
        assert isinstance(part, DTensor)
        local = part.to_local()
        kept += local.untyped_storage().nbytes()
        assert torch.equal(part.full_tensor(), parameters.pop(name))
    assert not parameters
    total = sum(p.nbytes for p in whole.parameters())
    assert kept <= total / world * 1.01  # where a size is odd, one process has a row more
    with torch.no_grad():
        logits, _ = sharded(TOKENS, POSITIONS)
        expected, _ = whole(TOKENS, POSITIONS)
    assert torch.equal(logits, expected)
    check_gradients(sharded, whole, rank)
    with pytest.raises(ValueError, match="either a device or a sharding"):
        load_checkpoint(device="cpu", sharding=mesh)
    check_saving(sharded, whole, rank, Path(store).with_name("saved"))
    dist.destroy_process_group()


def check_gradients(sharded: Griffin, whole: Griffin, rank: int) -> None:
    """Blocks are computed again from the parameters that are gathered again."""
    assert sharded.gradient_checkpointing
    whole.gradient_checkpointing = False
    for model, scale in ((sharded, rank + 1), (whole, 1.5)):  # FSDP takes the processes' mean
        (scale * model(TOKENS, POSITIONS)[0].square().mean()).backward()
    for name, parameter in whole.named_parameters():
        part = sharded.get_parameter(name).grad
        assert isinstance(part, DTensor)
        assert parameter.grad is not None
        gradient = part.full_tensor().numpy()
        assert_close(gradient, parameter.grad.numpy(), "gradient", "float32", name=name)
        assert gradient.any()


def check_saving(sharded: Griffin, whole: Griffin, rank: int, folder: Path) -> None:
    tokenizer = load_tokenizer()
    save_checkpoint(folder, sharded, tokenizer)
    saved = load_checkpoint(folder).state_dict()
    for name, tensor in whole.state_dict().items():
        assert torch.equal(saved.pop(name), tensor)
    assert not saved
    before = sorted(path.name for path in folder.parent.iterdir())
    error = DestinationError if rank == 0 else RuntimeError
    with pytest.raises(error, match="DestinationError: .*force=True" if rank else "force=True"):
        save_checkpoint(folder, sharded, tokenizer)
    if rank == 0:  # which by the time another looks may be writing again
        assert sorted(path.name for path in folder.parent.iterdir()) == before
    save_checkpoint(folder, sharded, tokenizer, force=True)
    check_refusing(sharded, rank, folder.with_name("refused"))


def check_refusing(sharded: Griffin, rank: int, folder: Path) -> None:
    """No process waits for another where what is to be saved is wrong."""
    pieces = ["<bos>", "<eos>", *map(str, range(2047))]
    vocab = tokenizers.models.WordLevel({piece: i for i, piece in enumerate(pieces)}, "0")
    large = Tokenizer(tokenizers.Tokenizer(vocab))
    with pytest.raises(RuntimeError if rank else TokenizerError, match="and the vocabulary 2048"):
        save_checkpoint(folder, sharded, large)
    sharded.register_parameter("extra", torch.nn.Parameter(torch.zeros(2)))
    del sharded.final_norm.scale
    with pytest.raises(MismatchError, match=r"2 differences") as caught:
        save_checkpoint(folder, sharded, load_tokenizer())
    assert "missing final_norm.scale" in str(caught.value)
    assert "unexpected extra (2,)" in str(caught.value)
    assert not folder.exists()


@pytest.mark.skipif(not dist.is_available(), reason="torch was built without distributed")
def test_sharded(tmp_path) -> None:
    spawn(check, (2, str(tmp_path / "store")), nprocs=2)


def test_a_version_of_pytorch_that_does_not_split(monkeypatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    mesh: Any = None
    with pytest.raises(RuntimeError, match=r"PyTorch 2\.10 or newer, got 2\.9\.1"):
        shard(Griffin(load_checkpoint().config, device="meta"), mesh)
