"""Tensor names and shapes of the published weight files, and files of random numbers in exactly those layouts.

The official files cannot be shipped, and tests must not download. So the layouts are written down here as name -> shape,
from the authors' descriptions and not from our modules: a module that lacks a parameter cannot hide it. `write_layout`
fills one with seeded random numbers. Such a file has the form of a published model and none of its training. It shows
that a file of this form loads and computes what it should.

A file wraps those tables: CG3D's trainer writes `base_model` and `visual_clip_model`, ULIP's `state_dict` with `module.`
in front and the settings in `args`, DeepSpeed `module`. Uni3D's numbers are half precision.
"""

from pathlib import Path

import torch
from torch import Tensor

from cg3d.core.errors import InputError


def _linear(
    name: str, out: int, into: int, bias: bool = True, ones: int = 0
) -> dict[str, tuple]:  # `ones`: trailing kernel axes
    return {f"{name}.weight": (out, into, *[1] * ones)} | ({f"{name}.bias": (out,)} if bias else {})


def _norm(name: str, width: int, batch: bool = False) -> dict[str, tuple]:
    shapes = {f"{name}.weight": (width,), f"{name}.bias": (width,)}
    return shapes | (
        {f"{name}.running_mean": (width,), f"{name}.running_var": (width,), f"{name}.num_batches_tracked": ()}
        if batch
        else {}
    )


def _patch_reader(at: str, channels: int, out: int) -> dict[str, tuple]:  # Point-BERT's mini-PointNet
    shapes = (
        _linear(f"{at}encoder.first_conv.0", 128, channels, ones=1)
        | _norm(f"{at}encoder.first_conv.1", 128, True)
        | _linear(f"{at}encoder.first_conv.3", 256, 128, ones=1)
    )
    return (
        shapes
        | _linear(f"{at}encoder.second_conv.0", 512, 512, ones=1)
        | _norm(f"{at}encoder.second_conv.1", 512, True)
        | _linear(f"{at}encoder.second_conv.3", out, 512, ones=1)
    )


def _tokens(at: str, width: int) -> dict[str, tuple]:
    return (
        {f"{at}cls_token": (1, 1, width), f"{at}cls_pos": (1, 1, width)}
        | _linear(f"{at}pos_embed.0", 128, 3)
        | _linear(f"{at}pos_embed.2", width, 128)
    )


def _vit_block(name: str, width: int, qkv_bias: bool) -> dict[str, tuple]:  # timm's names
    return (
        _norm(f"{name}.norm1", width)
        | _linear(f"{name}.attn.qkv", 3 * width, width, qkv_bias)
        | _linear(f"{name}.attn.proj", width, width)
        | _norm(f"{name}.norm2", width)
        | _linear(f"{name}.mlp.fc1", 4 * width, width)
        | _linear(f"{name}.mlp.fc2", width, 4 * width)
    )


def pointbert(
    at: str = "",  # prefix
    channels: int = 3,  # 6 for ULIP-2
    depth: int = 12,  # 18 for ULIP-2
    width: int = 384,
) -> dict[str, tuple]:
    "Point-BERT without its projection."
    shapes = (
        _patch_reader(at, channels, 256)
        | _linear(f"{at}reduce_dim", width, 256)
        | _tokens(at, width)
        | _norm(f"{at}norm", width)
    )
    for i in range(depth):
        shapes |= _vit_block(f"{at}blocks.blocks.{i}", width, qkv_bias=False)
    return shapes


def pointmlp(
    at: str = "",  # prefix
    width: int = 64,
) -> dict[str, tuple]:
    "PointMLP without its head."

    def layer(name, out, into):
        return _linear(f"{name}.0", out, into, bias=False, ones=1) | _norm(f"{name}.1", out, True)

    shapes = layer(f"{at}embedding.net", width, 3)
    for stage in range(4):
        shapes |= {
            f"{at}local_grouper_list.{stage}.affine_{letter}": (1, 1, 1, width)
            for letter in ("alpha", "beta")
        }
        shapes |= layer(f"{at}pre_blocks_list.{stage}.transfer.net", 2 * width, 2 * width)
        width *= 2
        for block in (
            f"{at}{part}_blocks_list.{stage}.operation.{i}.net{n}"
            for part in ("pre", "pos")
            for i in range(2)
            for n in (1, 2)
        ):
            shapes |= layer(block, width, width)
    return shapes


