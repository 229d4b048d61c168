"""What is made for others says what is so, shows nothing of this machine, and goes nowhere unless it is sent."""

from __future__ import annotations

import base64
import io
import json
import re
import shutil
import socket
import threading
from collections.abc import Callable, Iterator
from hashlib import sha256
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar

import huggingface_hub
import pytest
import torch
import yaml
from PIL import Image
from rich.console import Console
from typer.testing import CliRunner

from sdtrain.cli import app
from sdtrain.commands.fit import fit
from sdtrain.config.read import resolve
from sdtrain.errors import UserError
from sdtrain.files.header import read_header
from sdtrain.files.tensors import read_tensors
from tests.conftest import merged, small_run

Train = Callable[..., tuple[Path, str]]
EVIL = 'a "ring": {x}\n---\n- [click](http://evil) <script>alert(1)</script> | `$(rm)` \x1b[31m # no'
TOKEN = "hf_abcDEF123"


def run_command(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output.replace("\n", " ")


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, pictures: Path) -> Path:
    changes = {
        "steps": 2,
        "optimizer.d0": 1e-2,
        "preview.every": 1,
        "preview.prompts": ["a red zorbit", EVIL],
        "preview.seeds": [0, 7],
        "export.about.author": "Ada",
        "export.about.license": "CC-BY-4.0",
        "export.about.tags": ["rings"],
        "export.about.trigger_words": ["zorbit"],
    }
    table = merged(small_run(tmp_path_factory.mktemp("published"), pictures), changes)
    return fit(resolve(table, "test config"), console=Console(file=io.StringIO())).folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A run of its own for each test."""
    return Path(shutil.copytree(trained, tmp_path / "runs" / trained.name))


def head_of(folder: Path) -> dict[str, Any]:
    head = (folder / "README.md").read_text(encoding="utf-8").split("---\n")[1]
    found = yaml.safe_load(head)
    assert isinstance(found, dict)
    return found


def test_the_folder_is_what_hubs_and_model_managers_expect(run: Path) -> None:
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    said = run_command("card", run)
    folder = run / "publish"
    names = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    pictures = {f"images/{number:02d}.png" for number in range(4)}
    assert names == {"README.md", "small.safetensors", "small.json", "small.preview.png", *pictures}
    assert "note: the base model has no id" in said and "licence" not in said
    assert all(path.read_bytes() == content for path, content in before.items()), "nothing of the run changes"
    head = head_of(folder)
    assert head["license"] == "cc-by-4.0" and head["instance_prompt"] == "zorbit"
    assert {"lora", "rings", "text-to-image", "sdxl"} <= set(head["tags"]) and "base_model" not in head
    assert [one["output"]["url"] for one in head["widget"]] == sorted(pictures)
    assert head["widget"][0]["text"] == "a red zorbit"
    data = huggingface_hub.ModelCard((folder / "README.md").read_text(encoding="utf-8")).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("cc-by-4.0", "diffusers", "text-to-image")
    told = json.loads((folder / "small.json").read_text())
    assert (told["activation text"], told["sd version"]) == ("zorbit", "SDXL")


def test_the_gallery_is_the_newest_preview_with_what_it_was_drawn_from(run: Path) -> None:
    run_command("card", run)
    with Image.open(run / "previews" / "step-000002.png") as grid:
        told = json.loads(grid.text["sdtrain cells"])  # type: ignore[attr-defined]
        width, height = told["size"]
        corners = [corner for row in told["corners"] for corner in row]
        cells = [grid.convert("RGB").crop((x, y, x + width, y + height)).tobytes() for x, y in corners]
    for number, cell in enumerate(cells):
        with Image.open(run / "publish" / "images" / f"{number:02d}.png") as picture:
            assert picture.tobytes() == cell
            words = picture.text["parameters"]  # type: ignore[attr-defined]
        assert f"Seed: {(0, 7)[number % 2]}, Size: 96x96, Model: small" in words
        assert "sdtrain parameters" in picture.text  # type: ignore[attr-defined]
        assert words.startswith("a red zorbit\nSteps: 2, Sampler: Euler, CFG scale: 6") == (number < 2)


def test_the_weights_are_the_run_s_under_the_same_hashes_with_what_is_said_now(run: Path) -> None:
    run_command("card", run, "--set", "export.about.usage_hint=strength 0.8", "--set", "export.about.author=Bob")
    first, second = (read_header(run / name / "small.safetensors") for name in ("weights", "publish"))
    one, other = read_tensors(first), read_tensors(second)
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    data = [header.path.read_bytes()[-1000:] for header in (first, second)]
    assert data[0] == data[1], "in the same order: the hash of the tensors is that of before"
    for key in ("sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256", "sdtrain.d", "ss_tag_frequency"):
        assert first.metadata[key] == second.metadata[key]
    assert (second.metadata["modelspec.author"], second.metadata["modelspec.usage_hint"]) == ("Bob", "strength 0.8")
    assert "strength 0.8" in (run / "publish" / "README.md").read_text()


def test_nothing_of_this_machine_is_told(run: Path, trained: Path) -> None:
    run_command("card", run)
    place = trained.parents[1]
    assert str(place).encode() in (run / "weights" / "small.safetensors").read_bytes(), "or this test shows nothing"
    for path in (run / "publish").rglob("*"):
        for word in (str(place), str(place.parent), str(Path.home()) + "/"):
            assert not path.is_file() or word.encode() not in path.read_bytes(), (path, word)


def test_the_card_tells_d_and_the_settings_and_how_to_load_it(run: Path) -> None:
    run_command("card", run, "--repo", "ada/rings")
    text = (run / "publish" / "README.md").read_text(encoding="utf-8")
    d = json.loads(read_header(run / "weights" / "small.safetensors").metadata["sdtrain.d"])["unet"]
    assert f"| d of unet | {d:.3e} |" in text.replace("\\", "")
    assert "rank = 2" in text and "models/loras" in text and "ComfyUI, Forge, A1111, sd-scripts, diffusers" in text
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.S)
    assert '"ada/rings"' in code
    code = (
        code.replace('"ada/rings"', repr(str(run / "publish"))).replace('"cuda"', '"cpu"').replace("float16", "float32")
    )
    code = code.replace('"BASE"', repr("sdtrain/builtin/tiny-sdxl")).split("picture =")[0]
    found: dict[str, Any] = {}
    exec(code, found)
    assert len(found["pipe"].get_list_adapters()["unet"]) == 1, "the lines of the card load the LoRA"


def test_what_people_wrote_is_neither_yaml_nor_markdown_nor_html(run: Path) -> None:
    said = {"description": EVIL, "license": EVIL, "author": EVIL, "tags": [EVIL], "usage_hint": EVIL}
    words = [word for key, value in said.items() for word in ("--set", f"export.about.{key}={json.dumps(value)}")]
    run_command("card", run, *words)
    text = (run / "publish" / "README.md").read_text(encoding="utf-8")
    head = head_of(run / "publish")
    shown = 'a "ring": {x}\\n---\\n- [click](http://evil) <script>alert(1)</script> | `$(rm)` \\x1b[31m # no'
    assert head["tags"][-1] == shown and head["widget"][2]["text"] == shown
    assert head["license"] == "other" and re.fullmatch(r"[a-z0-9.-]+", head["license_name"])
    assert "\x1b" not in text
    body = re.sub(r"```.*?```", "", text.split("---\n", 2)[2], flags=re.S)
    body = body.replace("<details>", "").replace("</details>", "").replace("<summary>", "").replace("</summary>", "")
    body = body.replace("[diffusers](https://github.com/huggingface/diffusers)", "")
    assert "\n---" not in body and "\n- [" not in body and "\n\\---" in body
    for sign in ("<script", "[click", "](http", "`$", "http://evil"):
        assert not re.search(rf"(?<!\\){re.escape(sign)}", body), (sign, body)


def test_a_full_fine_tune_is_loaded_as_a_checkpoint(train: Train) -> None:
    folder, _ = train({"method": {"kind": "full"}, "steps": 1})
    said = run_command("card", folder)
    text = (folder / "publish" / "README.md").read_text(encoding="utf-8")
    assert "from_single_file" in text and "models/checkpoints" in text and "load_lora_weights" not in text
    assert "no licence is said" in said and "no previews" in said and "lora" not in head_of(folder / "publish")["tags"]


def test_only_a_folder_of_its_own_is_replaced_and_only_with_force(run: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    run_command("card", run, "--out", out)
    (out / "README.md").write_text("mine")
    with pytest.raises(UserError, match="--force"):
        run_command("card", run, "--out", out)
    assert (out / "README.md").read_text() == "mine"
    run_command("card", run, "--out", out, "--force")
    assert (out / "README.md").read_text() != "mine"
    (out / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="thesis"):
        run_command("card", run, "--out", out, "--force")
    assert (out / "thesis.txt").read_text() == "mine"
    with pytest.raises(UserError, match="about alone"):
        run_command("card", run, "--out", tmp_path / "other", "--set", "steps=3")
    assert not (tmp_path / "other").exists()
    with pytest.raises(UserError, match="weights"):
        (run / "weights" / "small.safetensors").unlink()
        run_command("card", run, "--out", tmp_path / "other")


# ---------------------------------------------------------------------- to the hub


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def refused(*arguments: Any, **more: Any) -> None:
        raise AssertionError("the network was used")

    monkeypatch.setattr(socket, "create_connection", refused)
    monkeypatch.setattr(socket.socket, "connect", refused)
    monkeypatch.setattr(socket, "getaddrinfo", refused)


@pytest.mark.usefixtures("no_network")
def test_a_dry_run_shows_what_would_go_and_sends_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    said = run_command("push", run, "ada/rings", "--dry-run")
    for path in (run / "publish").rglob("*"):
        assert not path.is_file() or str(path.relative_to(run / "publish")) in said
    assert "8 files" in said and "nothing was sent" in said and TOKEN not in said
    assert "ada/rings" in (run / "publish" / "README.md").read_text()


@pytest.mark.usefixtures("no_network")
def test_without_a_token_or_a_network_one_sentence_is_told(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="HF_HUB_OFFLINE"):
        run_command("push", run, "ada/rings")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: None)
    with pytest.raises(UserError) as raised:
        run_command("push", run, "ada/rings")
    assert len(raised.value.problems) == 1 and "hf auth login" in str(raised.value)
    for name in ("rings", "a/b/c", "../x", "a b/c", "https://hf.co/a/b"):
        with pytest.raises(UserError, match="owner/name"):
            run_command("push", run, name, "--dry-run")
    assert not (run / "publish").exists(), "nothing was made for nothing"


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as a commit needs; keeps what it is told.

    part_bytes: how large the parts are in which weights are sent, 0 for one part, None where they go with the commit.
    """

    told: ClassVar[list[tuple[str, str, Any]]] = []
    refuses = False
    refuses_pieces = False
    part_bytes: int | None = None

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)).decode()
        content = [json.loads(line) for line in body.splitlines()]
        self.told.append((self.path, self.headers.get("Authorization", ""), content))
        port = self.server.server_address[1]
        if self.refuses:
            return self.answer(403, {"error": f"{TOKEN} may not write here"})
        if self.path.endswith("/preupload/main"):
            files = [
                {"path": one["path"], "uploadMode": self.mode_of(one["path"]), "shouldIgnore": False}
                for one in content[0]["files"]
            ]
            return self.answer(200, {"files": files})
        if self.path.endswith("/info/lfs/objects/batch"):
            objects = [{**one, "actions": {"upload": self.place_of(one)}} for one in content[0]["objects"]]
            return self.answer(200, {"transfer": "basic", "objects": objects})
        if self.path.startswith("/whole/"):
            return self.answer(200, {})
        if self.path.endswith("/commit/main"):
            return self.answer(
                200, {"commitUrl": f"http://127.0.0.1:{port}/ada/rings/commit/1", "commitOid": "1", "success": True}
            )
        return self.answer(200, {"url": f"http://127.0.0.1:{port}/ada/rings", "id": "ada/rings"})

    def mode_of(self, name: str) -> str:
        """Weights go another way than text, as on the Hub."""
        return "lfs" if self.part_bytes is not None and name.endswith(".safetensors") else "regular"

    def place_of(self, one: dict[str, Any]) -> dict[str, Any]:
        """Where an object goes: in one piece, or in parts of a size."""
        at, parts = f"http://127.0.0.1:{self.server.server_address[1]}", -(-one["size"] // (self.part_bytes or 1))
        if not self.part_bytes:
            return {"href": f"{at}/pieces/{one['oid']}/1"}
        header = {str(number): f"{at}/pieces/{one['oid']}/{number}" for number in range(1, parts + 1)}
        return {"href": f"{at}/whole/{one['oid']}", "header": {"chunk_size": str(self.part_bytes), **header}}

    def do_PUT(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.told.append((self.path, self.headers.get("Authorization", ""), body))
        self.send_response(403 if self.refuses_pieces else 200)
        self.send_header("ETag", "e")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_GET(self) -> None:
        self.told.append((self.path, self.headers.get("Authorization", ""), None))
        if self.refuses:  # else the client takes it that the repository is there, and goes on
            return self.answer(403, {"error": f"{TOKEN} may not write here"})
        return self.answer(200, {"id": "ada/rings", "sha": "0", "siblings": []})

    def answer(self, code: int, content: Any) -> None:
        data = json.dumps(content).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        if "error" in content:
            self.send_header("X-Error-Message", content["error"])
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *arguments: Any) -> None:
        """Say nothing."""


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """A hub of one's own at the loopback address, for the true client."""
    handler = type("Hub", (Hub,), {"told": [], "refuses": False})
    server = HTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    api = huggingface_hub.HfApi
    endpoint = f"http://127.0.0.1:{server.server_address[1]}"
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(huggingface_hub, "get_token", lambda: TOKEN)
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda token: api(endpoint=endpoint, token=token))
    yield handler
    server.shutdown()
    server.server_close()


