"""The layers under the blocks, each built from its sizes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from recurrentgemma.common.model import params
from recurrentgemma.common.model.layer_spec import sample_param
from recurrentgemma.common.model.numerics import RMS_EPS
from recurrentgemma.common.model.params import ParamSpec
from recurrentgemma.common.model.state_dict import to_torch, torch_name, torch_shape
from recurrentgemma.common.published import TORCH_LAYERS, elsewhere
from recurrentgemma.torch.cache import Hidden, Positions, num_padding, prepend_history
from recurrentgemma.torch.products import dense, lookup, product
from recurrentgemma.torch.quantization import QuantizedMatrix
from recurrentgemma.torch.runtime.arrays import as_dtype
from recurrentgemma.torch.runtime.known import inside_documents, number
from recurrentgemma.torch.runtime.neighbours import Before
from recurrentgemma.torch.runtime.split_tensors import part_of
from recurrentgemma.torch.runtime.teams import ALONE, AXIS, SplitOf, Team
from recurrentgemma.torch.scan import as_positions, wide_dtype

MATRICES = "...td,cdD->c...tD"  # x W_c for each matrix of a stack


class SpecModule(nn.Module):
    """A module that keeps the specs of its own parameters, from which they are drawn.

    Attributes:
      team: The processes that compute it together.
    """

    team: Team = ALONE

    def __init__(
        self,
        specs: Iterable[ParamSpec] = (),
        device: str | torch.device | None = "meta",
        dtype=None,
    ) -> None:
        super().__init__()
        self.declare(specs, dtype)
        self.materialise(device)

    def declare(self, specs: Iterable[ParamSpec], dtype: torch.dtype | None) -> None:
        """Makes parameters on "meta", without values; `materialise` gives them theirs."""
        self.specs = tuple(specs)
        for spec in self.specs:
            shape = torch_shape(spec.path, spec.shape)
            parameter = nn.Parameter(torch.empty(shape, device="meta", dtype=dtype))
            self.register_parameter(torch_name(spec.path), parameter)

    def extra_repr(self) -> str:
        return ", ".join(f"{spec.path} {list(spec.shape)}" for spec in self.specs)

    def _join(self, team: Team, split: SplitOf) -> None:
        """Computes its part in a team from now on; its parameters are this process's parts."""
        del split
        self.team = team

    def materialise(self, device: torch.device | str | None) -> None:
        """Allocates all parameters on a device and draws them; on "meta" nothing happens."""
        # Not `get_default_device`, which fails in PyTorch 2.6 once a default was taken back.
        device = torch.empty(()).device if device is None else torch.device(device)
        if device.type == "meta":
            return
        for module in self.modules():  # not `to_empty`, which cannot replace fake tensors
            for name, parameter in module.named_parameters(recurse=False):
                setattr(module, name, nn.Parameter(torch.empty_like(parameter, device=device)))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Draws initial values as the specs say, for parameters that are not on "meta".

        Args:
          seed: The same seed gives the same values in the JAX twin, bit for bit. `None` takes one
            from torch's global generator on the CPU.
        """
        drawn = [
            (spec._replace(path=f"{prefix}.{spec.path}" if prefix else spec.path), parameter)
            for prefix, module in self.named_modules()
            for spec in (module.specs if isinstance(module, SpecModule) else ())
            if isinstance(parameter := getattr(module, torch_name(spec.path)), Tensor)
            # The storage of a fake tensor is on no other device.
            and parameter.untyped_storage().device.type != "meta"
        ]
        if seed is None:
            seed = int(torch.randint(2**31, (), device="cpu")) if drawn else 0
        for spec, parameter in drawn:
            value = torch.from_numpy(to_torch(spec.path, sample_param(spec, seed)))
            parameter.copy_(part_of(value.to(parameter.dtype), parameter))


class Linear(nn.Linear, SpecModule):
    """y = x W + b; on "meta" until the block around it materialises."""

    def __init__(
        self, width: int, width_out: int, bias: bool = True, variance: float = 1.0, dtype=None
    ) -> None:
        super().__init__(width, width_out, bias, device="meta", dtype=dtype)
        self.declare(params.linear((width, width_out), variance=variance, bias=bias), dtype)

    def reset_parameters(self, seed: int | None = None) -> None:
        """As `SpecModule`, whose method `nn.Linear` hides."""
        SpecModule.reset_parameters(self, seed)

    def _join(self, team: Team, split: SplitOf) -> None:
        """As `SpecModule`; only parts of the inputs need the others' results."""
        if split("weight")[0] == AXIS:
            self.team = team

    def forward(self, input: Float[Tensor, "*b i"]) -> Float[Tensor, "*b j"]:
        if self.team is ALONE:
            return product(input, self.weight, self.bias, axis=-1)
        y = self.team.total(product(input, self.weight, axis=-1))
        return y if self.bias is None else y + self.bias


