"""Hub loading with the real client against a local server: open, gated and absent repositories, cache, offline."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import timm
import torch
from safetensors.torch import save_file

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CLIENT = """
import json, pathlib, sys
import torch, biosae as bs
def attempt(name, **kwargs):
    try:
        e = bs.encoders.load(name, device="cpu", **kwargs)
    except Exception as error:
        return [type(error).__name__, str(error)]
    out = e.forward(torch.ones(1, 3, 96, 96))["final"]
    return [e.weights_sha256, e.source, e.preprocess.spec(), float(out.double().sum()), e.info.name]
names = ("org/open", "org/open@main", "org/pickle", "org/gated", "org/absent", "org/empty")
found = {n: attempt(f"hf-hub:{n}") for n in names}
found["as weights"] = attempt("timm:test_vit", weights="hf-hub:org/open")
bs.settings.offline = True
found["cached"] = attempt("hf-hub:org/open")
found["cached pickle"] = attempt("hf-hub:org/pickle")
found["not cached"] = attempt("hf-hub:org/other")
blob = next(p for p in pathlib.Path(sys.argv[1]).rglob("*") if p.name == sys.argv[2] and not p.is_symlink())
data = bytearray(blob.read_bytes()); data[-1] ^= 1
blob.chmod(0o644); blob.write_bytes(bytes(data))
found["damaged cache"] = attempt("hf-hub:org/open")
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def network() -> torch.nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        return timm.create_model("test_vit", num_classes=0, img_size=96).eval()


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory, network: torch.nn.Module) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("hub")
    state = {k: v.contiguous() for k, v in network.state_dict().items()}
    save_file(state, folder / "model.safetensors")
    torch.save(state, folder / "pytorch_model.bin")
    cfg = {"input_size": [3, 96, 96], "mean": [0.4, 0.5, 0.6], "std": [0.1, 0.2, 0.3], "interpolation": "bilinear",
           "crop_pct": 0.9, "fixed_input_size": True}  # fmt: skip
    config = {"architecture": "test_vit", "num_classes": 0, "pretrained_cfg": cfg, "model_args": {"img_size": 96}}
    text = json.dumps(config).encode()
    return {
        "org/open/config.json": text,
        "org/open/model.safetensors": (folder / "model.safetensors").read_bytes(),
        "org/pickle/config.json": text,
        "org/pickle/pytorch_model.bin": (folder / "pytorch_model.bin").read_bytes(),
        "org/empty/config.json": text,
    }


@pytest.fixture(scope="module")
def server(repositories: dict[str, bytes]) -> Iterator[str]:
    class Hub(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            owner_and_name, _, rest = self.path.lstrip("/").partition("/resolve/")
            data = repositories.get(f"{owner_and_name}/{rest.partition('/')[2]}")
            known = any(k.startswith(owner_and_name + "/") for k in repositories)
            if data is None:
                errors = {"org/gated": (403, "GatedRepo"), "org/absent": (401, "RepoNotFound")}
                status, code = errors.get(owner_and_name, (404, "EntryNotFound" if known else "RepoNotFound"))
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                data = b""
            else:
                self.send_response(200)
                self.send_header("ETag", '"' + hashlib.sha256(data).hexdigest() + '"')
                self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET

        def log_message(self, *_: object) -> None:
            pass

    hub = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=hub.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{hub.server_port}"
    hub.shutdown()


@pytest.fixture(scope="module")
def found(server: str, repositories: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> dict[str, list]:
    home = tmp_path_factory.mktemp("hf_home")
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("HF_", "BIOSAE_")) and "proxy" not in k.lower()}
    environment = {**clean, "HF_ENDPOINT": server, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    sha = hashlib.sha256(repositories["org/open/model.safetensors"]).hexdigest()
    command = [sys.executable, "-c", CLIENT, str(home), sha]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", ["org/open", "org/open@main", "cached", "as weights", "org/pickle", "cached pickle"])
def test_downloaded_numbers_are_the_networks(
    found: dict[str, list], case: str, network: torch.nn.Module, repositories: dict[str, bytes]
) -> None:
    sha, source, spec, total, _ = found[case]
    file = "org/pickle/pytorch_model.bin" if "pickle" in case else "org/open/model.safetensors"
    assert sha == hashlib.sha256(repositories[file]).hexdigest()
    assert source == f"hf-hub:{file.rpartition('/')[0]}@{COMMIT}"
    assert spec["mean"] == [0.4, 0.5, 0.6] and spec["size"] == 96 and spec["crop_pct"] == 0.9
    with torch.no_grad():
        expected = network(torch.ones(1, 3, 96, 96)).double().sum().item()
    assert total == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize(
    ("case", "error", "texts"),
    [
        ("org/gated", "GatedError", ["org/gated", "accept the licence", "HF_TOKEN", "weights_dirs"]),
        ("org/absent", "GatedError", ["org/absent", "private or gated", "HF_TOKEN"]),
        ("org/empty", "WeightsError", ["org/empty", "no weight file", "model.safetensors"]),
        ("not cached", "OfflineError", ["org/other", "settings.offline", "hf download org/other", "weights_dirs"]),
        ("damaged cache", "WeightsError", ["SHA-256 expected", "found"]),
    ],
)
def test_errors_say_what_to_do(found: dict[str, list], case: str, error: str, texts: list[str]) -> None:
    kind, message = found[case]
    assert kind == error
    for text in texts:
        assert text in message
