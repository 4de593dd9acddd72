import io
import json
import pickle
import re
import tarfile
from pathlib import Path

import cv2
import numpy as np
import pytest
import tensorflow_datasets as tfds

from declip_jax.data.sources.base import Source
from declip_jax.evals import sets

OPENAI = "https://github.com/openai/CLIP/blob/main/"
COUNTS = {  # classes, templates
    "cifar10": (10, 18),
    "cifar100": (100, 18),
    "food101": (101, 1),
    "oxford_pets": (37, 1),
    "flowers102": (102, 1),
    "sun397": (397, 2),
    "stanford_cars": (196, 8),
    "dtd": (47, 8),
    "caltech101": (102, 34),
    "fgvc_aircraft": (100, 2),
    "imagenet": (1000, 80),
    "imagenet_v2": (1000, 80),
    "imagenet_a": (200, 80),
    "imagenet_r": (200, 80),
    "imagenet_sketch": (1000, 80),
}
CIFAR10 = sets.get("cifar10").class_names


class Named(Source):
    """One record a class, in their order."""

    def __init__(self, names):
        self.class_names = tuple(names)

    def __len__(self):
        return len(self.class_names)

    def __getitem__(self, index):
        return {"label": range(len(self))[index]}

    def __str__(self):
        return "named"


@pytest.fixture
def tfds_folder(tmp_path, monkeypatch) -> Path:
    """What TFDS takes for ~/tensorflow_datasets."""
    monkeypatch.setattr("tensorflow_datasets.core.constants.DATA_DIR", str(tmp_path / "tfds"))
    return tmp_path / "tfds"


def labels(known: sets.EvalSet, names) -> list:
    return [record["label"] for record in sets._SetSource(Named(names), known, "")]


def image(value: int) -> bytes:
    return cv2.imencode(".png", np.full((4, 4, 3), value, np.uint8))[1].tobytes()


def pixel(record) -> int:
    return int(cv2.imdecode(np.frombuffer(record["image"], np.uint8), cv2.IMREAD_COLOR)[0, 0, 0])


def class_folders(root: Path, names, images: int = 1, value=lambda index: index) -> None:
    """Folders of `names`, each image of the color that `value` gives for the folder's index."""
    for index, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for number in range(images):
            (root / name / f"{number:03d}.png").write_bytes(image(value(index)))


