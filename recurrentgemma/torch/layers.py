"""The layers under the blocks. Shapes and initial values come from the layer spec."""

from __future__ import annotations

import contextlib

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from recurrentgemma.common.model.config import GriffinConfig
from recurrentgemma.common.model.layer_spec import (
    CONV1D_WIDTH,
    layer_spec,
    sample_param,
    spec_by_path,
)
from recurrentgemma.common.model.state_dict import to_torch, torch_name, torch_shape
from recurrentgemma.torch.cache import num_padding, prepend_history
from recurrentgemma.torch.scan import as_positions, wide_dtype

_PART_ELEMENTS = 2**19  # that a part of the vocabulary has, which then stays in the cache


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager:
    """Where products keep the dtype of their factors, under `torch.autocast` too."""
    kind = device.type
    # Dynamo does not trace `torch.amp.is_autocast_available` in PyTorch 2.6 to 2.10.
    if kind != "meta" and torch.is_autocast_enabled(kind):
        return torch.autocast(kind, enabled=False)
    return contextlib.nullcontext()


class SpecModule(nn.Module):
    """A module whose parameters are declared in the layer spec under `prefix`."""

    def __init__(self, config: GriffinConfig, prefix: str) -> None:
        super().__init__()
        self.config = config
        self.prefix = prefix

    def parameter(
        self, name: str, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> nn.Parameter:
        """An uninitialised parameter of the shape that the layer spec gives."""
        spec = spec_by_path(self.config)[f"{self.prefix}.{name}"]
        return nn.Parameter(
            torch.empty(torch_shape(spec.path, spec.shape), device=device, dtype=dtype)
        )

    def linear(
        self, name: str, device: torch.device | str | None, dtype: torch.dtype | None
    ) -> nn.Linear:
        """An uninitialised linear layer of the shape that the layer spec gives."""
        specs = spec_by_path(self.config)
        in_features, out_features = specs[f"{self.prefix}.{name}.kernel"].shape
        bias = f"{self.prefix}.{name}.bias" in specs
        # On "meta" the layer's own initialisation costs nothing.
        linear = nn.Linear(in_features, out_features, bias, device="meta", dtype=dtype)
        linear.weight = self.parameter(f"{name}.kernel", device, dtype)
        if bias:
            linear.bias = self.parameter(f"{name}.bias", device, dtype)
        return linear

    @torch.no_grad()
    def reset_parameters(self, seed: int | None = None) -> None:
        """Draws initial values as the layer spec says; of parameters without values none.

        Args:
          seed: The same seed gives the same values in the JAX twin, bit for bit. `None` takes one
            from torch's global generator on the CPU.
        """
        parameters = {
            name: parameter
            for name, parameter in self.named_parameters()
            # That of a fake tensor is on no other device.
            if parameter.untyped_storage().device.type != "meta"
        }
        if not parameters:
            return
        if seed is None:
            seed = int(torch.randint(2**31, (), device="cpu"))
        prefix = f"{self.prefix}." if self.prefix else ""
        specs = {torch_name(spec.path): spec for spec in layer_spec(self.config)}
        for name, parameter in parameters.items():
            spec = specs[prefix + name]
            parameter.copy_(torch.from_numpy(to_torch(spec.path, sample_param(spec, seed))))


class RMSNorm(SpecModule):
    """y = x / sqrt(mean(x^2) + 1e-6) * (1 + scale), computed in float32."""

    def __init__(self, config: GriffinConfig, prefix: str, *, device=None, dtype=None) -> None:
        super().__init__(config, prefix)
        self.scale = self.parameter("scale", device, dtype)
        self.reset_parameters(0)

    def forward(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t d"]:
        x32 = x.to(wide_dtype(x.dtype))
        rms = torch.rsqrt(x32.square().mean(-1, keepdim=True) + 1e-6)
        return (x32 * rms * (1 + self.scale.to(x32.dtype))).to(x.dtype)


class BlockDiagonalLinear(SpecModule):
    """y_h = x_h W_h + b_h over heads h of the last axis."""

    def __init__(self, config: GriffinConfig, prefix: str, *, device=None, dtype=None) -> None:
        super().__init__(config, prefix)
        self.w = self.parameter("w", device, dtype)
        self.b = self.parameter("b", device, dtype)
        self.reset_parameters()

    def forward(self, x: Float[Tensor, "b t l"]) -> Float[Tensor, "b t l"]:
        x_hzi = x.flatten(0, 1).unflatten(-1, (self.config.num_heads, -1)).transpose(0, 1)
        y_hzj = torch.baddbmm(self.b[:, None], x_hzi, self.w)
        return y_hzj.transpose(0, 1).reshape(x.shape)


class Conv1D(SpecModule):
    """y_t = b + sum_k w_{3-k} * x_{t-k}: depthwise, causal, within a document.

    The products are summed in float32.
    """

    def __init__(self, config: GriffinConfig, prefix: str, *, device=None, dtype=None) -> None:
        super().__init__(config, prefix)
        self.w = self.parameter("w", device, dtype)
        self.b = self.parameter("b", device, dtype)
        self.reset_parameters()

    def forward(
        self,
        x: Float[Tensor, "b t l"],
        segment_pos: Int[Tensor, "b t"],
        state: Float[Tensor, "b 3 l"] | None = None,
    ) -> tuple[Float[Tensor, "b t l"], Float[Tensor, "b 3 l"]]:
        """Returns the outputs and the state after them (see `RecurrentBlockCache`)."""
        segment_pos = as_positions(segment_pos, x)
        length, reach = x.shape[1], CONV1D_WIDTH - 1
        if state is not None and length == 1:
            return self._step(x, segment_pos, state)
        if state is None:
            tokens_alone = torch.where((segment_pos >= 0)[..., None], x, 0)
            extended = nn.functional.pad(tokens_alone, (0, 0, reach, 0))
        else:
            extended = prepend_history(state, x, num_padding(segment_pos))
        wide = wide_dtype(x.dtype)
        w = self.w.to(wide)
        y = x * w[reach] + self.b.to(wide)
        for k in range(1, CONV1D_WIDTH):
            # The token at position p of its document has p tokens before it.
            earlier = extended[:, reach - k : reach - k + length]
            y = y + torch.where((segment_pos >= k)[..., None], earlier, 0) * w[reach - k]
        return y.to(x.dtype), self._new_state(extended, segment_pos, state is not None)

    def _step(self, x: Tensor, segment_pos: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
        """One token a row."""
        wide = wide_dtype(x.dtype)
        # Zeros stand for what a document has not had yet; another's are forgotten at its start.
        state = state.to(x.dtype).masked_fill((segment_pos == 0)[..., None], 0)
        extended = torch.cat([state, x], 1)
        y = (extended * self.w.to(wide)).sum(1, keepdim=True) + self.b.to(wide)
        return y.to(x.dtype), torch.where((segment_pos < 0)[..., None], state, extended[:, 1:])

    def _new_state(self, extended: Tensor, segment_pos: Tensor, continues: bool) -> Tensor:
        reach = CONV1D_WIDTH - 1
        if not segment_pos.shape[1]:
            return extended
        last_pos = segment_pos[:, -1:]
        if continues:  # a row of padding only keeps what it had
            last_pos = torch.where(last_pos < 0, reach, last_pos)
        age = torch.arange(reach - 1, -1, -1, device=extended.device)
        return torch.where((age <= last_pos)[..., None], extended[:, -reach:], 0)


class Einsum(SpecModule):
    """y_c = x W_c + b_c for each of the C matrices of the weight."""

    def __init__(self, config: GriffinConfig, prefix: str, *, device=None, dtype=None) -> None:
        super().__init__(config, prefix)
        self.w = self.parameter("w", device, dtype)
        self.b = self.parameter("b", device, dtype)
        self.reset_parameters()

    def forward(self, x: Float[Tensor, "b t d"]) -> tuple[Float[Tensor, "b t m"], ...]:
        # One product a matrix: torch.einsum would copy the weight to bring its axes together.
        x_czd = x.flatten(0, 1).expand(self.w.shape[0], -1, -1)
        y_czm = torch.baddbmm(self.b.flatten(1, 2), x_czd, self.w)
        return y_czm.unflatten(1, x.shape[:2]).unbind()


class Embedder(SpecModule):
    """Token embeddings, tied between input and output."""

    def __init__(self, config: GriffinConfig, prefix: str, *, device=None, dtype=None) -> None:
        super().__init__(config, prefix)
        self.input_embedding = self.parameter("input_embedding", device, dtype)
        self.reset_parameters()

    def encode(self, tokens: Int[Tensor, "b t"]) -> Float[Tensor, "b t d"]:
        """The embeddings, times sqrt(D) rounded to bfloat16 where the config says so."""
        x = nn.functional.embedding(tokens, self.input_embedding)
        return x * self.config.embedding_scale

    def decode(self, x: Float[Tensor, "b t d"]) -> Float[Tensor, "b t v"]:
        """Logits, soft-capped, in float32 (float64 beside float64)."""
        x, embedding, cap = (
            x.to(wide_dtype(x.dtype)),
            self.input_embedding,
            self.config.logits_soft_cap,
        )
        x = x / cap if cap else x  # before the product, where it costs less
        # In parts, since in a narrower dtype each is copied to the wide one.
        parts = (
            [embedding]
            if embedding.dtype == x.dtype
            else embedding.split(max(_PART_ELEMENTS // x.shape[-1], 1))
        )
        with without_autocast(x.device):
            logits = [nn.functional.linear(x, part.to(x.dtype)) for part in parts]
        logits = torch.cat(logits, -1) if len(logits) > 1 else logits[0]
        return logits.tanh_() * cap if cap else logits
