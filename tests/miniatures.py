"""Published data sets in small: the exact folders, names, keys and types, a handful of shapes each."""

import json
import pickle

import numpy as np

SYNSETS = {
    "02691156": "airplane,aeroplane,plane",
    "03001627": "chair",
    "03211117": "display,video display",
    "04530566": "vessel,watercraft",
}
MODELS = [
    f"{synset}-{model}" for synset in SYNSETS for model in ("1a2b", "3c-4d-5e", "6f70")
]  # one model id of each class holds hyphens
MODELNET = [
    "airplane_0001",
    "airplane_0002",
    "night_stand_0001",
    "night_stand_0002",
    "tv_stand_0001",
    "tv_stand_0002",
]
MODELNET_NUMBER = {"airplane": 0, "night_stand": 23, "tv_stand": 36}  # places in the published list of 40
LVIS = [
    ("aa11", "bat_(animal)", "000-001"),
    ("bb22", "bat_(sports_equipment)", "000-002"),
    ("cc33", "CD_player", "000-002"),
]


def cloud(seed, n=1100, kind=0):
    """A cloud in float32 that its seed tells apart: off center, larger than the unit sphere, longest along y."""
    rng = np.random.default_rng(seed)
    points = rng.normal(size=(n, 3)) * [[0.3, 1, 0.2], [0.5, 1, 0.5], [0.2, 1, 0.6]][kind % 3] + [3, 4, 5]
    return points.astype(np.float32)


def picture(path, seed, size=(48, 40), alpha=True):
    """A small picture; its upper left pixel is transparent."""
    from PIL import Image

    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 4), dtype=np.uint8)
    pixels[..., 3] = 255
    pixels[0, 0, 3] = 0
    Image.fromarray(pixels if alpha else pixels[..., :3]).save(path)


def write_lines(path, lines, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(lines) + end)


def taxonomy(path):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        json.dumps(
            [
                {"synsetId": synset, "name": name, "children": [], "numInstances": 3}
                for synset, name in SYNSETS.items()
            ]
        )
    )


