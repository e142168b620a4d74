"""Published weights through create_model: sources, conversion, the cache, and which variant a checkpoint fits."""

import argparse
import contextlib
import hashlib
import http.server
import io
import json
import logging
import os
import sys
import threading
import types
from pathlib import Path

import pytest
import timm
import torch

import zoo
from zoo import backbones, registry
from zoo.tools import weights as tool
from zoo.weights import (
    DownloadError,
    cache,
    cached_weights,
    checkpoint_filter,
    fetch_pretrained,
    fit,
    fitting_variants,
    licence_note,
    load_checkpoint,
    pretrained,
    save_weights,
)

KEYS = Path(__file__).parent / "keys"


class Files:
    """A server on the loopback interface that has these files."""

    def __init__(self):
        site = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                site.requests.append(self.path)
                content = site.files.get(self.path)
                self.send_response(404 if content is None else 200)
                self.send_header("Content-Length", str(len(content or b"")))
                self.end_headers()
                with contextlib.suppress(ConnectionError):
                    self.wfile.write(content or b"")

            def log_message(self, *args):
                pass

        self.files, self.requests = {}, []
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"


@pytest.fixture
def site():
    site = Files()
    yield site
    site.server.shutdown()
    site.server.server_close()


@pytest.fixture(autouse=True)
def surroundings(monkeypatch, tmp_path):
    """A cache of its own, no proxy, nothing remembered from other tests."""
    for variable in ("HF_HUB_OFFLINE", "ZOO_OFFLINE", "ZOO_MIRROR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(pretrained, "_announced", set())
    monkeypatch.setattr(cache, "_temporary", {})


def saved(content):
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


@pytest.fixture(scope="module")
def micro():
    """A model, and a training checkpoint of it as bytes."""
    model = zoo.create_model("vim_micro")
    return model, saved({"model": model.state_dict(), "epoch": 3})


def create(site, path="/w.pth", **kwargs):
    return zoo.create_model("vim_micro", True, pretrained_cfg_overlay={"url": site.address + path}, **kwargs)


def same(model, other):
    return all(torch.equal(tensor, other.state_dict()[name]) for name, tensor in model.state_dict().items())


# Checkpoints as their authors publish them.


def with_weights(families=backbones.FAMILIES):
    """Names with tags of weights that come through our builder and whose names and shapes are listed."""
    modules = [sys.modules[f"zoo.backbones.{family}"] for family in families]
    ours = [
        m.__name__.rpartition(".")[2]
        for m in modules
        if getattr(m, "build_model_with_cfg", None) is registry.build_model_with_cfg
    ]
    names = timm.list_models(module=ours, pretrained=True)
    return [name for name in names if (KEYS / f"{name.partition('.')[0]}.json").is_file()]


def random_weights(spec):
    """Random weights of the names and shapes in a key list; what counts batches is an integer."""
    weights = {key: torch.rand(shape) for key, shape in spec["state_dict"].items()}
    weights |= {key: torch.tensor(7) for key in weights if key.endswith("num_batches_tracked")}
    return weights | {key: weights[f"{key[:-1]}0"] for key in weights if key.endswith(".rpb.1")}  # one parameter


DEFAULT = ("vim_tiny_patch16_224.in1k", "local_vim_tiny.in1k", "plainmamba_l1.in1k")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in DEFAULT else pytest.mark.slow) for name in with_weights()]
)
def test_published_checkpoints_load_strictly(site, monkeypatch, name):
    """Random weights under the authors' names in their envelope; the server stands for the hub and the origin."""
    spec = json.loads((KEYS / f"{name.partition('.')[0]}.json").read_text())
    if 30 * spec["params"] > os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"):
        pytest.skip("the weights do not fit into this machine's memory as often as this test holds them")
    weights = random_weights(spec)
    envelope = "state_dict" if "state_dict" in str(spec["checkpoint_layout"]).partition("note")[0] else "model"
    training = {"optimizer": {"state": {}, "param_groups": [{"lr": 1e-3}]}, "epoch": 299}
    average = {key: torch.zeros(1) for key in weights}
    content = {envelope: weights, "model_ema": average, **training, "args": argparse.Namespace(lr=1e-3)}
    cfg = timm.get_pretrained_cfg(name)
    path = cfg.url.partition("github.com")[2] or f"/{cfg.hf_hub_id}/resolve/main/{cfg.hf_hub_filename}"
    site.files[path] = saved(content)
    monkeypatch.setenv("ZOO_MIRROR", site.address)
    model = zoo.create_model(name, pretrained=True)
    expected = checkpoint_filter(model)(weights, model)
    assert set(expected) == set(model.state_dict())
    assert all(torch.equal(tensor, expected[key]) for key, tensor in model.state_dict().items())
    assert cached_weights(name) is not None and site.requests == [path]
    assert not [file for file in Path(cache.cache_folder()).iterdir() if "original" in file.name]


