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
# # Fine-tuning in PyTorch: English to French
#
# This notebook shows the data, a training state, your own loop, the loss, translations before and
# after, then the same with LoRA adapters. It needs `pip install ".[torch,train]"` and runs in
# seconds on the bundled model, which has read only the Bible and Jane Austen: the few steps here
# show how training works, not how far it can go. `recurrentgemma train` does a whole run, with
# checkpoints, resuming and logs; its results on this data are in
# [examples/translate](../examples/translate/README.md).

# %%
from recurrentgemma.common.extras import require

get_ipython().InteractiveTB.set_mode("Minimal")  # an error is one line
require("torch", "matplotlib")

# %%
import copy
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch

from recurrentgemma import torch as recurrentgemma
from recurrentgemma.common.training.data import read_examples
from recurrentgemma.common.training.lora import num_trainable
from recurrentgemma.common.training.packing import RowStream, cut
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

# %%
model = recurrentgemma.load_checkpoint(checkpoint, dtype=None if checkpoint else torch.float32)
vocab = recurrentgemma.load_tokenizer(checkpoint)
sampler = recurrentgemma.Sampler(model=model, vocab=vocab)
config = model.config

# %% [markdown]
# ## The data
#
# A JSON line holds a text, a prompt with its completion, or a conversation. Here are 2,800 short
# sentences from reviews with their translations, from the MultiEmo corpus (CC BY 4.0, see
# [examples/translate](../examples/translate/README.md)). Only the completion counts in the loss.

# %%
DATA = Path("../examples/translate")
LENGTH = 128

train = cut(read_examples(DATA / "train.jsonl", vocab), LENGTH).examples
valid = cut(read_examples(DATA / "valid.jsonl", vocab), LENGTH).examples
print(len(train), "examples to train on,", len(valid), "held out")
example = train[0]
print(repr(vocab.decode(example.tokens[~example.counts].tolist())))
print(repr(vocab.decode(example.tokens[example.counts].tolist())))

# %% [markdown]
# Several examples share a row. `segment_pos` counts each one's tokens from 0; at a 0 the model
# forgets everything before it, so packed examples do not see each other. -1 is padding.

# %%
stream = RowStream(train, LENGTH, vocab.pad_id, seed=0)
batch = stream.take(4)

shown = np.where(batch.segment_pos < 0, np.nan, batch.segment_pos)
figure, axes = plt.subplots(figsize=(9, 2.2), layout="constrained")
image = axes.imshow(shown, cmap="Blues", aspect="auto", interpolation="none")
rows, places = np.nonzero(batch.weights)
axes.scatter(places, rows, s=4, color="#d1603d", label="counts in the loss")
axes.set_facecolor("#d9d9d9")
axes.set(xlabel="place in the row", yticks=range(4), ylabel="row")
axes.set_title("A batch: position in the document; grey is padding", loc="left")
axes.legend(loc="lower right", bbox_to_anchor=(1, 1), frameon=False, markerscale=2)
figure.colorbar(image, pad=0.01)
plt.show()

# %% [markdown]
# ## Before

# %%
prompts = [example.prompt for example in valid[:4]]


def translations():
    out = sampler(prompts, total_generation_steps=24)
    return [text.strip() or "(nothing: it ends the text)" for text in out.text]


before = translations()
for prompt, text in zip(prompts, before, strict=True):
    print(prompt.splitlines()[1], "->", text)

# %% [markdown]
# ## Train
#
# The optimiser works in float32 whatever the parameters' dtype; the layer spec says which
# parameters decay; and the loss is the mean over the tokens that count, and never holds the logits
# of a whole batch. `train_step` changes the given state and, without adapters, the model in it; so
# this notebook gives it a copy.

# %%
STEPS = 30
optimizer = recurrentgemma.OptimizerOptions(
    learning_rate=2e-3, weight_decay=0.01, warmup_steps=5, total_steps=STEPS
)
trained = copy.deepcopy(model)
trained.gradient_checkpointing = False  # it is small: time matters more than memory
state = recurrentgemma.create_train_state(trained, optimizer=optimizer)
stream = RowStream(train, LENGTH, vocab.pad_id, seed=0)
held_out = [RowStream(valid, LENGTH, vocab.pad_id, seed=0).take(8)]

losses, validation = [], []
for step in range(STEPS):
    if step % 10 == 0:
        validation.append((step, recurrentgemma.evaluate(state, held_out)["loss"]))
    state, metrics = recurrentgemma.train_step(state, stream.take(4))
    losses.append(float(metrics["loss"]))
validation.append((STEPS, recurrentgemma.evaluate(state, held_out)["loss"]))

# %%
figure, axes = plt.subplots(figsize=(7, 3.2), layout="constrained")
axes.plot(range(1, STEPS + 1), losses, color="#9bbcc8", label="training")
axes.plot(*zip(*validation, strict=True), "o-", color="#1f6f8b", markersize=4, label="held out")
axes.set(xlabel="step", ylabel="loss (lower is better)", ylim=(0, None))
axes.set_title("English to French", loc="left")
axes.spines[["top", "right"]].set_visible(False)
axes.legend(frameon=False)
plt.show()
print(f"held out: {validation[0][1]:.2f} before, {validation[-1][1]:.2f} after {STEPS} steps")

# %% [markdown]
# ## After

# %%
sampler = recurrentgemma.Sampler(model=recurrentgemma.parameters(state), vocab=vocab)
for prompt, text in zip(prompts, translations(), strict=True):
    print(prompt.splitlines()[1], "->", text)

# %% [markdown]
# ## Adapters instead
#
# LoRA freezes the parameters and trains two thin matrices beside each kernel. The optimiser's state
# shrinks with them, and so does the result: one small file, which both frameworks read and
# `recurrentgemma merge` merges into a checkpoint.

# %%
lora = recurrentgemma.LoraOptions(rank=8, alpha=16.0)
full, thin = num_trainable(config, None), num_trainable(config, lora)
print(f"{thin:,} values in place of {full:,}: {thin / full:.1%}")
big = recurrentgemma.GriffinConfig.from_preset("RECURRENT_GEMMA_2B_V1")
full, thin = num_trainable(big, None), num_trainable(big, lora)
print(f"of the 2B model {thin:,} in place of {full:,}: {thin / full:.2%}")

adapted = recurrentgemma.create_train_state(model, optimizer=optimizer, lora=lora)
for _ in range(8):
    adapted, metrics = recurrentgemma.train_step(adapted, stream.take(4))
after = recurrentgemma.evaluate(adapted, held_out)["loss"]
print(f"held out: {validation[0][1]:.2f} before, {after:.2f} after 8 steps of the adapters")

# %% [markdown]
# ## Keep it
#
# A checkpoint is a folder that `recurrentgemma sample --checkpoint FOLDER` takes, in either
# framework; `recurrentgemma convert` turns it into Hugging Face's or Kaggle's format.

# %%
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    recurrentgemma.save_checkpoint(folder / "french", sampler.model, vocab)
    recurrentgemma.save_adapters(folder / "adapters.safetensors", adapted)
    for file in sorted(folder.rglob("*.*")):
        if file.is_file():
            print(f"{file.relative_to(folder)!s:28} {file.stat().st_size:>12,} bytes")