def shards(root: Path, split: str, given) -> None:
    """One shard as CLIP_benchmark writes them: images of the color of their number in KEY.cls."""
    (root / split).mkdir(parents=True)
    with tarfile.open(root / split / "0.tar", "w") as tar:
        for key, number in enumerate(given):
            for extension, data in (("png", image(number)), ("cls", str(number).encode())):
                member = tarfile.TarInfo(f"s{key:07d}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))


def written_by_tfds(root: Path, name: str, names, splits: dict[str, int]) -> None:
    """A data set of TFDS with so many records a split, their classes in turn."""

    class Builder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version("3.0.2")

        def _info(self):
            label = tfds.features.ClassLabel(names=list(names))
            features = {"image": tfds.features.Image(encoding_format="png"), "label": label}
            return tfds.core.DatasetInfo(
                builder=self, features=tfds.features.FeaturesDict(features)
            )

        def _split_generators(self, downloads):
            return {split: self._generate_examples(count) for split, count in splits.items()}

        def _generate_examples(self, count):
            for index in range(count):
                number = index % len(names)
                yield index, {"image": io.BytesIO(image(number)), "label": number}

    Builder.name = name
    Builder(data_dir=str(root), file_format="array_record").download_and_prepare()


# What the files say.


def test_a_file_for_every_name():
    files = {path.stem for path in Path(sets.__file__).parent.glob("*.json")}
    assert files == {*sets.NAMES, *sets.RETRIEVAL}
    assert set(sets.NAMES) == set(COUNTS)


@pytest.mark.parametrize("name", sets.NAMES)
def test_classes_and_templates(name):
    known = sets.get(name)
    assert (len(known.class_names), len(known.templates)) == COUNTS[name]
    assert len(set(known.labels)) == len(known.labels) == len(known.class_names)
    assert len(set(known.templates)) == len(known.templates)
    assert all(template.count("{}") == 1 for template in known.templates)
    twice = {n for n in known.class_names if known.class_names.count(n) > 1}
    assert twice == ({"missile", "sunglasses"} if len(known.labels) == 1000 else set())
    per_class = ("oxford_pets", "flowers102", "caltech101", "fgvc_aircraft")
    assert known.metric == ("mean_per_class" if name in per_class else "top1")
    is_own_list = not name.startswith("imagenet_")
    assert known.source.startswith(OPENAI) == is_own_list and "https://" in known.source
    assert list(known.splits) == (["train", "validation", "test"] if is_own_list else ["test"])


@pytest.mark.parametrize("name", sets.RETRIEVAL)
def test_retrieval_sets_have_no_classes(name):
    known = sets.get(name)
    assert not known.class_names and not known.templates
    assert known.metric == "image_to_text_r1" and known.splits["test"] == "test"


@pytest.mark.parametrize(
    "name, label, class_name",
    [
        ("imagenet", "n01440764", "tench"),
        ("imagenet", "n02119789", "kit fox"),
        ("imagenet", "n01608432", "kite (bird of prey)"),
        ("imagenet", "n03126707", "construction crane"),
        ("imagenet", "n02012849", "crane bird"),
        ("imagenet", "n03710721", "one-piece bathing suit"),
        ("imagenet", "n04008634", "missile"),
        ("imagenet", "n15075141", "toilet paper"),
        ("imagenet_a", "n01498041", "stingray"),
        ("imagenet_r", "n01443537", "goldfish"),
        ("cifar100", "aquarium_fish", "aquarium fish"),
        ("food101", "cheese_plate", "cheese plate"),
        ("oxford_pets", "Maine_Coon", "Maine Coon"),
        ("flowers102", "ball moss", "air plant"),
        ("flowers102", "pink-yellow dahlia?", "pink and yellow dahlia"),
        ("sun397", "/a/apartment_building/outdoor", "apartment building outdoor"),
        ("stanford_cars", "Ram C/V Cargo Van Minivan 2012", "Ram C/V Cargo Van Minivan 2012"),
        ("caltech101", "background_google", "background"),
        ("caltech101", "faces", "off-center face"),
        ("caltech101", "faces_easy", "centered face"),
        ("caltech101", "crocodile_head", "head of a  crocodile"),
        ("fgvc_aircraft", "F-16A/B", "F-16A/B"),
    ],
)
def test_well_known_pairs(name, label, class_name):
    known = sets.get(name)
    assert known.class_names[known.labels.index(label)] == class_name


@pytest.mark.parametrize("name", [n for n in sets.NAMES if not n.startswith("imagenet")])
def test_labels_read_like_their_names(name):
    known = sets.get(name)
    others = {
        "flowers102": {"ball moss", "pink-yellow dahlia?"},
        "caltech101": {
            *("airplanes", "background_google", "car_side", "cougar_body", "cougar_face"),
            *("crocodile_head", "faces", "faces_easy", "flamingo_head", "leopards", "motorbikes"),
            *("snoopy", "yin_yang"),
        },
    }
    found = {
        label
        for label, class_name in zip(known.labels, known.class_names, strict=True)
        if sets._fold(re.sub("^/[a-z]/", "", label)) != sets._fold(class_name)
    }
    assert found == others.get(name, set())


def test_orders_by_hand():
    """Some that differ from TFDS, where cats and dogs are mixed and cheesecake precedes plate."""
    assert sets.get("oxford_pets").class_names[11:14] == (
        "Sphynx",
        "american bulldog",
        "american pit bull terrier",
    )
    assert sets.get("food101").class_names[16:18] == ("cheese plate", "cheesecake")
    assert sets.get("caltech101").class_names[:3] == (
        "background",
        "off-center face",
        "centered face",
    )
    names = sets.get("cifar100").class_names
    assert (names[0], names[1], names[30], names[90], names[99]) == (
        "apple",
        "aquarium fish",
        "dolphin",
        "train",
        "worm",
    )
    wnids = sets.get("imagenet").labels
    assert list(wnids) == sorted(wnids)
    for name in ("imagenet_a", "imagenet_r"):
        assert list(sets.get(name).labels) == sorted(sets.get(name).labels)
        assert set(sets.get(name).labels) <= set(wnids)


# Labels of data in other orders.


@pytest.mark.parametrize("name", [name for name in sets.NAMES if sets.get(name).tfds])
def test_the_order_of_tfds(name, tmp_path):
    """Every class that the installed TFDS has goes to the place of its label."""
    known = sets.get(name)
    feature = tfds.builder(known.tfds, data_dir=tmp_path).info.features["label"]
    found = labels(known, feature.names) if not known.other_labels else None
    if name.startswith("cifar"):  # their names come with the data
        assert feature.names == [str(i) for i in range(len(known.labels))]
        assert found == list(range(len(known.labels)))
    elif known.other_labels:
        source = sets._SetSource(Named(feature.names), known, "")
        for index, label in enumerate(feature.names):
            if label in known.labels:
                assert known.labels[source[index]["label"]] == label
            else:
                with pytest.raises(ValueError, match=f"{label}.*not among the 200 of {name}"):
                    source[index]
    else:
        assert [known.labels[place] for place in found] == feature.names
        is_reordered = name in ("food101", "oxford_pets", "sun397", "caltech101")
        assert (found != sorted(found)) == is_reordered


@pytest.mark.parametrize("name", sets.NAMES)
def test_labels_and_names_in_any_order(name):
    known = sets.get(name)
    everywhere = list(range(len(known.labels)))
    assert labels(known, known.labels) == labels(known, known.class_names) == everywhere
    assert labels(known, known.labels[::-1]) == everywhere[::-1]
    folders = [label.removeprefix("/").replace("/", "-").upper() for label in known.labels]
    assert labels(known, folders if name != "sun397" else known.labels) == everywhere
    if known.class_names.count("missile") < 2:
        assert labels(known, known.class_names[::-1]) == everywhere[::-1]
    else:  # the names alone do not tell which missile is which
        with pytest.raises(ValueError, match="has the unknown .*'missile'"):
            labels(known, known.class_names[::-1])


def test_numbers_count_in_the_order_of_the_set():
    names = [str(number) for number in range(10)][::-1]
    assert labels(sets.get("cifar10"), names) == list(range(10))[::-1]
    with pytest.raises(ValueError, match="has the unknown '10'; it lacks 'airplane'"):
        labels(sets.get("cifar10"), [str(number + 1) for number in range(10)])


@pytest.mark.parametrize(
    "names, message",
    [
        (CIFAR10[:9], "9 classes, cifar10 10: it lacks 'truck'"),
        ((*CIFAR10, "zebra"), "11 classes, cifar10 10: it has the unknown 'zebra'"),
        ((*CIFAR10[:8], "boat", "lorry"), "unknown 'boat', 'lorry'; it lacks 'ship', 'truck'"),
        ((*CIFAR10, "Truck"), "has a second time 'Truck'"),
        (
            list("abcdefghij"),
            "unknown 'a', 'b', 'c', …; it lacks 'airplane', 'automobile', 'bird',",
        ),
        ((), "has no classes, as cifar10 needs them"),
    ],
)
def test_other_classes(names, message):
    with pytest.raises(ValueError, match=message):
        labels(sets.get("cifar10"), names)


# Opening sets.


def test_class_folders(tmp_path):
    known = sets.get("oxford_pets")
    class_folders(tmp_path / "oxford_pets/test", known.labels[::-1])
    source = sets.open_set("oxford_pets", "test", str(tmp_path))
    assert source.class_names == known.class_names and len(source) == 37
    for record in source:
        assert record["label"] == 36 - pixel(record)
    with pytest.raises(ValueError, match="oxford_pets' has no split train"):
        sets.open_set("oxford_pets", "train", str(tmp_path))


def test_imagenet_in_val_and_v2_in_numbered_folders(tmp_path):
    known = sets.get("imagenet")
    (tmp_path / "train").mkdir()
    class_folders(tmp_path / "val", known.labels, images=0)
    (tmp_path / "val" / "n02119789" / "one.png").write_bytes(image(0))
    source = sets.open_set("imagenet", "test", "", str(tmp_path))
    assert [known.class_names[record["label"]] for record in source] == ["kit fox"]

    # As strings, 10 and 100 come before 2.
    class_folders(tmp_path / "imagenet_v2", map(str, range(1000)), images=0)
    for number in (2, 10, 999):
        (tmp_path / "imagenet_v2" / str(number) / "one.png").write_bytes(image(number % 256))
    source = sets.open_set("imagenet_v2", "test", str(tmp_path))
    assert {record["label"]: pixel(record) for record in source} == {2: 2, 10: 10, 999: 999 % 256}


def test_imagenet_a_without_split_folders(tmp_path):
    known = sets.get("imagenet_a")
    class_folders(tmp_path / "imagenet-a", known.labels)
    source = sets.open_set("imagenet_a", "test", str(tmp_path))
    assert [record["label"] for record in source] == list(range(200))


def test_a_class_called_train_is_no_split(tmp_path):
    class_folders(tmp_path, sets.get("cifar100").labels)
    assert len(sets.open_set("cifar100", "test", "", str(tmp_path))) == 100
    with pytest.raises(ValueError, match="no split train of cifar100; data that do not tell"):
        sets.open_set("cifar100", "train", "", str(tmp_path))


@pytest.mark.parametrize("folder", ["wds_cifar10", "wds_vtab-cifar10", "cifar10"])
def test_shards_of_clip_benchmark(folder, tmp_path):
    root = tmp_path / folder
    shards(root, "train", [*range(10)] * 3)
    shards(root, "test", range(10))
    (root / "classnames.txt").write_text("\n".join(CIFAR10[::-1]) + "\n")
    test = sets.open_set("cifar10", "test", str(tmp_path))
    assert [record["label"] for record in test] == [*range(10)][::-1]
    assert [pixel(record) for record in test] == [*range(10)]
    assert len(sets.open_set("cifar10", "train", str(tmp_path))) == 27
    named = sets.open_set("cifar10", "test", "elsewhere", str(root))
    assert named.layout() == test.layout()
    one_file = str(root / "test" / "0.tar")
    assert len(sets.open_set("cifar10", "test", "", one_file)) == 10
    with pytest.raises(ValueError, match="has no split train"):
        sets.open_set("cifar10", "train", "", one_file)


def test_shards_without_names_of_classes(tmp_path):
    shards(tmp_path / "wds_cifar10", "test", range(10))
    with pytest.raises(ValueError, match="no classes.*classnames.txt"):
        sets.open_set("cifar10", "test", str(tmp_path))


def test_written_by_tfds(tmp_path):
    known = sets.get("cifar10")
    written_by_tfds(tmp_path, "cifar10", CIFAR10[::-1], {"train": 50, "test": 10})
    test = sets.open_set("cifar10", "test", str(tmp_path))
    assert len(test) == 10 and test.class_names == known.class_names
    for record in test:
        assert record["label"] == 9 - pixel(record)
    assert "cifar10-test" in test.locate(0) and "3.0.2" in str(test)
    again = pickle.loads(pickle.dumps(test))
    assert [record["label"] for record in again] == [record["label"] for record in test]
    by_path = sets.open_set("cifar10", "train", "", str(tmp_path / "cifar10" / "3.0.2"))
    assert len(by_path) == 45


def test_in_the_folder_of_tfds(tmp_path, tfds_folder):
    written_by_tfds(tfds_folder, "cifar10", CIFAR10, {"test": 4})
    assert len(sets.open_set("cifar10", "test", str(tmp_path / "data"))) == 4
    assert len(sets.open_set("cifar10", "test", "", "tfds:cifar10")) == 4
    class_folders(tmp_path / "data" / "cifar10" / "test", CIFAR10)  # comes first
    assert len(sets.open_set("cifar10", "test", str(tmp_path / "data"))) == 10


def test_imagenet_is_tested_on_what_tfds_calls_validation(tmp_path):
    wnids = sets.get("imagenet").labels
    written_by_tfds(tmp_path, "imagenet2012", wnids, {"train": 20, "validation": 7, "test": 3})
    opened = {s: sets.open_set("imagenet", s, str(tmp_path)) for s in sets.get("imagenet").splits}
    sizes = {split: len(source) for split, source in opened.items()}
    assert sizes == {"train": 18, "validation": 2, "test": 7}


def test_imagenet_r_with_the_labels_of_all_classes(tmp_path):
    wnids = sets.get("imagenet").labels
    written_by_tfds(tmp_path, "imagenet_r", wnids, {"test": 3})  # of these three, R has n01443537
    source = sets.open_set("imagenet_r", "test", str(tmp_path))
    places = {pixel(source._source[i]): i for i in range(3)}
    assert source[places[1]]["label"] == 0
    with pytest.raises(ValueError, match="class 'n01440764' is not among the 200 of imagenet_r"):
        source[places[0]]


@pytest.mark.parametrize("turns", [True, False], ids=["in turns", "by class"])
def test_validation_is_a_tenth_of_each_class_of_train(turns, tmp_path):
    order = [*range(10)] * 40 if turns else sorted([*range(10)] * 40)
    shards(tmp_path / "cifar10", "train", order)
    (tmp_path / "cifar10" / "classnames.txt").write_text("\n".join(CIFAR10))
    train, validation = (
        sets.open_set("cifar10", split, str(tmp_path)) for split in ("train", "validation")
    )
    keys = [{record["key"] for record in source} for source in (train, validation)]
    assert len(train) == 360 and len(validation) == 40
    assert not keys[0] & keys[1] and len(keys[0] | keys[1]) == 400
    counts = np.bincount([record["label"] for record in validation], minlength=10)
    assert counts.min() > 0 and (turns or counts.tolist() == [4] * 10)
    assert train.layout() != validation.layout()
    again = sets.open_set("cifar10", "validation", str(tmp_path))
    assert [r["key"] for r in again] == [r["key"] for r in validation]
    assert validation.locate(0).endswith(validation[0]["key"])


def test_official_validation_is_taken_whole(tmp_path):
    known = sets.get("dtd")
    for split, count in (("train", 3), ("val", 2), ("test", 1)):
        class_folders(tmp_path / "dtd" / split, known.labels, images=count)
    sizes = [len(sets.open_set("dtd", split, str(tmp_path))) // 47 for split in known.splits]
    assert sizes == [3, 2, 1]


def test_captioned_sets(tmp_path):
    images = [
        {"filename": f"{split}.png", "split": split, "sentences": [{"raw": f"for {split}"}]}
        for split in ("train", "val", "test")
    ]
    (tmp_path / "mscoco").mkdir()
    (tmp_path / "mscoco" / "dataset_coco.json").write_text(json.dumps({"images": images}))
    for entry in images:
        (tmp_path / "mscoco" / entry["filename"]).write_bytes(image(0))
    for split, caption in (("validation", "for val"), ("test", "for test")):
        source = sets.open_set("mscoco", split, str(tmp_path))
        assert [record["captions"] for record in source] == [[caption]]


# Mistakes.


@pytest.mark.parametrize("name, near", [("cifar", "cifar10"), ("imagenet-a", "imagenet_a")])
def test_misspelled(name, near):
    with pytest.raises(ValueError, match=f"set '{name}' is unknown. Did you mean '{near}'"):
        sets.open_set(name, "test", "")


def test_missing_split(tmp_path):
    with pytest.raises(ValueError, match=r"imagenet_r has no split 'train'; it has \['test'\]"):
        sets.open_set("imagenet_r", "train", str(tmp_path))
    written_by_tfds(tmp_path, "cifar10", CIFAR10, {"train": 10})
    with pytest.raises(ValueError, match="split 'test' .* unknown or empty"):
        sets.open_set("cifar10", "test", str(tmp_path))


@pytest.mark.parametrize("name", [*sets.NAMES, *sets.RETRIEVAL])
def test_absent(name, tmp_path, tfds_folder):
    (tmp_path / "data" / name).mkdir(parents=True)  # it is empty
    with pytest.raises(sets.Absent) as raised:
        sets.open_set(name, "test", str(tmp_path / "data"))
    message = str(raised.value)
    known = sets.get(name)
    assert "\n" not in message and f"Put it into {tmp_path / 'data' / name}" in message
    assert all(str(tmp_path / "data" / folder) in message for folder in known.folders)
    assert (f"tfds build {known.tfds} " in message) == bool(known.tfds)


def test_a_source_that_is_not_there_is_no_absent_set(tmp_path):
    with pytest.raises(ValueError, match="no such file or folder") as raised:
        sets.open_set("cifar10", "test", "", str(tmp_path / "nothing"))
    assert not isinstance(raised.value, sets.Absent)


def test_data_without_a_validation_split_share_their_training_images(tmp_path):
    """As folders of DTD often are, whose official splits are three."""
    labels = sets.get("dtd").labels
    for split in ("train", "test"):
        class_folders(tmp_path / "dtd" / split, labels)
    opened = {s: sets.open_set("dtd", s, str(tmp_path)) for s in ("train", "validation", "test")}
    assert [len(opened[s]) for s in opened] == [42, 5, 47]
    keys = [{source[i]["key"] for i in range(len(source))} for source in opened.values()]
    assert not keys[0] & keys[1] and keys[0] | keys[1] == keys[2]
    class_folders(tmp_path / "dtd" / "val", labels)
    assert len(sets.open_set("dtd", "train", str(tmp_path))) == 47
    assert len(sets.open_set("dtd", "validation", str(tmp_path))) == 47


def test_a_split_that_is_not_on_this_machine_is_absent(tmp_path):
    class_folders(tmp_path / "dtd" / "test", sets.get("dtd").labels)
    for split in ("train", "validation"):
        with pytest.raises(sets.Absent, match="has no split train of dtd"):
            sets.open_set("dtd", split, str(tmp_path))
        with pytest.raises(ValueError, match="has no split train of dtd") as raised:
            sets.open_set("dtd", split, "", str(tmp_path / "dtd"))
        assert not isinstance(raised.value, sets.Absent)
