"""Measures the tiny model: bits per byte on held-out chapters, beside xz, and samples."""

import lzma
import math
from typing import NamedTuple

import numpy as np
import torch
from corpus import Corpus, Document
from rich.progress import Progress
from sentencepiece import SentencePieceProcessor
from torch import Tensor, nn
from torch.nn import functional

CHUNK = 1024
SOURCES = ("bible", "austen")
PROMPTS = (
    "In the beginning",
    "Psalm 151\n\n",
    "Jesus answered them,",
    "It is a truth universally acknowledged, that",
    "Elizabeth could not help",
    '"My dear Emma," said Mr. Knightley,',
)


class Stream(NamedTuple):
    """Documents one after another, each `<bos> text <eos>`.

    Attributes:
        tokens: int64 [N].
        positions: int64 [N], 0 at every `<bos>`: the model's `segment_pos`.
        document: int64 [N], which document a token belongs to.
    """

    tokens: np.ndarray
    positions: np.ndarray
    document: np.ndarray


def encode(vocab: SentencePieceProcessor, documents: list[Document]) -> list[np.ndarray]:
    """Each document's tokens, with `<bos>` and `<eos>`."""
    texts = vocab.EncodeAsIds([document.text for document in documents])
    return [np.array([vocab.bos_id(), *ids, vocab.eos_id()], np.int64) for ids in texts]


def pack(encoded: list[np.ndarray]) -> Stream:
    """One stream of documents, in the order given."""
    return Stream(
        np.concatenate(encoded),
        np.concatenate([np.arange(len(ids)) for ids in encoded]),
        np.concatenate([np.full(len(ids), index) for index, ids in enumerate(encoded)]),
    )


@torch.no_grad()
def bits_per_byte(
    model: nn.Module,
    vocab: SentencePieceProcessor,
    documents: list[Document],
    device: torch.device,
    progress: Progress | None = None,
) -> dict[str, float]:
    """Bits that the model needs for each byte of text, for each source and "overall".

    The model reads each document from its own start and carries its state from chunk to chunk, so
    it predicts every token from everything before it in the chapter. The sum counts all tokens of
    the text, the first after `<bos>` alone, and the `<eos>` at its end.
    """
    stream = pack(encode(vocab, documents))
    count = len(stream.tokens) - 1
    tokens, positions = (
        torch.from_numpy(part).to(device)[None] for part in (stream.tokens, stream.positions)
    )
    losses, cache = np.empty(count), None
    task = progress.add_task("validation", total=count) if progress else None
    for start in range(0, count, CHUNK):
        end = min(start + CHUNK, count)
        logits, cache = model(
            tokens=tokens[:, start:end], segment_pos=positions[:, start:end], cache=cache
        )
        loss = functional.cross_entropy(
            logits[0].float(), tokens[0, start + 1 : end + 1], reduction="none"
        )
        losses[start:end] = loss.double().cpu().numpy()
        if progress and task is not None:
            progress.update(task, completed=end)
    if progress and task is not None:
        progress.remove_task(task)
    counted = np.where(stream.positions[1:] > 0, losses, 0.0)  # the next <bos> does not count
    nats = np.bincount(stream.document[1:], counted, minlength=len(documents))
    return _rates(documents, nats / math.log(2))


def _rates(documents: list[Document], bits: np.ndarray) -> dict[str, float]:
    sizes = np.array([len(document.text.encode()) for document in documents])
    rates = {}
    for source in SOURCES:
        mask = np.array([document.source == source for document in documents])
        rates[source] = float(bits[mask].sum() / sizes[mask].sum())
    return rates | {"overall": float(bits.sum() / sizes.sum())}


def _xz_size(data: bytes) -> int:
    return len(lzma.compress(data, preset=9 | lzma.PRESET_EXTREME))


def xz_bits_per_byte(corpus: Corpus, progress: Progress | None = None) -> dict[str, dict]:
    """The same for `xz -9e`: over the held-out text "alone", and after it "saw_training" text.

    The second is fairer: it is the growth of the compressed training text when the held-out text is
    appended; xz's window of 64 MiB holds both.
    """

    def text(documents: list[Document], source: str) -> bytes:
        chosen = [d.text for d in documents if source in (d.source, "overall")]
        return "\n".join(chosen).encode()

    rates: dict[str, dict] = {"alone": {}, "saw_training": {}}
    training = text(corpus.train, "overall")
    task = progress.add_task("xz -9e", total=7) if progress else None

    def size(data: bytes) -> int:
        result = _xz_size(data)
        if progress and task is not None:
            progress.advance(task)
        return result

    base = size(training)
    for source in (*SOURCES, "overall"):
        held_out = text(corpus.valid, source)
        rates["alone"][source] = 8 * size(held_out) / len(held_out)
        rates["saw_training"][source] = 8 * (size(training + held_out) - base) / len(held_out)
    if progress and task is not None:
        progress.remove_task(task)
    return rates


@torch.no_grad()
def continue_text(
    model: nn.Module,
    vocab: SentencePieceProcessor,
    prompt: str,
    device: torch.device,
    steps: int = 120,
    temperature: float = 0.7,
    seed: int = 0,
) -> str:
    """The prompt and up to `steps` more tokens; temperature 0 always takes the likeliest."""
    generator = torch.Generator().manual_seed(seed)
    ids = [vocab.bos_id(), *vocab.EncodeAsIds(prompt)]
    tokens: Tensor = torch.tensor([ids], device=device)
    positions: Tensor = torch.arange(len(ids), device=device)[None]
    cache = None
    for _ in range(steps):
        logits, cache = model(tokens=tokens, segment_pos=positions, cache=cache)
        last = logits[0, -1].float().cpu()
        if temperature == 0:
            choice = int(last.argmax())
        else:
            weights = functional.softmax(last / temperature, -1)
            choice = int(torch.multinomial(weights, 1, generator=generator))
        if choice == vocab.eos_id():
            break
        ids.append(choice)
        tokens = torch.tensor([[choice]], device=device)
        positions = positions[:, -1:] + 1
    return vocab.DecodeIds(ids[1:])


def samples(
    model: nn.Module, vocab: SentencePieceProcessor, device: torch.device
) -> list[tuple[str, str]]:
    """A prompt and its continuation each; the first greedy, the others at temperature 0.7."""
    return [
        (prompt, continue_text(model, vocab, prompt, device, temperature=0.7 if i else 0, seed=i))
        for i, prompt in enumerate(PROMPTS)
    ]
