"""`recurrentgemma download`, against a stand-in for the site on this machine.

The sites' libraries run in processes of their own, which are told where the stand-in is.
"""

import contextlib
import errno
import hashlib
import http.server
import io
import json
import os
import socket
import struct
import sys
import tarfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import CONFIGS, files, write_checkpoint
from forks import Forked, ForkServer

from recurrentgemma.common.errors import DiskSpaceError, DownloadError
from recurrentgemma_conversion import Format, open_checkpoint
from recurrentgemma_conversion.download import default_folder, download

COMMIT = "0" * 40
HUB = "huggingface_hub"
HF, KAGGLE = "hf:google/recurrentgemma-2b-it", "kaggle:google/recurrentgemma/flax/2b-it"


class Site(http.server.ThreadingHTTPServer):
    """Serves a folder as both sites would, or refuses.

    Its weights may be "reset", the connection lost on the way, or "damaged", with another checksum.
    """

    folder: Path
    status = 200
    weights = "whole"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Site  # pyright: ignore[reportIncompatibleVariableOverride]

    def log_message(self, format, *args) -> None:
        """Nothing."""

    def do_HEAD(self) -> None:
        self.do_GET()

    body: bytes = b""

    def do_POST(self) -> None:
        self.body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.do_GET()

    def do_GET(self) -> None:
        status, headers, body = self.server.status, {}, b""
        if status == 200:
            status, headers, body = self.answer()
        elif status in (401, 403):
            headers["X-Error-Code"] = "GatedRepo"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        weights = status == 200 and len(body) > 100_000
        if weights and self.server.weights == "damaged":
            self.send_header("x-goog-hash", "md5=AAAAAAAAAAAAAAAAAAAAAA==")
        self.end_headers()
        if self.command == "HEAD":
            return
        if weights and self.server.weights == "reset":
            body = body[:1000]
            linger = struct.pack("ii", 1, 0)
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
            self.close_connection = True
        self.wfile.write(body)

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        path, content = self.path.partition("?")[0], files(self.server.folder)
        if path.startswith("/api/models/google/recurrentgemma-2b-it/tree/"):
            tree = [
                {"type": "file", "path": name, "size": len(data), "oid": git_id(data)}
                for name, data in content.items()
            ]
            return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()
        if path.startswith("/api/models/google/recurrentgemma-2b-it"):
            siblings = [{"rfilename": name, "size": len(data)} for name, data in content.items()]
            info = {"id": "google/recurrentgemma-2b-it", "sha": COMMIT, "siblings": siblings}
            info |= {"modelId": info["id"], "private": False, "tags": [], "downloads": 0}
            return 200, {"Content-Type": "application/json"}, json.dumps(info).encode()
        if path.startswith("/google/recurrentgemma-2b-it/resolve/"):
            data = content[path.split("/", 5)[5]]
            return 200, {"ETag": f'"{git_id(data)}"', "X-Repo-Commit": COMMIT}, data
        json_type = {"Content-Type": "application/json"}
        if path.endswith("/GetModelInstance"):
            return 200, json_type, b'{"versionNumber": 1}'
        if path.endswith("/ListModelInstanceVersionFiles"):
            few = [] if len(content) > 25 else [{"name": name} for name in content]
            more = {"nextPageToken": "more"} if len(content) > 25 else {}
            return 200, json_type, json.dumps({"files": few} | more).encode()
        if path.endswith("/DownloadModelInstanceVersion"):
            wanted = json.loads(self.body).get("path")
            return 200, {}, content[wanted] if wanted else archive(self.server.folder)
        return 404, {}, b""


def archive(folder: Path) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:gz") as tar:
        for file in folder.iterdir():
            tar.add(file, file.name)
    return data.getvalue()


