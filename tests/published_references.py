"""Naive reference implementations of the published encoders.

Short functions that read the tensors of a file by their published names and share no code with the package. They compute
in float32 as the originals do. Centers are chosen as the originals choose them: `pointnet2_centers` follows the kernel of
`pointnet2_ops` thread by thread, `plain_centers` a loop with argmax.
"""

import math
import re
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from cg3d.core.state_dict import read_checkpoint


def lin(P, name, x):
    w = P[f"{name}.weight"]
    x = x @ w.reshape(w.shape[0], -1).T
    return x + P[f"{name}.bias"] if f"{name}.bias" in P else x


def bn(P, name, x):
    return (x - P[f"{name}.running_mean"]) / (P[f"{name}.running_var"] + 1e-5).sqrt() * P[
        f"{name}.weight"
    ] + P[f"{name}.bias"]


def ln(P, name, x, eps=1e-5):
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, unbiased=False, keepdim=True) + eps).sqrt() * P[
        f"{name}.weight"
    ] + P[f"{name}.bias"]


def gelu(x):
    return 0.5 * x * (1 + torch.erf(x / math.sqrt(2)))


def attend(q, k, v, heads):  # (L, d) each
    d = q.shape[1] // heads
    return torch.cat(
        [
            ((q[:, h * d : (h + 1) * d] @ k[:, h * d : (h + 1) * d].T) / math.sqrt(d)).softmax(-1)
            @ v[:, h * d : (h + 1) * d]
            for h in range(heads)
        ],
        1,
    )


def squared_gaps(
    xyz: np.ndarray, at: int
) -> np.ndarray:  # (N, 3) -> (N,), in the order of operations of the kernel
    x, y, z = ((xyz[:, i] - xyz[at, i]) ** 2 for i in range(3))
    return x + y + z


