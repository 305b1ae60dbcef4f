"""Opening models by name: bundled, saved, published, from the hub."""

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from published_layouts import write_layout

import cg3d
from cg3d.models import hub
from cg3d.models.cg3d import CG3D
from cg3d.models.clip_backbone import load_backbone
from cg3d.pretrained import factory
from cg3d.pretrained.factory import create_model, list_models, split_options


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return load_backbone("nano", "random")


@pytest.fixture(scope="module")
def model(small):
    torch.manual_seed(0)
    return CG3D.build(backbone=small, encoder="pointnet", points=64, clip_weights="random").eval()


@pytest.fixture(scope="module")
def cloud():
    return torch.rand(2, 100, 6, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def ulip(tmp_path_factory):
    return write_layout(tmp_path_factory.mktemp("ulip") / "model.pt", "ulip/pointmlp", small_towers=True)


def same(first, second, cloud):
    return torch.equal(first.encode_shape(cloud), second.encode_shape(cloud))


def test_public_names():
    assert cg3d.create_model is create_model and cg3d.list_models is list_models
    assert cg3d.load is create_model, "the short form"
    assert list_models()[0] == "nano" and {"uni3d-b", "openshape-l14", "ulip2"} <= set(list_models())
    assert not {"modelnet40", "openshape-data"} & set(list_models()), "data sets are no models"


def test_folders_and_files_of_a_saved_model(model, small, cloud, tmp_path):
    model.save(tmp_path / "run")
    for name in (tmp_path / "run", str(tmp_path / "run"), tmp_path / "run" / "model.safetensors"):
        again = create_model(name, backbone=small)
        assert same(again, model, cloud) and not again.training and again.backbone is small
    with pytest.raises(ValueError, match="points: a setting of published weights"):
        create_model(tmp_path / "run", points=64)


def test_published_files(ulip, cloud):
    opened = create_model(ulip)
    assert opened.contract.model == "ulip/pointmlp" and opened.contract.points == 8192
    assert create_model(ulip.parent).contract.model == "ulip/pointmlp", "a folder with model.pt"
    assert create_model(f"{ulip}?points=512").contract.points == 512
    assert create_model(ulip, points=512).encode_shape(cloud).shape == (2, 512)
    for wrong, message in (
        ("?points=many", "is no number"),
        ("?points", "name=value"),
        ("?pints=3", "pints"),
    ):
        with pytest.raises(ValueError, match=message):
            create_model(f"{ulip}{wrong}")


def test_towers_of_the_caller_stay_where_they_are(ulip, small, monkeypatch):
    towers = create_model(ulip).backbone
    moved = []
    monkeypatch.setattr(type(towers), "to", lambda self, *where: moved.append(where) or self)
    opened = create_model(ulip, backbone=towers)
    assert opened.backbone is towers and not moved
    with pytest.raises(ValueError, match="not both"):
        create_model(ulip, backbone=towers, clip="nano")
    with pytest.raises(ValueError, match="512 numbers.*384"):
        create_model(ulip, backbone=small)


def test_the_hub(model, small, ulip, cloud, tmp_path, monkeypatch):
    model.save(tmp_path / "ours")
    (tmp_path / "theirs").mkdir()
    asked = []

    def snapshot(repo, allow_patterns, **rest):
        asked.append((repo, rest.get("revision")))
        return str(tmp_path / repo.split("/")[1])

    def download(repo, file, **rest):
        asked.append((repo, file))
        return str(ulip)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    assert same(create_model("hub:somebody/ours", backbone=small, revision="v1"), model, cloud)
    assert same(CG3D.from_pretrained("somebody/ours", backbone=small), model, cloud)
    assert create_model("hub:somebody/theirs").contract.model == "ulip/pointmlp"
    assert create_model("hub:somebody/theirs/a/b.pt", points=512).contract.points == 512
    assert asked == [
        ("somebody/ours", "v1"),
        ("somebody/ours", None),
        ("somebody/theirs", None),
        ("somebody/theirs", "model.pt"),
        ("somebody/theirs", "a/b.pt"),
    ]
    with pytest.raises(ValueError, match="revision and token"):
        create_model("hub:somebody/theirs", revision="v1")


def test_published_models_by_name_are_compared_with_their_hash(ulip, monkeypatch):
    digest = hashlib.sha256(ulip.read_bytes()).hexdigest()
    entry = factory.CATALOG["uni3d-b"]
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda *args, **rest: str(ulip))
    with pytest.raises(ValueError, match="SHA-256 is not bb533f91.*download again"):
        create_model("uni3d-b")
    monkeypatch.setitem(factory.CATALOG, "uni3d-b", replace(entry, sha256={entry.files[0]: digest}))
    assert create_model("uni3d-b").contract.model == "ulip/pointmlp"


def test_unknown_names(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(FileNotFoundError, match="no model 'nanoo'.*did you mean nano.*hub:owner/name"):
        create_model("nanoo")
    for name in ("owner/name", "./no/such.pt", Path("none")):
        with pytest.raises(FileNotFoundError, match="no such file or folder"):
            create_model(name)
    with pytest.raises(FileNotFoundError, match="config.json is not there"):
        create_model(tmp_path)
    with pytest.raises(ValueError, match="clip: a setting of published weights"):
        create_model("nano", clip="ViT-B-32")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(cg3d.Cg3dError, match="HF_HUB_OFFLINE"):
        create_model("hub:nobody/nothing")


def test_options():
    assert split_options("a.pt?points=8&clip=x/y.pt&swap_yz=True") == (
        "a.pt",
        {"points": 8, "clip": "x/y.pt", "swap_yz": True},
    )
    assert split_options("a.pt") == ("a.pt", {})


def test_errors_of_the_hub_say_which_it_was():
    from types import SimpleNamespace

    import huggingface_hub.errors as errors

    def raised(kind, status):
        error = kind.__new__(kind)
        Exception.__init__(error, "words")
        error.response = SimpleNamespace(status_code=status)
        return hub.hub_error(error, "a/b")

    assert isinstance(raised(errors.RepositoryNotFoundError, 404), FileNotFoundError)
    assert "no such file" in str(raised(errors.EntryNotFoundError, 404))
    assert "refuses (403)" in str(raised(errors.HfHubHTTPError, 403))
    unreachable = hub.hub_error(ConnectionError("x"), "a/b")
    assert isinstance(unreachable, hub.HubError) and isinstance(unreachable, cg3d.Cg3dError)


def test_a_card_is_written_and_uploaded(model, small, tmp_path, monkeypatch, cloud):
    folder = model.save_pretrained(tmp_path / "out", license="apache-2.0", metrics={"top1": 12.5})
    card = (folder / "README.md").read_text()
    assert "license: apache-2.0" in card and "| top1 | 12.5 |" in card and f'create_model("{folder}")' in card
    uploaded = {}

    def upload(self, *, repo_id, folder_path, commit_message):
        uploaded.update({path.name: path.read_text() for path in Path(folder_path).glob("*.md")})
        return f"{repo_id}: {commit_message}"

    monkeypatch.setattr("huggingface_hub.HfApi.upload_folder", upload)
    monkeypatch.setattr(
        "huggingface_hub.HfApi.create_repo", lambda self, repo, **rest: type("Repo", (), {"repo_id": repo})
    )
    assert model.push_to_hub("me/mine", message="first") == "me/mine: first"
    assert 'cg3d.create_model("hub:me/mine")' in uploaded["README.md"]
    with pytest.raises(ValueError, match="owner/name"):
        model.push_to_hub("mine")
