"""Build the bundled furniture set: from Debian's furniture package to 790 colored shapes with texts.

    python recipes/nano/build_furniture.py --out data

cg3d must be able to train on real shapes without a network. Debian's package `sweethome3d-furniture` holds
five libraries of 3D furniture under CC0 and CC BY; each model is an OBJ file with materials and textures, and
is named, tagged and measured. This script turns the package into `furniture.npz`, `furniture.csv` and
`ATTRIBUTION.md`.

Its second input is `data/furniture_texts.csv`: for each of the 790 shapes that are kept (30 of the package's
820 are near-duplicates: sockets, windows, banknotes, rugs) a proof-read category, the split, a caption, and,
for training and validation shapes, a query that asks for the shape without naming it. These texts were
written for this project from pictures of the shapes.

One process, under a minute. The same versions of trimesh and numpy give the same bytes.
"""

import argparse
import re
import subprocess
import tempfile
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

import numpy as np
import pandas as pd

from cg3d.core.errors import InputError, MissingFile
from cg3d.core.paths import data_dir
from cg3d.io.collection import Collection, write_collection
from cg3d.io.shape import Shape, read_shape

PACKAGE = "sweethome3d-furniture=1.8-1"
LIBRARIES = {  # library -> license
    "Scopia": "CC-BY-3.0",
    "BlendSwap-CC-0": "CC0-1.0",
    "BlendSwap-CC-BY": "CC-BY-3.0",
    "KatorLegaz": "CC-BY-3.0-US",
    "Reallusion": "CC-BY-3.0-US",
}
CATALOG = "PluginFurnitureCatalog.properties"  # in each library
TEXT_COLUMNS = ["id", "name", "category", "judged", "split", "caption", "query"]  # of furniture_texts.csv
COLUMNS = [  # of furniture.csv
    *("name", "category", "judged", "source", "id", "group", "split", "license", "creator", "tags"),
    *("width", "height", "depth", "title", "address", "caption", "query"),
]

# ---- the package


def download(
    folder: Path,
) -> Path:  # the .deb
    "Fetch Debian's package with apt; nothing is installed."
    subprocess.run(["apt-get", "download", PACKAGE], cwd=folder, check=True)
    return next(folder.glob("sweethome3d-furniture_*.deb"))


def unpack(
    package: Path,  # the .deb
    folder: Path,  # where it is unpacked
) -> list[Path]:  # the five .sh3f libraries (zip archives), in the order of LIBRARIES
    """Unpack the package and find its libraries.

    Raises: `MissingFile` if there is no such file, `InputError` if a library is missing.
    """
    if not package.is_file():
        message = f"{package}: no such package file; leave --package out to download it with apt"
        raise MissingFile(message, file=package)
    subprocess.run(["dpkg", "-x", str(package), str(folder)], check=True)
    libraries = {path.stem: path for path in folder.rglob("*.sh3f")}
    missing = LIBRARIES.keys() - libraries.keys()
    if missing:
        message = f"{package}: libraries {sorted(missing)} are not in it; is it {PACKAGE}?"
        raise InputError(message, file=package)
    return [libraries[name] for name in LIBRARIES]


# ---- one model


def parse_catalog(
    text: str,  # Java properties such as name#7=Bed, width#7=140.7: the number joins the keys of one model
) -> list[dict[str, str]]:  # one per model, key -> value
    "The entries of a catalog, grouped by model."
    models: dict[int, dict[str, str]] = {}
    for key, number, value in re.findall(r"^(\w+)#(\d+)=(.*)$", text, re.M):
        value = re.sub(r"\\u([0-9a-fA-F]{4})", lambda match: chr(int(match[1], 16)), value.strip())
        models.setdefault(int(number), {})[key] = value
    return [models[number] for number in sorted(models)]


def read_catalog(archive: zipfile.ZipFile) -> list[dict[str, str]]:
    "The catalog of a library."
    return parse_catalog(archive.read(CATALOG).decode("latin-1"))


def model_id(archive: zipfile.ZipFile, model: dict[str, str]) -> str:
    "Id of a model: library/name."
    return f"{Path(archive.filename).stem}/{model['id'].split('#')[1]}"


