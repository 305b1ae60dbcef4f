"""Stage `real` of the recipe: the image head and the 3D encoder of `nano` are tuned for real objects and real sensors.

Both start from the weights that the earlier stages have made. A batch holds 96 open shapes and 32 real
objects. Colors are shaded, tinted, quantized, noised, made gray or dropped; clouds are seen from one side, get
holes, flying pixels and a piece of the table below them.
"""

import copy
import math
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from corpus import row_texts, training_rows
from recipe import (
    chunked_step,
    learning_rate_factor,
    maps_to_tokens,
    pack_points,
    update_average,
    weight_decay_groups,
)
from torch import Tensor, nn
from towers import device_of, draw_targets, optimizer_step, soft_loss, soft_targets, view_features

from cg3d.core.errors import InputError
from cg3d.core.malloc import keep_freed_memory
from cg3d.geometry import augment, corruptions
from cg3d.io.collection import Collection
from cg3d.models.cg3d import CG3D


@dataclass(frozen=True)
class Rows:
    "Training rows of both collections; the open shapes come first."

    points: Tensor  # (N, P, 6)
    texts: dict[str, Tensor]  # unit vectors of `row_texts`, (N, D) each
    labels: Tensor  # row of `classes`, -1 without a category, (N,)
    classes: Tensor  # unit vectors of the nouns, (L, D)
    open_count: int  # rows before the first real object
    real_weights: np.ndarray  # probability of each real object
    batch: int = 128  # shapes a step
    real: int = 32  # of them real objects

    def batches(self, rng: np.random.RandomState) -> Iterator[np.ndarray]:
        "Row numbers of endless batches: open shapes without repetition, real objects by category."
        order = []
        while True:
            if len(order) < self.batch - self.real:
                order = list(rng.permutation(self.open_count))
            part = [order.pop() for _ in range(self.batch - self.real)]
            real = self.open_count + rng.choice(len(self.real_weights), self.real, p=self.real_weights)
            yield np.concatenate([part, real])

    def text_loss(self, embeddings: Tensor, rows: np.ndarray, rng: np.random.RandomState) -> Tensor:
        "Soft-target loss to noun, name and a sentence of a whole batch, and cross entropy over all nouns."
        loss = self.class_loss(embeddings, rows)
        for weight, texts in draw_targets(self.texts, rows, rng, embeddings.device):
            loss = loss + weight * soft_loss(embeddings, texts, soft_targets(texts))
        return loss

    def class_loss(self, embeddings: Tensor, rows: np.ndarray) -> Tensor:
        "Cross entropy over the nouns; 0.3 of the target goes to nouns of similar text. Rows without one count 0."
        labels, classes = self.labels[rows].to(embeddings.device), self.classes.to(embeddings.device)
        known = labels >= 0
        labels = labels.clamp(min=0)
        similar = (classes[labels] @ classes.T / 0.05).softmax(-1)
        targets = 0.7 * F.one_hot(labels, len(classes)) + 0.3 * similar
        losses = -(targets * (embeddings @ classes.T / 0.05).log_softmax(-1)).sum(-1)
        return (losses * known).sum() / known.sum().clamp(min=1)


def training_set(
    model: CG3D,  # its text tower embeds the texts
    shapes: Collection,  # open shapes with captions and queries
    objects: Collection,  # real objects with captions
    **sizes: int,  # batch and real, see `Rows`
) -> Rows:
    """Rows that are not in the test split of either collection.

    A real object is drawn with probability proportional to (size of its category) ** -0.6.
    """
    parts = [(c, training_rows(c), row_texts(c)) for c in (shapes, objects)]
    texts = {
        kind: torch.cat([model.encode_text([t[kind][i] for i in rows]).cpu() for _, rows, t in parts])
        for kind in parts[0][2]
    }
    categories = [c for collection, rows, _ in parts for c in collection.table["category"].to_numpy()[rows]]
    nouns = sorted({category for category in categories if category})
    labels = torch.tensor([nouns.index(c) if c else -1 for c in categories])
    open_count = len(parts[0][1])
    counts = Counter(categories[open_count:])
    weights = np.array([counts[c] ** -0.6 for c in categories[open_count:]])
    points = torch.cat([collection.points(rows) for collection, rows, _ in parts])
    classes = model.zero_shot_classifier(nouns).cpu()
    return Rows(points, texts, labels, classes, open_count, weights / weights.sum(), **sizes)


def embed_views_of_maps(
    model: CG3D,
    maps: Tensor,  # (M, 352, 6, 6)
) -> Tensor:  # unit vectors (M, D)
    "The rest of the image tower, with the prompts."
    tokens = maps_to_tokens(model.backbone, maps.to(model.device).float())
    return F.normalize(model.prompts.encode_tokens(tokens).float(), dim=-1)


