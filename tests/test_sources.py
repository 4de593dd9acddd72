import io
import json

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds

from configs import common
from declip_jax.data import sources
from declip_jax.data.options import Data
from declip_jax.data.scenes import Scenes
from declip_jax.data.sources.part import Part, part_of
from tests.test_order import Fake


def data(**changes) -> Data:
    settings = common.get_config().data
    settings.update_from_flattened_dict(changes)
    return Data.read(settings, "config.data")


def test_parts():
    source = Fake(10)
    assert part_of(source, "train") is source and part_of(source, "train[:]") is source
    assert part_of(source, "test[:100%]") is source and part_of(source, "[:20]") is source
    for split, first, last in (("train[:3]", 0, 3), ("x[3:]", 3, 10), ("[20%:50%]", 2, 5)):
        part = part_of(source, split)
        assert len(part) == last - first and str(part) == f"fake [{first}:{last}]"
        assert part[0] == source[first] and part[last - first - 1] == source[last - 1]
        assert part.locate(1) == f"record {first + 1} of fake"
        with pytest.raises(IndexError):
            part[last - first]
        with pytest.raises(IndexError):
            part[-1]
    for split in ("train[3]", "train[:-1]", "train[:3", "a b", "train[5:5]", "train[10:]"):
        with pytest.raises(ValueError, match="of fake"):
            part_of(source, split)


def test_parts_of_blocks():
    blocks = np.array([0, 5, 5, 12, 40])
    for first, last, expected in ((0, 50, blocks), (6, 50, [0, 6, 34]), (5, 12, [0]), (7, 9, [0])):
        part = Part(Fake(50, blocks, 3), first, last)
        assert part.blocks_together == 3
        sizes = np.diff(part.blocks, append=len(part))
        assert sizes.sum() == last - first and part.blocks[0] == 0
        assert sorted({*part.blocks}) == sorted({*expected})


def test_one_source():
    source = sources.open_data(data(source="scenes", split="train[:9]"))
    assert isinstance(source, Scenes) and len(source) == 9


def test_a_mixture():
    mixture = (
        dict(source="scenes", split="train[:6]", weight=3),
        dict(source="scenes", split="test[:4]", weight=1),
    )
    source = sources.open_data(data(mixture=mixture))
    assert len(source) == 10 and source.slots.tolist() == [7500, 2500]
    assert source[5]["key"] == Scenes("train")[5]["key"]
    assert source[6]["key"] == Scenes("test")[0]["key"]
    assert source.locate(7) == Scenes("test[:4]").locate(1)
    assert source.class_names == ()
    with pytest.raises(IndexError):
        source[10]


def test_layouts():
    def layout(**changes):
        return sources.open_data(data(**changes)).layout()

    one = ({"source": "scenes", "split": "train[:6]"}, {"source": "scenes", "split": "test[:4]"})
    two = ({"source": "scenes", "split": "train[:4]"}, {"source": "scenes", "split": "test[:6]"})
    layouts = [layout(mixture=one), layout(mixture=two), layout(mixture=one[::-1])]
    layouts += [layout(source="scenes", split=f"train[:{count}]") for count in (9, 10)]
    assert len({json.dumps(layout) for layout in layouts}) == 5
    assert json.dumps(Part(Fake(9), 1, 4).layout()) != json.dumps(Part(Fake(9), 2, 5).layout())


def test_one_caption_column_needs_no_tuple(tmp_path):
    write_pairs(tmp_path, "0.parquet")
    entry = {"source": str(tmp_path), "columns": {"captions": "caption"}}
    assert sources.open_data(data(mixture=(entry,)))[1]["captions"] == ["a"]


def test_without_weights_every_record_counts_the_same():
    mixture = (dict(source="scenes", split="train[:6]"), dict(source="scenes", split="test[:2]"))
    assert sources.open_data(data(mixture=mixture)).slots.tolist() == [7500, 2500]