def read_model(
    archive: zipfile.ZipFile,  # a .sh3f library
    model: dict[str, str],  # its catalog entry
    folder: Path,  # scratch space
    points: int = 2048,
) -> Shape:  # y up
    """Sample a model by area, with its colors, upright and in its real size.

    The catalog's `modelRotation` (3x3) turns models upright that are drawn lying down. The sampling seed
    comes from the model's id, so that a shape does not change when another one is added before it.
    """
    path = PurePosixPath(model["model"].lstrip("/"))
    for member in archive.namelist():  # the OBJ file, its materials and textures share a folder
        if member.startswith(f"{path.parent}/"):
            archive.extract(member, folder)
    shape_id = model_id(archive, model)
    shape = read_shape(folder / path, points=points, seed=zlib.crc32(shape_id.encode()))
    if "modelRotation" in model:
        rotation = np.array(model["modelRotation"].split(), np.float32).reshape(3, 3)
        shape.points = shape.points @ rotation.T
    shape.size = tuple(round(float(model[key]) / 100, 4) for key in ("width", "height", "depth"))
    shape.tags = tuple(tag.strip() for tag in model.get("tags", "").split(",") if tag.strip())
    shape.id, shape.source, shape.creator = shape_id, "sweethome3d", model["creator"]
    shape.license = LIBRARIES[Path(archive.filename).stem]
    return shape


def origin(
    archive: zipfile.ZipFile,
    model: dict[str, str],
) -> tuple[str, str]:  # title and address of the original work, empty where no notice gives them
    "Title and address in the notice beside a Blend Swap model; attribution asks for both."
    parent = PurePosixPath(model["model"].lstrip("/")).parent
    for member in archive.namelist():
        if member.startswith(f"{parent}/") and member.lower().endswith((".txt", ".html")):
            text = re.sub(r"<[^>]+>", " ", archive.read(member).decode("utf-8", "replace"))
            text = " ".join(text.split())
            title = re.search(r'downloading "([^"]+)"|Blend #\d+: (.+?) Released under', text)
            address = re.search(r"https?://(?:www\.)?blendswap\.com/blends?/(?:view/)?\d+", text)
            if title or address:
                return (title[1] or title[2]).strip() if title else "", address[0] if address else ""
    return "", ""


# ---- all models


def read_texts(
    path: Path,  # furniture_texts.csv
) -> pd.DataFrame:  # one row per shape that is kept, columns TEXT_COLUMNS
    """Read the committed texts.

    Raises: `InputError` for other columns or a repeated id.
    """
    texts = pd.read_csv(path, keep_default_na=False)
    if list(texts) != TEXT_COLUMNS:
        raise InputError(f"{path}: columns {list(texts)} are not {TEXT_COLUMNS}", file=path)
    repeated = texts["id"][texts["id"].duplicated()]
    if len(repeated):
        raise InputError(f"{path}: id {repeated.iloc[0]!r} is there twice", file=path, value=repeated.iloc[0])
    return texts


def read_models(
    libraries: list[Path],  # .sh3f files
    texts: pd.DataFrame,  # of `read_texts`
) -> Iterator[tuple[Shape, dict]]:  # each shape with its further columns, in the order of `texts`
    """Read every model that has a row in `texts`.

    Raises: `InputError` if a row's id is in no library.
    """
    from tqdm.auto import tqdm

    archives = [zipfile.ZipFile(path) for path in libraries]
    entries = {
        model_id(archive, model): (archive, model) for archive in archives for model in read_catalog(archive)
    }
    for row in tqdm(texts.to_dict("records"), desc="furniture", disable=None):
        if row["id"] not in entries:
            raise InputError(f"{row['id']!r} is in no library; is the package {PACKAGE}?", value=row["id"])
        archive, model = entries[row["id"]]
        with tempfile.TemporaryDirectory() as folder:
            shape = read_model(archive, model, Path(folder))
        shape.name, shape.category = row["name"], row["category"]
        shape.caption, shape.query = row["caption"], row["query"]
        title, address = origin(archive, model)
        columns = {"judged": row["judged"], "split": row["split"], "group": model["category"]}
        yield shape, columns | {"title": title, "address": address}


# ---- attribution: CC BY asks for creator, title, source, license and a statement of changes