def slip(
    image: tuple[int, int, int, int] = (
        768,
        12,
        16,
        14,
    ),  # width, blocks, patch and patches a side of the image tower
    text: tuple[int, int, int] = (512, 12, 512),  # width, blocks of the text tower, length of an embedding
) -> dict[str, tuple]:
    "SLIP's towers."
    width, depth, patch, side = image
    shapes = vit(width, depth, patch, side, "visual.")
    width, depth, dim = text
    for i in range(depth):
        name = f"transformer.resblocks.{i}"
        shapes |= {
            f"{name}.attn.in_proj_weight": (3 * width, width),
            f"{name}.attn.in_proj_bias": (3 * width,),
        } | _linear(f"{name}.attn.out_proj", width, width)
        shapes |= (
            _norm(f"{name}.ln_1", width)
            | _linear(f"{name}.mlp.c_fc", 4 * width, width)
            | _linear(f"{name}.mlp.c_proj", width, 4 * width)
            | _norm(f"{name}.ln_2", width)
        )
    shapes |= {"token_embedding.weight": (49408, width), "positional_embedding": (77, width)} | _norm(
        "ln_final", width
    )
    return shapes | {"image_projection": (image[0], dim), "text_projection": (width, dim), "logit_scale": ()}


def vit(width: int = 768, depth: int = 12, patch: int = 16, side: int = 14, at: str = "") -> dict[str, tuple]:
    "A timm vision transformer with a class token and no head."
    shapes = {
        f"{at}cls_token": (1, 1, width),
        f"{at}pos_embed": (1, side**2 + 1, width),
        f"{at}patch_embed.proj.weight": (width, 3, patch, patch),
        f"{at}patch_embed.proj.bias": (width,),
    }
    for i in range(depth):
        shapes |= _vit_block(f"{at}blocks.{i}", width, qkv_bias=True)
    return shapes | _norm(f"{at}norm", width)


def ppat(
    at: str = "ppat.",  # prefix
    depth: int = 12,
    hidden: int = 1536,  # width of a block's MLP
    patch_width: int = 256,
    width: int = 512,
    heads: int = 8,
) -> dict[str, tuple]:
    "OpenShape's point patch transformer without its projection."
    shapes, before = {f"{at}cls_token": (width,)}, 9
    for i, after in enumerate((64, 64, patch_width)):
        shapes |= _linear(f"{at}sa.mlp_convs.{i}", after, before, ones=2) | _norm(
            f"{at}sa.mlp_bns.{i}", after, True
        )
        before = after
    shapes |= _linear(f"{at}lift.0", width, patch_width + 3, ones=1) | _norm(f"{at}lift.2", width)
    for i in range(depth):
        name = f"{at}transformer.layers.{i}"
        shapes |= (
            _norm(f"{name}.0.norm", width)
            | _linear(f"{name}.0.fn.to_qkv", 192 * heads, width, False)
            | _linear(f"{name}.0.fn.to_out.0", width, 64 * heads)
        )
        shapes |= (
            _norm(f"{name}.1.norm", width)
            | _linear(f"{name}.1.fn.net.0", hidden, width)
            | _linear(f"{name}.1.fn.net.3", width, hidden)
        )
    return shapes


