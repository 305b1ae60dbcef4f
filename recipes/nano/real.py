"""Stage `real` of the recipe: the image head and the 3D encoder of `nano` are tuned for real objects and real sensors.

Both start from the weights that the earlier stages, or an earlier run of this stage, have made. A batch holds 96
open shapes and 32 real objects. Colors are shaded, tinted, quantized, noised, made gray or dropped; clouds are
bent, seen from one side, get holes, flying pixels and a piece of the table below them. A run that was stopped
continues where its last checkpoint was written.
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
from corpus import row_texts
from recipe import (
    chunked_step,
    maps_to_tokens,
    pack_points,
    update_average,
    weight_decay_groups,
)
from torch import Tensor, nn
from towers import device_of, draw_targets, optimizer_step, soft_loss, soft_targets, view_features

from cg3d.core.atomic import write_file
from cg3d.core.errors import InputError
from cg3d.core.malloc import keep_freed_memory
from cg3d.geometry import augment, corruptions
from cg3d.io.collection import Collection
from cg3d.models.cg3d import CG3D, as_points
from cg3d.render.cameras import ViewSettings
from cg3d.render.points import neighbors, surface_normals

# Of 4,096, see `cg3d.models.cg3d.distinct_colors`: 0.1 % of the open training shapes have more, and 65 % of the real ones.
GRAY_COPY_ABOVE = 48


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

    @property
    def steps(self) -> int:
        "Batches of one pass over the open shapes."
        return self.open_count // (self.batch - self.real)

    def batch_rows(
        self,
        step: int,  # from 0
        seed: int,
    ) -> np.ndarray:  # (batch,)
        "Row numbers of one batch: open shapes without repetition within a pass, real objects by category."
        epoch, place = divmod(step, self.steps)
        order = np.random.RandomState([seed, 0, epoch]).permutation(self.open_count)
        part = order[place * (self.batch - self.real) :][: self.batch - self.real]
        drawn = np.random.RandomState([seed, 1, step]).choice(
            len(self.real_weights), self.real, p=self.real_weights
        )
        return np.concatenate([part, self.open_count + drawn])

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
    """Rows of the training split of both collections; validation rows stay out, as test rows do.

    A real object is drawn with probability proportional to (size of its category) ** -0.6.
    """
    parts = [(c, np.flatnonzero(c.table["split"] == "train"), row_texts(c)) for c in (shapes, objects)]
    texts = {}
    for kind in parts[0][2]:
        different, places = np.unique([t[kind][i] for _, rows, t in parts for i in rows], return_inverse=True)
        texts[kind] = model.encode_text(different.tolist()).cpu()[places]
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
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, lr, total_steps=rows.steps * epochs + 1, pct_start=0.15
    )
    for epoch in range(epochs):
        losses = []
        for step in range(rows.steps):
            part = rows.batch_rows(epoch * rows.steps + step, seed)
            views = torch.stack([maps[i][rng.randint(len(maps[i]))] for i in part])
            loss = rows.text_loss(embed_views_of_maps(model, views), part, rng)
            optimizer_step(loss, optimizer, schedule, parameters)
            losses.append(loss.item())
        history.append(float(np.mean(losses)))
    for parameter in head:
        parameter.requires_grad_(False)
    return history


# ---- the 3D encoder


def smooth_noise(
    points: Tensor,  # (B, N, 6)
    frequency: float,  # standard deviation of the wave vectors, radians a unit of length
    p: float,
    strength: float,  # greatest amplitude
    generator: torch.Generator,
) -> Tensor:  # (B, N, 3)
    "Three sine waves over each cloud, of random direction, phase and amplitude; 0 for clouds that are not chosen."
    draw = {"generator": generator, "device": points.device}
    waves = points[..., :3] @ (frequency * torch.randn(len(points), 3, 3, **draw))
    phase = 2 * math.pi * torch.rand(len(points), 1, 3, **draw)
    chosen = torch.rand(len(points), 1, 1, **draw) < p
    amplitude = strength * torch.rand(len(points), 1, 1, **draw) * chosen
    return amplitude * torch.sin(waves + phase)


def uneven_color(
    points: Tensor,  # (B, N, 6)
    p: float,
    strength: float,  # greatest relative change of brightness
    generator: torch.Generator,
) -> Tensor:  # as points
    "Smooth errors of brightness over the surface, as projected textures have."
    color = points[..., 3:] * (1 + smooth_noise(points, 4, p, strength, generator))
    return torch.cat([points[..., :3], color.clamp(0, 1)], -1)


def swap_color(
    points: Tensor,  # (B, N, 6)
    p: float,
    generator: torch.Generator,
) -> Tensor:  # as points
    "The colors of another cloud of the batch, laid over this one along a random direction."
    direction = torch.randn(3, generator=generator)
    height = points[..., :3] @ direction
    shift = int(torch.randint(1, max(2, len(points)), (), generator=generator))
    other = points.roll(shift, 0)
    order = height.roll(shift, 0).argsort(-1)
    ordered = other[..., 3:].gather(1, order[..., None].expand(-1, -1, 3))
    rank = height.argsort(-1).argsort(-1)
    chosen = torch.rand(len(points), 1, 1, generator=generator) < p
    color = torch.where(chosen, ordered.gather(1, rank[..., None].expand(-1, -1, 3)), points[..., 3:])
    return torch.cat([points[..., :3], color], -1)


def bend(
    points: Tensor,  # (B, N, 6)
    p: float,
    strength: float,  # greatest displacement
    generator: torch.Generator,
) -> Tensor:  # as points
    "Smooth displacements over the whole cloud: its parts are bent and stretched."
    moved = points[..., :3] + smooth_noise(points, 2, p, strength, generator)
    return torch.cat([moved, points[..., 3:]], -1)


@torch.no_grad()
def sensor_errors(
    points: Tensor,  # (B, P, 6), unit sphere, y up
    normals: Tensor,  # (B, P, 3)
    count: int,  # points to keep
    generator: torch.Generator,
) -> Tensor:  # (B, count, 6)
    """What scanners and depth cameras do to color and to geometry, in random combinations.

    A quarter of the clouds keep their colors, up to `augment.drop_color`. At the end they are normalized and sampled
    as the model does it with its input, every other time after a random choice.
    """
    kept = torch.rand(len(points), 1, 1, generator=generator) < 0.25
    colors = points[..., 3:]
    points = corruptions.shade_color(points, 0.35, 0.8, generator, normals)
    points = uneven_color(points, 0.3, 0.25, generator)
    points = corruptions.tint_color(points, 0.5, 0.35, generator)
    points = corruptions.quantize_color(points, 0.1, 6, generator)
    points = corruptions.noise_color(points, 0.3, 0.12, generator)
    points = corruptions.gray_color(points, 0.12, generator)
    points = swap_color(points, 0.25, generator)
    points = torch.cat([points[..., :3], torch.where(kept, colors, points[..., 3:])], -1)
    points = bend(points, 0.4, 0.1, generator)
    points = corruptions.add_support_plane(points, 0.12, 0.3, generator)
    points = augment.rotate_up(points, 180.0, 1.0, generator)
    points = augment.one_sided(points, 0.4, (5.0, 60.0), 0.012, generator)
    points = corruptions.punch_holes(points, 0.2, 0.25, 3, generator)
    points = corruptions.flying_pixels(points, 0.2, 0.05, 0.4, generator)
    points = augment.uneven_density(points, 0.2, 10.0, generator)
    points = augment.tilt(points, 10.0, 0.8, generator)
    points = augment.jitter(points, 0.012, 0.05, 0.5, generator)
    points = augment.scale(points, 0.8, 1.2, True, generator)
    points = augment.drop_color(points, 0.28, generator)
    if torch.rand((), generator=generator) < 0.5:
        points = points[:, torch.randperm(points.shape[1], generator=generator)[:count]]
    return as_points(points, count)


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
    points = rows.points[: rows.open_count, :: max(1, rows.points.shape[1] // model.config.points)]
    own = model.encode_shape(points).cpu()
    mean[: rows.open_count] = F.normalize(own + mean[: rows.open_count], dim=-1)
    return mean


def plateau_factor(
    step: int,  # from 0
    steps: int,
    warmup: int = 15,
) -> float:
    "Linear warm-up, constant for half of the steps, then linear decay; `steps` may change before half of them."
    return min(1.0, (step + 1) / warmup, 2 * (steps - step) / steps)


def bank_loss(
    embeddings: Tensor,  # unit vectors (M, D)
    texts: Tensor,  # unit vectors of the right texts (M, D)
    bank: Tensor,  # unit vectors of all texts of the training set (N, D)
    temperature: float = 0.05,
) -> Tensor:
    "Soft-target loss among the texts of the whole training set; they are constant, so they cost little."
    return soft_loss(embeddings, bank, (texts @ bank.T / temperature).softmax(-1), temperature)


def reverse_loss(
    embeddings: Tensor,  # unit vectors of a part of a batch (M, D)
    texts: Tensor,  # unit vectors of the whole batch (B, D)
    part: slice,  # place of the embeddings in the batch
    temperature: float = 0.05,
) -> Tensor:
    "From each text of the batch to the shapes of a part of it, as in a search."
    return soft_loss(texts, embeddings, (texts @ texts[part].T / temperature).softmax(-1), temperature)


def outward_normals(
    xyz: Tensor,  # (N, P, 3), on the CPU
    settings: ViewSettings = ViewSettings(),
) -> Tensor:  # float16 (N, P, 3)
    "Unit normals away from the centroid; a third of the time of `corruptions.estimate_normals`."
    normals = []
    for part in xyz.split(32):
        near = surface_normals(part, neighbors(part, 12)[1], settings)
        outward = ((part - part.mean(1, keepdim=True)) * near).sum(-1, keepdim=True)
        normals.append(torch.where(outward < 0, -near, near).half())
    return torch.cat(normals)


def tune_points(
    model: CG3D,  # its encoder is trained in place
    rows: Rows,
    views: list[Tensor],  # unit vectors of the views of each row, (V, D)
    teacher: Tensor,  # of `teachers`, (N, D)
    normals: Tensor,  # of `outward_normals`, (N, P, 3)
    steps: int = 480,
    lr: float = 3e-4,
    seed: int = 0,
    checkpoint: str | Path | None = None,  # written every `every` steps; an existing one is continued
    every: int = 25,
) -> Iterator[tuple[int, float, nn.Module]]:  # after each step: its number, the loss, the averaged encoder
    """Tune the encoder towards texts, views, nouns and the teachers, under the errors of sensors.

    Raises: `InputError` for fewer steps than one.
    """
    if steps < 1:
        raise InputError(f"steps={steps} must be at least 1", field="steps", value=steps)
    encoder, device = model.encoder.float(), device_of(model.encoder)
    average, parameters = copy.deepcopy(encoder).eval(), list(encoder.parameters())
    optimizer = torch.optim.AdamW(weight_decay_groups(parameters), lr=lr, betas=(0.9, 0.98))
    banks = {kind: rows.texts[kind].to(device) for kind in ("caption", "query")}
    done = 0
    if checkpoint and Path(checkpoint).is_file():
        state = torch.load(checkpoint, map_location=device)
        for name, part in {"encoder": encoder, "average": average, "optimizer": optimizer}.items():
            part.load_state_dict(state[name])
        done = state["done"]
    with keep_freed_memory(device.type == "cpu"):
        for step in range(done, steps):
            torch.manual_seed(seed + 1000 * step)  # of the encoder's drop path
            rng = np.random.RandomState([seed, 2, step])
            generator = torch.Generator().manual_seed(seed + 1000 * step)
            part = rows.batch_rows(step, seed)
            errors = normals[part].float(), model.config.points, generator
            clouds = sensor_errors(rows.points[part], *errors)
            drawn = torch.stack([views[i][rng.randint(len(views[i]))] for i in part]).to(device)
            clean = teacher[part].to(device)
            texts = {kind: vectors[part].to(device) for kind, vectors in rows.texts.items()}
            targets = [(0.5, texts["category"], 0.07), (1.0, texts["name"], 0.07)]
            targets += [(0.7, drawn, 0.05), (0.7, clean, 0.05)]

            def more_loss(
                embeddings: Tensor,
                chunk: slice,
                part: np.ndarray = part,
                clean: Tensor = clean,
                texts: dict[str, Tensor] = texts,
            ) -> Tensor:
                loss = rows.class_loss(embeddings, part[chunk]) - (embeddings * clean[chunk]).sum(-1).mean()
                for weight, kind in ((1.0, "caption"), (0.5, "query")):
                    loss = loss + weight * bank_loss(embeddings, texts[kind][chunk], banks[kind])
                return loss + 0.5 * reverse_loss(embeddings, texts["caption"], chunk)

            for group in optimizer.param_groups:
                group["lr"] = lr * plateau_factor(step, steps)
            encoder.train()
            loss = chunked_step(encoder, clouds.to(device), targets, more_loss, parameters, optimizer)
            done = step + 1
            update_average(average, encoder, 1 - min(0.99, (1 + done) / (10 + done)))
            if checkpoint and (done % every == 0 or done == steps):
                parts = {"encoder": encoder, "average": average, "optimizer": optimizer}
                state = {"done": done} | {name: part.state_dict() for name, part in parts.items()}
                write_file(checkpoint, lambda path, state=state: torch.save(state, path))
            yield done, loss, average


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


def prepare_views(
    model: CG3D,
    rows: Rows,
    counts: tuple[int, int],  # stored views of an open shape, of a real object
    seed: int,
) -> list[Tensor]:  # of each row, feature maps (views, 352, 6, 6)
    "Render all rows and compute the maps of the frozen stem."
    stem = model.backbone.clip.visual.trunk.patch_embed.backbone
    parts = rows.points[: rows.open_count], rows.points[rows.open_count :]
    return [m for part, count in zip(parts, counts) for m in view_features(stem, part, count, seed=seed)[0]]


def build_real(
    model: CG3D,  # the model to start from; trained in place
    shapes: Collection,
    objects: Collection,
    folder: str | Path,  # gets nano/ and nano-3d/, inputs.pt and tuning.pt
    towers: str | Path,  # folder of the towers to start from
    epochs: int = 3,  # of the head; 0: the towers stay as they are
    steps: int = 480,  # of the 3D encoder
    views: tuple[int, int] = (2, 4),  # of an open shape, of a real object
    seed: int = 0,
) -> dict[str, list[float]]:  # losses of head and encoder
    """Tune head and encoder; writes nano/ after the first and nano-3d/ every 100 steps of the second.

    A second call with the same folder continues: inputs.pt holds what does not change during the encoder's training,
    tuning.pt its state.
    """
    from cg3d.models.clip_backbone import load_backbone

    folder, curve, head_curve = Path(folder), [], []
    rows, stored = training_set(model, shapes, objects), folder / "inputs.pt"
    settings = {"views": list(views), "seed": seed, "rows": len(rows.points), "epochs": epochs}
    inputs = torch.load(stored) if stored.is_file() else {"settings": None}
    if inputs.pop("settings") != settings:
        maps = prepare_views(model, rows, views, seed)
        with torch.inference_mode():
            embedded = [embed_views_of_maps(model, m).cpu().clone() for m in maps]
        head_curve = tune_head(model, rows, maps, epochs, seed=seed)
        write_towers(model, towers, folder / "nano")
        inputs = {
            "views": embedded,
            "teacher": teachers(model, rows, embedded).clone(),
            "normals": outward_normals(rows.points[..., :3]),
        }
        write_file(stored, lambda path: torch.save({"settings": settings} | inputs, path))
    backbone = load_backbone(folder / "nano", device=device_of(model.encoder))
    checkpoint = folder / "tuning.pt"
    for done, loss, average in tune_points(
        model, rows, **inputs, steps=steps, seed=seed, checkpoint=checkpoint
    ):
        curve.append(loss)
        if done % 100 == 0 or done == steps:
            pack_points(average, backbone, folder / "nano-3d", model.prompts, gray_copy_above=GRAY_COPY_ABOVE)
        if done % 10 == 0 or done == steps:
            print(f"step {done} of {steps}: loss {np.mean(curve[-10:]):.3f}", flush=True)
    return {"head": head_curve, "encoder": curve} if head_curve else {"encoder": curve}
