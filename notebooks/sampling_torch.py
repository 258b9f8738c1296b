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
# # Sampling in PyTorch
#
# Load a checkpoint, continue prompts, choose how to draw tokens, stream them, and keep a state. The
# notebook needs `pip install ".[torch,train]"` (`train` for the plots). It takes less than a minute
# on two CPU cores with the bundled model: a small Griffin that has read only the World English
# Bible and Jane Austen.

# %%
from recurrentgemma.common.extras import require

get_ipython().InteractiveTB.set_mode("Minimal")  # an error is one line
require("torch", "matplotlib")

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from recurrentgemma import torch as recurrentgemma
from recurrentgemma_conversion.download import default_folder, download

# %% [markdown]
# ## Which model
#
# `SOURCE = None` uses the bundled model. For RecurrentGemma itself, you must accept Google's terms
# once:
#
# 1. Log in at [Kaggle](https://www.kaggle.com/models/google/recurrentgemma) or [Hugging
#    Face](https://huggingface.co/google/recurrentgemma-2b-it), open that page and accept the
#    licence there.
# 2. Give this machine a token: `~/.kaggle/kaggle.json` from [Kaggle's
#    settings](https://www.kaggle.com/settings), or `hf auth login`.
# 3. `pip install ".[hub]"`, set `SOURCE` below, and run the notebook again. The cell does what
#    `recurrentgemma download SOURCE` does in a shell, and one line says if something is missing.

# %%
SOURCE = None  # or "kaggle:google/recurrentgemma/pyTorch/2b-it", "hf:google/recurrentgemma-2b-it"

checkpoint = None if SOURCE is None else default_folder(SOURCE)
if checkpoint is not None and not checkpoint.exists():
    download(SOURCE, checkpoint)

# %% [markdown]
# A checkpoint of any format loads in the same way: Kaggle's, Hugging Face's, or our own. On a CPU,
# float32 is faster than the bfloat16 of the stored weights.

# %%
device = "cuda" if torch.cuda.is_available() else "cpu"
dtype = torch.float32 if device == "cpu" else None
model = recurrentgemma.load_checkpoint(checkpoint, dtype=dtype, device=device)
vocab = recurrentgemma.load_tokenizer(checkpoint)
sampler = recurrentgemma.Sampler(model=model, vocab=vocab)
config = model.config
print(f"{config.num_layers} blocks of width {config.width}, {vocab.size} pieces")
print(f"a window of {config.attention_window_size} tokens")

# %% [markdown]
# ## Continue prompts
#
# A batch may mix lengths, and each row stops at its own end. By default the sampler takes the
# likeliest token.
#
# On a GPU the sampler captures the decode step as a CUDA graph; `Sampler(..., jit_compile=True)`
# compiles it with `torch.compile` first.

# %%
prompts = ["In the beginning", "It is a truth universally acknowledged, that", "Emma"]
out = sampler(prompts, total_generation_steps=40)
for prompt, text in zip(prompts, out.text, strict=True):
    print(f"{prompt}|{text}\n")

# %% [markdown]
# If the sampler always takes the likeliest token, the text soon repeats itself. Random draws avoid
# this. The same seed gives the same text, in JAX and in PyTorch; with one seed for each prompt, a
# prompt's text is the same alone and in any batch.

# %%
drawn = recurrentgemma.Categorical(temperature=0.7, top_k=40)
out = sampler(["Emma was"], total_generation_steps=50, sampling=drawn, rng=1, num_samples=3)
for text in out.text:
    print(f"Emma was|{text}\n")

# %% [markdown]
# ## What the choice does
#
# `num_logprobs` reports the model's likeliest tokens at every step. Temperature makes the
# distribution steeper or flatter, `top_p` cuts off its tail: here for the word after one prompt.

# %%
prompt = "She was very"
out = sampler([prompt], total_generation_steps=1, num_logprobs=vocab.size - 1)
likeliest = out.logprobs[0].top_tokens[0, :16]
logprobs = np.asarray(out.logprobs[0].top[0], np.float64)