def test_settings_in_a_checkpoint_do_not_keep_it_from_loading(tmp_path, monkeypatch):
    """VMamba's files hold a yacs CfgNode; others numpy scalars and paths. None of their classes is imported."""
    import numpy as np

    module = types.ModuleType("yacs.config")
    module.CfgNode = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    monkeypatch.setitem(sys.modules, "yacs", types.ModuleType("yacs"))
    monkeypatch.setitem(sys.modules, "yacs.config", module)
    node = module.CfgNode(MODEL=module.CfgNode(TYPE="vssm", DIMS=[96, 192]))
    node.frozen = True
    content = {
        "model": {"w": torch.ones(2)},
        "config": node,
        "max_accuracy": np.float64(82.6),
        "history": np.arange(3),
        "output": Path("runs/1"),
    }
    torch.save(content, tmp_path / "c.pth")
    monkeypatch.delitem(sys.modules, "yacs.config")
    others = [np._core.multiarray._reconstruct, np._core.multiarray.scalar]  # as accelerate and mmengine allow for good
    with torch.serialization.safe_globals(others):
        assert torch.equal(load_checkpoint(tmp_path / "c.pth")["w"], torch.ones(2))
        assert set(others) <= set(torch.serialization.get_safe_globals())


def test_saved_weights_that_share_memory(tmp_path):
    base = torch.arange(12.0).view(3, 4)
    save_weights({"all": base, "part": base[1], "turned": base.T, "again": base}, tmp_path / "w.safetensors", {"a": 1})
    loaded = load_checkpoint(tmp_path / "w.safetensors")
    assert torch.equal(loaded["turned"], base.T) and torch.equal(loaded["part"], base[1])
    assert [path.name for path in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.parametrize(
    "licence, part",
    [("cc-by-nc-sa-4.0", "NOT FOR COMMERCIAL"), ("unknown", "no licence stated"), ("mit", "license mit")],
)
def test_licences_are_told(licence, part):
    note = licence_note(timm.models.PretrainedCfg(license=licence, origin_url="https://example.org/x"))
    assert part in note and "https://example.org/x" in note
    assert ("COMMERCIAL" in note) == ("nc" in licence)


# Sources and the cache.


def test_models_with_other_arguments_load_from_the_original(site, tmp_path):
    """The file does not fit the registered variant, but the model that was asked for."""
    model = zoo.create_model("vim_micro", embed_dim=32, depth=2)
    site.files["/w.pth"] = saved(model.state_dict())
    for _ in range(2):
        loaded = create(site, embed_dim=32, depth=2)
        assert same(loaded, model) and "state_dict" not in loaded.pretrained_cfg
    assert len(site.requests) == 1
    with pytest.raises(ValueError, match="do not fit this vim_micro: missing"):
        create(site)


def test_a_file_that_was_replaced_is_noticed(site, micro, tmp_path):
    site.files["/w.pth"] = micro[1]
    create(site)
    for path in (tmp_path / "cache").glob("*.safetensors"):
        path.unlink()
    site.files["/w.pth"] = saved(zoo.create_model("vim_micro").state_dict())
    with pytest.raises(DownloadError, match="not the file of the first time"):
        create(site)
    next((tmp_path / "cache").glob("*.json")).unlink()
    create(site)


def test_digests_in_notes_and_names_are_checked(site, micro, tmp_path):
    digest = hashlib.sha256(micro[1]).hexdigest()
    for path, notes, fits in (
        ("/a.pth", (f"sha256={digest}", f"size={len(micro[1])}"), True),
        (f"/b-{digest[:8]}.pth", None, True),
        ("/c.pth", (f"sha256={'0' * 64}",), False),
        ("/d-00000000.pth", None, False),
        ("/e.pth", ("size=7",), False),
    ):
        site.files[path] = micro[1]
        overlay = {"url": site.address + path, "notes": notes}
        if fits:
            assert same(zoo.create_model("vim_micro", True, pretrained_cfg_overlay=overlay), micro[0])
        else:
            with pytest.raises(DownloadError, match="instead of"):
                zoo.create_model("vim_micro", True, pretrained_cfg_overlay=overlay)


def test_a_folder_that_cannot_be_written(site, micro, tmp_path, monkeypatch, caplog):
    (tmp_path / "file").touch()
    monkeypatch.setenv("ZOO_CACHE", str(tmp_path / "file" / "cache"))
    site.files["/w.pth"] = micro[1]
    with caplog.at_level(logging.WARNING):
        assert same(create(site), micro[0])
        assert same(create(site), micro[0])
    assert "set ZOO_CACHE to a folder that you can write" in caplog.text
    assert len(caplog.records) == 1 and len(site.requests) == 1


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "ZOO_OFFLINE"])
def test_offline(site, micro, monkeypatch, variable):
    site.files["/w.pth"] = micro[1]
    monkeypatch.setenv(variable, "1")
    with pytest.raises(DownloadError, match=f"not in the cache, and {variable} forbids downloads"):
        create(site)
    with pytest.raises(DownloadError, match=f"{variable} forbids downloads"):
        fetch_pretrained("vim_tiny_patch16_224.in1k")
    assert site.requests == []
    monkeypatch.delenv(variable)
    create(site)
    monkeypatch.setenv(variable, "1")
    assert same(create(site), micro[0])


