"Small towers of newer models as `clip=`, with random weights: shapes, preprocessing, sigmoid bias, prompts, refusals."

import json
from types import SimpleNamespace

import open_clip
import pytest
import torch

import cg3d.models.clip_backbone as backbone_module
from cg3d.models.clip_backbone import Backbone, load_backbone, missing_functions, published_preprocessing
from cg3d.models.prompts import Prompts

HALF = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}
SIGLIP2 = {  # ViT-B-32-SigLIP2-256 of open_clip, with a narrow text tower and CLIP's tokenizer: its own is on the hub
    "model_cfg": {
        "embed_dim": 768,
        "init_logit_bias": -10,
        "custom_text": True,
        "vision_cfg": {
            "image_size": 256,
            "timm_model_name": "vit_base_patch32_siglip_256",
            "timm_model_pretrained": False,
            "timm_pool": "map",
            "timm_proj": "none",
        },
        "text_cfg": {
            "context_length": 64,
            "vocab_size": 49408,
            "width": 64,
            "heads": 2,
            "layers": 2,
            "no_causal_mask": True,
            "proj_bias": True,
            "pool_type": "last",
            "norm_kwargs": {"eps": 1e-06},
            "act_kwargs": {"approximate": "tanh"},
        },
    },
    "preprocess_cfg": {
        **{k: list(v) for k, v in HALF.items()},
        "interpolation": "bicubic",
        "resize_mode": "squash",
    },
}


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return {name: load_backbone(name, "random", "cpu") for name in ("MobileCLIP2-S0", "PE-Core-T-16-384")}


@pytest.fixture(scope="module")
def siglip(tmp_path_factory):
    folder = tmp_path_factory.mktemp("siglip2")
    (folder / "open_clip_config.json").write_text(json.dumps(SIGLIP2))
    return load_backbone(folder, "random", "cpu")


@pytest.mark.parametrize(
    ("name", "size", "kind", "expected"),
    [
        (
            "MobileCLIP2-S0",
            (256, 256),
            "FastVit",
            {"mean": (0, 0, 0), "std": (1, 1, 1), "interpolation": "bilinear", "resize_mode": "shortest"},
        ),
        (
            "PE-Core-T-16-384",
            (384, 384),
            "Eva",
            {**HALF, "interpolation": "bilinear", "resize_mode": "squash"},
        ),
    ],
)
def test_shapes_preprocessing_and_prompts(small, name, size, kind, expected):
    tower = small[name]
    assert tower.dim == 512 and tower.image_size == size and type(tower._image_tower).__name__ == kind
    assert {key: tower.cfg[key] for key in expected} == expected
    white = torch.ones(1, 3, 30, 40)
    top = (1 - expected["mean"][0]) / expected["std"][0]
    assert tower.preprocess(white).shape == (1, 3, *size) and tower.preprocess(white).unique().tolist() == [
        top
    ]
    with torch.no_grad():
        assert tower.encode_image(white).shape == (1, 512) and tower.encode_text(["a chair", "x"]).shape == (
            2,
            512,
        )
        assert Prompts(tower, visual="pixel").encode_image(white).shape == (1, 512)
        assert Prompts(tower, visual=None, text="context").encode_text(["a chair"]).shape == (1, 512)
    for call in (
        lambda: Prompts(tower, visual="deep"),
        lambda: Prompts(tower, visual="shallow"),
        lambda: tower.image_blocks,
        lambda: tower.image_tokens(white),
        lambda: tower.pool_tokens(torch.zeros(1, 5, 8)),
    ):
        with pytest.raises(
            ValueError, match=f"image tower of '{name}' is a {kind}; use pixel or no visual prompt"
        ):
            call()
    assert tower.logit_bias is None
    with pytest.raises(ValueError, match="not trained with the sigmoid loss"):
        tower.pair_probability(torch.eye(2), torch.eye(2))


def test_pe_core_s_is_configured_like_t():
    config = open_clip.get_model_config("PE-Core-S-16-384")
    assert config["embed_dim"] == 512 and config["vision_cfg"]["image_size"] == 384
    assert published_preprocessing("PE-Core-S-16-384") == published_preprocessing("PE-Core-T-16-384")