def uni3d(
    size: str = "b",  # ti, s, b, l, g
    at: str = "point_encoder.",
) -> dict[str, tuple]:
    "Uni3D's point encoder, the unused image side of its transformer included."
    width, depth, hidden, patch, side, classes = {
        "ti": (192, 12, 512, 14, 16, 0),
        "s": (384, 12, 1024, 14, 16, 0),
        "b": (768, 12, 2048, 14, 32, 1000),
        "l": (1024, 24, 2730, 14, 32, 1000),
        "g": (1408, 40, 6144, 14, 40, 1000),
    }[size]
    shapes = (
        _patch_reader(at, 6, 512)
        | _linear(f"{at}encoder2trans", width, 512)
        | _linear(f"{at}trans2embed", 1024, width)
        | _tokens(at, width)
    )
    v = f"{at}visual."
    shapes |= {
        f"{v}cls_token": (1, 1, width),
        f"{v}pos_embed": (1, side**2 + 1, width),
        f"{v}patch_embed.proj.weight": (width, 3, patch, patch),
        f"{v}patch_embed.proj.bias": (width,),
    }
    for i in range(depth):
        b = f"{v}blocks.{i}"
        if size in ("b", "l"):
            shapes |= (
                _linear(f"{b}.attn.q_proj", width, width)
                | _linear(f"{b}.attn.k_proj", width, width, False)
                | _linear(f"{b}.attn.v_proj", width, width)
            )
        else:
            shapes |= {f"{b}.attn.q_bias": (width,), f"{b}.attn.v_bias": (width,)} | _linear(
                f"{b}.attn.qkv", 3 * width, width, False
            )
        if size in ("b", "l"):
            shapes |= (
                _linear(f"{b}.mlp.fc1_g", hidden, width)
                | _linear(f"{b}.mlp.fc1_x", hidden, width)
                | _norm(f"{b}.mlp.norm", hidden)
            )
        else:
            shapes |= _linear(f"{b}.mlp.fc1", hidden if size == "g" else 2 * hidden, width)
        shapes |= (
            _linear(f"{b}.attn.proj", width, width)
            | _norm(f"{b}.norm1", width)
            | _norm(f"{b}.norm2", width)
            | _linear(f"{b}.mlp.fc2", width, hidden)
        )
    head = _linear(f"{v}head", classes, width) if classes else {}
    return shapes | _norm(f"{v}fc_norm", width) | head | {"logit_scale": ()}


def with_adam(file: dict[str, dict[str, tuple]]) -> dict[str, dict[str, tuple]]:
    "A file that also holds Adam's two moments of every parameter, as OpenShape's trainer saves it."
    shapes = [
        shape
        for tensors in file.values()
        for name, shape in tensors.items()
        if "running_" not in name and "num_batches" not in name
    ]
    return file | {
        f"optimizer.state.{i}": {"step": (), "exp_avg": shape, "exp_avg_sq": shape}
        for i, shape in enumerate(shapes)
    }


def payload(
    name: str,  # one of `published_layouts()`
) -> int:  # bytes
    "Size of the numbers in a file of this layout, without what torch.save adds."
    half = name.startswith("uni3d/")
    return sum(
        torch.Size(shape).numel() * (8 if tensor.endswith("num_batches_tracked") else 2 if half else 4)
        for shapes in published_layouts()[name].values()
        for tensor, shape in shapes.items()
    )


_SMALL = dict(image=(128, 2, 8, 3), text=(64, 2, 512))  # towers for tests: heads stay 64 wide
_SCALING3 = dict(hidden=1024, patch_width=128)


def _ulip(
    encoder: dict[str, tuple], feature: int, dim: int, towers: dict[str, tuple]
) -> dict[str, dict[str, tuple]]:
    shapes = encoder | {"pc_projection": (feature, dim), "logit_scale": ()} | towers
    return {"state_dict": {f"module.{name}": shape for name, shape in shapes.items()}}


def _openshape(dim: int, width: int = 512, **sizes) -> dict[str, dict[str, tuple]]:
    shapes = ppat(width=width, **sizes) | _linear("proj", dim, width)
    return {
        "state_dict": {f"module.{name}": shape for name, shape in shapes.items()},
        "logit_scale": {"module.logit_scale": ()},
    }


