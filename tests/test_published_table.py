'Every command of the table "In the papers, and here" of docs/published.md, on files in the published layouts.'

import re
import shlex
from pathlib import Path

import miniatures as mini
import numpy as np
import pytest
import torch
from published_layouts import write_layout

from cg3d.cli.job_commands import command_values
from cg3d.core.config import split_list
from cg3d.data import shapenet_part
from cg3d.evaluation.comparison import Protocol, label_list, open_model, predict, select_split
from cg3d.evaluation.conditions import CONDITIONS
from cg3d.pretrained.download import CATALOG
from cg3d.pretrained.factory import split_options
from cg3d.training.pretrain import read_data

PAGE = Path(__file__).parent.parent / "docs/published.md"
ROWS = re.findall(
    r"^\| (.+) \| `(cg3d evaluate .+|python -c .+)` \| *(.*)\|$", PAGE.read_text(), re.MULTILINE
)
LAYOUTS = {  # file or name of the catalog -> a layout of that family, a small one
    "pt.pt": "cg3d/point_transformer",
    "checkpoint_pointbert.pt": "ulip/pointbert",
    "checkpoint_pointmlp.pt": "ulip/pointmlp",
    "ulip2": "ulip2/pointbert",
    "openshape-g14": "openshape/vitb32",
    "uni3d-b": "uni3d/ti",
    "uni3d-l": "uni3d/ti",
    "uni3d-g": "uni3d/ti",
}


def parameters(command):  # of cg3d evaluate
    words = shlex.split(command)
    assert words[:2] == ["cg3d", "evaluate"] and set(words[2::3]) == {"-p"}
    pairs = zip(words[3::3], words[4::3])
    return command_values("evaluate", [], [f"{name}={value}" for name, value in pairs])


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    "The data sets and weights by the names that the commands have."
    root = tmp_path_factory.mktemp("table")
    for write in (mini.modelnet_text, mini.ulip2_modelnet, mini.scanobjectnn, mini.ulip_lvis):
        write(root)
    mini.openshape_tests(root)
    for name in ("ulip2/pointbert", "openshape/vitb32", "uni3d/ti"):
        write_layout(root / name.replace("/", "_"), name)
    for file in ("pt.pt", "checkpoint_pointbert.pt", "checkpoint_pointmlp.pt"):
        write_layout(root / file, LAYOUTS[file], small_towers=True)
    write_layout(root / "slip_base_100ep.pt", "slip", small_towers=True)
    return root


def test_the_table_has_every_family_and_no_number_of_ours():
    families = ("CG3D", "ULIP Point-BERT", "ULIP PointMLP", "ULIP-2", "OpenShape", "Uni3D", "PatchAlign3D")
    assert all(any(facts.startswith(name) for facts, _, _ in ROWS) for name in families)
    assert len(ROWS) == 17 and not any(here.strip() for _, _, here in ROWS)


COMMANDS = [parameters(command) for _, command, _ in ROWS if command.startswith("cg3d")]
DATA = sorted({(values["data"], values.get("split", "test")) for values in COMMANDS})


@pytest.mark.filterwarnings("ignore:.*numbers of classes and candidates")  # three shapes are not all of LVIS
@pytest.mark.parametrize("data,split", DATA)
def test_every_data_set_is_read(home, data, split, monkeypatch):
    monkeypatch.chdir(home)
    collection = read_data(data)
    rows = select_split(collection, split, data)
    assert len(label_list(collection)) in (40, 15, 3) and torch.isfinite(rows.points([0])).all()
    with pytest.raises(ValueError, match="no setting 'layuot'"):
        read_data(f"{split_options(data)[0]}?layuot=x")


CHECKPOINTS = sorted(
    {parameters(command)["checkpoint"] for _, command, _ in ROWS if command.startswith("cg3d")}
)


@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_every_checkpoint_is_measured(home, checkpoint, monkeypatch):
    "With towers in the file or beside it all of the command runs; without them (2.5 billion weights) the 3D encoder."
    monkeypatch.chdir(home)
    values = next(v for v in COMMANDS if v["checkpoint"] == checkpoint and "split" not in v)
    data = read_data(values["data"])
    for name in split_list(checkpoint):
        if name in CATALOG:
            assert CATALOG[name].is_model
            model = open_model(LAYOUTS[name].replace("/", "_"))
            embedded = model.encode_shape(select_split(data, "test", "x").points([0]))
            assert torch.allclose(embedded.norm(dim=-1), torch.ones(1))
            continue
        protocol = Protocol(values["templates"], values.get("normalize_text", True))
        tested = (data.table["split"] == "test").to_numpy()
        few = data.select(tested & (np.cumsum(tested) <= 2))
        table = predict(open_model(name), few, label_list(data), protocol).table
        assert set(CONDITIONS) <= set(table.columns) and table["shapes"][0] == 2
        assert table["file"][0].startswith("sha256:") and table["templates"][0] in (
            "single (1)",
            "ulip64 (64)",
        )


def test_the_command_for_parts(tmp_path, capsys, monkeypatch):
    "The line is run as it stands, with a model and a folder in place of those that it names."
    (line,) = [command for _, command, _ in ROWS if command.startswith("python -c")]
    code = shlex.split(line)[2]
    opened = []
    monkeypatch.setattr("cg3d.pretrained.parts.load_part_model", opened.append)
    monkeypatch.setattr(shapenet_part, "read_shapenet_part", opened.append)
    monkeypatch.setattr("cg3d.evaluation.part_segmentation.part_segmentation", lambda model, data: "measured")
    exec(code, {})
    assert opened == ["patchalign3d.pt", "ROOT"] and capsys.readouterr().out == "measured\n"
