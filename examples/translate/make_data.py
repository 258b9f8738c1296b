"""Makes train.jsonl and valid.jsonl: short English sentences with their French translations.

    python examples/translate/make_data.py bigbench-1.0.0.tar.gz

The argument is the source package `bigbench` 1.0.0 from the Python package index, 358 MB. Download
the file by hand: `pip download` fails, since it tries to build the package. The sentences come from
MultiEmo; README.md names its authors and licence.
"""

import argparse
import collections
import hashlib
import json
import random
import re
import tarfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
SHA256 = "1bb398a5512c6d798cdebe0dfa0ac03f67f6033fa6b39c6ef71df978c7cbc5c2"
TASK = "bigbench-1.0.0/bigbench/benchmark_tasks/multiemo/all_sentence_{}/task.json"
PROMPT = "Translate this into French:\n{}\n"
PAIRS, VALIDATION = 3000, 200
FEWEST, MOST = 3, 8  # words
SENTENCE = re.compile(r"[A-Z][A-Za-z ',-]+[.?!]")
PHRASE = re.compile(r"[A-ZÀÂÇÉÈÊÎÔ][A-Za-zàâçéèêëîïôûùüœ ',-]+ ?[.?!]")
WORD = re.compile(r"[^\W\d_]+")

Pair = tuple[str, str]


def check(path: Path) -> None:
    """Ends the program unless this is the source package."""
    if not path.is_file():
        raise SystemExit(f"{path} does not exist: download the source package of bigbench 1.0.0")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != SHA256:
        raise SystemExit(f"{path} is not bigbench 1.0.0: its SHA-256 is {digest}")


def read_pairs(path: Path) -> list[Pair]:
    """All sentences with their translations, without spaces before punctuation."""
    members = {TASK.format(language): language for language in ("en", "fr")}
    signs = {"en": ".,?!", "fr": ".,"}
    texts: dict[str, list[str]] = {}
    with tarfile.open(path) as archive:
        for member in archive:
            if member.name in members:
                file = archive.extractfile(member)
                assert file is not None
                examples = json.load(file)["examples"]
                language = members[member.name]
                space = re.compile(rf"\s+([{signs[language]}])")
                texts[language] = [space.sub(r"\1", e["input"]).strip() for e in examples]
                if len(texts) == 2:
                    break
    return list(zip(texts["en"], texts["fr"], strict=True))


def choose(pairs: list[Pair]) -> list[Pair]:
    """Whole sentences of 3 to 8 words on both sides, those with the most common rarest word."""
    pairs = [
        pair
        for pair, shape in ((pair, (SENTENCE, PHRASE)) for pair in dict.fromkeys(pairs))
        if all(part.fullmatch(text) for part, text in zip(shape, pair, strict=True))
        and all(FEWEST <= len(words(text)) <= MOST for text in pair)
    ]
    pairs = list({english: (english, french) for english, french in pairs}.values())
    counts = [collections.Counter(w for pair in pairs for w in words(pair[i])) for i in (0, 1)]

    def rarest(pair: Pair) -> int:
        return min(counts[side][w] for side, text in enumerate(pair) for w in words(text))

    return sorted(pairs, key=lambda pair: (-rarest(pair), pair))[:PAIRS]


def words(text: str) -> list[str]:
    return WORD.findall(text.lower())


def write(path: Path, pairs: list[Pair]) -> None:
    lines = [
        json.dumps({"prompt": PROMPT.format(english), "completion": french}, ensure_ascii=False)
        for english, french in pairs
    ]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description="Make the data of this example.")
    parser.add_argument("sdist", type=Path, help="bigbench-1.0.0.tar.gz")
    path = parser.parse_args().sdist
    check(path)
    pairs = choose(read_pairs(path))
    random.Random(0).shuffle(pairs)
    write(HERE / "valid.jsonl", pairs[:VALIDATION])
    write(HERE / "train.jsonl", pairs[VALIDATION:])
    print(f"{len(pairs) - VALIDATION} pairs to train on, {VALIDATION} to validate with")


if __name__ == "__main__":
    main()