figure, axes = plt.subplots(1, 3, figsize=(10, 3.6), sharex=True, sharey=True, layout="constrained")
for axis, temperature in zip(axes, (0.5, 1.0, 1.5), strict=True):
    weights = np.exp(logprobs / temperature)
    probabilities = weights / weights.sum()
    kept = np.cumsum(probabilities) - probabilities < 0.9
    colors = ["#1f6f8b" if keep else "#c9d6db" for keep in kept[:16]]
    axis.barh(range(16), probabilities[:16], color=colors)
    axis.set_title(f"temperature {temperature}: {kept.sum()} tokens\nmake up 90 %", loc="left")
    axis.set_xlabel("probability")
    axis.spines[["top", "right"]].set_visible(False)
axes[0].set_yticks(
    range(16), [repr(vocab.vocab.id_to_piece(int(t)).replace("\u2581", " ")) for t in likeliest]
)
axes[0].invert_yaxis()
figure.suptitle(f"{prompt} ...", x=0.01, ha="left")
plt.show()

# %% [markdown]
# ## A token at a time

# %%
for _, text in sampler.stream("My dear Fanny,", total_generation_steps=40, stop_strings=["\n\n"]):
    print(text, end="", flush=True)

# %% [markdown]
# ## What the model thinks of a text
#
# `score` gives the log-probability of each token after the tokens before it. In bits, it says how
# much the token surprises the model.

# %%
text = (
    "In the beginning, God created the heavens and the earth. The earth was formless and empty. "
    'God said, "Let there be a large popcorn," and there was light.'
)
(score,) = sampler.score([text])
bits = -score.logprobs / np.log(2)
pieces = [vocab.vocab.id_to_piece(token).replace("\u2581", "\u00b7") for token in score.tokens]

figure, axis = plt.subplots(figsize=(11, 2.8), layout="constrained")
axis.bar(range(len(bits)), bits, color=plt.colormaps["YlOrRd"](np.clip(bits / 12, 0.15, 1)))
axis.set_xticks(range(len(bits)), pieces, rotation=90, family="monospace")
axis.set(ylabel="surprise, bits", xlim=(-1, len(bits)))
axis.set_title(
    f"{-score.total / np.log(2):.0f} bits, perplexity {score.perplexity:.0f} a token", loc="left"
)
axis.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# ## A state is a text that the model has read
#
# Read a text once: its state has a constant size, you can continue it in many ways, and you can
# save it to a file that the other framework reads too.

# %%
chapter = Path("texts/emma_22.txt").read_text(encoding="utf-8")
for length in (100, 1000, 4000):
    state = sampler.prefill(chapter[:length])
    print(f"{length:5} characters, {state.num_tokens[0]:4} tokens: {state.nbytes:,} bytes")

for more in ("\n\nMr. Elton", '\n\n"Oh!" said Emma,'):
    longer = sampler.prefill(more, state)
    out = sampler.generate(longer, total_generation_steps=30)
    print(f"{more.strip()}|{out.text[0]}\n")

with tempfile.TemporaryDirectory() as folder:
    sampler.save_state(Path(folder) / "emma.safetensors", longer)
    loaded = sampler.load_state(Path(folder) / "emma.safetensors")
print("from the file:", sampler.generate(loaded, total_generation_steps=30).text == out.text)

# %% [markdown]
# ## Conversations
#
# Instruction-tuned checkpoints (`2b-it`, `9b-it`) talk in turns; each turn reads only the new text.
# The bundled model has the turn marks in its vocabulary but was never trained on them, so this cell
# waits for `SOURCE`.

# %%
if SOURCE is not None:
    chat = recurrentgemma.Conversation(sampler)
    for text in chat.send("Why is a state of one size useful?", total_generation_steps=200):
        print(text, end="", flush=True)
