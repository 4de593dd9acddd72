"""What must hold for the reader of each format: the same samples however a run is cut up."""

import io
import tarfile

import cv2
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tensorflow_datasets as tfds
from array_record.python.array_record_module import ArrayRecordWriter

from configs import common
from declip_jax.data import records
from declip_jax.data.options import Data
from declip_jax.data.sources import open_data, parquet
from tests.test_pipeline import assert_equal, batches, indices, joined

COUNT = 23


def encoded(index: int) -> bytes:
    """An image that shows its index in the first channel (of RGB)."""
    image = np.full((16, 20, 3), (200 - index, 90, 10 * index), np.uint8)[..., ::-1]
    return cv2.imencode(".png", np.ascontiguousarray(image))[1].tobytes()


def indices_of(batch) -> list[int]:
    return (200 - np.array(indices(batch))).tolist()


def write_prepared(folder) -> str:
    path = folder / records.shard_name("set", "train", 0, 1)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for index in range(COUNT):
        record = {"image": encoded(index), "captions": [f"number {index}"], "key": str(index)}
        writer.write(records.serialize(record))
    writer.close()
    records.write_metadata(folder, "set", {"train": records.SplitSize([COUNT], 1000)})
    return str(folder)


def write_webdataset(folder) -> str:
    for shard in range(3):
        with tarfile.open(folder / f"{shard:05}.tar", "w") as tar:
            for index in range(shard * 8, min(COUNT, shard * 8 + 8)):
                files = {"png": encoded(index), "txt": f"number {index}".encode()}
                for extension, content in files.items():
                    info = tarfile.TarInfo(f"{index:06}.{extension}")
                    info.size = len(content)
                    tar.addfile(info, io.BytesIO(content))
    return str(folder / "{00000..00002}.tar")


def write_parquet(folder) -> str:
    for shard in range(2):
        rows = range(shard * 12, min(COUNT, shard * 12 + 12))
        images = [{"bytes": encoded(index), "path": f"{index}.png"} for index in rows]
        table = pa.table({"image": images, "caption": [f"number {index}" for index in rows]})
        pq.write_table(table, folder / f"train-{shard:05}-of-00002.parquet", row_group_size=5)
    return str(folder / "train-*.parquet")


class Numbers(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")
    pkg_dir_path = None

    def _info(self):
        return self.dataset_info_from_configs(
            description="Numbers.",
            features=tfds.features.FeaturesDict(
                {
                    "picture": tfds.features.Image(shape=(None, None, 3)),
                    "texts": tfds.features.Sequence({"said": tfds.features.Text()}),
                }
            ),
        )

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples()}

    def _generate_examples(self):
        for index in range(COUNT):
            texts = [{"said": f"number {index}"}]
            yield index, {"picture": io.BytesIO(encoded(index)), "texts": texts}


def write_tfds(folder) -> str:
    builder = Numbers(data_dir=str(folder), file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_dir)


WRITERS = {
    "prepared": write_prepared,
    "webdataset": write_webdataset,
    "parquet": write_parquet,
    "tfds": write_tfds,
}


@pytest.fixture(autouse=True)
def small_cache(monkeypatch):
    """Two of the six row groups at a time, as of Parquet files of some size."""
    monkeypatch.setattr(parquet, "CACHE_BYTES", 5000)


@pytest.fixture(scope="module", params=["scenes", *WRITERS, "mixture"])
def data(request, tmp_path_factory):
    """`config.data` for each format, and for a mixture of two."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = common.get_config().data
    if request.param == "scenes":
        settings.update(source="scenes", split="train[:23]")
    elif request.param == "mixture":
        entries = []
        for name, weight in (("webdataset", 2.0), ("parquet", 1.0)):
            (folder / name).mkdir()
            entries.append(dict(source=WRITERS[name](folder / name), weight=weight))
        settings.mixture = tuple(entries)
    else:
        settings.source = WRITERS[request.param](folder)
        if request.param == "tfds":
            settings.columns.captions = ("texts/said",)
    return Data.read(settings, "config.data")


def test_every_record_comes_once_an_epoch(data):
    source = open_data(data)
    if str(data.source).endswith("parquet"):
        assert len(source.blocks) == 6 and source.blocks_together == 2
    length = len(source)
    if data.mixture:
        batch = joined(batches(source, 30, batch_size=10))
        assert set(indices_of(batch)) == set(range(COUNT))
        return
    assert length == COUNT
    epochs = joined(batches(source, 3, batch_size=COUNT))
    if data.source != "scenes":
        order = [indices_of(epochs)[i : i + COUNT] for i in range(0, 3 * COUNT, COUNT)]
        assert all(sorted(epoch) == list(range(COUNT)) for epoch in order)
        assert len(set(map(tuple, order))) == 3


def test_workers_processes_and_restarts_change_nothing(data):
    whole = batches(open_data(data), 14)  # of 4; the first epoch ends within the sixth
    for a, b in zip(batches(open_data(data), 14, workers=2), whole, strict=True):
        assert_equal(a, b)
    for count in (2, 4):
        shards = [batches(open_data(data), 14, shard=(i, count)) for i in range(count)]
        for parts, batch in zip(zip(*shards, strict=True), whole, strict=True):
            assert_equal(joined(parts), batch)
    for step in range(1, 14):
        assert_equal(batches(open_data(data), 1, start_sample=4 * step)[0], whole[step])
    rest = batches(open_data(data), 3, batch_size=6, start_sample=20, shard=(1, 2), workers=1)
    samples = [20 + 6 * batch + row for batch in range(3) for row in (3, 4, 5)]
    assert_equal(joined(rest), {k: v[samples] for k, v in joined(whole).items()})


def test_a_source_smaller_than_a_batch(data):
    (batch,) = batches(open_data(data), 1, batch_size=64)
    assert len(batch["image"]) == 64


def test_records_are_located(data):
    source = open_data(data)
    places = {source.locate(index) for index in range(len(source))}
    assert len(places) == len(source)
    if not data.mixture and data.source != "scenes":
        assert data.source.split("{")[0].split("*")[0] in source.locate(0)  # the folder