def git_id(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


@pytest.fixture(scope="module")
def server() -> Iterator[Site]:
    with Site(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def site(server: Site) -> Site:
    """It answers, and has no folder yet."""
    server.status, server.weights = Site.status, Site.weights
    return server


@pytest.fixture(scope="module")
def imported(forks: ForkServer, server: Site, tmp_path_factory) -> tuple[ForkServer, dict]:
    """Commands whose libraries are imported once, and the environment that these read then."""
    endpoint, home = f"http://127.0.0.1:{server.server_port}", tmp_path_factory.mktemp("home")
    sites = {"HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
    # kagglehub lets a stand-in have the name of this machine, and no port of its own.
    sites |= {"KAGGLE_API_ENVIRONMENT": "LOCALHOST", "KAGGLEHUB_CACHE": str(home)}
    sites |= {"HF_HOME": str(home), "KAGGLE_CONFIG_DIR": str(home)}
    # kagglehub is not among them: its messages go where stdout went when it was imported.
    for name in ("huggingface_hub._snapshot_download", "kagglesdk", "IPython", "yaml"):
        forks.import_module(name, sites)
    kept = {n: v for n, v in os.environ.items() if not n.startswith(("HF_", "KAGGLE"))}
    return forks, kept | sites


def through(port: int) -> dict[str, str]:
    """The environment in which a port of this machine is asked for any address."""
    endpoint = f"http://127.0.0.1:{port}"
    return {"HTTP_PROXY": endpoint, "http_proxy": endpoint, "NO_PROXY": "", "no_proxy": ""}


@pytest.fixture
def run(imported: tuple[ForkServer, dict], tmp_path: Path, site: Site) -> Callable[..., Forked]:
    """Runs `recurrentgemma download` against the stand-in."""
    forks, sites = imported

    def download(source: str, *args: str, **env: str) -> Forked:
        proxies = through(site.server_port) if source == KAGGLE else {}
        return forks.run("download", source, *args, cwd=tmp_path, env=sites | proxies | env)

    return download


def assert_refused(done: Forked, tmp_path: Path, *words: str) -> None:
    assert (done.returncode, done.stdout) == (2, ""), done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("recurrentgemma: error: ")
    assert all(word in last for word in words), last
    assert {path.name for path in tmp_path.iterdir()} <= {"source"}


def test_hugging_face(run, tmp_path: Path, site: Site) -> None:
    site.folder = write_checkpoint(tmp_path / "source", Format.HUGGINGFACE)
    (site.folder / "recurrentgemma.gguf").write_text("not wanted")
    done = run(HF)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"recurrentgemma-2b-it: huggingface from {HF}\n"
    (site.folder / "recurrentgemma.gguf").unlink()
    assert files(tmp_path / "recurrentgemma-2b-it") == files(site.folder)
    with open_checkpoint(tmp_path / "recurrentgemma-2b-it") as reader:
        assert reader.config == CONFIGS["griffin"]
    done = run(HF)
    assert "exists; pass --force" in done.stderr
    done = run(HF, "elsewhere", "--json")
    assert json.loads(done.stdout) == {
        "source": HF,
        "destination": "elsewhere",
        "format": "huggingface",
    }


def test_refusals_of_hugging_face(run, tmp_path: Path, site: Site) -> None:
    site.folder = tmp_path / "source"
    site.status = 401
    assert_refused(run(HF), tmp_path, "needs credentials: hf auth")
    site.status = 403
    done = run(HF, HF_TOKEN="hf_x")
    assert_refused(done, tmp_path, "licence is not accepted", "huggingface.co/google/recurrent")
    with contextlib.closing(socket.socket()) as unused:
        unused.bind(("127.0.0.1", 0))
        done = run(HF, **through(unused.getsockname()[1]))
    assert_refused(done, tmp_path, "cannot reach huggingface.co", "check the network")


@pytest.mark.parametrize("format_", [Format.KAGGLE_TORCH, Format.KAGGLE_FLAX])
def test_kaggle(run, tmp_path: Path, site: Site, format_: Format) -> None:
    site.folder = write_checkpoint(tmp_path / "source", format_)
    done = run(KAGGLE)
    assert done.returncode == 0, done.stderr
    assert done.stdout == f"recurrentgemma-flax-2b-it: {format_} from {KAGGLE}\n"
    assert files(tmp_path / "recurrentgemma-flax-2b-it") == files(site.folder)
    done = run(KAGGLE, "elsewhere", "--json")
    assert json.loads(done.stdout) == {
        "source": KAGGLE,
        "destination": "elsewhere",
        "format": format_,
    }


def test_refusals_of_kaggle(run, tmp_path: Path, site: Site) -> None:
    site.folder = tmp_path / "source"
    site.status = 403
    assert_refused(run(KAGGLE), tmp_path, "needs credentials: make a")
    credentials = {"KAGGLE_USERNAME": "someone", "KAGGLE_KEY": "0"}
    done = run(KAGGLE, **credentials)
    assert_refused(done, tmp_path, "licence is not accepted", "kaggle.com/models/google/recurrent")
    site.status = 404
    done = run(KAGGLE, **credentials)
    assert_refused(done, tmp_path, "there is no kaggle:google")


@pytest.mark.parametrize(
    ("source", "status", "weights", "words"),
    [
        (HF, 200, "reset", ["cannot reach huggingface.co, or no longer", "try again"]),
        (HF, 503, "whole", ["huggingface.co cannot serve this now (HTTP 503)", "try again later"]),
        (KAGGLE, 200, "reset", ["cannot reach www.kaggle.com, or no longer", "try again"]),
        (KAGGLE, 200, "damaged", ["arrived damaged: try again"]),
        (KAGGLE, 503, "whole", ["www.kaggle.com cannot serve this now (HTTP 503)"]),
    ],
)
def test_sites_that_fail(
    run, tmp_path: Path, site: Site, source: str, status: int, weights: str, words: list[str]
) -> None:
    format_ = Format.HUGGINGFACE if source == HF else Format.KAGGLE_TORCH
    site.folder = write_checkpoint(tmp_path / "source", format_)
    site.status, site.weights = status, weights
    assert_refused(run(source), tmp_path, *words)


def wrapped(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


FULL = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.parametrize(
    ("error", "kind", "words"),
    [
        (FULL, DiskSpaceError, "the disk became full: make room"),
        (wrapped(RuntimeError("xet"), FULL), DiskSpaceError, "the disk became full"),
        (ConnectionResetError("reset"), DownloadError, r"or no longer \(reset\): check the net"),
        (RuntimeError("what\nwas it"), DownloadError, r"or no longer \(what\): check the network"),
    ],
    ids=repr,
)
@pytest.mark.parametrize(
    ("source", "function"),
    [(HF, "huggingface_hub.snapshot_download"), (KAGGLE, "kagglehub.model_download")],
)
def test_whatever_the_libraries_raise(
    tmp_path: Path, monkeypatch, capsys, source: str, function: str, error, kind, words: str
) -> None:
    def fail(*args, **kwargs) -> None:
        sys.stdout.write("Downloading")
        raise error

    monkeypatch.setattr(function, fail)
    with pytest.raises(kind, match=words):
        download(source, tmp_path / "out")
    assert not list(tmp_path.iterdir())
    assert capsys.readouterr() == ("", "Downloading")


def test_mistakes(cli, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    for source in ("google/recurrentgemma", "ftp:x", "hf:"):
        assert "a source must be kaggle:" in cli("download", source).err
    monkeypatch.setitem(sys.modules, "kagglehub", None)
    monkeypatch.setitem(sys.modules, HUB, None)
    for source, package in ((HF, "huggingface_hub"), (KAGGLE, "kagglehub")):
        done = cli("download", source)
        assert done.code == 2
        assert f"needs {package}, which is not installed" in done.err
        assert "pip install 'recurrentgemma[hub]'" in done.err
    assert not list(tmp_path.iterdir())


def test_default_folders() -> None:
    assert default_folder(HF) == Path("recurrentgemma-2b-it")
    assert default_folder(KAGGLE) == Path("recurrentgemma-flax-2b-it")
