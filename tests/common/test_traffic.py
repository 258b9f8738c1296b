"""What a training step on a mesh is said to send and to compute."""

import pytest

from recurrentgemma.common.model.families import config_from_preset
from recurrentgemma.common.model.layer_spec import num_parameters
from recurrentgemma.common.traffic import traffic

TWO_B = config_from_preset("RECURRENT_GEMMA_2B_V1")


def test_each_kind() -> None:
    count = num_parameters(TWO_B)
    data = traffic(TWO_B, {"data": 8}, 64, 2048)
    assert data.collectives.keys() == {"all-reduce"}
    assert data.sent == pytest.approx(2 * 2 * count * 7 / 8, rel=1e-6)
    fsdp = traffic(TWO_B, {"fsdp": 8}, 64, 2048)
    assert fsdp.collectives.keys() == {"all-gather", "reduce-scatter", "collective-permute"}
    assert fsdp.memory == pytest.approx(data.memory / 8, rel=0.01)
    assert fsdp.operations / data.operations == pytest.approx(1.06, rel=0.01)  # the ring's logits
    assert traffic(TWO_B, {"fsdp": 8}, 64, 8192).sent == fsdp.sent  # whatever the tokens
    tensor = [traffic(TWO_B, {"tensor": 5}, 8, length).sent for length in (512, 1024)]
    assert tensor[1] == pytest.approx(2 * tensor[0], rel=1e-6)
    assert data.seconds(1e15, 1e30) == data.operations / 1e15
    assert data.seconds(1e30, 1e9) == data.sent / 1e9


def test_neighbours() -> None:
    """Griffin's devices send as much however long a row is; with global attention they do not."""
    short, long = (traffic(TWO_B, {"sequence": 8}, 8, 2048 * n) for n in (8, 64))
    assert long.collectives == short.collectives
    fsdp = traffic(TWO_B, {"fsdp": 8}, 8, 2048 * 8)
    assert short._replace(collectives=fsdp.collectives) == fsdp
    between = short.collectives["collective-permute"] - fsdp.collectives["collective-permute"]
    state, inputs = 4 * (3 * (2 * 3 + 1) + 1), 3 * 2 * 3
    keys = 3 * 2 * 2048 * 2 * 256  # forward, again, backward; two bytes; keys and values
    assert between == 8 * (18 * 2560 * (state + inputs) + 8 * keys)
    both = traffic(TWO_B, {"fsdp": 2, "sequence": 4}, 8, 2048 * 8)
    table = 256_000 * 2560 // 2 * 3 / 4 * 2  # its slice, in its whole width
    for kind, times in (("all-gather", 1), ("reduce-scatter", 2)):
        weights = both.collectives[kind] - times * table
        assert weights == pytest.approx(fsdp.collectives[kind], rel=1e-3)
    gemma = config_from_preset("GEMMA_2B")
    sent = [traffic(gemma, {"sequence": 4}, 4, n).collectives for n in (1024, 2048)]
    more = sent[1]["collective-permute"] - sent[0]["collective-permute"]
    assert more == 18 * 4 * (3 * 2 * 768 * 2 * 256)


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match=r"which is sequence\+tensor"):
        traffic(TWO_B, {"sequence": 4, "tensor": 2}, 8, 512)
    with pytest.raises(ValueError, match="tokens of a row must be divisible by sequence=8, got 12"):
        traffic(TWO_B, {"sequence": 8}, 8, 12)
    with pytest.raises(ValueError, match=r"divisible by data \* fsdp = 8, got 4"):
        traffic(TWO_B, {"fsdp": 8}, 4, 512)
