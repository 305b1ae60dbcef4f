"""Zero-shot accuracy after a short pre-training by the kind of positives and the number of views a step.

python benchmarks/positives.py [--data furniture] [--test SET ...] [--epochs 30] [--seeds 0,1,2] [--out positives.csv]

Trains on the training split of `--data` and tests on its test split, and on the test split of every further set. A set
is `furniture` or the path of a packed collection (`x.npz` beside `x.csv`). Every run and tested set is a row of the
file; a run whose rows are there is not repeated. The table shows mean and deviation over the seeds.
"""

import argparse
import tempfile
from dataclasses import replace
from itertools import product
from pathlib import Path

import pandas as pd

from cg3d.evaluation.embedding_benchmark import scored_categories, scored_rows
from cg3d.evaluation.zero_shot import accuracy_table, zero_shot_weights
from cg3d.io.collection import Collection
from cg3d.models.cg3d import CG3D
from cg3d.pretrained.factory import load
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
KEYS = ["data", "positives", "views_per_step", "seed", "epochs"]  # of a run
SCORES = ["top1", "top5", "mean_class"]


def read_set(name: str) -> Collection:
    """A set; its candidates are the proof-read nouns where its table marks any, else all."""
    collection = read_data(name)
    if "judged" in collection.table and not (collection.table["judged"] == 1).any():
        collection = replace(collection, table=collection.table.drop(columns="judged"))
    return collection


def accuracies(model: CG3D, collection: Collection) -> dict[str, float]:
    """Accuracies of the 3D encoder on the test shapes of a set."""
    categories, test = scored_categories(collection), collection.select(split="test")
    scored, target = scored_rows(test, categories)
    weights = zero_shot_weights(model.prompts, categories)
    scores = model.encode_shape(test.points(scored.numpy())) @ weights.T
    return accuracy_table({"3D encoder": scores}, target).iloc[0][[*SCORES, "shapes", "classes"]].to_dict()


def train_and_score(run: dict, tested: dict[str, Collection]) -> list[dict]:
    """One run: a row for each tested set."""
    settings = {name: value for name, value in run.items() if name != "data"}
    config = TrainConfig(data=run["data"], **SIZES, **settings)
    with tempfile.TemporaryDirectory() as folder:
        triplets = make_triplets(read_data(config.data), config, progress=False)
        learner = make_learner(config, folder, triplets, make_model(config), progress=False)
        learner.fit()
        model = load(folder, backbone=learner.model.backbone, device=learner.device)  # the averaged weights
    return [
        run | {"test": Path(name).stem} | accuracies(model, collection) for name, collection in tested.items()
    ]


def main() -> None:
    """Run what is missing and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--data", default="furniture", help="set to train on and to test on")
    parser.add_argument("--test", nargs="*", default=[], help="further sets to test on")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--out", type=Path, default=Path("positives.csv"))
    arguments = parser.parse_args()
    rows = pd.read_csv(arguments.out).to_dict("records") if arguments.out.is_file() else []
    tested = {name: read_set(name) for name in (arguments.data, *arguments.test)}
    for seed, positives, views in product(map(int, arguments.seeds.split(",")), KINDS, VIEWS):
        run = dict(zip(KEYS, (arguments.data, positives, views, seed, arguments.epochs)))
        if not any(run.items() <= row.items() for row in rows):
            rows += train_and_score(run, tested)
            pd.DataFrame(rows).to_csv(arguments.out, index=False)
    table = pd.DataFrame(rows)
    table = table[(table["data"] == arguments.data) & (table["epochs"] == arguments.epochs)]
    groups = table.groupby(["test", "positives", "views_per_step"], sort=False)[SCORES]
    print(groups.agg(["mean", "std"]).round(1).to_string())


if __name__ == "__main__":
    main()
