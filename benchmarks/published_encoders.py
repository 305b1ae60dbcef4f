"""Re-implementation of the two published encoders in the order of operations of their official code, as the reference of `encoders.py`.

Channels first, `Conv1d` over permuted groups, the whole distance table and `topk`, `repeat` and `cat` before each first layer, explicit softmax.
On a GPU the official code samples with the CUDA kernel of `pointnet2_ops`; on a CPU it uses a loop, as this file does.
Parameters have the published names, so that the weights of the encoders in `cg3d.models` load without conversion."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def square_distance(src: Tensor, dst: Tensor) -> Tensor:  # (B, M, 3), (B, N, 3) -> (B, M, N)
    B, M, _ = src.shape
    N = dst.shape[1]
    dist = -2 * torch.matmul(src, dst.permute(0, 2, 1))
    dist += torch.sum(src**2, -1).view(B, M, 1)
    dist += torch.sum(dst**2, -1).view(B, 1, N)
    return dist


def index_points(points: Tensor, idx: Tensor) -> Tensor:  # (B, N, C), (B, ...) -> (B, ..., C)
    batch = (
        torch.arange(len(points), device=points.device)
        .view(-1, *[1] * (idx.ndim - 1))
        .repeat(1, *idx.shape[1:])
    )
    return points[batch, idx, :]


def farthest_points(
    xyz: Tensor, count: int
) -> Tensor:  # (B, N, 3) -> (B, count); begins at the first point, as `pointnet2_ops`
    B, N, _ = xyz.shape
    taken = torch.zeros(B, count, dtype=torch.long, device=xyz.device)
    distance = torch.full((B, N), 1e10, dtype=xyz.dtype, device=xyz.device)
    farthest = torch.zeros(B, dtype=torch.long, device=xyz.device)
    batch = torch.arange(B, device=xyz.device)
    for i in range(count):
        taken[:, i] = farthest
        centroid = xyz[batch, farthest, :].view(B, 1, 3)
        dist = torch.sum((xyz - centroid) ** 2, -1)
        distance = torch.min(distance, dist)
        farthest = torch.max(distance, -1)[1]
    return taken


def nearest_points(
    count: int, xyz: Tensor, centers: Tensor
) -> Tensor:  # (B, N, 3), (B, M, 3) -> (B, M, count)
    return torch.topk(square_distance(centers, xyz), count, dim=-1, largest=False, sorted=False)[1]


# PointMLP: Ma et al., ICLR 2022, github.com/ma-xu/pointMLP-pytorch


class LocalGrouper(nn.Module):
    def __init__(self, channel: int, groups: int, neighbors: int):
        super().__init__()
        self.groups, self.neighbors = groups, neighbors
        self.affine_alpha = nn.Parameter(torch.ones(1, 1, 1, channel))
        self.affine_beta = nn.Parameter(torch.zeros(1, 1, 1, channel))

    def forward(self, xyz: Tensor, points: Tensor) -> tuple[Tensor, Tensor]:  # (B, N, 3), (B, N, C)
        B, S = len(xyz), self.groups
        fps_idx = farthest_points(xyz.contiguous(), S)
        new_xyz, new_points = index_points(xyz, fps_idx), index_points(points, fps_idx)
        idx = nearest_points(self.neighbors, xyz, new_xyz)
        grouped = index_points(points, idx)
        mean = new_points.unsqueeze(-2)
        std = torch.std((grouped - mean).reshape(B, -1), dim=-1, keepdim=True).unsqueeze(-1).unsqueeze(-1)
        grouped = (grouped - mean) / (std + 1e-5)
        grouped = self.affine_alpha * grouped + self.affine_beta
        return new_xyz, torch.cat(
            [grouped, new_points.view(B, S, 1, -1).repeat(1, 1, self.neighbors, 1)], dim=-1
        )


class ConvBNReLU(nn.Module):
    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(in_channels, out_channels, 1, bias=False),
            nn.BatchNorm1d(out_channels),
            nn.ReLU(inplace=True),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)  # (B, C, L)


class ConvBNReLURes(nn.Module):
    def __init__(self, channel: int, expansion: float):
        super().__init__()
        hidden, self.act = int(channel * expansion), nn.ReLU(inplace=True)
        self.net1 = nn.Sequential(nn.Conv1d(channel, hidden, 1, bias=False), nn.BatchNorm1d(hidden), self.act)
        self.net2 = nn.Sequential(nn.Conv1d(hidden, channel, 1, bias=False), nn.BatchNorm1d(channel))

    def forward(self, x: Tensor) -> Tensor:
        return self.act(self.net2(self.net1(x)) + x)


class PreExtraction(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, blocks: int, expansion: float):
        super().__init__()
        self.transfer = ConvBNReLU(in_channels, out_channels)
        self.operation = nn.Sequential(*[ConvBNReLURes(out_channels, expansion) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:  # (B, S, k, D) -> (B, C, S)
        b, n, s, d = x.size()
        x = x.permute(0, 1, 3, 2).reshape(-1, d, s)
        x = self.operation(self.transfer(x))
        x = F.adaptive_max_pool1d(x, 1).view(len(x), -1)
        return x.reshape(b, n, -1).permute(0, 2, 1)


class PosExtraction(nn.Module):
    def __init__(self, channels: int, blocks: int, expansion: float):
        super().__init__()
        self.operation = nn.Sequential(*[ConvBNReLURes(channels, expansion) for _ in range(blocks)])

    def forward(self, x: Tensor) -> Tensor:
        return self.operation(x)


class PointMLP(nn.Module):
    "With CG3D's head: the maximum over the last anchors, then one projection."

    def __init__(self, config):
        super().__init__()
        width = config.width
        self.embedding = ConvBNReLU(config.in_channels, width)
        self.local_grouper_list, self.pre_blocks_list, self.pos_blocks_list = (
            nn.ModuleList(),
            nn.ModuleList(),
            nn.ModuleList(),
        )
        for anchors, growth, pre, pos in zip(
            config.anchors, config.growth, config.pre_blocks, config.pos_blocks
        ):
            self.local_grouper_list.append(LocalGrouper(width, anchors, config.neighbors))
            self.pre_blocks_list.append(PreExtraction(2 * width, growth * width, pre, config.expansion))
            width *= growth
            self.pos_blocks_list.append(PosExtraction(width, pos, config.expansion))
        self.projection = nn.Conv1d(width, config.dim, 1)

    def forward(self, points: Tensor) -> Tensor:  # (B, N, C) -> (B, dim)
        xyz, x = points[..., :3], self.embedding(points.permute(0, 2, 1))
        for grouper, pre, pos in zip(self.local_grouper_list, self.pre_blocks_list, self.pos_blocks_list):
            xyz, x = grouper(xyz, x.permute(0, 2, 1))
            x = pos(pre(x))
        return self.projection(F.adaptive_max_pool1d(x, 1)).squeeze(-1)


# Point Transformer: Yu et al., Point-BERT, CVPR 2022, github.com/lulutang0608/Point-BERT, as CG3D takes it


class Encoder(nn.Module):
    def __init__(self, in_channels: int, hidden: tuple[int, int, int], channel: int):
        super().__init__()
        first, local, second = hidden
        self.channel = channel
        self.first_conv = nn.Sequential(
            nn.Conv1d(in_channels, first, 1),
            nn.BatchNorm1d(first),
            nn.ReLU(inplace=True),
            nn.Conv1d(first, local, 1),
        )
        self.second_conv = nn.Sequential(
            nn.Conv1d(2 * local, second, 1),
            nn.BatchNorm1d(second),
            nn.ReLU(inplace=True),
            nn.Conv1d(second, channel, 1),
        )

    def forward(self, groups: Tensor) -> Tensor:  # (B, G, k, C) -> (B, G, channel)
        bs, g, n, c = groups.shape
        feature = self.first_conv(groups.reshape(bs * g, n, c).transpose(2, 1))
        overall = torch.max(feature, dim=2, keepdim=True)[0]
        feature = torch.cat([overall.expand(-1, -1, n), feature], dim=1)
        return torch.max(self.second_conv(feature), dim=2, keepdim=False)[0].reshape(bs, g, self.channel)


class Attention(nn.Module):
    def __init__(self, dim: int, heads: int):
        super().__init__()
        self.heads, self.scale = heads, (dim // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(dim, dim * 3, bias=False), nn.Linear(dim, dim)
        self.attn_drop = self.proj_drop = nn.Dropout(0.0)

    def forward(self, x: Tensor) -> Tensor:  # (B, L, C)
        B, N, C = x.shape
        q, k, v = self.qkv(x).reshape(B, N, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        attn = self.attn_drop(((q @ k.transpose(-2, -1)) * self.scale).softmax(dim=-1))
        return self.proj_drop(self.proj((attn @ v).transpose(1, 2).reshape(B, N, C)))


class Mlp(nn.Module):
    def __init__(self, dim: int, hidden: int):
        super().__init__()
        self.fc1, self.act, self.fc2, self.drop = (
            nn.Linear(dim, hidden),
            nn.GELU(),
            nn.Linear(hidden, dim),
            nn.Dropout(0.0),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.drop(self.fc2(self.drop(self.act(self.fc1(x)))))


class DropPath(nn.Module):
    def __init__(self, rate: float):
        super().__init__()
        self.rate = rate

    def forward(self, x: Tensor) -> Tensor:  # (B, L, C)
        if self.rate == 0 or not self.training:
            return x
        keep = 1 - self.rate
        return x.div(keep) * (keep + torch.rand(x.shape[0], 1, 1, dtype=x.dtype, device=x.device)).floor_()


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, ratio: int, rate: float):
        super().__init__()
        self.norm1, self.norm2, self.drop_path = nn.LayerNorm(dim), nn.LayerNorm(dim), DropPath(rate)
        self.attn, self.mlp = Attention(dim, heads), Mlp(dim, dim * ratio)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop_path(self.attn(self.norm1(x)))
        return x + self.drop_path(self.mlp(self.norm2(x)))


class TransformerEncoder(nn.Module):
    def __init__(self, dim: int, depth: int, heads: int, ratio: int, rate: float):
        super().__init__()
        self.blocks = nn.ModuleList(
            [Block(dim, heads, ratio, each) for each in torch.linspace(0, rate, depth).tolist()]
        )

    def forward(self, x: Tensor, pos: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x + pos)
        return x


class PointTransformer(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.groups, self.neighbors, width = config.groups, config.neighbors, config.width
        self.encoder = Encoder(config.in_channels, config.patch_hidden, config.patch_width)
        self.reduce_dim = nn.Linear(config.patch_width, width)
        self.cls_token, self.cls_pos = (
            nn.Parameter(torch.zeros(1, 1, width)),
            nn.Parameter(torch.randn(1, 1, width)),
        )
        self.pos_embed = nn.Sequential(nn.Linear(3, 128), nn.GELU(), nn.Linear(128, width))
        self.blocks = TransformerEncoder(
            width, config.depth, config.heads, config.mlp_ratio, config.drop_path
        )
        self.norm = nn.LayerNorm(width)
        self.projection = nn.Linear(2 * width, config.dim)

    def forward(self, points: Tensor) -> Tensor:  # (B, N, C) -> (B, dim)
        xyz = points[..., :3].contiguous()
        center = index_points(xyz, farthest_points(xyz, self.groups))
        neighborhood = index_points(points, nearest_points(self.neighbors, xyz, center))
        neighborhood = torch.cat([neighborhood[..., :3] - center.unsqueeze(2), neighborhood[..., 3:]], dim=-1)
        tokens = self.reduce_dim(self.encoder(neighborhood))
        x = torch.cat((self.cls_token.expand(len(tokens), -1, -1), tokens), dim=1)
        pos = torch.cat((self.cls_pos.expand(len(tokens), -1, -1), self.pos_embed(center)), dim=1)
        x = self.norm(self.blocks(x, pos))
        return self.projection(torch.cat([x[:, 0], x[:, 1:].max(1)[0]], dim=-1))


PUBLISHED = {"pointmlp": PointMLP, "point_transformer": PointTransformer}


def published(name: str, encoder: nn.Module) -> nn.Module:
    "The published layout of one of our encoders, with its very weights."
    port = PUBLISHED[name](encoder.config)
    port.load_state_dict(encoder.state_dict())
    return port.to(next(encoder.parameters())).train(encoder.training)