def tune_head(
    model: CG3D,  # head and prompts of its image tower are trained in place
    rows: Rows,
    maps: list[Tensor],  # of each row, (views, 352, 6, 6)
    epochs: int = 3,
    lr: float = 2e-4,
    seed: int = 0,
) -> list[float]:  # loss of each epoch
    "Train everything behind the frozen stem of the image tower, on one stored view of a shape and step."
    rng, history = np.random.RandomState(seed), []
    head = [
        p for name, p in model.backbone.clip.visual.named_parameters() if "patch_embed.backbone" not in name
    ]
    parameters = [*model.prompts.parameters(), *head]
    for parameter in parameters:
        parameter.requires_grad_(True)
    steps = rows.open_count // (rows.batch - rows.real)
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=steps * epochs + 1, pct_start=0.15
    )
    batches = rows.batches(rng)
    for _ in range(epochs):
        losses = []
        for _ in range(steps):
            part = next(batches)
            views = torch.stack([maps[i][rng.randint(len(maps[i]))] for i in part])
            loss = rows.text_loss(embed_views_of_maps(model, views), part, rng)
            optimizer_step(loss, optimizer, schedule, parameters)
            losses.append(loss.item())
        history.append(float(np.mean(losses)))
    for parameter in head:
        parameter.requires_grad_(False)
    return history


# ---- the 3D encoder


def uneven_color(
    points: Tensor,  # (B, N, 6)
    p: float,
    strength: float,  # greatest relative change of brightness
    generator: torch.Generator,
) -> Tensor:  # as points
    "Smooth errors of brightness over the surface, as projected textures have."
    draw = {"generator": generator, "device": points.device}
    waves = points[..., :3] @ (4 * torch.randn(len(points), 3, 3, **draw))
    phase = 2 * math.pi * torch.rand(len(points), 1, 3, **draw)
    chosen = torch.rand(len(points), 1, 1, **draw) < p
    share = strength * torch.rand(len(points), 1, 1, **draw) * chosen
    color = points[..., 3:] * (1 + share * torch.sin(waves + phase))
    return torch.cat([points[..., :3], color.clamp(0, 1)], -1)


@torch.no_grad()
def sensor_errors(
    points: Tensor,  # (B, P, 6), unit sphere, y up
    normals: Tensor,  # (B, P, 3)
    count: int,  # points to keep
    generator: torch.Generator,
) -> Tensor:  # (B, count, 6)
    "What scanners and depth cameras do to color and to geometry, in random combinations."
    points = corruptions.shade_color(points, 0.35, 0.8, generator, normals)
    points = uneven_color(points, 0.3, 0.25, generator)
    points = corruptions.tint_color(points, 0.5, 0.35, generator)
    points = corruptions.quantize_color(points, 0.1, 6, generator)
    points = corruptions.noise_color(points, 0.3, 0.12, generator)
    points = corruptions.gray_color(points, 0.12, generator)
    points = corruptions.add_support_plane(points, 0.12, 0.3, generator)
    points = augment.rotate_up(points, 180.0, 1.0, generator)
    points = augment.one_sided(points, 0.4, (5.0, 60.0), 0.012, generator)
    points = corruptions.punch_holes(points, 0.2, 0.25, 3, generator)
    points = corruptions.flying_pixels(points, 0.2, 0.05, 0.4, generator)
    points = augment.uneven_density(points, 0.2, 10.0, generator)
    points = augment.tilt(points, 10.0, 0.8, generator)
    points = augment.jitter(points, 0.012, 0.05, 0.5, generator)
    points = augment.scale(points, 0.8, 1.2, True, generator)
    points = augment.translate(points, 0.05, generator)
    points = augment.drop_color(points, 0.28, generator)
    return points[:, torch.randperm(points.shape[1], generator=generator)[:count]].contiguous()


@torch.inference_mode()
def teachers(
    model: CG3D,  # with the weights to start from
    rows: Rows,
    views: list[Tensor],  # embeddings of the views of each row, (V, D)
) -> Tensor:  # unit vectors (N, D)
    """Open shapes: the average of the clean cloud's embedding and of its views. Real objects: their views.

    The encoder to start from is accurate on open shapes, and its average with the views more accurate than either; on
    real objects it is not.
    """
    mean = torch.stack([F.normalize(v.mean(0), dim=-1) for v in views])
    own = model.encode_shape(rows.points[: rows.open_count]).cpu()
    mean[: rows.open_count] = F.normalize(own + mean[: rows.open_count], dim=-1)
    return mean