def test_mirror_and_sources_in_order(site, micro, monkeypatch):
    """The hub comes before the origin; the mirror stands for both."""
    monkeypatch.setenv("ZOO_MIRROR", f"{site.address}/copies/")
    site.files["/copies/dir/w.pth?x=1"] = micro[1]
    overlay = {"url": "https://example.invalid/dir/w.pth?x=1", "hf_hub_id": "some/one@v2", "hf_hub_filename": "m.pth"}
    assert same(zoo.create_model("vim_micro", True, pretrained_cfg_overlay=overlay), micro[0])
    assert site.requests == ["/copies/some/one/resolve/v2/m.pth", "/copies/dir/w.pth?x=1"]


def test_the_hub_is_asked_through_its_library(site, micro, tmp_path, monkeypatch):
    import huggingface_hub

    def hub(repository, name, **options):
        asked.append((repository, name, options["revision"], options["local_files_only"]))
        if name != "m.pth":
            raise RuntimeError("404 Client Error")
        return str(tmp_path / "m.pth")

    asked = []
    (tmp_path / "m.pth").write_bytes(micro[1])
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hub)
    overlay = {"hf_hub_id": "some/one@v2", "hf_hub_filename": "m.pth"}
    assert same(zoo.create_model("vim_micro", True, pretrained_cfg_overlay=overlay), micro[0])
    assert asked == [("some/one", "m.pth", "v2", False)] and (tmp_path / "m.pth").exists()
    site.files["/w.pth"] = micro[1]
    overlay = {"hf_hub_id": "some/one", "url": f"{site.address}/w.pth"}
    assert same(zoo.create_model("vim_micro", True, pretrained_cfg_overlay=overlay), micro[0])
    assert [name for _, name, *_ in asked[1:]] == ["model.safetensors", "pytorch_model.bin"]


# Which variant a checkpoint fits.


def brute_force(state_dict):
    """Every model of the zoo that a state dict fits."""
    fits = []
    for name in zoo.list_models():
        model = fit.build_on_meta(name)
        try:
            converted = checkpoint_filter(model)(state_dict, model)
        except (KeyError, ValueError, RuntimeError, AttributeError):
            continue
        if not fit.differences(converted, model.state_dict()):
            fits.append(name)
    return fits