def test_what_the_dry_run_showed_is_what_goes_in_one_commit(run: Path, hub: type[Hub]) -> None:
    run_command("push", run, "ada/rings", "--dry-run")
    assert hub.told == []
    said = run_command("push", run, "ada/rings")
    assert "/ada/rings/commit/1" in said and TOKEN not in said
    (made,) = [content[0] for path, _, content in hub.told if path == "/api/repos/create"]
    assert made["name"] == "rings" and made["organization"] == "ada"
    assert made.get("private") is True or made.get("visibility") == "private"
    (commit,) = [content for path, _, content in hub.told if path.endswith("/commit/main")]
    sent = {one["value"]["path"]: base64.b64decode(one["value"]["content"]) for one in commit if one["key"] == "file"}
    folder = run / "publish"
    there = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    assert sent == there
    assert {token for _, token, _ in hub.told} == {f"Bearer {TOKEN}"}


@pytest.mark.parametrize("part_bytes", [0, 30_000], ids=["whole", "in parts"])
def test_weights_are_sent_as_large_files_are(
    run: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch, part_bytes: int
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    hub.part_bytes = part_bytes
    assert "/ada/rings/commit/1" in run_command("push", run, "ada/rings")
    (commit,) = [content for path, _, content in hub.told if path.endswith("/commit/main")]
    (large,) = [one["value"] for one in commit if one["key"] == "lfsFile"]
    content = (run / "publish" / "small.safetensors").read_bytes()
    assert (large["path"], large["oid"]) == ("small.safetensors", sha256(content).hexdigest())
    pieces = {int(path.rpartition("/")[2]): body for path, _, body in hub.told if path.startswith("/pieces/")}
    assert len(pieces) == (-(-len(content) // part_bytes) if part_bytes else 1)
    assert b"".join(pieces[number] for number in sorted(pieces)) == content
    assert {token for path, token, _ in hub.told if path.startswith("/pieces/")} == {""}, "storage needs no token"


def test_large_files_that_are_refused_are_a_sentence(
    run: Path, hub: type[Hub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_DISABLE_XET", True)
    hub.part_bytes, hub.refuses_pieces = 0, True
    with pytest.raises(UserError, match=r"did not take it: Error while uploading 'small.safetensors' to the Hub. 403"):
        run_command("push", run, "ada/rings")
    assert not [path for path, _, _ in hub.told if path.endswith("/commit/main")]


def test_what_the_hub_refuses_is_a_sentence_without_the_token(run: Path, hub: type[Hub]) -> None:
    hub.refuses = True
    with pytest.raises(UserError, match="did not take it") as raised:
        run_command("push", run, "ada/rings", "--public")
    assert "*** may not write here" in str(raised.value)
    assert TOKEN not in str(raised.value) and len(str(raised.value)) < 700
    assert raised.value.exit_code == 2
    assert not [path for path, _, _ in hub.told if path.endswith("/commit/main")]
