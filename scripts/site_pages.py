"""Pages and files that the site has beside docs/: mkdocs calls these functions (`hooks:`).

Notebooks with their outputs, examples, the API's columns, and MathJax from its package.
"""

from __future__ import annotations

import ast
import base64
import json
import posixpath
import re
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).resolve().parent.parent
FRAMEWORKS = {"jax": "JAX", "torch": "PyTorch"}
MATHJAX = "django-static-mathjax"
_LINK = re.compile(r"\]\((?!\w+:|#)([^)\s#]+)")
_ENTRY = re.compile(r"^(twins|both|jax|torch): ([\w.]+)(?: \| ([\w.]+))?$", re.MULTILINE)


def on_files(files: Files, config) -> Files:
    """Adds what is not in docs/."""
    for source in [*ROOT.glob("notebooks/*.ipynb"), *ROOT.glob("examples/*.py")]:
        name = source.relative_to(ROOT).with_suffix(".md").as_posix()
        text, pictures = (_notebook if source.suffix == ".ipynb" else _script)(source)
        files.append(File.generated(config, name, content=text))
        for picture, content in pictures.items():
            files.append(File.generated(config, picture, content=content))
    for folder in ("notebooks", "examples"):
        for source in [*ROOT.glob(f"{folder}/**/*.md"), *ROOT.glob(f"{folder}/**/*.png")]:
            name = source.relative_to(ROOT).as_posix()
            files.append(File.generated(config, name, abs_src_path=str(source)))
    for name, path in _mathjax():
        files.append(File.generated(config, name, abs_src_path=str(path)))
    return files


def on_page_markdown(markdown: str, page, config, files: Files) -> str:
    """Writes out the API's entries, and points links to where their targets are on the site."""
    here = page.file.src_uri
    source = here if here.startswith(("notebooks/", "examples/")) else f"docs/{here}"

    def link(match: re.Match[str]) -> str:
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), match[1]))
        uri = re.sub(r"\.(ipynb|py)$", ".md", target.removeprefix("docs/"))
        if files.get_file_from_path(uri):
            return f"]({posixpath.relpath(uri, posixpath.dirname(here))}"
        outside = not target.startswith("docs/") and (ROOT / target).exists()
        return f"]({config.repo_url}/blob/main/{target}" if outside else match[0]

    return _LINK.sub(link, _ENTRY.sub(_entry, markdown))


def _entry(match: re.Match[str]) -> str:
    """`twins: NAME` in two columns; `both: NAME` once; `jax: NAME` where one twin has it."""
    kind, name, torch_name = match.groups()
    level, label = 3 + name.count("."), name.rpartition(".")[2]
    if kind != "twins":
        framework = "torch" if kind == "torch" else "jax"
        alone = "" if kind == "both" else f" ({FRAMEWORKS[kind]})"
        options = (
            f'{{heading: "{name}{alone}", toc_label: "{label}{alone}", heading_level: {level}}}'
        )
        return f"::: recurrentgemma.{framework}.{name}\n    options: {options}"
    columns = "\n".join(
        f"<div markdown>\n\n::: recurrentgemma.{path}\n\n</div>"
        for path in (f"jax.{name}", f"torch.{torch_name or name}")
    )
    title, label = (text.replace("_", "\\_") for text in (name, label))
    anchor = name.lower().replace("_", "").replace(".", "-")
    return (
        f'{"#" * level} {title} {{: #{anchor} data-toc-label="{label}" }}\n\n'
        f'<div class="twins" markdown>\n{columns}\n</div>'
    )


def _notebook(source: Path) -> tuple[str, dict[str, bytes]]:
    """A notebook as a page, and its pictures."""
    parts, pictures = [], {}
    for number, cell in enumerate(json.loads(source.read_text(encoding="utf-8"))["cells"]):
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text)
            continue
        parts.append(f"```python\n{text}\n```")
        for output in cell["outputs"]:
            if "text" in output:
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            else:
                picture = f"{source.stem}_{number}.png"
                pictures[f"notebooks/{picture}"] = base64.b64decode(output["data"]["image/png"])
                parts.append(f"![what the cell above draws]({picture})")
    return "\n\n".join(parts), pictures


def _script(source: Path) -> tuple[str, dict[str, bytes]]:
    """An example as a page: what its docstring says, how to run it, its code."""
    code = source.read_text(encoding="utf-8")
    says, _, runs = (ast.get_docstring(ast.parse(code)) or "").partition("\n\n")
    body = code.split('"""\n', 2)[-1].strip()
    text = f"# {source.name}\n\n{says}\n\n```sh\n{runs}\n```\n\n```python\n{body}\n```"
    return text, {}


def _mathjax() -> Iterator[tuple[str, Path]]:
    """MathJax's script, fonts and licence: their names on the site, and where they are."""
    try:
        package = distribution(MATHJAX)
    except PackageNotFoundError as error:
        raise PluginError(f"the site needs {MATHJAX}: pip install {MATHJAX}") from error
    folder = Path(str(package.locate_file("mathjax/static/mathjax")))
    fonts = (folder / "es5").glob("output/chtml/fonts/woff-v2/*.woff")
    for path in (folder / "LICENSE", folder / "es5/tex-chtml.js", *fonts):
        name = path.name if path.parent == folder else path.relative_to(folder / "es5")
        yield f"mathjax/{name}", path
