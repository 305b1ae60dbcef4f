"""Zero-shot accuracy after a short pre-training by the kind of positives and the number of views a step, on the bundled furniture.

python benchmarks/positives.py [--epochs 30] [--seeds 0,1,2] [--out positives.csv]

Every run is a row of the file; a run whose row is there is not repeated. The table shows mean and deviation over the seeds.
"""

import argparse
import tempfile
from itertools import product
from pathlib import Path

import pandas as pd

from cg3d.evaluation.zero_shot import ENCODER, accuracy_table, labeled_rows, method_scores
from cg3d.pretrained.factory import load
from cg3d.train import zero_shot_classes
from cg3d.training.config import TrainConfig
from cg3d.training.pretrain import make_learner, make_model, make_triplets, read_data

KINDS = ("diagonal", "caption", "decoupled")
VIEWS = (1, 2, 6)
SIZES = dict(
    encoder="pointnet",
    points=512,
    views=6,
    schedule="frozen",
    visual_prompt="none",
    ema=0.98,
)


def train_and_score(positives: str, views_per_step: int, seed: int, epochs: int) -> dict:
    """One run: settings, and the accuracies of the 3D encoder on the test shapes."""
    settings = {"positives": positives, "views_per_step": views_per_step, "seed": seed, "epochs": epochs}
    config, collection = TrainConfig(**SIZES, **settings), read_data("furniture")
    labels = zero_shot_classes(collection, config.min_shapes)
    test, target = labeled_rows(collection.select(split="test"), labels)
    with tempfile.TemporaryDirectory() as folder:
        triplets = make_triplets(collection, config, progress=False)
        learner = make_learner(config, folder, triplets, make_model(config), progress=False)
        learner.fit()
        model = load(folder, backbone=learner.model.backbone, device=learner.device)  # the averaged weights
    table = accuracy_table(method_scores(model, test, target, labels), target)
    scores = table[table["method"] == ENCODER].iloc[0].drop("method")
    return settings | scores.to_dict()


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path("positives.csv"))
    arguments = parser.parse_args()
    rows = pd.read_csv(arguments.out).to_dict("records") if arguments.out.is_file() else []
    keys = ["positives", "views_per_step", "seed", "epochs"]
    done = {tuple(row[key] for key in keys) for row in rows}
    for seed, positives, views in product(map(int, arguments.seeds.split(",")), KINDS, VIEWS):
        if (positives, views, seed, arguments.epochs) not in done:
            rows.append(train_and_score(positives, views, seed, arguments.epochs))
            pd.DataFrame(rows).to_csv(arguments.out, index=False)
    table = pd.DataFrame(rows)
    table = table[table["epochs"] == arguments.epochs].drop(columns=["seed", "epochs"])
    print(table.groupby(["positives", "views_per_step"]).agg(["mean", "std"]).round(1).to_string())


if __name__ == "__main__":
    main()
