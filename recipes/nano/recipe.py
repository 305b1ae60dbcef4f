"""How the bundled model `nano` is made: the 3D encoder, the prompts, the packed files, and the stages of the
job.

`towers.py` trains the two towers; here the 3D encoder learns from texts, views and features, and everything
is written in the formats that cg3d loads. The job notebook is `nbs/backbone.ipynb`; README.md in this folder
has the commands.
"""

import copy
import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from corpus import WORDNET_HINT, corpus, row_texts, training_rows
from torch import Tensor, nn
from towers import (
    SHARES,
    PooledHead,
    TokenHead,
    bfloat16,
    device_of,
    distill_text,
    draw_targets,
    embed_maps,
    image_teacher,
    initialize_tokens,
    match_texts,
    nano_tokenizer,
    new_text_tower,
    soft_loss,
    soft_targets,
    text_teacher,
    train_head,
    view_features,
)

from cg3d.core.config import check_settings, split_list
from cg3d.core.errors import InputError
from cg3d.geometry.augment import Augment
from cg3d.io.collection import Collection, read_collection
from cg3d.models.cg3d import CG3D, CG3DConfig
from cg3d.models.clip_backbone import CONFIG_FILE, NANO_CONFIG, Backbone, load_backbone, register_nano_vit
from cg3d.models.prompts import Prompts
from cg3d.models.registry import create_encoder

# ---- the 3D encoder

AUGMENT = Augment(
    rotate=180.0,
    scale=(0.8, 1.2),
    scale_per_axis=True,
    translate=0.05,
    one_sided=0.35,
    depth_noise=0.01,
    uneven=0.25,
    tilt=8.0,
    jitter=0.01,
    jitter_p=0.5,
    color_jitter=0.2,
    color_drop=0.3,
)
ENCODER = {
    "encoder": "point_transformer_small",
    "encoder_cfg": {"groups": 64, "neighbors": 24},
    "points": 1024,
}


def standardize(
    features: Tensor,  # (N, D)
    rows: np.ndarray,  # to learn from
) -> Tensor:  # (N, D)
    "Zero mean and unit standard deviation over the training rows."
    return (features - features[rows].mean(0)) / (features[rows].std(0) + 1e-3)


@torch.no_grad()
def update_average(
    average: nn.Module,
    encoder: nn.Module,
    rate: float,  # in [0, 1]
) -> None:
    "Move the averaged weights towards the current ones; buffers are copied."
    for old, new in zip(average.parameters(), encoder.parameters()):
        old.lerp_(new, rate)
    for old, new in zip(average.buffers(), encoder.buffers()):
        old.copy_(new)


