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
# # Fine-tuning in JAX: English to French
#
# This notebook shows the data, a training state, your own loop, the loss, translations before and
# after, then the same with LoRA adapters. It needs `pip install ".[jax,train]"` and takes one to
# two minutes on two CPU cores with the bundled model, which has read only the Bible and Jane
# Austen. `recurrentgemma train` does a whole run, with checkpoints, resuming and logs;
# [examples/translate](../examples/translate/README.md) has its results on sentences from reviews.

# %%
from recurrentgemma.common.extras import require

get_ipython().InteractiveTB.set_mode("Minimal")  # an error is one line
require("jax", "flax", "optax", "matplotlib")

# %%
import itertools
import json
import random
import tempfile
from pathlib import Path

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np

from recurrentgemma import jax as recurrentgemma
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
SOURCE = None  # or "kaggle:google/recurrentgemma/flax/2b-it", "hf:google/recurrentgemma-2b-it"

checkpoint = None if SOURCE is None else default_folder(SOURCE)
if checkpoint is not None and not checkpoint.exists():
    download(SOURCE, checkpoint)

# %%
model, params = recurrentgemma.load_checkpoint(
    checkpoint, dtype=None if checkpoint else jnp.float32
)
vocab = recurrentgemma.load_tokenizer(checkpoint)
sampler = recurrentgemma.Sampler(model=model, vocab=vocab, params=params)
config = model.config

# %% [markdown]
# ## The data
#
# A JSON line holds a text, a prompt with its completion, or a conversation; only the completion
# counts in the loss. A small grammar makes the sentences here. In French the adjective takes the
# noun's gender, which English does not show. A hundred sentences are held out: training never sees
# them.

# %%
NOUNS = {
    "le": {"bed": "lit", "garden": "jardin", "book": "livre", "wall": "mur", "path": "chemin"},
    "la": {"house": "maison", "room": "chambre", "street": "rue", "door": "porte", "town": "ville"},
}
ADJECTIVES = {
    "small": "petit", "big": "grand", "green": "vert", "black": "noir",
    "open": "ouvert", "round": "rond", "cold": "froid", "heavy": "lourd",
}  # fmt: skip
ADVERBS = {"": "", "very ": "très ", "too ": "trop "}
VERBS = {("is", "are"): ("est", "sont"), ("was", "were"): ("était", "étaient")}

pairs = []
for plural, (article, nouns) in itertools.product((0, 1), NOUNS.items()):
    words = itertools.product(*(table.items() for table in (nouns, VERBS, ADVERBS, ADJECTIVES)))
    for (noun, nom), (verbs, verbes), (adverb, adverbe), (adjective, adjectif) in words:
        ending = "e" * (article == "la") + "s" * plural
        english = f"The {noun}{'s' * plural} {verbs[plural]} {adverb}{adjective}."
        french = f"{nom}{'s' * plural} {verbes[plural]} {adverbe}{adjectif}{ending}."
        french = f"{'Les' if plural else article.title()} {french}"
        pairs.append({"prompt": f"English: {english}\nFrench:", "completion": f" {french}"})
random.Random(0).shuffle(pairs)

LENGTH = 128

with tempfile.TemporaryDirectory() as folder:
    file = Path(folder) / "pairs.jsonl"
    file.write_text("\n".join(map(json.dumps, pairs)), encoding="utf-8")
    examples = cut(read_examples(file, vocab), LENGTH).examples
valid, train = examples[:100], examples[100:]
print(len(train), "examples to train on,", len(valid), "held out")
print(json.dumps(pairs[100], ensure_ascii=False))

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
held_out = pairs[:100]


def translations(pairs):
    out = sampler([pair["prompt"] for pair in pairs], 32, stop_strings=["\n"])
    return [text.strip() or "(nothing: it ends the text)" for text in out.text]


for pair, text in zip(held_out[:8], translations(held_out[:8]), strict=True):
    print(pair["prompt"].splitlines()[0], "->", text)

# %% [markdown]
# ## Train
#
# The optimiser works in float32 whatever the parameters' dtype; the layer spec says which
# parameters decay; and the loss is the mean over the tokens that count, and never holds the logits
# of a whole batch. `train_step` uses up the given state (the new state takes its memory); continue
# with the state that it returns.

# %%
STEPS = 120
optimizer = recurrentgemma.OptimizerOptions(
    learning_rate=2e-3, weight_decay=0.01, warmup_steps=10, total_steps=STEPS
)
trained = model.clone(gradient_checkpointing=False)  # it is small: time matters more than memory
state = recurrentgemma.create_train_state(trained, params, optimizer=optimizer)
stream = RowStream(train, LENGTH, vocab.pad_id, seed=0)
validation_batch = RowStream(valid, LENGTH, vocab.pad_id, seed=0).take(16)

losses, validation = [], []
for step in range(STEPS):
    if step % 20 == 0:
        validation.append((step, recurrentgemma.evaluate(state, [validation_batch])["loss"]))
    state, metrics = recurrentgemma.train_step(state, stream.take(6))
    losses.append(float(metrics["loss"]))
validation.append((STEPS, recurrentgemma.evaluate(state, [validation_batch])["loss"]))

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
sampler.params = recurrentgemma.parameters(state)
after = translations(held_out)
for pair, text in zip(held_out[:8], after[:8], strict=True):
    print(pair["prompt"].splitlines()[0], "->", text)
right = sum(text == pair["completion"].strip() for pair, text in zip(held_out, after, strict=True))
print(f"\n{right} of {len(held_out)} sentences that training never saw are right, word for word")

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

adapted = recurrentgemma.create_train_state(trained, params, optimizer=optimizer, lora=lora)
for _ in range(8):
    adapted, metrics = recurrentgemma.train_step(adapted, stream.take(4))
loss = recurrentgemma.evaluate(adapted, [validation_batch])["loss"]
print(f"held out: {validation[0][1]:.2f} before, {loss:.2f} after 8 steps of the adapters")

# %% [markdown]
# ## Keep it
#
# A checkpoint is a folder that `recurrentgemma sample --checkpoint FOLDER` takes, in either
# framework; `recurrentgemma convert` turns it into Hugging Face's or Kaggle's format.

# %%
with tempfile.TemporaryDirectory() as name:
    folder = Path(name)
    recurrentgemma.save_checkpoint(folder / "french", config, sampler.params, vocab)
    recurrentgemma.save_adapters(folder / "adapters.safetensors", adapted)
    for file in sorted(folder.rglob("*.*")):
        if file.is_file():
            print(f"{file.relative_to(folder)!s:28} {file.stat().st_size:>12,} bytes")