def published_layouts(
    small_towers: bool = False,  # True: SLIP towers of two narrow blocks instead of twelve wide ones
) -> dict[str, dict[str, dict[str, tuple]]]:  # file -> container ("a.b" nests) -> name -> shape
    "Every layout that `load_published` and `load_part_model` read."
    sizes = _SMALL if small_towers else {}
    towers = slip(**sizes)
    image = vit(*sizes.get("image", ()))
    width, blocks = image["cls_token"][-1], sum(name.endswith("norm1.weight") for name in image)
    tuned = {
        "visual_clip_model": image
        | {"prompt_embeddings": (1, 5, width), "deep_prompt_embeddings": (blocks - 1, 5, width)},
        "optimizer.state.0": {"exp_avg": (3, 3)},
    }
    head = _linear("cls_head_finetune.0", 256, 768) | _linear("cls_head_finetune.3", 55, 256)
    at = "point_encoder."
    perceptron = (
        _linear(f"{at}classifier.0", 512, 1024)
        | _norm(f"{at}classifier.1", 512, True)
        | _linear(f"{at}classifier.4", 256, 512)
        | _norm(f"{at}classifier.5", 256, True)
    )
    return {
        "cg3d/point_transformer": {"base_model": pointbert() | _linear("projection", 512, 768) | head}
        | tuned,
        "cg3d/pointmlp": {"base_model": pointmlp() | _linear("projection", 512, 1024, ones=1)} | tuned,
        "ulip/pointbert": _ulip(pointbert(at), 768, 512, towers),
        "ulip/pointmlp": _ulip(pointmlp(at) | perceptron, 256, 512, towers),
        "ulip2/pointbert": _ulip(pointbert(at, 6, 18), 768, 1280, {}),
        "ulip2/pointbert-xyz": _ulip(pointbert(at, 3, 18), 768, 1280, {}),
        "openshape/vitb32": {"": ppat("pc_encoder.", **_SCALING3)},
        "openshape/vitl14": {
            "": ppat("pc_encoder.ppat.", **_SCALING3) | _linear("pc_encoder.proj", 768, 512)
        },
        "openshape/scaling1": with_adam(_openshape(1280, 256, depth=6, hidden=1024, patch_width=96, heads=4)),
        "openshape/scaling3": _openshape(768, **_SCALING3),
        "openshape/bigG": _openshape(1280),
        "patchalign3d": {
            "model": pointbert()
            | _linear("seg_head.0", 50, 384),  # a head that its training left in the file
            "proj": _linear("proj", 1280, 384),
        },
        **{f"uni3d/{size}": {"module": uni3d(size)} for size in ("ti", "s", "b", "l", "g")},
        "slip": {
            "state_dict": {
                f"module.{name}": shape
                for name, shape in (towers | _linear("image_mlp.layer1", 4096, width)).items()
            }
        },
    }


def random_tensors(
    shapes: dict[str, tuple],
    seed: int = 0,
) -> dict[str, Tensor]:
    "Seeded numbers of a trained network's order of size; nothing is learned in them."
    g = torch.Generator().manual_seed(seed)

    def draw(name: str, shape: tuple) -> Tensor:
        if name.endswith("num_batches_tracked"):
            return torch.tensor(1000)
        if name.endswith("logit_scale"):
            return torch.tensor(2.6593)
        x = torch.randn(shape, generator=g)
        if name.endswith("running_var"):
            return 0.5 + x.abs()
        if len(shape) == 1:
            return 0.1 * x + name.endswith("weight")  # norms are near 1, biases near 0
        if "affine_alpha" in name:
            return 1 + 0.1 * x
        if name.endswith(("pc_projection", "image_projection", "text_projection")):
            return x * shape[0] ** -0.5
        return x * max(1, torch.Size(shape[1:]).numel()) ** -0.5

    return {name: draw(name, shape) for name, shape in shapes.items()}


def write_layout(
    path: str | Path,  # .pt or .pth
    name: str,  # one of `published_layouts()`
    seed: int = 0,
    small_towers: bool = False,  # as in `published_layouts`
    **extra,  # what else stands in the file: epoch, args
) -> Path:
    "A file of random numbers in a published layout."
    layouts = published_layouts(small_towers)
    if name not in layouts:
        raise InputError(f"no layout {name!r}; there are {', '.join(layouts)}")
    content: dict = {}
    for i, (container, shapes) in enumerate(layouts[name].items()):
        inner = content
        for part in filter(None, container.split(".")):
            inner = inner.setdefault(part, {})
        tensors = random_tensors(shapes, seed + i)
        if name.startswith("uni3d/"):  # published in half precision
            tensors = {key: x.half() if x.is_floating_point() else x for key, x in tensors.items()}
        inner.update(tensors)
    torch.save(content | extra, path)
    return Path(path)
