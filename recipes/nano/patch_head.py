"""Does a small head on the patches of `nano` find objects by name in clouds of several objects?

    python recipes/nano/patch_head.py PATH    # PATH: a packed collection (x.npz + x.csv) with category and split

Clouds are composed of two to four training shapes that stand beside each other, on each other, or overlap a
little. The encoder is frozen; a head with one hidden layer maps each of its 64 patch tokens to the text embedding
of the object that the patch belongs to. Scored on clouds composed of test shapes: the share of points that get the
right name among those in the cloud, where each point takes the answer of the nearest patch center.
"""

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cg3d.core.metrics import mean_class_accuracy
from cg3d.geometry.ops import farthest_point_sample, gather, normalize
from cg3d.geometry.segmentation import components, graph_edges
from cg3d.io.collection import Collection, read_collection
from cg3d.models.cg3d import CG3D
from cg3d.pretrained.factory import load
from cg3d.render.cameras import ring_views
from cg3d.render.points import render_points

POINTS = 2048  # of a composed cloud
TEMPLATE = "a {}"  # sentence for a name
SCALE = 20.0  # factor on cosines in the loss
GAP = 0.08  # points of one connected part are at most so far from a neighbor, in radii of the cloud


PARTS = ["seat", "leg", "back", "armrest"]
PART_COLORS = [[0.9, 0.1, 0.1], [0.1, 0.7, 0.1], [0.1, 0.2, 0.9], [0.9, 0.8, 0.1]]


@dataclass(frozen=True)
class Composed:
    "Clouds of several objects, and what the frozen encoder makes of them."

    points: Tensor  # (B, POINTS, 6), unit sphere, y up
    objects: Tensor  # number of each point's object, (B, POINTS)
    labels: Tensor  # category of each object, -1 where there is none, (B, 4)
    tokens: Tensor  # CLS first, (B, 1 + G, width)
    centers: Tensor  # of the patches, (B, G, 3)
    nearest: Tensor  # patch of each point, (B, POINTS)


def turned(points: np.ndarray, generator: np.random.Generator) -> np.ndarray:
    "Coordinates with y up, turned around it, scaled to a largest extent between 0.5 and 1, standing on y = 0."
    angle = generator.uniform(0, 2 * np.pi)
    c, s = np.cos(angle), np.sin(angle)
    xyz = points[:, :3] @ np.array([[c, 0, s], [0, 1, 0], [-s, 0, c]]).T
    xyz = xyz * generator.uniform(0.5, 1) / max(np.ptp(xyz, axis=0).max(), 1e-6)
    return xyz - [xyz[:, 0].mean(), xyz[:, 1].min(), xyz[:, 2].mean()]