class RMSNorm(SpecModule):
    """y = x / sqrt(mean(x^2) + eps) * (1 + scale), computed in float32."""

    scale: nn.Parameter

    def __init__(self, width: int, eps: float = RMS_EPS, device=None, dtype=None) -> None:
        super().__init__(params.rms_norm(width), device, dtype)
        self.eps = eps

    def _join(self, team: Team, split: SplitOf) -> None:
        """The norm is of the whole stream; `AttentionBlock` says which norms are of its part."""

    def forward(self, x: Float[Tensor, "*b d"]) -> Float[Tensor, "*b d"]:
        x32, scale = as_dtype(wide_dtype(x.dtype), x, self.team.shared(self.scale))
        rms = torch.rsqrt((x32 * x32).mean(-1, keepdim=True) + number(self.eps, x32))
        y = x32 * rms
        return torch.addcmul(y, y, scale).to(x.dtype)


class BlockDiagonalLinear(SpecModule):
    """y_h = x_h W_h + b_h over blocks h of the last axis."""

    w: nn.Parameter | QuantizedMatrix
    b: nn.Parameter

    def __init__(
        self, width: int, num_blocks: int, w_init_variance_scale=1.0, device=None, dtype=None
    ) -> None:
        specs = params.block_diagonal(width, num_blocks, variance=w_init_variance_scale)
        super().__init__(specs, device, dtype)

    def forward(self, x: Float[Tensor, "*b l"]) -> Float[Tensor, "*b l"]:
        x_hzi = x.reshape(-1, len(self.b), x.shape[-1] // len(self.b)).transpose(0, 1)
        y_hzj = product(x_hzi, self.w, self.b.unsqueeze(1))
        return y_hzj.transpose(0, 1).reshape(x.shape)


class Conv1D(SpecModule):
    """y_t = b + sum_k w_{taps-1-k} x_{t-k}, depthwise and causal in a document, in float32."""

    w: nn.Parameter
    b: nn.Parameter

    def __init__(
        self, width: int, temporal_width: int, w_init_variance_scale=0.01, device=None, dtype=None
    ) -> None:
        specs = params.conv_1d(width, temporal_width, w_init_variance_scale)
        super().__init__(specs, device, dtype)

    def forward(
        self, x: Hidden, segment_pos: Positions, cache: Any = None, return_cache: bool = True
    ) -> tuple[Hidden, Any]:
        """Returns the outputs and the state after them (see `RecurrentBlockCache`)."""
        segment_pos = as_positions(segment_pos, x)
        length, reach, wide = x.shape[1], len(self.w) - 1, wide_dtype(x.dtype)
        w, b = as_dtype(wide, self.w, self.b)
        if cache is not None and length == 1 and not isinstance(cache, Before):
            y, new_cache = _step(x, segment_pos, cache, w, b)
            return y, new_cache if return_cache else None
        if isinstance(cache, Before):
            extended = cache.extended(x, reach)
        elif cache is None:
            tokens_alone = torch.where((segment_pos >= 0)[..., None], x, 0)
            extended = nn.functional.pad(tokens_alone, (0, 0, reach, 0))
        else:
            extended = prepend_history(cache, x, num_padding(segment_pos))
        y = x * w[reach] + b
        for k in range(1, reach + 1):
            # The token at position p of its document has p tokens before it.
            earlier = extended[:, reach - k : reach - k + length]
            y = y + torch.where((segment_pos >= k)[..., None], earlier, 0) * w[reach - k]
        new_cache = _new_state(extended, segment_pos, reach, cache is not None)
        return y.to(x.dtype), new_cache if return_cache else None


def _step(
    x: Tensor, segment_pos: Tensor, state: Tensor, w: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """One token a row."""
    # Zeros stand for inputs that the document lacks; its start forgets another document's.
    (state,), inside = as_dtype(x.dtype, state), inside_documents(segment_pos)
    if not inside:
        state = state.masked_fill((segment_pos == 0)[..., None], 0)
    extended = torch.cat([state, x], 1)
    (y,) = as_dtype(x.dtype, (extended * w).sum(1, keepdim=True) + b)
    new_state = extended[:, 1:]
    if not inside:
        new_state = torch.where((segment_pos < 0)[..., None], state, new_state)
    return y, new_state


def _new_state(extended: Tensor, segment_pos: Tensor, reach: int, continues: bool) -> Tensor:
    if not segment_pos.shape[1]:
        return extended
    last_pos = segment_pos[:, -1:]
    if continues:  # a row of padding only keeps what it had
        last_pos = torch.where(last_pos < 0, reach, last_pos)
    age = torch.arange(reach - 1, -1, -1, device=extended.device)
    return torch.where((age <= last_pos)[..., None], extended[:, extended.shape[1] - reach :], 0)


class Einsum(SpecModule):
    """y = einsum(eqn, x, w) + b."""

    w: nn.Parameter | QuantizedMatrix
    b: nn.Parameter | None

    def __init__(
        self,
        w_shape: Sequence[int],
        b_shape: Sequence[int] | None,
        eqn: str,
        w_init_variance_scale=1.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(params.einsum(w_shape, b_shape, w_init_variance_scale), device, dtype)
        self.eqn = eqn
        if b_shape is None:
            self.register_parameter("b", None)

    def forward(self, x: Shaped[Tensor, "..."]) -> Shaped[Tensor, "..."]:
        if self.eqn != MATRICES:
            y = torch.einsum(self.eqn, x, dense(self.w))
            return y if self.b is None else y + self.b
        # One product a matrix: torch.einsum would copy the weight to bring its axes together.
        b = None if self.b is None else self.b.flatten(1, -2)
        y_czm = product(x.flatten(0, -2)[None], self.w, b)
        return y_czm.view(len(y_czm), *x.shape[:-1], y_czm.shape[-1])


class Embedder(SpecModule):
    """Token embeddings, tied between input and output."""

    input_embedding: nn.Parameter | QuantizedMatrix

    def __init__(
        self,
        vocab_size: int,
        embed_dim: int,
        scale: float = 1.0,
        soft_cap: float = 0.0,
        device=None,
        dtype=None,
    ) -> None:
        super().__init__(params.embedder(vocab_size, embed_dim), device, dtype)
        self.scale, self.soft_cap = scale, soft_cap

    def encode(self, tokens: Int[Tensor, "b t"]) -> Hidden:
        """The embeddings, times the scale in their dtype."""
        x = self.team.looked_up(lookup, self.input_embedding, tokens)
        return x * number(self.scale, x)  # a plain number is not rounded

    def decode(self, x: Hidden) -> Float[Tensor, "b t v"]:
        """Logits, soft-capped, in float32 (float64 beside float64)."""
        x = self.team.shared(x)
        x = x.to(wide_dtype(x.dtype))
        cap = number(self.soft_cap, x)
        x = x / cap if self.soft_cap else x  # before the product, where it costs less
        logits = product(x, self.team.local(self.input_embedding), axis=-1, dtype=x.dtype)
        return self.team.joined(logits.tanh_() * cap if self.soft_cap else logits)


__getattr__ = elsewhere(__name__, TORCH_LAYERS)
