"""A step of rows whose places the host knows, beside the step that knows none."""

import copy

import pytest

pytest.importorskip("torch.nn", reason="torch is not installed")
import torch
from cases import make_config

from recurrentgemma.common.model.gemma import AttentionType, GemmaConfig
from recurrentgemma.torch import Model, attention
from recurrentgemma.torch.runtime import steps
from tolerances import assert_close

WINDOW = 8


def _gemma(version: int, **changes) -> GemmaConfig:
    return GemmaConfig(
        version=version,
        vocab_size=31,
        width=32,
        mlp_width=48,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        layer_types=(AttentionType.SLIDING, AttentionType.FULL),
        sliding_window=WINDOW + 1,
        query_pre_attn_scalar=16,
        **changes,
    )


CONFIGS = {
    "ring": make_config("RA", attention_window_size=WINDOW),
    "growing": _gemma(2, attention_soft_cap=20.0),
    "several key heads": _gemma(3),
}
# The place of each row's next token, and how many tokens of it were read.
PLACES = {
    "one place": (5, 5, 5),
    "several places": (2, 7, 5),
    "some rows past the window": (3, WINDOW, 2 * WINDOW + 3),
    "all rows past the window": (WINDOW + 1, 2 * WINDOW, 2 * WINDOW + 3),
    "padding": (-1, 4, -1),
    "padding past the window": (-1, WINDOW + 2, 3),
    "padding alone": (-1, -1, -1),
}


def states(model: Model, places: tuple[int, ...]):
    """The state after the tokens before each row's place; padding rows have read three."""
    read = [place if place >= 0 else 3 for place in places]
    longest = max(read)
    position = torch.tensor([[i - longest + n for i in range(longest)] for n in read])
    position = position.clamp(min=-1)
    tokens = torch.randint(0, 31, position.shape, generator=torch.Generator().manual_seed(0))
    return model(tokens, position, model.init_cache(len(places), capacity=32))[1]


@pytest.mark.parametrize("given_up", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
@pytest.mark.parametrize("kind", CONFIGS)
@torch.no_grad()
def test_known_places_change_nothing(
    kind: str,
    places: tuple[int, ...],
    dtype: torch.dtype,
    given_up: bool,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, name = Model(CONFIGS[kind], dtype=dtype), str(dtype).removeprefix("torch.")
    state = states(model, places)
    step = torch.arange(len(places))[:, None] + 5, torch.tensor(places)[:, None]
    given = copy.deepcopy(state)
    if given_up:
        with steps.giving_up():
            found, found_state = model(*step, given)
    else:
        found, found_state = model(*step, given)
        for block in state:  # a step is functional
            assert all(map(torch.equal, given[block], state[block]))
    monkeypatch.setattr(attention, "known_rows", lambda *_: None)
    logits, expected = model(*step, state)
    tokens = torch.tensor(places) >= 0
    assert_close(found[tokens].numpy(), logits[tokens].numpy(), "logits", name)
    assert torch.isfinite(found).all()
    for block, fields in expected.items():
        for field, value in fields._asdict().items():
            actual = getattr(found_state[block], field)
            assert_close(actual.float().numpy(), value.float().numpy(), "state", name, name=field)


@torch.no_grad()
def test_no_state_is_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Model(CONFIGS["ring"])
    state = states(model, PLACES["some rows past the window"])
    places = torch.tensor(PLACES["some rows past the window"])[:, None]
    with steps.giving_up():
        _, after = model(torch.zeros_like(places), places, state)
    for block, fields in state.items():
        if "keys" in fields._fields:
            assert after[block].keys.data_ptr() == fields.keys.data_ptr()