def weight_decay_groups(
    parameters: Sequence[nn.Parameter],
    weight_decay: float = 0.05,  # of the matrices
) -> list[dict]:  # for an optimizer
    "Matrices with weight decay, vectors without."
    matrices = [parameter for parameter in parameters if parameter.ndim > 1]
    vectors = [parameter for parameter in parameters if parameter.ndim < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def chunked_step(
    encoder: nn.Module,
    clouds: Tensor,  # (B, n, 6)
    targets: list[tuple[float, Tensor, float]],  # weight, unit vectors (B, D), temperature
    more_loss: Callable[[Tensor, slice], Tensor],  # of the embeddings of a chunk, and its place in the batch
    parameters: Sequence[nn.Parameter],
    optimizer: torch.optim.Optimizer,
    chunk: int = 32,  # clouds per pass
) -> float:  # the loss
    """One optimizer step over a batch that is processed in chunks which fit the processor's cache.

    Batch norm sees chunks, the softmax the whole batch.
    """
    loss_sum = 0.0
    soft = [soft_targets(vectors, temperature) for _, vectors, temperature in targets]
    optimizer.zero_grad()
    for start in range(0, len(clouds), chunk):
        part = slice(start, start + chunk)
        with bfloat16(clouds.device):
            embeddings = encoder(clouds[part])
        embeddings = F.normalize(embeddings.float(), dim=-1)
        loss = more_loss(embeddings, part)
        for (weight, vectors, temperature), shares in zip(targets, soft):
            loss = loss + weight * soft_loss(embeddings, vectors, shares[part], temperature)
        loss = loss * len(embeddings) / len(clouds)
        loss.backward()
        loss_sum += loss.item()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    return loss_sum


@dataclass(frozen=True)
class Phase:
    "Targets of some epochs of the 3D encoder's training."

    epochs: int
    texts: dict[str, Tensor]  # unit vectors of `row_texts`, (N, D) each
    views: Tensor  # unit vectors of the views, (N, V, D)


def learning_rate_factor(warmup: int, steps: int) -> Callable[[int], float]:
    "Linear warm-up, then cosine decay to a thousandth."

    def factor(step: int) -> float:
        cosine = 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
        return min(1.0, (step + 1) / warmup) * (cosine + 1e-3)

    return factor


def train_points(
    encoder: nn.Module,  # trained in place; needs a linear `projection`
    points: Tensor,  # clouds (N, P, 6) on the CPU, where they are augmented
    phases: Sequence[Phase],
    pooled: Tensor,  # pooled features of the stem, (N, V, 1280)
    rows: np.ndarray,  # to learn from
    lr: float = 1e-3,
    batch_size: int = 128,
    count: int = 1024,  # points of a cloud
    seed: int = 0,
) -> Iterator[tuple[float, nn.Module]]:  # after each epoch: the loss, and the averaged encoder
    """Train a 3D encoder on texts, views and features; a generator, so that a long run can be watched and
    saved.

    Four targets at once: the three texts, one view embedding, and (through a linear layer that is discarded
    afterwards) the pooled features of the stem, averaged over the views. Clouds are rotated, stretched,
    recolored, and a third of them reduced to what a depth camera sees. The result is the exponential moving
    average of the weights.

    The targets change once. In the first phase they are the text teacher's and the pooled head's, which are
    better; in the second those of the packed towers, whose embedding space the encoder is used in.

    Raises: `InputError` if there are fewer rows than one batch.
    """
    torch.manual_seed(seed)
    rng, generator = np.random.RandomState(seed), torch.Generator().manual_seed(seed)
    steps, device = len(rows) // batch_size, device_of(encoder)
    if not steps:
        raise InputError(f"{len(rows)} shapes are fewer than one batch of {batch_size}")
    features, hidden = standardize(pooled.mean(1), rows), {}
    regressor = nn.Linear(encoder.projection.in_features, features.shape[1]).to(device)
    hook = encoder.projection.register_forward_pre_hook(lambda module, inputs: hidden.update(x=inputs[0]))
    average = copy.deepcopy(encoder).eval()
    average.projection._forward_pre_hooks.clear()
    parameters = [*encoder.parameters(), *regressor.parameters()]
    optimizer = torch.optim.AdamW(weight_decay_groups(parameters), lr=lr, betas=(0.9, 0.98))
    epochs = sum(phase.epochs for phase in phases)
    factor = learning_rate_factor(2 * steps, steps * epochs)
    schedule, done = torch.optim.lr_scheduler.LambdaLR(optimizer, factor), 0
    try:
        for phase in [item for item in phases for _ in range(item.epochs)]:
            encoder.train()
            losses = []
            for part in np.split(rng.permutation(rows)[: steps * batch_size], steps):
                clouds = AUGMENT(points[part], generator)
                indices = torch.randperm(points.shape[1], generator=generator)[:count]
                clouds = clouds[:, indices].to(device)
                drawn = draw_targets(phase.texts, part, rng, device)
                targets = [(weight, vectors, 0.07) for weight, vectors in drawn]
                views = phase.views[part, rng.randint(phase.views.shape[1], size=batch_size)].to(device)
                targets.append((1.0, views, 0.05))
                wanted = features[part].to(device)

                def stem_loss(embeddings: Tensor, chunk: slice, wanted: Tensor = wanted) -> Tensor:
                    with bfloat16(device):
                        predicted = regressor(hidden["x"])
                    return 2 * (1 - F.cosine_similarity(predicted.float(), wanted[chunk]).mean())

                losses.append(chunked_step(encoder, clouds, targets, stem_loss, parameters, optimizer))
                schedule.step()
                done += 1
                update_average(average, encoder, 1 - min(0.998, (1 + done) / (10 + done)))
            yield float(np.mean(losses)), average
    finally:
        hook.remove()


# ---- packing

HEAD_NAMES = {  # in TokenHead -> in cg3d_nano_vit
    "proj": "patch_embed.proj",
    "cls": "cls_token",
    "pos": "pos_embed",
    "blocks": "blocks",
    "norm": "norm",
}


def pack_towers(
    text_state: dict[str, Tensor],  # of the text tower
    image_state: dict[str, Tensor],  # of the TokenHead
    stem_state: dict[str, Tensor],  # of the stem; its last convolution comes from the head
    folder: str | Path,
) -> Path:  # with open_clip_config.json and open_clip_model.safetensors
    """Write the towers as an open_clip model in half precision, which `load_backbone` and open_clip read.

    Under 30 MB of weights, 12.6 of them the token table. `logit_scale` is the inverse of the training
    temperature.
    """
    from safetensors.torch import save_file

    register_nano_vit()
    stem = {name: value for name, value in stem_state.items() if not name.startswith("classifier.")}
    stem |= {name: value for name, value in image_state.items() if name.split(".")[0] in ("conv_head", "bn2")}
    state = {f"visual.trunk.patch_embed.backbone.{name}": value for name, value in stem.items()}
    for name, value in image_state.items():
        first, dot, rest = name.partition(".")
        if first in HEAD_NAMES:
            state[f"visual.trunk.{HEAD_NAMES[first]}{dot}{rest}"] = value
    state["visual.head.proj.weight"] = image_state["head.weight"]
    state["logit_scale"] = torch.tensor(math.log(1 / 0.07))
    state |= {name: value for name, value in text_state.items() if name != "attn_mask"}
    half = {
        name: value.detach().cpu().half().contiguous().clone()
        for name, value in state.items()
        if not name.endswith("num_batches_tracked")
    }
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(half, folder / "open_clip_model.safetensors")
    (folder / CONFIG_FILE).write_text(json.dumps(NANO_CONFIG, indent=2) + "\n")
    return folder


def pack_points(
    encoder: nn.Module,  # averaged, as `train_points` gives it
    backbone: Backbone,  # the packed towers
    folder: str | Path,
    prompts: Prompts | None = None,  # deep visual prompts; None: the model has none
    **settings,  # of CG3DConfig, where they differ from `ENCODER`; clip says how the backbone is found again
) -> Path:
    "Write the 3D encoder as a CG3D model in half precision."
    defaults = {"visual_prompt": "deep" if prompts else None, "clip": backbone.name}
    model = CG3D.build(CG3DConfig(**(defaults | ENCODER | settings)), backbone)
    model.encoder.load_state_dict(encoder.state_dict())
    if prompts:
        model.prompts.load_state_dict(prompts.state_dict())
    return model.save(folder, half=True)


# ---- prompts


def train_prompts(
    prompts: Prompts,  # visual tokens, trained in place
    tokens: Callable[
        [np.ndarray, np.random.RandomState], Tensor
    ],  # rows -> input of the first block (B, T, width)
    targets: dict[str, Tensor],  # unit vectors of `row_texts` by the frozen text tower, (N, D) each
    rows: np.ndarray,  # to learn from
    epochs: int = 2,
    lr: float = 3e-3,
    batch_size: int = 64,
    seed: int = 0,
) -> list[float]:  # loss of each epoch
    """Prompt tuning of a frozen image tower on views; raises as `match_texts`.

    The prompts see views and their texts, as in the joint training. The towers around them stay as they are,
    so the tokens that enter the first block are the same at every step. (The shipped prompts were trained
    with the text of the noun at weight 1; here, as for the towers, it has weight 0.5.)
    """
    optimizer = torch.optim.AdamW(prompts.parameters(), lr=lr, weight_decay=0.0)

    def embed(part: np.ndarray, rng: np.random.RandomState) -> Tensor:
        return prompts.encode_tokens(tokens(part, rng))

    return match_texts(embed, optimizer, targets, rows, epochs, batch_size, seed)


@torch.no_grad()
def maps_to_tokens(
    backbone: Backbone,
    maps: Tensor,  # (B, 352, 6, 6), of `trunk_maps`, on the backbone's device
) -> Tensor:  # (B, 1 + 36, width)
    "The rest of the image tower's stem: from stored maps to the input of its first block."
    trunk = backbone.clip.visual.trunk
    embed = trunk.patch_embed
    tokens = embed.proj(embed.backbone.bn2(embed.backbone.conv_head(maps))).flatten(2).transpose(1, 2)
    return trunk.norm_pre(trunk.patch_drop(trunk._pos_embed(tokens)))


# ---- the stages of the job; each reads what the one before has left in the folder, so a run can continue


@torch.no_grad()
def _embed_texts(
    tower: nn.Module, texts: list[str], batch_size: int = 512
) -> Tensor:  # unit vectors, on the CPU
    bpe, device = nano_tokenizer(), device_of(tower)
    parts = [texts[start : start + batch_size] for start in range(0, len(texts), batch_size)]
    return torch.cat([F.normalize(tower(bpe(part).to(device)), dim=-1).cpu() for part in parts])


def build_text(
    collection: Collection,
    wordnet: str | Path,
    folder: str | Path,
    teacher: Callable | None = None,  # None: `text_teacher`
    epochs: float = 4,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> list[float]:  # 1 - cosine to the teacher at each step
    "Stage 1: corpus, teacher, text tower; leaves text.pt and targets.pt."
    folder, teacher = Path(folder), teacher or text_teacher(device)
    folder.mkdir(parents=True, exist_ok=True)
    texts = corpus(collection, wordnet, seed=seed)
    torch.manual_seed(seed)
    tower = new_text_tower()
    initialize_tokens(tower, teacher)
    tower = tower.to(device)
    targets = {group: teacher(texts[group]).half() for group in SHARES}
    history = distill_text(tower, texts, targets, epochs, seed=seed)
    rows = row_texts(collection)
    embeddings = {
        "teacher": {name: teacher(part) for name, part in rows.items()},
        "nano": {name: _embed_texts(tower, part) for name, part in rows.items()},
    }
    torch.save(embeddings, folder / "targets.pt")
    torch.save(tower.cpu().state_dict(), folder / "text.pt")
    return history


def build_image(
    collection: Collection,
    folder: str | Path,
    stem: nn.Module | None = None,  # None: `image_teacher`
    pooled_epochs: int = 12,
    epochs: int = 16,
    seed: int = 0,
    device: str | torch.device = "cpu",
) -> dict[str, list[float]]:  # losses of both heads
    "Stage 2: views, features, both heads; leaves views.pt and the packed towers in nano/."
    folder, rows, curves = Path(folder), training_rows(collection), {}
    stem = copy.deepcopy(stem or image_teacher()).to(device)
    targets = torch.load(folder / "targets.pt", map_location="cpu")
    maps, pooled = view_features(stem, collection.points(), seed=seed)
    torch.manual_seed(seed)
    pooled_head = PooledHead(stem).to(device)
    curves["pooled"] = train_head(pooled_head, maps, targets["teacher"], rows, pooled_epochs, 1e-3, seed=seed)
    torch.manual_seed(seed)
    head = TokenHead(stem).to(device)
    curves["token"] = train_head(head, maps, targets["nano"], rows, epochs, seed=seed)
    views = {"teacher": embed_maps(pooled_head, maps), "nano": embed_maps(head, maps)}
    torch.save({"maps": maps, "pooled": pooled} | views, folder / "views.pt")
    pack_towers(torch.load(folder / "text.pt"), head.state_dict(), stem.state_dict(), folder / "nano")
    return curves


def build_points(
    collection: Collection,
    folder: str | Path,
    backbone: Backbone,  # the packed towers; the encoder is trained on its device
    epochs: tuple[int, int] = (7, 21),  # with the teachers' targets, then with the towers' own
    prompt_epochs: int = 2,
    seed: int = 0,
) -> dict[str, list[float]]:  # losses of prompts and encoder
    "Stage 3: prompts and 3D encoder; writes nano-3d/ after every epoch."
    folder, rows, curve, device = Path(folder), training_rows(collection), [], device_of(backbone)
    targets = torch.load(folder / "targets.pt", map_location="cpu")
    views = torch.load(folder / "views.pt", map_location="cpu")
    torch.manual_seed(seed)
    prompts = Prompts(backbone, visual="deep").to(device)
    options = {"dim": backbone.dim, "in_channels": 6, **ENCODER["encoder_cfg"]}
    encoder = create_encoder(ENCODER["encoder"], **options).to(device)

    def tokens(part: np.ndarray, rng: np.random.RandomState) -> Tensor:
        maps = views["maps"][part, rng.randint(views["maps"].shape[1], size=len(part))]
        return maps_to_tokens(backbone, maps.to(device).float())

    prompt_curve = train_prompts(prompts, tokens, targets["nano"], rows, prompt_epochs, seed=seed)
    kinds = zip(epochs, ("teacher", "nano"), strict=True)
    phases = [Phase(count, targets[kind], views[kind]) for count, kind in kinds]
    points = collection.points()
    for loss, average in train_points(encoder, points, phases, views["pooled"], rows, seed=seed):
        pack_points(average, backbone, folder / "nano-3d", prompts)
        curve.append(loss)
        print(f"epoch {len(curve)} of {sum(epochs)}: loss {loss:.3f}", flush=True)
    return {"prompts": prompt_curve, "points": curve}


def torch_device(
    name: str,  # auto, cpu, cuda, cuda:1
) -> torch.device:
    """The device of a name; auto is CUDA if there is a GPU, else the CPU.

    Raises: `InputError` if the name is unknown to PyTorch.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        return torch.device(name)
    except RuntimeError as error:
        message = f"device={name!r} is no device of PyTorch; use auto, cpu, cuda or cuda:1"
        raise InputError(message, field="device", value=name) from error


STAGES = ("text", "image", "points", "real", "evaluate")


@dataclass(frozen=True)
class RecipeConfig:
    """Parameters of `nbs/backbone.ipynb`, where they are explained.

    Raises: `KindError` for a value of another type, `InputError` for a value out of range or an unknown
    stage.
    """

    collection: str = "../shared/data/open3dlang"
    wordnet: str = ""
    out: str = "runs/nano"
    stages: str = "evaluate"
    text_epochs: int = 4
    pooled_epochs: int = 12
    image_epochs: int = 16
    early_epochs: int = 7
    late_epochs: int = 21
    prompt_epochs: int = 2
    real: str = ""
    head_epochs: int = 3
    real_steps: int = 480
    open_views: int = 2
    real_views: int = 4
    backbone: str = "nano"
    model: str = "nano"
    teacher: bool = False
    views: int = 4
    seed: int = 0
    device: str = "auto"

    def __post_init__(self):
        ranges = {"seed": (0, None), "head_epochs": (0, None)}
        check_settings(self, {"stages": STAGES}, ranges, separators={"stages": ","}, integers=(1, None))
        if "text" in self.stage_list and not self.wordnet:
            message = f"the stage text needs wordnet=FOLDER: {WORDNET_HINT}, then FOLDER/usr/share/wordnet"
            raise InputError(message, field="wordnet")
        if "real" in self.stage_list and not self.real:
            message = "the stage real needs real=PATH, a packed collection of real objects"
            raise InputError(message, field="real")
        torch_device(self.device)

    @property
    def stage_list(self) -> list[str]:
        "The stages to run."
        return split_list(self.stages)


def build(
    config: RecipeConfig,
    collection: Collection,  # the whole set, with a column split
) -> dict[str, list[float]]:  # losses, by what was trained
    "Run the training stages of the configuration, in their order."
    curves, folder, device = {}, Path(config.out), torch_device(config.device)
    if "text" in config.stage_list:
        options = {"epochs": config.text_epochs, "seed": config.seed, "device": device}
        curves["text"] = build_text(collection, config.wordnet, folder, **options)
    if "image" in config.stage_list:
        options = {"pooled_epochs": config.pooled_epochs, "epochs": config.image_epochs}
        curves |= build_image(collection, folder, seed=config.seed, device=device, **options)
    if "points" in config.stage_list:
        backbone = load_backbone(folder / "nano", device=device)
        epochs = (config.early_epochs, config.late_epochs)
        curves |= build_points(collection, folder, backbone, epochs, config.prompt_epochs, config.seed)
    if "real" in config.stage_list:
        from real import build_real

        backbone = load_backbone(folder / "nano", device=device)
        model = CG3D.from_pretrained(folder / "nano-3d", backbone=backbone)
        options = {
            "epochs": config.head_epochs,
            "steps": config.real_steps,
            "views": (config.open_views, config.real_views),
            "seed": config.seed,
        }
        objects = read_collection(config.real)
        curves |= build_real(model, collection, objects, folder / "real", folder / "nano", **options)
    return curves
