"""Small faults, each of which makes one twin another model."""

from __future__ import annotations

from typing import NamedTuple


class Fault(NamedTuple):
    """A replacement in one file of a twin.

    Attributes:
      name: What is wrong then.
      file: Of the package.
      old: What is there once.
      new: What takes its place.
      options: Of the `parity` run that must catch it.
      model: What `parity` runs on: a small "griffin", or an "other" model with what it lacks.
    """

    name: str
    file: str
    old: str
    new: str
    options: str = ""
    model: str = "griffin"

    @property
    def path(self) -> str:
        """From the repository's root."""
        return f"recurrentgemma/{self.file}"

    @property
    def twin(self) -> str:
        """The folder in the package: jax or torch."""
        return self.file.split("/")[0]


_J, _S = "jax/softmax.py", "torch/softmax.py"
_L, _B, _A, _N = (f"torch/{name}.py" for name in ("layers", "blocks", "attention", "scan/native"))

FAULTS = (
    # Norms
    Fault("RMSNorm: eps 1e-5", _L, "number(self.eps, x32)", "number(10 * self.eps, x32)"),
    Fault(
        "RMSNorm: eps 1e-5, looked at in bfloat16",
        _L,
        "number(self.eps, x32)",
        "number(10 * self.eps, x32)",
        "--dtype bfloat16",
    ),
    Fault("RMSNorm: scale without its 1", _L, "torch.addcmul(y, y, scale", "torch.mul(y, scale"),
    Fault(
        "RMSNorm: the mean taken off", _L, "y = x32 * rms", "y = (x32 - x32.mean(-1, True)) * rms"
    ),
    Fault(
        "residual block: no norm before the MLP",
        _B,
        "self.mlp_block(self.channel_pre_norm(x))",
        "self.mlp_block(x)",
    ),
    # Embeddings and logits
    Fault(
        "embedding: scale not rounded",
        _L,
        "x * number(self.scale, x)",
        "x * x.shape[-1] ** 0.5",
    ),
    Fault("soft cap: logits not divided by it", _L, "x = x / cap if self.soft_cap else x", "x = x"),
    Fault("soft cap: no tanh", _L, "logits.tanh_() * cap", "logits * cap"),
    Fault(
        "soft cap: tanh before the division",
        "jax/layers.py",
        "jnp.tanh(logits / cap) * cap",
        "jnp.tanh(logits) / cap * cap",
    ),
    Fault(
        "logits: rounded to bfloat16",
        _L,
        "x = x.to(wide_dtype(x.dtype))\n        cap",
        "x = x\n        cap",
        "--dtype bfloat16",
    ),
    # MLP
    Fault("MLP: gelu exact", _B, 'gelu(gate, approximate="tanh")', "gelu(gate)"),
    Fault(
        "MLP: gelu exact, looked at in bfloat16",
        _B,
        'gelu(gate, approximate="tanh")',
        "gelu(gate)",
        "--dtype bfloat16",
    ),
    Fault("MLP: halves of ffw_up swapped", _B, "gate, value = self", "value, gate = self"),
    Fault(
        "MLP: ffw_up without bias",
        _L,
        "b = None if self.b is None else self.b.flatten(1, -2)",
        "b = None",
    ),
    # Recurrent block
    Fault(
        "recurrent block: gelu exact",
        _B,
        'gelu(self.linear_y(x), approximate="tanh")',
        "gelu(self.linear_y(x))",
    ),
    Fault("convolution: taps reversed", _L, "* w[reach - k]\n", "* w[k - 1]\n"),
    Fault("convolution: no bias", _L, "x * w[reach] + b\n", "x * w[reach]\n"),
    Fault(
        "convolution: crosses documents",
        _L,
        "torch.where((segment_pos >= k)[..., None], earlier, 0)",
        "earlier",
    ),
    Fault(
        "convolution: one token short at a start",
        "jax/layers.py",
        "jnp.where((segment_pos >= k)",
        "jnp.where((segment_pos > k)",
    ),
    Fault(
        "convolution: state a step stale",
        _L,
        "extended[:, extended.shape[1] - reach :]",
        "extended[:, extended.shape[1] - reach - 1 : -1]",
    ),
    Fault(
        "convolution: state one input short",
        _L,
        "(age <= last_pos)",
        "(age < last_pos)",
    ),
    # RG-LRU
    Fault("gates: transposed", _L, "x_hzi, self.w, ", "x_hzi, self.w.mT, "),
    Fault("gates: no bias", _L, "self.w, self.b.unsqueeze(1)", "self.w, 0 * self.b.unsqueeze(1)"),
    Fault(
        "gates: the recurrence gate taken for the input gate",
        "jax/scan/gates.py",
        "multiplier * jax.nn.sigmoid(input_gate) * inputs.x",
        "multiplier * jax.nn.sigmoid(a_gate) * inputs.x",
    ),
    Fault("RG-LRU: sign inside of softplus", _N, "* softplus(a_param)", "* softplus(-a_param)"),
    Fault(
        "RG-LRU: reset ignored",
        _N,
        "half_log_a.masked_fill_((position == 0)[..., None], -torch.inf)",
        "pass",
    ),
    Fault("RG-LRU: multiplier 1 - a^2", _N, "t.neg_().sqrt_().div_(", "t.neg_().div_("),
    Fault(
        "RG-LRU: state handed on in bfloat16",
        _B,
        "RecurrentBlockCache(rg_lru_state, conv1d",
        "RecurrentBlockCache(rg_lru_state.bfloat16().to(rg_lru_state), conv1d",
    ),
    Fault(
        "RG-LRU: state of the input's dtype",
        "torch/scan/dispatch.py",
        "    wide = wide_dtype(x.dtype)\n    return x.new_zeros",
        "    wide = x.dtype\n    return x.new_zeros",
        "--dtype bfloat16",
    ),
    Fault(
        "RG-LRU: gradient of the root clipped at 1/2",
        _N,
        "clamp_(max=2 * MAX_SQRT_GRADIENT)",
        "clamp_(max=1.0)",
        "--gradients",
    ),
    Fault(
        "RG-LRU: gradient of softplus left out",
        _N,
        "drate * (-RG_LRU_C * torch.sigmoid(a_param))",
        "drate * -RG_LRU_C",
        "--gradients",
    ),
    # Attention
    Fault("attention: window of W keys", _S, "(lag_cs <= reach)", "(lag_cs < reach)"),
    Fault("attention: window of W + 2 keys", _S, "(lag_cs <= reach)", "(lag_cs <= reach + 1)"),
    Fault("attention: sees the next token", _S, "(lag_cs >= 0) & (lag", "(lag_cs >= -1) & (lag"),
    Fault(
        "attention: crosses documents",
        _S,
        "(document_bgc[..., None] == document_bgs[..., None, :])",
        "(document_bgs[..., None, :] >= 0)",
    ),
    Fault(
        "attention: scores times H^-0.49",
        _J,
        "products * mixer.scale",
        "products * mixer.scale**0.98",
    ),
    Fault("RoPE: on the wrong half", _A, "rotated, passed = x.split", "passed, rotated = x.split"),
    Fault(
        "RoPE: neighbours paired, not halves",
        _A,
        "x1, x2 = rotated.to(wide).chunk(2, -1)",
        "x1, x2 = rotated.to(wide).unflatten(-1, (-1, 2)).unbind(-1)",
    ),
    Fault(
        "RoPE: turns the other way",
        _A,
        "x1 * cos - x2 * sin, torch.addcmul(x2 * cos, x1, sin)",
        "x1 * cos + x2 * sin, torch.addcmul(x2 * cos, x1, -sin)",
    ),
    Fault("RoPE: base 1,000", _A, "rope.base**-exponent", "(rope.base / 10) ** -exponent"),
    Fault(
        "RoPE: angles in the input's dtype",
        _A,
        "    wide = wide_dtype(x.dtype)\n    sin, cos",
        "    wide = x.dtype\n    sin, cos",
        "--dtype bfloat16 --length 300",  # rounded angles grow with the position
    ),
    Fault(
        "attention: keys and values swapped in the state",
        _A,
        "keys, values = (z.contiguous()",
        "values, keys = (z.contiguous()",
    ),
    Fault(
        "attention: ring a slot stale",
        _A,
        "age = (last_pos[:, None] - torch.arange",
        "age = (last_pos[:, None] - 1 - torch.arange",
    ),
    Fault(
        "attention: tokens of earlier documents counted",
        _A,
        "torch.where(starts, num_new, cache.num_tokens + num_new)",
        "cache.num_tokens + num_new",
    ),
    # A step of decoding
    Fault(
        "decoding: the convolution's state does not move on",
        _L,
        "new_state = extended[:, 1:]",
        "new_state = extended[:, :-1]",
    ),
    Fault(
        "decoding: the ring's ages off by one",
        "torch/runtime/steps.py",
        "device=segment_pos.device) - 1) % slots",
        "device=segment_pos.device)) % slots",
    ),
    # What Griffin lacks
    Fault(
        "attention's soft cap: tanh before the division",
        _S,
        "torch.tanh(scores_zkms / mixer.soft_cap)",
        "torch.tanh(scores_zkms)",
        model="other",
    ),
    Fault("attention's soft cap: left out", _J, "if mixer.soft_cap:", "if False:", model="other"),
    Fault(
        "attention's soft cap: before the scale",
        _S,
        "(q_zkmh.to(wide) * mixer.scale) @",
        "q_zkmh.to(wide) @",
        model="other",
    ),
    Fault(
        "attention to all keys: sees the next token",
        _S,
        "(lag_cs >= 0) & (document",
        "(lag_cs >= -1) & (document",
        model="other",
    ),
    Fault(
        "attention to all keys: crosses documents",
        _J,
        "mask_bcs = (lag_cs >= 0) & (document_bc[..., None] == document_bs[:, None])",
        "mask_bcs = (lag_cs >= 0) & (document_bs[:, None] >= 0)",
        model="other",
    ),
    Fault(
        "attention to all keys: places before a block not counted",
        _S,
        "before=history + start",
        "before=start",
        model="other",
    ),
    Fault(
        "attention to all keys: a slot too many is filled",
        "jax/attention.py",
        "jnp.arange(slots) < cache.num_tokens[:, None]",
        "jnp.arange(slots) <= cache.num_tokens[:, None]",
        model="other",
    ),
    Fault(
        "attention to all keys: a step does not see its own token",
        "jax/attention.py",
        "(between < num_before) | (between == slots - 1)",
        "between < num_before",
        model="other",
    ),
    Fault(
        "QK-norm: queries as they are",
        _A,
        "self.q_norm(q_btnh), self.k_norm(k_btkh)",
        "q_btnh, self.k_norm(k_btkh)",
        model="other",
    ),
    Fault(
        "QK-norm: keys as they are",
        "jax/attention.py",
        'self.child(RMSNorm, "k_norm", mixer.head_dim)(k_btkh)',
        'self.child(RMSNorm, "k_norm", mixer.head_dim)(k_btkh) * 0 + k_btkh',
        model="other",
    ),
    Fault(
        "QK-norm: the two norms swapped",
        _A,
        "self.q_norm(q_btnh), self.k_norm(k_btkh)",
        "self.k_norm(q_btnh), self.q_norm(k_btkh)",
        model="other",
    ),
    Fault(
        "grouped heads: the first has the last one's query",
        _S,
        "args = (q_zcnh.transpose(1, 2), k_zksh",
        "args = (q_zcnh.roll(1, 2).transpose(1, 2), k_zksh",
        model="other",
    ),
    Fault(
        "grouped heads: in a step, neighbours have different keys",
        _S,
        "q_zcnh.unflatten(2, (mixer.kv_heads, -1))",
        "q_zcnh.unflatten(2, (-1, mixer.kv_heads)).transpose(2, 3)",
        model="other",
    ),
    Fault(
        "grouped heads: keys counted for groups",
        _J,
        "groups = (mixer.kv_heads, mixer.heads // mixer.kv_heads, mixer.head_dim)\n"
        "    q_zckrh = q_zcnh.reshape(*q_zcnh.shape[:-2], *groups)",
        "groups = (mixer.heads // mixer.kv_heads, mixer.kv_heads, mixer.head_dim)\n"
        "    q_zckrh = q_zcnh.reshape(*q_zcnh.shape[:-2], *groups).swapaxes(-3, -2)",
        model="other",
    ),
    Fault("RoPE: not stretched", _A, " / rope.stretch", "", model="other"),
    Fault(
        "RoPE: on a half whatever the share",
        _A,
        "x.shape[-1] * rope.share",
        "x.shape[-1] * 0.5",
        model="other",
    ),
    Fault("post norm: not after the mixer", _B, "self.temporal_post_norm(y)", "y", model="other"),
    Fault("post norm: not after the MLP", _B, "self.channel_post_norm(y)", "y", model="other"),
    Fault(
        "post norm: after the sum",
        _B,
        "x + self.temporal_post_norm(y)",
        "self.temporal_post_norm(x + y)",
        model="other",
    ),
    Fault(
        "reach: a window where there is no limit",
        _J,
        "mask_bcs = (lag_cs >= 0) &",
        "mask_bcs = (lag_cs >= 0) & (lag_cs <= 4) &",
        model="other",
    ),
    # Names of checkpoints
    Fault(
        "names: a square kernel keeps Flax's axes",
        "torch/checkpoint.py",
        "to_tensor(to_torch(spec.path, on_host))",
        "to_tensor(on_host if len(set(on_host.shape)) == 1 else to_torch(spec.path, on_host))",
    ),
    Fault(
        "names: the RG-LRU's gates exchanged",
        "torch/checkpoint.py",
        "name = torch_name(spec.path)",
        'name = torch_name(spec.path.replace("a_gate", "_gate_").replace('
        '"input_gate", "a_gate").replace("_gate_", "input_gate"))',
    ),
)