def cg3d(root, n=1100, views=5):
    """CG3D: nine training and three test shapes; val_img.txt leaks, and so does Point-BERT's test.txt."""
    from cg3d.data.shapenet import CG3D_CLASSES

    render = root / "shapenet_render"
    for i, name in enumerate(MODELS):
        (root / "ShapeNet55/shapenet_pc").mkdir(parents=True, exist_ok=True)
        np.save(root / f"ShapeNet55/shapenet_pc/{name}.npy", cloud(i, n, i // 3))
        synset, _, model = name.partition("-")
        for view in range(views):
            picture(render / f"img/{synset}/{model}/{view:03d}.png", 10 * i + view)
    train, test = (
        [name for i, name in enumerate(MODELS) if i % 3 < 2],
        [name for i, name in enumerate(MODELS) if i % 3 == 2],
    )
    for split, names in (("train", train), ("test", test), ("val", [*train[:3], test[0]])):
        write_lines(render / f"{split}_img.txt", [f"{name}.npy" for name in names])
    write_lines(root / "ShapeNet55/train.txt", [f"{name}.npy" for name in test])
    write_lines(root / "ShapeNet55/test.txt", [f"{name}.npy" for name in train[:5]])
    write_lines(render / "shape_names.txt", CG3D_CLASSES)
    taxonomy(render / "taxonomy.json")
    return root


def ulip(root, n=1100, views=30):
    """ULIP's shapenet-55."""
    home = root / "shapenet-55"
    (home / "shapenet_pc").mkdir(parents=True)
    for i, name in enumerate(MODELS):
        np.save(home / f"shapenet_pc/{name}.npy", cloud(i, n, i // 3))
        for view in range(views):
            for ending in ("", "_depth0001"):
                picture(
                    home / f"rendered_images/{name}/{name}_r_{12 * view:03d}{ending}.png",
                    10 * i + view,
                    (32, 32),
                    alpha=False,
                )
    write_lines(home / "train.txt", [f"{name}.npy" for i, name in enumerate(MODELS) if i % 3 < 2])
    write_lines(home / "test.txt", [f"{name}.npy" for i, name in enumerate(MODELS) if i % 3 == 2])
    taxonomy(home / "taxonomy.json")
    return home


def modelnet_text(root, names=None):
    """modelnet40_normal_resampled with the lists of both sets."""
    from cg3d.data.modelnet import MODELNET10, MODELNET40

    home = root / "modelnet40_normal_resampled"
    for i, name in enumerate(MODELNET):
        (home / name.rpartition("_")[0]).mkdir(parents=True, exist_ok=True)
        np.savetxt(
            home / name.rpartition("_")[0] / f"{name}.txt",
            np.hstack([cloud(i, 64), np.eye(3)[np.arange(64) % 3]]),
            delimiter=",",
            fmt="%.6f",
        )
    write_lines(home / "modelnet40_shape_names.txt", names or MODELNET40, end="")
    write_lines(home / "modelnet10_shape_names.txt", MODELNET10)
    for split, rows in (("train", MODELNET[::2]), ("test", MODELNET[1::2])):
        write_lines(home / f"modelnet40_{split}.txt", rows)
        write_lines(
            home / f"modelnet10_{split}.txt", [name for name in rows if name.startswith("night_stand")]
        )
    return home


def modelnet_h5(root):
    import h5py

    from cg3d.data.modelnet import MODELNET40

    home = root / "modelnet40_ply_hdf5_2048"
    write_lines(home / "shape_names.txt", MODELNET40)
    for split, first in (("train", 0), ("test", 1)):
        rows = MODELNET[first::2]
        parts = {0: rows[:2], 1: rows[2:]}
        write_lines(
            home / f"{split}_files.txt",
            [f"data/modelnet40_ply_hdf5_2048/ply_data_{split}{part}.h5" for part in parts],
        )
        for part, names in parts.items():
            with h5py.File(home / f"ply_data_{split}{part}.h5", "w") as file:
                file["data"] = np.stack([cloud(MODELNET.index(name), 64) for name in names])
                file["normal"] = np.zeros((len(names), 64, 3), np.float32)
                file["faceId"] = np.zeros((len(names), 64), np.int32)
                file["label"] = np.array(
                    [[MODELNET_NUMBER[name.rpartition("_")[0]]] for name in names], np.uint8
                )
    return home


def modelnet_pickle(root, names=MODELNET, protocol=4, number="40"):
    from cg3d.data.modelnet import MODELNET10

    root.mkdir(parents=True, exist_ok=True)
    for split, first in (("train", 0), ("test", 1)):
        rows = [name for name in names[first::2] if number == "40" or name.startswith("night_stand")]
        labels = [
            np.array([MODELNET_NUMBER[word] if number == "40" else MODELNET10.index(word)], np.int32)
            for word in (name.rpartition("_")[0] for name in rows)
        ]
        with open(root / f"modelnet{number}_{split}_8192pts_fps.dat", "wb") as file:
            pickle.dump(
                [
                    [
                        np.hstack([cloud(MODELNET.index(name), 64), np.ones((64, 3))]).astype(np.float32)
                        for name in rows
                    ],
                    labels,
                ],
                file,
                protocol,
            )
    return root


def scanobjectnn(root, count=5):
    """All three variants; coordinates are meters, far from the origin."""
    import h5py

    for number, (folder, ending) in enumerate(
        (("main_split", ""), ("main_split_nobg", ""), ("main_split", "_augmentedrot_scale75"))
    ):
        (root / "h5_files" / folder).mkdir(parents=True, exist_ok=True)
        for split, word in (("train", "training"), ("test", "test")):
            with h5py.File(root / "h5_files" / folder / f"{word}_objectdataset{ending}.h5", "w") as file:
                file["data"] = np.stack(
                    [cloud(100 * number + i + 50 * (split == "test"), 32) for i in range(count)]
                )
                file["label"] = np.arange(count) * 3
                file["mask"] = np.zeros((count, 32), np.int8)
    return root / "h5_files"


H5_CORRUPTIONS = ("scale", "jitter", "rotate", "dropout_global", "dropout_local", "add_global", "add_local")
NPY_CORRUPTIONS = (
    "uniform gaussian background impulse upsampling distortion distortion_rbf distortion_rbf_inv density "
    "density_inc shear rotation cutout occlusion lidar"
).split()


def _corrupted_size(kind, level, points):
    "Points of a cloud that a corruption leaves, level from 0."
    if kind.startswith("dropout"):
        return points - 4 * (level + 1)
    return points + (level + 1) if kind.startswith(("add", "upsampling", "background")) else points


def _corrupted_h5(root, labels, points=32):
    import h5py

    root.mkdir(parents=True)
    for name in ["clean", *(f"{kind}_{level}" for kind in H5_CORRUPTIONS for level in range(5))]:
        kind, _, level = name.rpartition("_")
        size = points if name == "clean" else _corrupted_size(kind, int(level), points)
        with h5py.File(root / f"{name}.h5", "w") as file:
            file["data"] = np.stack([cloud(i, size) for i in range(len(labels))])
            file["label"] = np.array(labels)[:, None]


def modelnet_c(root):
    _corrupted_h5(root / "modelnet_c", [0, 23, 37])  # airplane, night_stand, vase
    return root / "modelnet_c"


def scanobjectnn_c(root):
    for variant in ("obj_bg", "obj_only", "hardest"):
        _corrupted_h5(root / "sonn_c" / variant, [0, 3])
    return root / "sonn_c"


def modelnet40_c(root, points=32):
    root = root / "modelnet40_c"
    root.mkdir()
    names = ["original", *(f"{kind}_{level}" for kind in NPY_CORRUPTIONS for level in range(1, 6))]
    for name in names:
        kind, _, level = name.rpartition("_")
        size = points if name == "original" else _corrupted_size(kind, int(level) - 1, points)
        np.save(root / f"data_{name}.npy", np.stack([cloud(i, size) for i in range(3)]))
    np.save(root / "label.npy", np.array([[0], [23], [37]]))
    return root


def omniobject3d(root):
    """Two objects of one class and one of another at three numbers of points; one class folder is empty."""
    import trimesh

    for count in (1024, 4096, 16384):
        for number, name in enumerate(("anise/anise_001", "anise/anise_002", "toy_car/toy_car_001")):
            file = root / f"ply_files/{count}/{name}/pcd_{count}.ply"
            file.parent.mkdir(parents=True)
            trimesh.PointCloud(cloud(number, count)).export(file)
        (root / f"ply_files/{count}/zongzi").mkdir()
    return root


def _class_folders(root, names, points=2048):
    for number, name in enumerate(names):
        for split, shift in (("train", 0), ("test", 1)):
            (root / name / split).mkdir(parents=True)
            np.save(root / name / split / f"{name}_0001.npy", cloud(2 * number + shift, points))
    return root


def pointda_modelnet(root):
    return _class_folders(root / "PointDA_data/modelnet", ("bathtub", "plant"))


def pointda_shapenet(root):
    return _class_folders(root / "PointDA_data/shapenet", ("bathtub", "plant"))


def pointda_scannet(root):
    import h5py

    home = root / "PointDA_data/scannet"
    home.mkdir(parents=True)
    for split, seed in (("train", 0), ("test", 3)):
        clouds = [cloud(seed + i, 2048) for i in range(2)]
        with h5py.File(home / f"{split}_0.h5", "w") as file:
            file["data"] = np.concatenate([clouds, np.zeros((2, 2048, 3))], 2).astype(np.float32)
            file["label"] = np.array([[4], [7]], np.uint8)
        write_lines(home / f"{split}_files.txt", [f"./data/PointDA_data/scannet/{split}_0.h5"])
    return home


def sim2real(root):
    return _class_folders(root / "xset/sim2real/so_obj_only_9", ("bed", "chair"))


def shape_dictionary(uid, group, seed):
    rng = np.random.default_rng(seed)

    def feature(*shape):
        return rng.normal(size=shape).astype(np.float16)

    def text():
        return {"original": feature(1, 1280), "prompt_avg": feature(1, 1280)}

    return {
        "dataset": "Objaverse",
        "group": group,
        "id": uid,
        "xyz": cloud(seed, 90),
        "rgb": rng.random((90, 3)).astype(np.float32),
        "image_feat": feature(12, 1280),
        "thumbnail_feat": feature(1280),
        "text": [f"raw {uid}"],
        "text_feat": [text()],
        "blip_caption": f"blip {uid}",
        "blip_caption_feat": text(),
        "msft_caption": f"msft {uid}",
        "msft_caption_feat": text(),
        "retrieval_text": [f"web {uid}"],
        "retrieval_text_feat": [text()],
    }


def objaverse(root):
    """OpenShape: the lists carry paths of the authors' machine."""
    root.mkdir(parents=True, exist_ok=True)
    for i, (uid, _, group) in enumerate(LVIS):
        (root / "Objaverse" / group).mkdir(parents=True, exist_ok=True)
        np.save(root / f"Objaverse/{group}/{uid}.npy", shape_dictionary(uid, group, i), allow_pickle=True)
    far = "/mnt/data/objaverse-processed/merged_for_training_final/Objaverse"
    entries = [
        {"dataset": "Objaverse", "group": group, "id": uid, "data_path": f"{far}/{group}/{uid}.npy"}
        for uid, _, group in LVIS
    ]
    (root / "meta_data/split").mkdir(parents=True)
    (root / "meta_data/split/train_all.json").write_text(json.dumps(entries))
    (root / "meta_data/split/train_no_lvis.json").write_text(json.dumps(entries[2:]))
    (root / "meta_data/split/lvis.json").write_text(
        json.dumps(
            [
                {"uid": uid, "group": group, "category": category, "data_path": f"{far}/{group}/{uid}.npy"}
                for uid, category, group in LVIS[:2]
            ]
        )
    )
    (root / "meta_data/gpt4_filtering.json").write_text(
        json.dumps({LVIS[0][0]: {"flag": "N"}, LVIS[1][0]: {"flag": "Y"}})
    )
    return root


def uni3d_lvis(root):
    for i, (uid, _, group) in enumerate(LVIS):
        (root / "objaverse" / group).mkdir(parents=True, exist_ok=True)
        np.save(root / f"objaverse/{group}/{uid}.npy", shape_dictionary(uid, group, i), allow_pickle=True)
    write_lines(
        root / "lvis_testset.txt",
        [
            f"{2 - i},{category},{uid},/objaverse/{group}/{uid}.npy"
            for i, (uid, category, group) in enumerate(LVIS)
        ],
    )
    return root


def ulip_lvis(root):
    home = root / "objaverse-lvis"
    for i, (uid, _, group) in enumerate(LVIS):
        (home / group).mkdir(parents=True, exist_ok=True)
        np.save(home / f"{group}/{uid}.npy", shape_dictionary(uid, group, i), allow_pickle=True)
    (home / "lvis.json").write_text(json.dumps({uid: f"{group}/{uid}.npy" for uid, _, group in LVIS}))
    (home / "objaverse_lvis_metadata.json").write_text(
        json.dumps(
            {
                "value_to_key_mapping": {uid: category for uid, category, _ in LVIS},
                "key_to_id": {category: i for i, (_, category, _) in enumerate(LVIS)},
            }
        )
    )
    return home


def openshape_tests(root):
    """ModelNet40 and ScanObjectNN as OpenShape repackages them."""
    one, two = root / "modelnet40", root / "scanobjectnn"
    one.mkdir(parents=True), two.mkdir(parents=True)
    (one / "test_split.json").write_text(
        json.dumps([{"name": name, "category": name.rpartition("_")[0]} for name in MODELNET[1::2]])
    )
    clouds = np.empty(3, object)
    clouds[:] = [
        {"xyz": cloud(MODELNET.index(name), 64), "rgb": np.full((64, 3), 100, np.float32)}
        for name in MODELNET[1::2]
    ]
    np.save(one / "test_pc.npy", clouds, allow_pickle=True)
    np.save(
        two / "xyz_label.npy",
        {"xyz": np.stack([cloud(i, 32) for i in range(4)]), "label": np.array([0, 4, 10, 14])},
        allow_pickle=True,
    )
    return root


def ulip2_modelnet(root):
    """ULIP-2's ModelNet40 test split with 10,000 points, in the folder of the text files; its rgb is not used."""
    home = root / "modelnet40_normal_resampled"
    home.mkdir(parents=True, exist_ok=True)
    names = MODELNET[1::2]
    entries = [{"name": name, "category": name.rpartition("_")[0]} for name in names]
    (home / "modelnet40_test_split_10k_colored.json").write_text(json.dumps(entries))
    clouds = np.empty(len(names), object)
    clouds[:] = [
        {"xyz": cloud(MODELNET.index(name), 64), "rgb": np.full((64, 3), 0.9, np.float32)} for name in names
    ]
    np.save(home / "modelnet40_colored_10k_pc.npy", clouds, allow_pickle=True)
    return home


def scannet(root):
    """One room: a floor, a two meters high cabinet along z, a bench; a second room only listed."""
    import trimesh

    scene = root / "scans/scene0000_00"
    scene.mkdir(parents=True)
    parts = [
        trimesh.creation.box((4, 3, 0.1)),
        trimesh.creation.box((0.5, 0.5, 2)),
        trimesh.creation.box((1, 0.4, 0.4)),
    ]
    for part, color in zip(parts, ([90, 90, 90, 255], [200, 0, 0, 255], [0, 0, 200, 255])):
        part.visual.vertex_colors = color
    trimesh.util.concatenate(parts).export(scene / "scene0000_00_vh_clean_2.ply")
    (scene / "scene0000_00_vh_clean_2.0.010000.segs.json").write_text(
        json.dumps({"sceneId": "scene0000_00", "segIndices": [1] * 8 + [4] * 4 + [5] * 4 + [7] * 8})
    )
    (scene / "scene0000_00.aggregation.json").write_text(
        json.dumps(
            {
                "sceneId": "scannet.scene0000_00",
                "appId": "Aggregator.v2",
                "segGroups": [
                    {"id": 0, "objectId": 0, "segments": [4, 5], "label": "cabinet"},
                    {"id": 1, "objectId": 1, "segments": [7], "label": "bench"},
                ],
                "segmentsFile": "scannet.scene0000_00_vh_clean_2.0.010000.segs.json",
            }
        )
    )
    write_lines(root / "scannetv2_train.txt", ["scene0000_00"])
    return root


def folder(root, table=True):
    """Meshes and a cloud of your own."""
    import trimesh

    (root / "sub").mkdir(parents=True)
    trimesh.creation.box((1, 2, 1)).export(root / "a-box.stl")
    trimesh.creation.icosphere(2).export(root / "sub/ball.obj")
    np.save(root / "cloud.npy", cloud(0, 400))
    if table:
        (root / "names.csv").write_text(
            'file,name,category,split,tags\na-box.stl,tall box,box,train,"tall, plain"\nsub/ball.obj,round ball,ball,train,\ncloud.npy,cigar,ball,test,\n'
        )
    return root