LICENSE_NAMES = {
    "CC0-1.0": "[CC0 1.0](https://creativecommons.org/publicdomain/zero/1.0/legalcode)",
    "CC-BY-3.0": "[CC BY 3.0](https://creativecommons.org/licenses/by/3.0/legalcode)",
    "CC-BY-3.0-US": "[CC BY 3.0 US](https://creativecommons.org/licenses/by/3.0/us/legalcode)",
}
HEAD = """# Attribution of the furniture set

`furniture.npz` and `furniture.csv` are made from Debian's package `sweethome3d-furniture` 1.8-1
(<https://packages.debian.org/sweethome3d-furniture>; upstream <https://www.sweethome3d.com/importModels.jsp>)
by `python recipes/nano/build_furniture.py --out data`.

Changes made: each model was sampled to 2,048 colored surface points, turned upright as its catalog says, centered and scaled into the unit sphere.
Creator, license, library (first part of `id`), title and address of the original work, where its notice gives them, are in each row of `furniture.csv`.

`furniture_texts.csv` (categories, splits, captions, queries) was written for this project from pictures of the shapes and is dedicated to the public domain under {CC0}.

| library | shapes | license | credit as its license file asks |
|---|---|---|---|
"""
CREDITS = {
    "Scopia": "Emmanuel Puybaret / eTeks <info@eteks.com> and Scopia Visual Interfaces Systems, s.l. <http://www.scopia.es>",
    "BlendSwap-CC-0": "the creators below (no credit required)",
    "BlendSwap-CC-BY": "the creators below, through Blend Swap <https://www.blendswap.com>",
    "KatorLegaz": "Andrew Kator & Jennifer Legaz",
    "Reallusion": "Reallusion <http://www.reallusion.com>",
}


def _work(row: dict) -> str:
    "Name, id, title and address of one work."
    facts = [f"`{row['id']}`"]
    if row["title"]:
        facts.append(f'"{row["title"]}"')
    if row["address"]:
        facts.append(row["address"])
    return f"{row['name']} ({', '.join(facts)})"


def attribution(
    table: pd.DataFrame,  # the collection's table
) -> str:  # Markdown
    "The attribution of the set: libraries, then creators with their works."
    library, lines = table["id"].str.split("/").str[0], []
    for name, license in LIBRARIES.items():
        lines.append(f"| {name} | {(library == name).sum()} | {LICENSE_NAMES[license]} | {CREDITS[name]} |")
    lines += ["", "## Works by creator", ""]
    for (license, creator), works in table.groupby(["license", "creator"]):
        titles = "; ".join(_work(row) for row in works.sort_values("id").to_dict("records"))
        lines += [f"**{creator}**, {LICENSE_NAMES[license]}, {len(works)}: {titles}", ""]
    return HEAD.replace("{CC0}", LICENSE_NAMES["CC0-1.0"]) + "\n".join(lines)


# ---- the build


def build(
    out: str | Path,  # folder for furniture.npz, furniture.csv, ATTRIBUTION.md
    package: str | Path | None = None,  # the .deb; None downloads it with apt
    texts: str | Path | None = None,  # furniture_texts.csv; None takes the committed one
) -> Collection:  # what was built
    "Build the bundled set from Debian's package; raises as `unpack`, `read_texts` and `read_models`."
    out, rows = Path(out), read_texts(Path(texts) if texts else data_dir() / "furniture_texts.csv")
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as scratch:
        libraries = unpack(Path(package) if package else download(Path(scratch)), Path(scratch))
        shapes, columns = zip(*read_models(libraries, rows))
    collection = write_collection(out / "furniture", shapes, columns=pd.DataFrame(columns))
    collection.table = collection.table[COLUMNS]
    collection.table.to_csv(out / "furniture.csv", index=False, lineterminator="\n")
    (out / "ATTRIBUTION.md").write_text(attribution(collection.table), encoding="utf-8")
    return collection


def main(
    argv: list[str] | None = None,  # None: those of the command line
) -> None:
    "Command line of the build."
    parser = argparse.ArgumentParser(description="Build the bundled furniture set from Debian's package.")
    out_help = "folder to write furniture.npz, furniture.csv and ATTRIBUTION.md to"
    parser.add_argument("--out", required=True, help=out_help)
    parser.add_argument("--package", help=f"the .deb file; without it, apt-get download {PACKAGE}")
    parser.add_argument("--texts", help="furniture_texts.csv; without it, the one that comes with cg3d")
    args = parser.parse_args(argv)
    print(build(args.out, args.package, args.texts))


if __name__ == "__main__":
    main()
