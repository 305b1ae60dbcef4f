"""One step's gradients of a real model, in one process or in one of several: gradients_worker.py OUT ENCODER BATCH [setting=value ...]"""

import os
import sys
from pathlib import Path

import torch

from cg3d.core.config import settings_from
from cg3d.core.distributed import average_gradients, full_tensors, is_sharded, rank, world_size
from cg3d.train import process_group
from cg3d.training.config import TrainConfig
from cg3d.training.pretrain import make_learner, make_triplets, read_data

out, encoder, batch, *more = sys.argv[1:]
torch.set_num_threads(1)
config = settings_from(
    TrainConfig,
    {
        "encoder": encoder,
        "batch_size": int(batch),
        "limit": 128,
        "views": 1,
        "view_size": 32,
        "points": 512,
        "augment": "none",
        "precision": "fp32",
        "device": "cpu",
        "epochs": 1,
        "out": out,
    }
    | dict(pair.split("=") for pair in more),
)
if backend := os.environ.get("CG3D_TEST_BACKEND"):  # several processes on one GPU, which NCCL refuses
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        torch.distributed.init_process_group(backend)
triplets = make_triplets(read_data("furniture"), config, progress=False)
with process_group(config):
    learner = make_learner(config, out, triplets, progress=False)
    if os.environ.get("STILL"):
        [
            module.eval()
            for module in learner.model.modules()
            if isinstance(module, torch.nn.modules.batchnorm._BatchNorm)
        ]
    learner.model.encoder.double()  # batch norm in float32 turns the order of a sum into 1e-3 of a gradient
    batch = learner.batch()
    found, backward = learner.losses(batch | {"points": batch["points"].double()}, learner.phases[0])
    backward()
    named = [
        (f"{part}.{name}", value)
        for part in ("encoder", "prompts")
        for name, value in getattr(learner.model, part).named_parameters()
    ]
    average_gradients([value for _, value in named])
    found_gradients = full_tensors({name: value.grad for name, value in named if value.grad is not None})
    held = sum((value.to_local() if is_sharded(value) else value).numel() for _, value in named)
    if not rank():
        Path(out).mkdir(parents=True, exist_ok=True)
        buffers = {f"buffer.{name}": value for name, value in learner.model.encoder.named_buffers()}
        torch.save(
            {
                "world": world_size(),
                "loss": found["loss"].item(),
                "gradients": found_gradients,
                "held": held,
                "buffers": buffers,
            },
            f"{out}/gradients.pt",
        )
    learner.reader.shutdown()
