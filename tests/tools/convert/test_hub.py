"""Import from and export to the hub: what is downloaded and said, offline, refused; the package's network is a stub."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest

from llada_megatron import cli
from llada_megatron.tools.convert import hub
from tests.tools.convert.checkpoints import config_of, tensors_of, to_sharded, with_tokenizer, write

package = pytest.importorskip("huggingface_hub")
for _module in ("constants", "errors"):
    pytest.importorskip(f"huggingface_hub.{_module}")
HASH = "0f3a" * 10
NAME = "org/tiny"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    """The hub's cache with one snapshot of a checkpoint, and code and another format beside it."""
    monkeypatch.setattr(package.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(package.constants, "HF_HUB_OFFLINE", False)
    repository = tmp_path / "cache/models--org--tiny"
    snapshot = repository / "snapshots" / HASH
    with_tokenizer(write(snapshot, tensors_of("tiny-dense"), config_of("tiny-dense")))
    (snapshot / "modeling_llada.py").write_text("raise SystemExit")
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(HASH)
    return snapshot


@pytest.fixture
def server(cache, monkeypatch):
    """A stub of the hub that has the files of the cache, with the calls that it was asked."""
    calls = []

    class Api:
        def model_info(self, name, revision=None, files_metadata=False):
            assert files_metadata
            calls.append(("info", name, revision))
            files = [SimpleNamespace(rfilename=path.name, size=path.stat().st_size) for path in sorted(cache.iterdir())]
            nested = SimpleNamespace(rfilename="onnx/model.safetensors", size=10**15)
            return SimpleNamespace(sha=HASH, siblings=[*files, nested])

        def whoami(self):
            calls.append(("whoami",))

        def create_repo(self, name, private, exist_ok):
            calls.append(("create", name, private, exist_ok))
            return f"https://huggingface.co/{name}"

        def upload_folder(self, repo_id, folder_path, commit_message):
            calls.append(("upload", repo_id, sorted(path.name for path in folder_path.iterdir())))

    def snapshot_download(name, revision, allow_patterns):
        calls.append(("download", name, revision, allow_patterns))
        return str(cache)

    monkeypatch.setattr(package, "HfApi", Api)
    monkeypatch.setattr(package, "snapshot_download", snapshot_download)
    return calls


def convert(capsys, *words):
    code = cli.main(["convert", *map(str, words)])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_what_is_downloaded_is_said_first(server, cache, tmp_path, capsys, monkeypatch):
    size = sum((cache / name).stat().st_size for name in ("config.json", "model.safetensors", "tokenizer.json"))
    monkeypatch.setattr(package, "try_to_load_from_cache", lambda *_, **__: None)
    code, out, err = convert(capsys, "import", NAME, tmp_path / "out")
    assert code == 0 and out.startswith(f"{tmp_path}/out/checkpoints/step-00000000: llada, ")
    told = hub.size_text(size)
    assert f"{NAME} on the hub, revision {HASH[:12]}: 3 files, {told}; 3 of them, {told}, are downloaded to " in err
    files = ["config.json", "model.safetensors", "tokenizer.json"]  # no code, nothing of sub-folders
    assert server == [("info", NAME, None), ("download", NAME, HASH, files)]
    manifest = json.loads((tmp_path / "out/checkpoints/step-00000000/manifest.json").read_text())
    assert manifest["facts"]["imported"]["from"] == NAME


def test_what_is_in_the_cache_is_not_downloaded_again(server, tmp_path, capsys):
    code, _, err = convert(capsys, "import", f"{NAME}@v1.0", tmp_path / "out")
    assert code == 0 and server[0] == ("info", NAME, "v1.0")
    assert f"3 files, {hub.size_text(0)}" not in err and f"all are in {package.constants.HF_HUB_CACHE}" in err


def test_a_full_disk_is_found_before_the_download(server, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(package, "try_to_load_from_cache", lambda *_, **__: None)
    monkeypatch.setattr(hub.shutil, "disk_usage", lambda _: SimpleNamespace(free=1000))
    code, _, err = convert(capsys, "import", NAME, tmp_path / "out")
    assert code == 1 and "are to be downloaded: make room, or set HF_HOME" in err and len(server) == 1


def test_offline_the_cache_serves(cache, tmp_path, capsys, monkeypatch):
    """The package itself, without a network."""
    monkeypatch.setattr(package.constants, "HF_HUB_OFFLINE", True)
    assert convert(capsys, "import", NAME, tmp_path / "out")[0] == 0
    code, _, err = convert(capsys, "import", "org/absent@v2", tmp_path / "other")
    (line,) = err.splitlines()
    assert code == 1 and line.startswith("error: org/absent@v2: HF_HUB_OFFLINE is set and the cache ")
    assert "`hf download org/absent --revision v2`" in line
    code, _, err = convert(capsys, "export", tmp_path / "out", tmp_path / "exported", "--push", NAME)
    assert code == 2 and "HF_HUB_OFFLINE is set" in err and not (tmp_path / "exported").exists()


def failing(error):
    def fail(*_, **__):
        raise error

    return fail


def http(kind, status=404):
    response = SimpleNamespace(status_code=status, headers={}, request=None, text="")
    error = kind.__new__(kind)
    Exception.__init__(error, f"{status} Client Error")
    error.response = response
    return error


def no_network(text):
    """An error of the network package that the installed version uses, which is no OSError."""
    base = package.errors.HfHubHTTPError.__bases__[0]
    return type("ConnectError", (base,), {})(text)


FAILURES = [
    (lambda: http(package.errors.RepositoryNotFoundError), "neither a directory here nor a repository on the hub"),
    (lambda: http(package.errors.GatedRepoError, 403), "access to the repository must be asked for"),
    (lambda: http(package.errors.RevisionNotFoundError), "no such revision"),
    (lambda: package.errors.LocalTokenNotFoundError("no token"), "`hf auth login`"),
    (lambda: http(package.errors.HfHubHTTPError, 500), "500 Client Error"),
    (
        lambda: ConnectionError("no route\nto host"),
        "no such directory here, and the hub cannot be reached (no route to host",
    ),
    (lambda: no_network("no name"), "no such directory here, and the hub cannot be reached (no name)"),
]


@pytest.mark.parametrize(("error", "told"), FAILURES)
def test_failures_are_one_line(server, tmp_path, capsys, monkeypatch, error, told):
    monkeypatch.setattr(package.HfApi, "model_info", failing(error()))
    code, _, err = convert(capsys, "import", NAME, tmp_path / "out")
    (line,) = err.splitlines()
    assert code in (1, 2) and line.startswith(f"error: {NAME}: ") and told in line


def test_a_repository_without_weights(server, cache, tmp_path, capsys):
    (cache / "model.safetensors").rename(cache / "model.gguf")
    code, _, err = convert(capsys, "import", NAME, tmp_path / "out")
    assert code == 1 and "holds no .safetensors file (but config.json, model" in err and len(server) == 1


def test_without_the_package(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    code, _, err = convert(capsys, "import", NAME, tmp_path / "out")
    assert code == 2 and "no such directory here" in err and "pip install 'llada-megatron[hub]'" in err


@pytest.mark.parametrize("source", ["a/b/c", "./org/tiny", "/org/tiny", "tiny", "org/tiny/", "../tiny", "org/.."])
def test_what_names_no_repository(source):
    assert not hub.is_repository(source)


def test_a_directory_here_comes_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_repository("org/tiny") and hub.is_repository("org/tiny@refs/pr/3")
    (tmp_path / "org/tiny").mkdir(parents=True)
    assert not hub.is_repository("org/tiny")


def test_an_export_is_pushed(server, cache, tmp_path, capsys, monkeypatch):
    to_sharded(cache, tmp_path / "run")
    words = ["export", tmp_path / "run", tmp_path / "exported", "--push", "me/mine"]
    code, out, err = convert(capsys, *words, "--json")
    assert code == 0 and json.loads(out.splitlines()[-1])["pushed_to"] == "https://huggingface.co/me/mine"
    assert [call[0] for call in server] == ["whoami", "create", "upload"] and server[1][2:] == (True, True)
    assert {"config.json", "model.safetensors", "README.md", "llada_generation.py"} <= set(server[2][2])
    assert f"uploading {tmp_path}/exported to https://huggingface.co/me/mine" in err

    words[2] = tmp_path / "second"
    monkeypatch.setattr(package.HfApi, "upload_folder", failing(ConnectionError("cut off")))
    code, _, err = convert(capsys, *words)
    assert code == 1 and "cut off); the export in" in err and f"`hf upload me/mine {tmp_path}/second`" in err
    monkeypatch.setattr(package.HfApi, "whoami", failing(package.errors.LocalTokenNotFoundError("none")))
    words[2] = tmp_path / "third"
    code, _, err = convert(capsys, *words)
    assert code == 2 and "nobody is logged in" in err and not (tmp_path / "third").exists()
    assert convert(capsys, *words[:-1], "mine")[0] == 2


def test_a_hugging_face_directory_is_no_run(cache, tmp_path, capsys, monkeypatch):
    assert cli.main(["sample", str(cache), "--prompt", "a"]) == 1
    assert (
        f"{cache} is a Hugging Face checkpoint: `llada convert import {cache} OUT` comes first"
        in capsys.readouterr().err
    )
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sample", "GSAI-ML/LLaDA-8B-Base", "--prompt", "a"]) == 1
    assert "Hugging Face hub, `llada convert import GSAI-ML/LLaDA-8B-Base OUT` comes first" in capsys.readouterr().err


def test_the_modules_that_are_used_are_imported():
    """In a process where nothing else has imported them, the package has no such attributes."""
    program = "from llada_megatron.tools.convert.hub import _package; p = _package('x'); p.errors, p.constants"
    subprocess.run([sys.executable, "-c", program], check=True, timeout=120)