def pointnet2_centers(
    xyz: Tensor,  # (N, 3)
    count: int,
) -> Tensor:  # (count,)
    """Farthest point sampling as the CUDA kernel of `pointnet2_ops` does it.

    T threads, T the largest power of two up to min(N, 512). Thread t goes through the points t, t + T, ...; points with
    |p|^2 <= 0.001 are passed over, and the first of the farthest is kept. Then t is compared with t + T/2, t + T/4, ...,
    t + 1, and the second replaces the first only where it is strictly farther.
    """
    cloud, n = xyz.numpy(), len(xyz)
    threads = 2 ** min(int(math.log2(n)), 9)
    rounds = -(-n // threads)
    x, y, z = (cloud**2).T
    far = x + y + z > 1e-3
    gap = np.full(n, 1e10, np.float32)
    chosen = [0]
    while len(chosen) < count:
        new = np.minimum(gap, squared_gaps(cloud, chosen[-1]))
        gap = np.where(far, new, gap)
        best, at = np.full(threads, -1, np.float32), np.zeros(threads, int)
        for r in range(rounds):  # every thread looks at its r-th point
            points = np.arange(r * threads, min((r + 1) * threads, n))
            t = points - r * threads
            better = far[points] & (gap[points] > best[t])
            best[t[better]], at[t[better]] = gap[points[better]], points[better]
        half = threads // 2
        while half:
            right = best[half : 2 * half] > best[:half]
            best[:half] = np.where(right, best[half : 2 * half], best[:half])
            at[:half] = np.where(right, at[half : 2 * half], at[:half])
            half //= 2
        chosen.append(int(at[0]))
    return torch.tensor(chosen)


def plain_centers(
    xyz: Tensor,  # (N, 3)
    count: int,
) -> Tensor:  # (count,)
    "Farthest point sampling by a loop; of equally far points the first."
    cloud, chosen, gap = xyz.numpy(), [0], np.full(len(xyz), 1e10, np.float32)
    while len(chosen) < count:
        gap = np.minimum(gap, squared_gaps(cloud, chosen[-1]))
        chosen.append(int(gap.argmax()))
    return torch.tensor(chosen)


def table(a, b):
    return -2 * (a @ b.T) + (a**2).sum(1)[:, None] + (b**2).sum(1)[None]


def nearest(xyz, at, k):
    return table(xyz[at], xyz).topk(k, largest=False, sorted=False).indices  # as the originals call it


def read_patches(P, at, patches):  # (G, k, c) -> (G, out)
    x = lin(
        P,
        f"{at}encoder.first_conv.3",
        bn(P, f"{at}encoder.first_conv.1", lin(P, f"{at}encoder.first_conv.0", patches)).relu(),
    )
    x = torch.cat([x.max(1, keepdim=True).values.expand_as(x), x], -1)
    return (
        lin(
            P,
            f"{at}encoder.second_conv.3",
            bn(P, f"{at}encoder.second_conv.1", lin(P, f"{at}encoder.second_conv.0", x)).relu(),
        )
        .max(1)
        .values
    )


def place(P, at, xyz):
    return lin(P, f"{at}pos_embed.2", gelu(lin(P, f"{at}pos_embed.0", xyz)))


def bert_tokens(
    P, cloud, groups, depth, at
):  # tokens (1 + G, 384) after the last norm, numbers of the centers
    xyz = cloud[:, :3]
    c = pointnet2_centers(xyz, groups)
    n = nearest(xyz, c, 32)
    D = cloud
    patches = torch.cat([D[n][..., :3] - D[c][:, None, :3], D[n][..., 3:]], -1)
    x = torch.cat([P[f"{at}cls_token"][0], lin(P, f"{at}reduce_dim", read_patches(P, at, patches))])
    position = torch.cat([P[f"{at}cls_pos"][0], place(P, at, D[c, :3])])
    for i in range(depth):
        b, x = f"{at}blocks.blocks.{i}", x + position
        x = x + lin(
            P, f"{b}.attn.proj", attend(*lin(P, f"{b}.attn.qkv", ln(P, f"{b}.norm1", x)).split(384, 1), 6)
        )
        x = x + lin(P, f"{b}.mlp.fc2", gelu(lin(P, f"{b}.mlp.fc1", ln(P, f"{b}.norm2", x))))
    return ln(P, f"{at}norm", x), c


def reference_pointbert(P, cloud, groups, depth, at):
    x, _ = bert_tokens(P, cloud, groups, depth, at)
    feature = torch.cat([x[0], x[1:].max(0).values])
    return feature @ P["pc_projection"] if at else lin(P, "projection", feature)


def reference_patchalign(P, cloud):  # (2048, 3), y up -> unit vectors (128, 1280), centers (128, 3)
    swapped = torch.stack([cloud[:, 0], cloud[:, 2], cloud[:, 1]], 1)
    x, c = bert_tokens(P, swapped, 128, 12, "")
    x = lin(P, "proj.proj", x[1:])
    return x / x.norm(dim=1, keepdim=True), cloud[c]


def reference_pointmlp(P, cloud, at):
    def layer(name, x):
        return bn(P, f"{name}.1", lin(P, f"{name}.0", x))

    def residual(name, x):
        return (layer(f"{name}.net2", layer(f"{name}.net1", x).relu()) + x).relu()

    xyz, x = cloud[:, :3], layer(f"{at}embedding.net", cloud[:, :3]).relu()
    for s, anchors in enumerate((512, 256, 128, 64)):
        c = (plain_centers if at else pointnet2_centers)(xyz, anchors)  # ULIP has a loop of its own
        n = nearest(xyz, c, 24)
        offset = x[n] - x[c][:, None]
        offset = (
            P[f"{at}local_grouper_list.{s}.affine_alpha"][0] * offset / (offset.std() + 1e-5)
            + P[f"{at}local_grouper_list.{s}.affine_beta"][0]
        )
        x = torch.cat([offset, x[c][:, None].expand_as(offset)], -1)
        x = layer(f"{at}pre_blocks_list.{s}.transfer.net", x).relu()
        for i in range(2):
            x = residual(f"{at}pre_blocks_list.{s}.operation.{i}", x)
        x, xyz = x.max(1).values, xyz[c]
        for i in range(2):
            x = residual(f"{at}pos_blocks_list.{s}.operation.{i}", x)
    x = x.max(0).values
    if not at:
        return lin(P, "projection", x)
    x = bn(P, f"{at}classifier.1", lin(P, f"{at}classifier.0", x)).relu()
    return bn(P, f"{at}classifier.5", lin(P, f"{at}classifier.4", x)).relu() @ P["pc_projection"]


def reference_ppat(P, cloud, groups, radius, k, at, project):
    xyz, D = cloud[:, :3], cloud
    c = plain_centers(xyz, groups)
    inside = table(xyz[c], xyz) <= radius**2
    tokens = []
    for g in range(groups):
        members = inside[g].nonzero().flatten()[:k]
        x = torch.cat([D[members, :3] - D[c[g], :3], D[members]], 1)
        for l in range(3):
            x = bn(P, f"{at}sa.mlp_bns.{l}", lin(P, f"{at}sa.mlp_convs.{l}", x)).relu()
        tokens.append(torch.cat([D[c[g], :3], x.max(0).values]))
    x = torch.cat(
        [P[f"{at}cls_token"][None], ln(P, f"{at}lift.2", lin(P, f"{at}lift.0", torch.stack(tokens)))]
    )
    for i in range(12):
        b = f"{at}transformer.layers.{i}"
        x = x + lin(
            P,
            f"{b}.0.fn.to_out.0",
            attend(*lin(P, f"{b}.0.fn.to_qkv", ln(P, f"{b}.0.norm", x)).split(512, 1), 8),
        )
        x = x + lin(P, f"{b}.1.fn.net.3", gelu(lin(P, f"{b}.1.fn.net.0", ln(P, f"{b}.1.norm", x))))
    return lin(P, project, x[0]) if project else x[0]


def reference_uni3d(P, cloud, depth, heads, at="point_encoder."):
    xyz, D = cloud[:, :3], cloud
    c = pointnet2_centers(xyz, 512)
    n = nearest(xyz, c, 64)
    x = read_patches(P, at, torch.cat([D[n][..., :3] - D[c][:, None, :3], D[n][..., 3:]], -1))
    x = torch.cat(
        [
            (P[f"{at}cls_token"] + P[f"{at}cls_pos"])[0],
            lin(P, f"{at}encoder2trans", x) + place(P, at, D[c, :3]),
        ]
    )
    silu = lambda x: x / (1 + torch.exp(-x))
    for i in range(depth):
        b = f"{at}visual.blocks.{i}"
        y = ln(P, f"{b}.norm1", x, 1e-6)
        if f"{b}.attn.qkv.weight" in P:
            q, k, v = (y @ P[f"{b}.attn.qkv.weight"].T).split(y.shape[1], 1)
            q, v = q + P[f"{b}.attn.q_bias"], v + P[f"{b}.attn.v_bias"]
        else:
            q, k, v = (lin(P, f"{b}.attn.{letter}_proj", y) for letter in "qkv")
        x = x + lin(P, f"{b}.attn.proj", attend(q, k, v, heads))
        y = ln(P, f"{b}.norm2", x, 1e-6)
        if f"{b}.mlp.fc1_g.weight" in P:
            y = ln(P, f"{b}.mlp.norm", silu(lin(P, f"{b}.mlp.fc1_g", y)) * lin(P, f"{b}.mlp.fc1_x", y), 1e-6)
        else:
            y = lin(P, f"{b}.mlp.fc1", y)
            y = (
                gelu(y)
                if y.shape[1] == P[f"{b}.mlp.fc2.weight"].shape[1]
                else silu(y[:, : y.shape[1] // 2]) * y[:, y.shape[1] // 2 :]
            )
        x = x + lin(P, f"{b}.mlp.fc2", y)
    return lin(P, f"{at}trans2embed", ln(P, f"{at}visual.fc_norm", x[0], 1e-6))


REFERENCES = {
    "cg3d/point_transformer": lambda P, x: reference_pointbert(P, x[:, :3], 64, 12, ""),
    "cg3d/pointmlp": lambda P, x: reference_pointmlp(P, x, ""),
    "ulip/pointbert": lambda P, x: reference_pointbert(P, x[:, :3], 512, 12, "point_encoder."),
    "ulip/pointmlp": lambda P, x: reference_pointmlp(P, x, "point_encoder."),
    "ulip2/pointbert": lambda P, x: reference_pointbert(P, x, 512, 18, "point_encoder."),
    "openshape/vitb32": lambda P, x: reference_ppat(P, x, 64, 0.4, 256, "pc_encoder.", None),
    "openshape/vitl14": lambda P, x: reference_ppat(
        P, x, 64, 0.4, 256, "pc_encoder.ppat.", "pc_encoder.proj"
    ),
    "openshape/scaling3": lambda P, x: reference_ppat(P, x, 128, 0.35, 128, "ppat.", "proj"),
    "openshape/bigG": lambda P, x: reference_ppat(P, x, 384, 0.2, 64, "ppat.", "proj"),
    "uni3d/ti": lambda P, x: reference_uni3d(P, x, 12, 3),
    "uni3d/s": lambda P, x: reference_uni3d(P, x, 12, 6),
    "uni3d/b": lambda P, x: reference_uni3d(P, x, 12, 12),
}


def bare_tensors(
    path: str | Path,  # a weight file
) -> dict[str, Tensor]:  # float32, under the names that the references read
    "The tensors of a file without the names of their containers."
    return {
        re.sub(r"^((base_|)model|state_dict|module)\.(module\.)?", "", name): tensor.float()
        for name, tensor in read_checkpoint(path).tensors.items()
    }