def test_siglip2(siglip):
    assert siglip.logit_bias == -10 and siglip.dim == 768 and siglip.image_prefix == 0
    assert tuple(siglip.cfg["mean"]) == (0.5, 0.5, 0.5) and siglip.cfg["resize_mode"] == "squash"
    image, text = torch.eye(3)[:2], torch.eye(3)
    expected = torch.sigmoid(siglip.logit_scale * torch.eye(3)[:2] - 10)
    assert torch.allclose(siglip.pair_probability(image, text), expected)
    pictures = torch.rand(2, 3, 64, 64)
    with torch.no_grad():
        tokens = siglip.image_tokens(pictures)
        for block in siglip.image_blocks:
            tokens = block(tokens)
        assert torch.allclose(siglip.pool_tokens(tokens), siglip.encode_image(pictures), atol=1e-5)
        assert Prompts(siglip, visual="pixel").encode_image(pictures).shape == (2, 768)
        deep = Prompts(siglip, visual="deep")
        assert deep.encode_image(pictures).shape == (2, 768)
        assert (deep.encode_image(pictures) - siglip.encode_image(pictures)).abs().max() > 1e-4


def test_text_context_is_refused_with_the_tokenizer_of_siglip2(siglip):
    from open_clip.tokenizer import HFTokenizer

    for name in ("sot_token_id", "eot_token_id"):  # which `Prompts` looks for
        assert not hasattr(HFTokenizer, name)
    hub = Backbone(siglip.clip, lambda texts: siglip.tokenizer(texts), "siglip2 from the hub")
    with pytest.raises(
        ValueError, match="text context needs CLIP's tokenizer.*'siglip2 from the hub' has another"
    ):
        Prompts(hub, visual=None, text="context")


def test_a_tokenizer_that_must_be_fetched_is_named(monkeypatch):
    def offline(name):
        raise OSError("offline mode is enabled")

    monkeypatch.setattr(open_clip, "get_tokenizer", offline)
    with pytest.raises(FileNotFoundError, match="tokenizer of 'ViT-B-32-SigLIP2-256' could not be fetched"):
        load_backbone("ViT-B-32-SigLIP2-256", "random")


def test_published_preprocessing_of_a_weights_file(tmp_path, small):
    "open_clip reads a file with CLIP's own mean; MobileCLIP2 was trained on pixels in [0, 1]."
    file = tmp_path / "mobileclip2_s0.pt"
    torch.save(small["MobileCLIP2-S0"].clip.state_dict(), file)
    loaded = load_backbone("MobileCLIP2-S0", str(file), "cpu")
    assert tuple(loaded.cfg["mean"]) == (0, 0, 0)
    assert loaded.fingerprint() == small["MobileCLIP2-S0"].fingerprint()
    model = SimpleNamespace(visual=SimpleNamespace(preprocess_cfg={"mean": (0.48, 0.46, 0.41)}))
    with pytest.warns(UserWarning, match="'ViT-L-14' read pictures in different ways"):
        backbone_module._set_preprocessing(model, "ViT-L-14", "file.pt")
    assert model.visual.preprocess_cfg["mean"] == (0.48, 0.46, 0.41)


def test_functions_of_open_clip_exist_and_a_lost_one_is_named(monkeypatch):
    assert missing_functions() == [], "this version of open_clip has lost what cg3d calls"
    monkeypatch.delattr(open_clip, "list_pretrained_tags_by_model")
    monkeypatch.setattr(
        open_clip, "create_model", lambda model_name, pretrained=None, precision="fp32", **more: None
    )
    assert missing_functions() == [
        "open_clip.create_model(load_weights=)",
        "open_clip.create_model(force_quick_gelu=)",
        "open_clip.create_model(require_pretrained=)",
        "open_clip.list_pretrained_tags_by_model",
    ]
    with pytest.raises(ValueError, match=r"open_clip .* has no open_clip.create_model\(load_weights=\)"):
        backbone_module._create("ViT-B-32", "random")