def compose(clouds: list[np.ndarray], generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    "One cloud (POINTS, 6) of several (P, 6), and the number of each point's object."
    placed, shares = [], []
    for points in clouds:
        xyz = turned(points, generator)
        if placed:
            base = placed[generator.integers(len(placed))][:, :3]
            gap = generator.choice([-0.05, 0.0, 0.1])  # overlapping a little, touching, apart
            if generator.random() < 0.3:  # on it
                xyz = xyz * 0.7 + [base[:, 0].mean(), base[:, 1].max() + min(gap, 0), base[:, 2].mean()]
            else:  # beside it
                side = generator.choice([-1, 1])
                edge = base[:, 0].max() - xyz[:, 0].min() if side > 0 else base[:, 0].min() - xyz[:, 0].max()
                depth = base[:, 2].mean() + generator.uniform(-0.2, 0.2)
                xyz = xyz + [edge + side * gap, base[:, 1].min(), depth]
        placed.append(np.concatenate([xyz, points[:, 3:]], 1))
        shares.append(np.ptp(xyz, axis=0).max() ** 2)
    owner = generator.choice(len(placed), POINTS, p=np.array(shares) / sum(shares))
    merged = np.empty((POINTS, 6), np.float32)
    for number, points in enumerate(placed):
        own = owner == number
        merged[own] = points[generator.integers(len(points), size=own.sum())]
    return merged, owner


@torch.inference_mode()
def composed(model: CG3D, shapes: Collection, labels: list[str], count: int, seed: int) -> Composed:
    "Clouds of two to four shapes with different categories, and their tokens."
    generator = np.random.default_rng(seed)
    points, objects = torch.empty(count, POINTS, 6), torch.empty(count, POINTS, dtype=torch.long)
    names = torch.full((count, 4), -1)
    words = shapes.table["category"].tolist()
    number = {label: i for i, label in enumerate(labels)}
    usable = [row for row, word in enumerate(words) if word in number]
    for cloud in range(count):
        rows, wanted = {}, generator.integers(2, 5)
        while len(rows) < wanted:
            row = usable[generator.integers(len(usable))]
            rows.setdefault(words[row], row)
        parts = shapes.points(list(rows.values())).numpy()
        merged, owner = compose(list(parts), generator)
        points[cloud], objects[cloud] = torch.from_numpy(merged), torch.from_numpy(owner)
        names[cloud, : len(rows)] = torch.tensor([number[word] for word in rows])
    points = normalize(points)
    tokens, centers = [], []
    for number, batch in enumerate(points.split(16)):
        print(f"{16 * number} of {count} clouds", flush=True)
        chosen = farthest_point_sample(batch[..., :3], model.config.points)
        found = model.encoder.tokens(gather(batch, chosen))
        tokens.append(found[0])
        centers.append(found[1])
    tokens, centers = torch.cat(tokens), torch.cat(centers)
    nearest = torch.cat([torch.cdist(p[None, :, :3], c[None]).argmin(-1) for p, c in zip(points, centers)])
    return Composed(points, objects, names, tokens, centers, nearest)


def patch_labels(data: Composed) -> Tensor:  # category of each patch, (B, G)
    "The category of most points that are nearest to a patch's center; -1 for a patch without points."
    groups = data.centers.shape[1]
    votes = torch.zeros(len(data.points), groups, 4)
    flat = data.nearest * 4 + data.objects
    votes.view(len(votes), -1).scatter_add_(1, flat, torch.ones(flat.shape))
    best = data.labels.gather(1, votes.argmax(-1))
    return torch.where(votes.sum(-1) > 0, best, -1)


def train_head(data: Composed, texts: Tensor, seed: int, epochs: int = 12) -> nn.Module:
    "A head from patch tokens with the class token to unit vectors of the text space."
    torch.manual_seed(seed)
    width = 2 * data.tokens.shape[-1]
    head = nn.Sequential(
        nn.LayerNorm(width), nn.Linear(width, 384), nn.GELU(), nn.Dropout(0.2), nn.Linear(384, texts.shape[1])
    )
    inputs, target = with_cls(data.tokens).flatten(0, 1), patch_labels(data).flatten()
    inputs, target = inputs[target >= 0], target[target >= 0]
    optimizer = torch.optim.AdamW(head.parameters(), 1e-3, weight_decay=0.05)
    steps = epochs * (len(target) // 1024)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for step in range(steps):
        rows = torch.randint(len(target), (1024,))
        logits = SCALE * F.normalize(head(inputs[rows]), dim=-1) @ texts.T
        loss = F.cross_entropy(logits, target[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % 200 == 0:
            print(f"seed {seed}, step {step} of {steps}, loss {loss.item():.3f}", flush=True)
    return head.eval()


def with_cls(tokens: Tensor) -> Tensor:  # (B, 1 + G, width) -> (B, G, 2 * width)
    "Each patch token beside the class token, in the order of the encoder's own projection."
    return torch.cat([tokens[:, :1].expand(-1, tokens.shape[1] - 1, -1), tokens[:, 1:]], -1)


def point_accuracy(data: Composed, patches: Tensor, texts: Tensor) -> dict[str, float]:  # patches (B, G, D)
    "Share of right points, and the mean over the objects of their shares, in percent."
    points, shares = [], []
    for cloud in range(len(data.points)):
        names = data.labels[cloud][data.labels[cloud] >= 0]
        answer = (F.normalize(patches[cloud], dim=-1) @ texts[names].T).argmax(-1)[data.nearest[cloud]]
        points.append((answer == data.objects[cloud]).float().mean().item())
        votes = F.one_hot(answer, len(names)).float()
        shares.append(mean_class_accuracy(votes, data.objects[cloud]))
    return {"points": 100 * float(np.mean(points)), "objects": 100 * float(np.mean(shares))}


def majority(data: Composed) -> dict[str, float]:
    "Every point is said to belong to the object with the most points."
    counts = F.one_hot(data.objects, 4).sum(1)
    share = (counts.amax(1) / data.objects.shape[1]).mean().item()
    return {"points": 100 * share, "objects": 100 * (1 / (data.labels >= 0).sum(1)).mean().item()}


@torch.inference_mode()
def connected_parts(model: CG3D, data: Composed, texts: Tensor, limit: int) -> dict[str, float]:
    "Each connected part is embedded by the model as a shape of its own."
    points, shares, parts_found = [], [], []
    for cloud in range(min(limit, len(data.points))):
        xyz = data.points[cloud, :, :3].numpy().astype(float)
        parts = components(graph_edges(xyz, GAP), np.ones(len(xyz), bool), 30)
        names = data.labels[cloud][data.labels[cloud] >= 0]
        answer = torch.zeros(POINTS, dtype=torch.long)
        clouds = [data.points[cloud][torch.from_numpy(np.asarray(part))] for part in parts]
        found = torch.cat([model.encode_shape(part[None]) for part in clouds]) @ texts[names].T
        for part, best in zip(parts, found.argmax(-1)):
            answer[torch.from_numpy(np.asarray(part))] = best
        parts_found.append(len(parts))
        points.append((answer == data.objects[cloud]).float().mean().item())
        votes = F.one_hot(answer, len(names)).float()
        shares.append(mean_class_accuracy(votes, data.objects[cloud]))
    row = {"points": 100 * float(np.mean(points)), "objects": 100 * float(np.mean(shares))}
    return row | {"clouds": len(points), "parts": float(np.mean(parts_found))}


@torch.inference_mode()
def scores(model: CG3D, data: Composed, heads: list[nn.Module], texts: Tensor, limit: int) -> pd.DataFrame:
    "A row a method: the share of right points, and its mean over objects, in percent."
    tokens = data.tokens
    whole = model.encoder.projection(torch.cat([tokens[:, 0], tokens[:, 1:].amax(1)], -1))
    frozen = {
        "one answer for the whole cloud": whole[:, None].expand(-1, tokens.shape[1] - 1, -1),
        "frozen: class token and patch token": model.encoder.projection(with_cls(tokens)),
        "frozen: patch token twice": model.encoder.projection(torch.cat([tokens[:, 1:]] * 2, -1)),
    }
    rows = [{"method": "majority object"} | majority(data)]
    rows += [{"method": name} | point_accuracy(data, patches, texts) for name, patches in frozen.items()]
    rows.append({"method": f"connected parts (gap {GAP})"} | connected_parts(model, data, texts, limit))
    for seed, head in enumerate(heads):
        found = point_accuracy(data, head(with_cls(tokens)), texts)
        rows.append({"method": f"head, seed {seed}"} | found)
    table = pd.DataFrame(rows).round(1)
    return table.assign(clouds=table["clouds"].fillna(len(data.points)).astype(int))


@torch.inference_mode()
def part_pictures(model: CG3D, head: nn.Module, shapes: Collection, out: Path) -> pd.DataFrame:
    "Pictures of single shapes in the colors of PARTS (red, green, blue, yellow), and the share of points of each."
    from PIL import Image

    text = model.zero_shot_classifier(PARTS, TEMPLATE)
    points = normalize(shapes.points())
    chosen = farthest_point_sample(points[..., :3], model.config.points)
    tokens, centers = model.encoder.tokens(gather(points, chosen))
    answer = (F.normalize(head(with_cls(tokens)), dim=-1) @ text.T).argmax(-1)
    nearest = torch.stack([torch.cdist(p[:, :3], c).argmin(-1) for p, c in zip(points, centers)])
    labels = answer.gather(1, nearest)
    painted = torch.cat([points[..., :3], torch.tensor(PART_COLORS)[labels]], -1)
    views = torch.cat([render_points(cloud, *ring_views(1), 192)[:, 0] for cloud in (points, painted)])
    rows = views.unflatten(0, (2, -1)).permute(0, 3, 1, 4, 2).flatten(2, 3)  # (2, height, all widths, 3)
    pixels = (255 * rows.flatten(0, 1)).round().byte().numpy()
    Image.fromarray(pixels).save(out / "parts.png")
    shares = F.one_hot(labels, len(PARTS)).float().mean(1).mul(100).round()
    return pd.DataFrame(shares.numpy(), columns=PARTS).assign(name=shapes.table["name"].to_list())


def main() -> None:
    "Train and score the head; the features are kept in the output folder."
    parser = argparse.ArgumentParser(description="Train and score a head on the patches of nano.")
    parser.add_argument("data", help="packed collection with the columns category and split")
    parser.add_argument("--out", default="runs/patch_head", help="folder of the features, heads and table")
    parser.add_argument("--train", type=int, default=1500, help="composed clouds of training shapes")
    parser.add_argument("--test", type=int, default=300, help="composed clouds of test shapes")
    parser.add_argument("--seeds", type=int, default=3, help="heads that are trained")
    parser.add_argument("--parts", type=int, default=100, help="clouds cut into connected parts")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    shapes, model = read_collection(args.data), load("nano", device="cpu")
    rows = shapes.table["category"].fillna("").astype(str).str.strip()
    shapes.table["category"] = rows
    train, test = shapes.select(split="train"), shapes.select(split="test")
    labels = sorted(set(train.table["category"]) - {""})
    with torch.inference_mode():
        texts = model.zero_shot_classifier(labels, TEMPLATE)
    print(f"{len(train)} training shapes, {len(test)} test shapes, {len(labels)} categories", flush=True)
    data = {
        "train": composed(model, train, labels, args.train, 0),
        "test": composed(model, test, labels, args.test, 1),
    }
    print("features are computed", flush=True)
    texts = texts.clone()
    plain = {name: Composed(*(value.clone() for value in vars(part).values())) for name, part in data.items()}
    heads = [train_head(plain["train"], texts, seed) for seed in range(args.seeds)]
    torch.save([head.state_dict() for head in heads], out / "heads.pt")
    table = scores(model, plain["test"], heads, texts, args.parts)
    table.to_csv(out / "results.csv", index=False)
    print(table.to_string(index=False))
    seats = test.select(category=["chair", "armchair", "stool", "sofa"])
    seats = seats.select(np.arange(len(seats)) < 10)
    print(part_pictures(model, heads[0], seats, out).to_string(index=False))


if __name__ == "__main__":
    main()