def listed(name):
    spec = json.loads((KEYS / f"{name}.json").read_text())
    return {key: torch.empty(shape, device="meta") for key, shape in spec["state_dict"].items()}


def test_fitting_variants_of_a_family():
    assert fitting_variants(listed("local_vim_tiny")) == ["local_vim_tiny"]
    dense = {f"backbone.{name}": tensor for name, tensor in listed("vmamba_tiny_s1l8").items() if "head" not in name}
    dense = {name: tensor for name, tensor in dense.items() if "classifier" not in name}
    assert fitting_variants({**dense, "decode_head.w": torch.empty(60_000_000, device="meta")}) == []
    assert fitting_variants({}) == []


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.stem for path in KEYS.glob("*.json")))
def test_fitting_variants_misses_none(name):
    if name in zoo.list_models():
        assert fitting_variants(listed(name)) == brute_force(listed(name))


def test_models_on_meta_have_the_same_names_and_shapes():
    for name in ("vim_micro", "vmamba_nano", "adventurer_nano"):
        model, quick = zoo.create_model(name, device="meta"), fit.build_on_meta(name)
        assert fit.differences(quick.state_dict(), model.state_dict()) == []


# The command-line tool.


def test_tool(site, micro, tmp_path, monkeypatch, capsys):
    name = "vim_tiny_patch16_224.in1k"
    assert tool.main(["list", "vim_*"]) == 0
    row = next(line for line in capsys.readouterr().out.splitlines() if line.startswith(name))
    assert row.split()[1:5] == ["7.1", "M", "76.1", "apache-2.0"] and "cached" not in row
    monkeypatch.setenv("ZOO_MIRROR", site.address)
    assert tool.main(["fetch", "vim_tiny_patch16_224"]) == 1
    assert "404" in capsys.readouterr().err
    cfg = timm.get_pretrained_cfg(name)
    weights = random_weights(json.loads((KEYS / f"{cfg.architecture}.json").read_text()))
    site.files[f"/{cfg.hf_hub_id}/resolve/main/{cfg.hf_hub_filename}"] = saved({"model": weights})
    assert tool.main(["fetch", "vim_tiny_patch16_224"]) == 0
    assert tool.main(["verify", "vim_*"]) == 0
    out = capsys.readouterr().out
    assert f"good {name}" in out and "2 good, 0 bad" in out  # with the packaged ones
    path = cached_weights(name)
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert tool.main(["verify", "vim_tiny*"]) == 1
    assert f"fetch --force {name}" in capsys.readouterr().out
    assert tool.main(["fetch", "--force", "vim_tiny_patch16_224"]) == 0
    assert tool.main(["verify", "vim_tiny*"]) == 0
    assert "cached" in (tool.main(["list", "vim_tiny*"]), capsys.readouterr().out)[1]


def test_tool_converts(micro, tmp_path, capsys):
    (tmp_path / "theirs.pth").write_bytes(micro[1])
    ours = tmp_path / "ours.safetensors"
    assert tool.main(["convert", str(tmp_path / "theirs.pth"), "vim_micro", str(ours)]) == 0
    assert same(zoo.create_model("vim_micro", checkpoint_path=ours), micro[0])
    assert tool.main(["convert", str(ours), "vim_nano", str(tmp_path / "x.safetensors")]) == 1
    assert "These weights fit vim_micro" in capsys.readouterr().err
    assert tool.main(["convert", str(ours), "vim_micro", str(tmp_path / "x.pth")]) == 1
    assert tool.main(["convert", str(ours), "vim_mikro", str(ours)]) == 1
    assert tool.main(["fetch", "no_such*"]) == 1
    with pytest.raises(ValueError, match=r"no weights of vim_base_patch16_224 are published; look at https"):
        fetch_pretrained("vim_base_patch16_224")
    with pytest.raises(ValueError, match="did you mean vim_tiny"):
        fetch_pretrained("vim_tiny_patch16_224.in2k")
