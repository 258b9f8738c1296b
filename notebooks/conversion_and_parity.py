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
# # Conversion and parity
#
# Tables give every parameter's name and layout in each checkpoint format; readers and writers loop
# over them. So any format converts to any other without changing a bit, and both frameworks read
# the same model from the result. This notebook converts a model and measures whether it is the
# same. It needs `pip install ".[full,train]"`, and takes less than a minute on two CPU cores with
# the bundled model.

# %%
from recurrentgemma.common.extras import require

get_ipython().InteractiveTB.set_mode("Minimal")  # an error is one line
require("jax", "flax", "torch", "matplotlib")

# %%
import tempfile
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from recurrentgemma.common.io.checkpoint import BUNDLED
from recurrentgemma.common.model.layer_spec import layer_spec, num_parameters
from recurrentgemma.parity import compare, load_model, make_batch
from recurrentgemma_conversion import Format, convert, open_checkpoint
from recurrentgemma_conversion.convert import WRITERS
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
source = checkpoint or BUNDLED
with open_checkpoint(source) as opened:
    config, format_ = opened.config, opened.format
print(f"{source.name}: {num_parameters(config):,} values in the format {format_}")

# %% [markdown]
# ## To every format and back
#
# In a shell: `recurrentgemma convert SOURCE DESTINATION --to FORMAT`. The command reads its output
# back and compares it, bit by bit, before the folder takes its name.

# %%
folder = Path(tempfile.mkdtemp())
for to in WRITERS:
    summary = convert(source, folder / to, to)
    names = ", ".join(sorted(path.name for path in (folder / to).iterdir()))
    print(f"{to:15} {summary.bytes / 1e6:5.1f} MB of {', '.join(summary.dtypes)}: {names}")

back = convert(folder / Format.HUGGINGFACE, folder / "back", Format.RECURRENTGEMMA)
with (
    open_checkpoint(folder / Format.RECURRENTGEMMA) as one,
    open_checkpoint(folder / "back") as two,
):
    same = [one.read(spec).tobytes() == two.read(spec).tobytes() for spec in layer_spec(config)]
print(
    f"by way of Hugging Face's and back: {sum(same)} of {len(same)} parameters have the same bits"
)

# %% [markdown]
# ## The names of a parameter
#
# The table shows the first recurrent block in each format. Hugging Face stores the two halves of
# `ffw_up` as two layers; PyTorch transposes the kernels of linear layers.

# %%
for spec in layer_spec(config):
    if spec.path.startswith("blocks.0.") and ("rg_lru" in spec.path or "ffw_up" in spec.path):
        print(f"{spec.path}  {spec.shape}")
        for to in WRITERS:
            with open_checkpoint(folder / to) as opened:
                for stored in opened.layout.pieces[spec.path]:
                    print(f"    {to:15} {stored.name}  {stored.shape}")

# %% [markdown]
# ## One model in two frameworks
#
# `recurrentgemma parity` runs `compare`: both frameworks read the same tokens, past the attention
# window, in one pass, in chunks and step by step, and it compares every activation. Two right
# answers may differ only by rounding, so it measures rounding: each framework's float32 against
# float64 on the same weights. In float64, where rounding is far smaller than any mistake, the two
# must agree to 1e-10.
#
# Here JAX reads Kaggle's Flax folder and PyTorch reads Hugging Face's, so this also proves the
# conversion.

# %%
batch = make_batch(config, min(config.attention_window_size + 16, 512), seed=0)
report = compare(
    lambda: load_model("jax", folder / Format.KAGGLE_FLAX, "float32"),
    lambda: load_model("torch", folder / Format.HUGGINGFACE, "float32"),
    batch,
    "float32",
    num_greedy=0,
)
worst = max(report.rows, key=lambda row: row.share)
print("within the budget" if report.within else f"BEYOND THE BUDGET: {report.first_beyond}")
print(f"the most that any of {len(report.rows)} tensors takes of its budget: {worst.share:.0%}")
print(f"the same likeliest token at {report.argmax_agreement:.1%} of places")

# %%
rows = [row for row in report.rows if row.kind == "activation" and row.case == "one pass"]
places = np.arange(len(rows))
figure, axes = plt.subplots(figsize=(9, 4), layout="constrained")
budget = [row.error.budget for row in rows]
axes.fill_between(places, 1e-17, budget, color="#1f6f8b", alpha=0.12, linewidth=0)
for color, values in (
    ("#1f6f8b", [row.error.rms for row in rows]),
    ("#d1603d", [row.wide.rms for row in rows]),
):
    nonzero = np.where(np.array(values) > 0, values, np.nan)
    axes.semilogy(places, nonzero, "o-", markersize=4, color=color)
axes.axhline(1e-10, color="#d1603d", linestyle=":", linewidth=1)
for height, color, text in (
    (1e-5, "#1f6f8b", "shaded: four times what rounding to float32 gives"),
    (4e-8, "#1f6f8b", "JAX against PyTorch in float32"),
    (2e-10, "#d1603d", "what float64 may differ by"),
    (1e-14, "#d1603d", "JAX against PyTorch in float64"),
):
    axes.text(0, height, text, color=color)
axes.set_xticks(places, [row.name.removeprefix("blocks.") for row in rows], rotation=90)
axes.set(ylabel="difference, as a share of the values", ylim=(1e-17, 1e-4))
axes.set_title("Every activation, from the embeddings to the logits", loc="left")
axes.spines[["top", "right"]].set_visible(False)
plt.show()

# %% [markdown]
# In a shell, `recurrentgemma parity` exits with 0 if the two are one model. `recurrentgemma parity
# A B` compares two checkpoints, `recurrentgemma parity --against transformers` compares with
# Hugging Face's implementation.