@pytest.mark.parametrize(
    "changes, words",
    [
        ({}, "config.data.source is empty.*prepare"),
        ({"source": "scenes", "mixture": ({"source": "scenes"},)}, "both set"),
        ({"mixture": ({"sorce": "scenes"},)}, "no field 'sorce'. Did you mean 'source'"),
        ({"mixture": ({"weight": 1.0},)}, r"config.data.mixture\[0\] lacks the field 'source'"),
        (
            {"mixture": ({"source": "scenes", "columns": {"caption": ("a",)}},)},
            "Did you mean 'captions'",
        ),
        (
            {"mixture": ({"source": "scenes", "weight": 1.0}, {"source": "scenes"})},
            "every source a number as its 'weight', or none",
        ),
        ({"mixture": ({"source": "scenes", "weight": "2"},)}, r"mixture\[0\].weight='2'.*a number"),
        ({"mixture": ("scenes",)}, r"\('scenes',\): expected dict\(source=….*a comma"),
        (
            {"mixture": ({"source": "scenes", "columns": 1},)},
            r"mixture\[0\].columns=1: expected a s",
        ),
        ({"columns.captions": (1,)}, r"config.data.columns.captions=\(1,\): expected a name, or"),
        (
            {"source": "scenes", "columns.captions": ("txt",)},
            r"config.data.columns.captions=\('txt',\): the fields of 'scenes' have fixed names",
        ),
        ({"source": "nowhere"}, "'nowhere' is not 'scenes'.*prepare"),
    ],
)
def test_what_cannot_be_opened(changes, words):
    with pytest.raises(ValueError, match=words):
        sources.open_data(data(**changes))


def write_pairs(folder, name, count=2):
    images = [{"bytes": b"x", "path": f"{name}{i}"} for i in range(count)]
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.table({"image": images, "caption": ["a"] * count}), folder / name)


def test_a_folder_of_several_splits(tmp_path):
    write_pairs(tmp_path, "train-00000-of-00002.parquet", 3)
    write_pairs(tmp_path, "train-00001-of-00002.parquet", 3)
    write_pairs(tmp_path, "test-00000-of-00001-0f3a.parquet", 2)
    assert len(sources.open_source(str(tmp_path), "train")) == 6
    assert len(sources.open_source(str(tmp_path), "test[:1]")) == 1
    with pytest.raises(ValueError, match=r"no files of the split 'validaton', only of \['test'"):
        sources.open_source(str(tmp_path), "validaton")
    assert len(sources.open_source(str(tmp_path / "*.parquet"), "validaton")) == 8


def test_patterns_of_folders(tmp_path):
    for name in ("a", "b"):
        write_pairs(tmp_path / name, "0.parquet")
    assert len(sources.open_source(str(tmp_path / "{a,b}"), "train")) == 4
    assert len(sources.open_source(str(tmp_path / "?" / "*"), "train")) == 4


def test_a_tfds_data_set_with_the_names_of_ours_is_not_taken_for_it(tmp_path):
    class Ours(tfds.core.GeneratorBasedBuilder):
        VERSION = tfds.core.Version("1.0.0")
        pkg_dir_path = None

        def _info(self):
            features = {"image": tfds.features.Image(), "captions": tfds.features.Text()}
            features["key"] = np.int64
            return self.dataset_info_from_configs(features=tfds.features.FeaturesDict(features))

        def _split_generators(self, dl_manager):
            return {"train": self._generate_examples()}

        def _generate_examples(self):
            image = io.BytesIO(cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1])
            yield 0, {"image": image, "captions": "a", "key": 7}

    builder = Ours(data_dir=str(tmp_path), file_format="array_record")
    builder.download_and_prepare()
    source = sources.open_source(str(builder.data_dir), "train")
    assert source[0]["captions"] == ["a"] and source[0]["key"] == "7"


@pytest.mark.parametrize("name", ["data.tar.gz", "data.tgz", "data.tar.zst"])
def test_compressed_tars(tmp_path, name):
    (tmp_path / name).write_bytes(b"x")
    with pytest.raises(ValueError, match="unpack it to .tar"):
        sources.open_source(str(tmp_path / name), "train")


def test_a_folder_without_data_is_refused_with_what_it_has(tmp_path):
    (tmp_path / "notes.md").write_text("nothing")
    with pytest.raises(ValueError, match=r"that folder has \['notes.md'\]"):
        sources.open_source(str(tmp_path), "train")