def tune_points(
    model: CG3D,  # its encoder is trained in place
    rows: Rows,
    views: list[Tensor],  # unit vectors of the views of each row, (V, D)
    steps: int = 480,
    lr: float = 4e-4,
    seed: int = 0,
) -> Iterator[tuple[float, nn.Module]]:  # after each step: the loss, and the averaged encoder
    """Tune the encoder towards texts, views, nouns and the teachers, under the errors of sensors.

    Raises: `InputError` for fewer steps than one.
    """
    if steps < 1:
        raise InputError(f"steps={steps} must be at least 1", field="steps", value=steps)
    torch.manual_seed(seed)
    rng, generator = np.random.RandomState(seed), torch.Generator().manual_seed(seed)
    encoder, device = model.encoder.float(), device_of(model.encoder)
    teacher = teachers(model, rows, views)
    normals = torch.cat([corruptions.estimate_normals(p[..., :3]).half() for p in rows.points.split(8)])
    average, parameters = copy.deepcopy(encoder).eval(), list(encoder.parameters())
    optimizer = torch.optim.AdamW(weight_decay_groups(parameters), lr=lr, betas=(0.9, 0.98))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, learning_rate_factor(30, steps))
    batches = rows.batches(rng)
    with keep_freed_memory(device.type == "cpu"):
        for done in range(1, steps + 1):
            part = next(batches)
            clouds = sensor_errors(rows.points[part], normals[part].float(), model.config.points, generator)
            drawn = torch.stack([views[i][rng.randint(len(views[i]))] for i in part]).to(device)
            clean = teacher[part].to(device)
            targets = [(weight, texts, 0.07) for weight, texts in draw_targets(rows.texts, part, rng, device)]
            targets += [(0.7, drawn, 0.05), (1.0, clean, 0.05)]

            def more_loss(embeddings: Tensor, chunk: slice, part: np.ndarray = part, clean: Tensor = clean):
                distance = 1 - (embeddings * clean[chunk]).sum(-1).mean()
                return rows.class_loss(embeddings, part[chunk]) + distance

            encoder.train()
            loss = chunked_step(encoder, clouds.to(device), targets, more_loss, parameters, optimizer)
            schedule.step()
            update_average(average, encoder, 1 - min(0.995, (1 + done) / (10 + done)))
            yield loss, average


def write_towers(
    model: CG3D,
    source: str | Path,  # folder of the towers to start from
    folder: str | Path,
) -> Path:  # with the same files
    "Write the towers with the tuned head, in half precision; all other tensors stay as they are."
    import shutil

    from safetensors.torch import load_file, save_file

    source, folder = Path(source), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(source / "open_clip_config.json", folder)
    state, tuned = load_file(source / "open_clip_model.safetensors"), model.backbone.clip.state_dict()
    for name in state:
        if name.startswith("visual.") and "patch_embed.backbone" not in name:
            state[name] = tuned[name].detach().cpu().half().contiguous()
    save_file(state, folder / "open_clip_model.safetensors")
    return folder


def build_real(
    model: CG3D,  # the model to start from; trained in place
    shapes: Collection,
    objects: Collection,
    folder: str | Path,  # gets nano/ and nano-3d/
    towers: str | Path,  # folder of the towers to start from
    epochs: int = 3,  # of the head
    steps: int = 480,  # of the 3D encoder
    seed: int = 0,
) -> dict[str, list[float]]:  # losses of head and encoder
    "Tune head and encoder; writes nano/ after the first and nano-3d/ every 100 steps of the second."
    from cg3d.models.clip_backbone import load_backbone

    folder, curve = Path(folder), []
    rows = training_set(model, shapes, objects)
    parts = (rows.points[: rows.open_count], 2), (rows.points[rows.open_count :], 4)
    stem = model.backbone.clip.visual.trunk.patch_embed.backbone
    maps = [m for points, count in parts for m in view_features(stem, points, count, seed=seed)[0]]
    with torch.inference_mode():
        views = [embed_views_of_maps(model, m).cpu().clone() for m in maps]
    head_curve = tune_head(model, rows, maps, epochs, seed=seed)
    backbone = load_backbone(write_towers(model, towers, folder / "nano"), device=device_of(model.encoder))
    for loss, average in tune_points(model, rows, views, steps, seed=seed):
        curve.append(loss)
        if len(curve) % 100 == 0 or len(curve) == steps:
            pack_points(average, backbone, folder / "nano-3d", model.prompts)
            print(f"step {len(curve)} of {steps}: loss {np.mean(curve[-100:]):.3f}", flush=True)
    return {"head": head_curve, "encoder": curve}
