import contextlib
import gzip
import json
import multiprocessing
import os
import pickle
import signal
from itertools import islice
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from ml_collections import ConfigDict

from configs import common
from declip_jax.data import records
from declip_jax.data.eval_images import eval_images
from declip_jax.data.options import Data
from declip_jax.data.pipeline import train_batches
from declip_jax.data.scenes import Scenes
from declip_jax.data.sources import Source, open_source
from declip_jax.data.tokenizer import CLIP_TOKENIZER

VIEW = ConfigDict({"crop_scale": (0.2, 0.8), "crop_ratio": (0.5, 2.0)}).lock()


class Numbered(Source):
    """Images that show their index in the first channel, and their crop in the others."""

    class_names = ("even", "odd")

    def __init__(self, length, captions=3, damaged=(), captionless=(), synthetic=False):
        self._length, self._captions, self._damaged = length, captions, damaged
        self._captionless, self._synthetic = captionless, synthetic

    def __str__(self):
        return "numbered"

    def __len__(self):
        return self._length

    def __getitem__(self, index):
        y, x = np.mgrid[:64, :64].astype(np.uint8)
        image = np.stack([np.full_like(x, index % 256), 4 * x, 4 * y], axis=-1)
        if index in self._captionless:
            raise records.BadRecord("no caption", f"of {index}")
        if index in self._damaged:
            image = cv2.imencode(".jpg", image)[1].tobytes()[:-200]
        captions = [f"caption {i} of image {index}" for i in range(self._captions)]
        record = {"image": image, "captions": captions, "key": f"key {index}", "label": index % 2}
        if self._synthetic:
            record["synthetic"] = self.synthetic(index)
        return record

    def synthetic(self, index):
        return [f"machine {i} saw {index}" + index // 5 * " and wrote it" for i in range(2)]


def stream(source, **changes):
    """`train_batches` of a small model; changes are its arguments or fields of `config.data`."""
    data = dict(common.get_config().data, threads=2, prefetch=2, token_lengths=())
    data["eda"] = ("swap", "delete")
    settings = dict(image_views=[VIEW], text_views=("caption",), resolution=8, context=16)
    settings |= dict(batch_size=4, seed=0, tokenizer=CLIP_TOKENIZER)
    data |= {name: value for name, value in changes.items() if name in data}
    settings |= {name: value for name, value in changes.items() if name not in data}
    return train_batches(source, Data.read(data, "config.data"), **settings)


def batches(source, count, **changes):
    """The first `count` training batches."""
    with contextlib.closing(stream(source, **changes)) as generator:
        return list(islice(generator, count))


def joined(several):
    """One batch of all samples: {"image": [N, V, R, R, 3], "tokens": [N, T, L], …}."""
    return {name: np.concatenate([b[name] for b in several]) for name in several[0]}


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        np.testing.assert_array_equal(a[name], b[name])


def indices(batch):
    return batch["image"][:, 0, 0, 0, 0].tolist()


def test_shapes_and_types():
    views = [VIEW, SimpleNamespace(crop_scale=(1.0, 1.0), crop_ratio=(1.0, 1.0))]
    (batch,) = batches(Numbered(10), 1, image_views=views, text_views=("caption", "augmented"))
    assert batch["image"].shape == (4, 2, 8, 8, 3) and batch["image"].dtype == np.uint8
    assert batch["tokens"].shape == (4, 2, 16) and batch["tokens"].dtype == np.int32
    assert np.ptp(batch["image"][:, 1, ..., 1].astype(int)) > 200  # the whole image
    assert (np.ptp(batch["image"][:, 0, ..., 1].astype(int), axis=(1, 2)) < 230).all()


def test_images_and_captions_stay_together():
    batch = joined(batches(Numbered(10), 5))
    for index, tokens in zip(indices(batch), batch["tokens"][:, 0], strict=True):
        expected = CLIP_TOKENIZER.encode([f"caption {i} of image {index}" for i in range(3)], 16)
        assert (tokens == expected).all(axis=1).any()


def test_every_epoch_is_a_new_permutation():
    # Ten records in batches of four: batches cross the ends of epochs, and nothing is left out.
    order = indices(joined(batches(Numbered(10), 10)))
    epochs = [tuple(order[i : i + 10]) for i in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len(set(epochs)) == 4

    other = indices(joined(batches(Numbered(10), 10, seed=1)))
    assert sorted(other[:10]) == list(range(10)) and other[:10] not in map(list, epochs)


def test_what_is_drawn_changes_with_epoch_and_seed():
    batch = joined(batches(Numbered(10), 30))  # twelve epochs
    crops = {crop.tobytes() for crop in batch["image"]}
    assert len(crops) == 120
    seen = {
        (index, *tokens[0]) for index, tokens in zip(indices(batch), batch["tokens"], strict=True)
    }
    assert len(seen) == 30  # all three captions of all ten images

    other = joined(batches(Numbered(10), 30, seed=1))
    assert not crops & {crop.tobytes() for crop in other["image"]}


@pytest.fixture
def all_views(tmp_path):
    """Settings with every text view and operation."""
    path = tmp_path / "synonyms.json.gz"
    path.write_bytes(gzip.compress(json.dumps({"image": ["picture", "photo"]}).encode()))
    views = ("caption", "masked", "augmented", "synthetic")
    eda = ("synonym", "swap", "delete")
    return dict(text_views=views, mask_rate=0.4, eda=eda, synonyms=str(path))


def test_text_views_are_of_the_same_caption(all_views):
    source = Numbered(10, synthetic=True)
    batch = joined(batches(source, 10, **(all_views | {"eda": ("swap",)})))
    caption, masked, augmented, synthetic = batch["tokens"].swapaxes(0, 1)  # [N, T, L] -> [T, N, L]
    labels = batch["mlm_labels"]
    assert labels.shape == caption.shape and labels.dtype == np.int32

    chosen = labels >= 0
    np.testing.assert_array_equal(np.where(chosen, labels, masked), caption)
    np.testing.assert_array_equal(labels[chosen], caption[chosen])
    assert (masked[chosen] == CLIP_TOKENIZER.mask).mean() > 0.6
    assert not np.isin(caption[chosen], (CLIP_TOKENIZER.start, CLIP_TOKENIZER.end)).any()

    np.testing.assert_array_equal(np.sort(augmented), np.sort(caption))
    assert (augmented != caption).any(axis=1).all()

    for index, row in zip(indices(batch), synthetic, strict=True):
        expected = CLIP_TOKENIZER.encode(source.synthetic(index), 16)
        assert (row == expected).all(axis=1).any()
    assert len({row.tobytes() for row in synthetic}) > 10  # both of some images


def test_synonyms_come_from_the_file(all_views):
    changes = all_views | {"text_views": ("augmented",), "eda": ("synonym",)}
    batch = joined(batches(Numbered(10), 5, **changes))
    for index, tokens in zip(indices(batch), batch["tokens"][:, 0], strict=True):
        texts = [f"caption {i} of {w} {index}" for i in range(3) for w in ("picture", "photo")]
        assert (tokens == CLIP_TOKENIZER.encode(texts, 16)).all(axis=1).any()


def test_other_text_views_leave_crops_and_captions_as_they_are(all_views):
    plain = joined(batches(Numbered(10), 3))
    more = joined(batches(Numbered(10, synthetic=True), 3, **all_views))
    np.testing.assert_array_equal(more["image"], plain["image"])
    np.testing.assert_array_equal(more["tokens"][:, :1], plain["tokens"])


class Lengths(Source):
    """Captions of so many tokens, start and end included; the synthetic ones have 9."""

    class_names = ()

    def __init__(self, *lengths):
        self._lengths = lengths

    def __len__(self):
        return len(self._lengths)

    def __getitem__(self, index):
        caption = " ".join(["a"] * (self._lengths[index] - 2))
        image = np.zeros((8, 8, 3), np.uint8)
        return {"image": image, "captions": [caption], "synthetic": ["a " * 7], "key": str(index)}


@pytest.mark.parametrize(
    "longest, context, token_lengths, expected",
    [
        (8, 77, (8, 16, 32), 8),
        (9, 77, (8, 16, 32), 16),
        (16, 77, (8, 16, 32), 16),
        (32, 77, (8, 16, 32), 32),
        (33, 77, (8, 16, 32), 78),
        (77, 77, (8, 16, 32), 78),
        (200, 77, (8, 16, 32), 78),
        (8, 77, (), 77),
        (8, 24, (16, 32, 48), 16),
        (17, 24, (16, 32, 48), 24),
        (8, 16, (16, 32), 16),
        (8, 15, (16, 32), 16),
        (8, 8, (4,), 8),
    ],
)
def test_batches_are_cut_to_their_longest_caption(longest, context, token_lengths, expected):
    changes = dict(context=context, token_lengths=token_lengths, text_views=("masked",))
    source = Lengths(4, longest, 5, 4)
    (batch,) = batches(source, 1, **changes)
    assert batch["tokens"].shape == (4, 1, expected) and batch["mlm_labels"].shape == (4, expected)
    ends = (batch["tokens"][:, 0] == CLIP_TOKENIZER.end).argmax(axis=-1)
    assert sorted(ends) == sorted([3, 3, 4, min(longest, context) - 1])
    assert (batch["tokens"][..., context:] == 0).all()
    assert (batch["mlm_labels"][:, context:] == -1).all()


def test_the_longest_text_view_counts():
    changes = dict(context=20, token_lengths=(8, 12), text_views=("caption", "synthetic"))
    (batch,) = batches(Lengths(4, 4, 4, 4), 1, **changes)
    assert batch["tokens"].shape == (4, 2, 12)


def test_each_batch_has_its_own_length():
    changes = dict(token_lengths=(4, 6, 8, 10, 12), batch_size=1, mask_rate=0.5)
    source = Lengths(4, 6, 8, 10, 12, 14, 16)
    result = batches(source, 7, text_views=("masked",), **changes)
    assert sorted(b["tokens"].shape[-1] for b in result) == [4, 6, 8, 10, 12, 16, 16]
    # Cutting changes no draw.
    whole = joined(batches(source, 7, text_views=("masked",), **(changes | {"token_lengths": ()})))
    for batch, tokens, labels in zip(result, whole["tokens"], whole["mlm_labels"], strict=True):
        length = batch["tokens"].shape[-1]
        np.testing.assert_array_equal(batch["tokens"][0], tokens[:, :length])
        np.testing.assert_array_equal(batch["mlm_labels"][0], labels[:length])


def test_several_processes_agree_on_the_full_length():
    (batch,) = batches(Lengths(4, 4, 4, 4), 1, context=15, token_lengths=(8,), shard=(0, 2))
    assert batch["tokens"].shape == (2, 1, 16)


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_make_the_same_batches(workers, all_views):
    source = Numbered(10, synthetic=True)
    changes = dict(token_lengths=(8, 12), batch_size=2, **all_views)
    expected = batches(source, 12, **changes)
    assert {batch["tokens"].shape[-1] for batch in expected} == {8, 12}
    for a, b in zip(batches(source, 12, workers=workers, **changes), expected, strict=True):
        assert_equal(a, b)


def test_threads_and_prefetch_change_nothing():
    expected = joined(batches(Numbered(10), 6))
    for threads, prefetch in ((1, 2), (0, 7)):
        changed = batches(Numbered(10), 6, threads=threads, prefetch=prefetch)
        assert_equal(joined(changed), expected)


@pytest.mark.parametrize("count", [2, 4])
def test_shards_share_each_batch(count, all_views):
    # Ten records do not divide by four; four epochs would show the shards drifting apart.
    source = Numbered(10, synthetic=True)
    whole = batches(source, 10, **all_views)
    shards = [batches(source, 10, shard=(i, count), **all_views) for i in range(count)]
    for step, batch in enumerate(whole):
        parts = [shard[step] for shard in shards]
        assert all(len(part["image"]) == 4 // count for part in parts)
        assert_equal(joined(parts), batch)


def test_a_run_continues_where_it_stopped(all_views):
    # The end of the first epoch lies within the third batch.
    source = Numbered(10, synthetic=True)
    whole = batches(source, 6, **all_views)
    for step in range(6):
        rest = batches(source, 6 - step, start_sample=4 * step, **all_views)
        assert_equal(joined(rest), joined(whole[step:]))


def test_a_run_continues_with_other_batches_shards_and_workers(all_views):
    source = Numbered(10, synthetic=True)
    whole = joined(batches(source, 9, **all_views))
    changes = dict(batch_size=6, start_sample=10, **all_views)
    rest = joined(batches(source, 4, workers=1, **changes))
    assert_equal(rest, {name: value[10:34] for name, value in whole.items()})

    half = joined(batches(source, 4, shard=(1, 2), **changes))
    second_halves = [10 + 6 * batch + row for batch in range(4) for row in (3, 4, 5)]
    assert_equal(half, {name: value[second_halves] for name, value in whole.items()})


def test_a_source_smaller_than_a_batch_comes_again():
    (batch,) = batches(Numbered(3), 1, batch_size=8)
    order = indices(batch)
    assert sorted(order[:3]) == sorted(order[3:6]) == [0, 1, 2]


def test_a_huge_source_needs_no_list_of_its_records():
    (batch,) = batches(Numbered(4_000_000_000), 1, start_sample=10**12)
    assert len(set(indices(batch))) > 1


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"text_views": ("caption", "subtitle")}, "subtitle.*caption"),
        ({"text_views": ("masked", "masked")}, "must be different"),
        ({"mask_rate": 1.5}, "config.data.mask_rate=1.5"),
        ({"token_lengths": (8, 13)}, r"config.data.token_lengths=\(8, 13\).*even"),
        ({"token_lengths": (12, 8)}, r"config.data.token_lengths=\(12, 8\)"),
        ({"token_lengths": (2, 8)}, r"config.data.token_lengths=\(2, 8\).*at least 4"),
        ({"text_views": ("augmented",), "eda": ()}, r"config.data.eda=\(\).*swap"),
        ({"text_views": ("augmented",), "eda": ("insert",)}, "config.data.eda=.*'insert'"),
        (
            {"text_views": ("augmented",), "eda": ("synonym",)},
            r"config.data.synonyms=''.*prepare synonyms.*config.data.eda=\"\('swap','delete'\)",
        ),
        ({"text_views": ("synthetic",)}, "numbered has no synthetic captions.*--synthetic-column"),
        ({"shard": (0, 3)}, "batch_size=4.*3"),
        ({"threads": -1}, "config.data.threads=-1 must be at least 0"),
        ({"prefetch": 1}, "config.data.prefetch=1 must be at least 2"),
        ({"max_bad_fraction": 1.5}, "config.data.max_bad_fraction=1.5 must lie in 0 … 1"),
        ({"bad_window": 0}, "config.data.bad_window=0"),
        ({"seed": -1}, "seed=-1"),
    ],
)
def test_wrong_settings_are_refused(changes, words):
    with pytest.raises(ValueError, match=words):
        batches(Numbered(10), 1, **changes)


def test_settings_that_no_view_needs_are_not_looked_at():
    batches(Numbered(10), 1, eda=("synonym",), synonyms="nowhere")


def test_an_empty_source_is_refused():
    with pytest.raises(ValueError, match="numbered is empty"):
        batches(Numbered(0), 1)


@pytest.mark.parametrize("changes", [{}, {"workers": 2}, {"batch_size": 2}, {"start_sample": 4}])
def test_a_record_that_cannot_be_used_is_replaced(changes, all_views):
    """By the same one, whatever the run is cut into, and nothing else changes."""
    whole = joined(batches(Numbered(10, synthetic=True), 15, **all_views))
    settings = dict(max_bad_fraction=1.0, log=lambda line: None) | all_views
    source = Numbered(10, damaged=(7, 2), synthetic=True)
    expected = joined(batches(source, 15, **settings))
    bad = np.isin(indices(whole), (7, 2))
    assert bad.sum() == 12 and not np.isin(indices(expected), (7, 2)).any()
    for name, value in expected.items():
        np.testing.assert_array_equal(value[~bad], whole[name][~bad])
    assert len({*np.array(indices(expected))[bad]}) > 3  # not always the same in its place

    batch = joined(batches(source, 8, **(settings | changes)))
    first = changes.get("start_sample", 0)
    samples = slice(first, first + len(batch["image"]))
    assert_equal(batch, {name: value[samples] for name, value in expected.items()})


@pytest.mark.parametrize("workers", [0, 1])
def test_what_could_not_be_used_is_counted_and_told(workers):
    lines = []
    source = Numbered(10, damaged=(7, 2), captionless=(3,))
    settings = dict(max_bad_fraction=1.0, workers=workers, log=lines.append)
    with contextlib.closing(stream(source, **settings)) as made:
        assert made.metrics() == {}
        for _ in range(25):
            next(made)
        metrics = made.metrics()
        assert metrics["data/pairs_per_s"] > 0
        assert metrics["data/image_bytes"] == 64 * 64 * 3
        # Each of the three comes ten times, and now and then in the place of another.
        images, captions = metrics["data/bad/unreadable_image"], metrics["data/bad/no_caption"]
        assert 20 <= images <= 40 and 10 <= captions <= 20
        assert metrics["data/bad_share"] == (images + captions) / 100
        assert made.metrics() == {}
        next(made)
        assert made.metrics().get("data/bad/unreadable_image", 0) <= 4
    assert len(lines) == 11 and lines[-1] == "Further records that cannot be used are only counted."
    assert {line.split(":")[0] for line in lines[:-1]} == {
        f"Cannot use record {index} of numbered" for index in (2, 3, 7)
    }
    assert any("Premature end" in line for line in lines)
    assert any("no caption: of 3. Another replaces it." in line for line in lines)


def test_too_many_that_cannot_be_used_end_the_run():
    source = Numbered(10, damaged=(7,))
    settings = dict(bad_window=40, log=lambda line: None, max_bad_fraction=0.25)
    assert len(batches(source, 50, **settings)) == 50  # a tenth, and some replacements
    words = (
        r"records of the last .* samples of numbered cannot be used.*"
        r"config.data.max_bad_fraction=0.05.*record 7 of numbered.*Premature end"
    )
    with pytest.raises(ValueError, match=words):
        batches(source, 50, **(settings | {"max_bad_fraction": 0.05}))
    # The first few of a run may be bad: it is a share of the window, not of what was seen.
    batches(source, 2, **(settings | {"max_bad_fraction": 0.05}))
    with pytest.raises(ValueError, match="config.data.max_bad_fraction=0.0 of a window"):
        batches(source, 5, max_bad_fraction=0)


def test_a_source_of_which_nothing_can_be_used_ends_the_run():
    with pytest.raises(ValueError, match="10 records of numbered in a row.*Premature end"):
        batches(Numbered(10, damaged=range(10)), 1, max_bad_fraction=1.0)


def test_a_file_system_that_is_away_is_not_a_bad_record():
    class Away(Numbered):
        def __getitem__(self, index):
            raise OSError(116, "Stale file handle")

    with pytest.raises(ValueError, match=r"record \d of numbered: .*Stale file handle"):
        batches(Away(10), 1)


def test_evaluation_needs_every_record():
    with pytest.raises(ValueError, match="record 7 of numbered cannot be read: .*Premature end"):
        list(eval_images(Numbered(10, damaged=(7,)), resolution=8, resize=8, batch_size=4))


class Deadly(Numbered):
    def __getitem__(self, index):
        if index == 7:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(index)


def test_a_killed_worker_is_fatal_and_its_records_are_named():
    generator = stream(Deadly(10), threads=1, workers=2)
    with pytest.raises(ValueError, match="exit code -9.* had in hand: record 7 of numbered. If"):
        for _ in range(100):
            next(generator)
    assert next(generator, None) is None
    assert not multiprocessing.active_children()
    generator.close()


def test_eval_images_come_once_in_order():
    result = list(eval_images(Numbered(10), resolution=8, resize=16, batch_size=4))
    assert [len(b["image"]) for b in result] == [4, 4, 2]
    assert all(b["image"].shape[1:] == (8, 8, 3) for b in result)
    assert np.concatenate([b["image"][:, 0, 0, 0] for b in result]).tolist() == list(range(10))
    labels = np.concatenate([b["label"] for b in result])
    assert labels.dtype == np.int32 and labels.tolist() == [0, 1] * 5
    assert [key for b in result for key in b["key"]] == [f"key {i}" for i in range(10)]
    captions = [texts for b in result for texts in b["captions"]]
    assert captions[9] == [f"caption {i} of image 9" for i in range(3)]


def test_eval_crop_larger_than_the_image_is_refused():
    with pytest.raises(ValueError, match="resize=8.*16"):
        eval_images(Numbered(10), resolution=16, resize=8, batch_size=4)


# --- sources ------------------------------------------------------------------------------------


def write_dataset(directory, class_names=(), synthetic=False):
    """A data set with 5 records in the two shards of split "train"."""
    stored = []
    for index in range(5):
        image = cv2.imencode(".png", Numbered(5)[index]["image"])[1].tobytes()
        record = {"image": image, "captions": ["a", "b"], "key": f"é{index}"}
        record |= {"synthetic": [f"machine {index}"]} if synthetic else {}
        stored.append(record | ({"label": index % len(class_names)} if class_names else {}))
    for shard in range(2):
        path = directory / records.shard_name("set", "train", shard, 2)
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for record in stored[3 * shard : 3 * shard + 3]:
            writer.write(records.serialize(record))
        writer.close()
    records.write_metadata(
        directory, "set", {"train": records.SplitSize([3, 2], 1000)}, class_names, synthetic
    )
    return stored


def test_a_prepared_source_reads_what_was_written(tmp_path):
    stored = write_dataset(tmp_path, ("cat", "dog"))
    source = open_source(str(tmp_path), "train")
    assert len(source) == 5 and source.class_names == ("cat", "dog")
    assert [source[i] for i in range(5)] == stored
    assert pickle.loads(pickle.dumps(source))[4] == stored[4]  # after it was read from, too
    assert open_source(str(tmp_path), "train[60%:]")[0] == stored[3]


def test_a_prepared_source_with_synthetic_captions(tmp_path):
    stored = write_dataset(tmp_path, synthetic=True)
    source = open_source(str(tmp_path), "train")
    assert [source[i] for i in range(5)] == stored
    changes = dict(text_views=("synthetic",), batch_size=5)
    (batch,) = batches(source, 1, **changes)
    expected = CLIP_TOKENIZER.encode([f"machine {i}" for i in range(5)], 16)
    assert {row.tobytes() for row in batch["tokens"]} == {row.tobytes() for row in expected}


def test_a_prepared_source_without_synthetic_captions(tmp_path):
    write_dataset(tmp_path)
    words = f"{tmp_path} split 'train' has no synthetic captions.*--synthetic-field"
    with pytest.raises(ValueError, match=words):
        batches(open_source(str(tmp_path), "train"), 1, text_views=("caption", "synthetic"))


def test_a_prepared_source_in_workers(tmp_path):
    write_dataset(tmp_path)
    source = open_source(str(tmp_path), "train")
    assert source.class_names == ()
    assert_equal(joined(batches(source, 3, workers=1)), joined(batches(source, 3)))
    (batch,) = eval_images(source, resolution=8, resize=8, batch_size=8)
    assert "label" not in batch and batch["key"] == [f"é{i}" for i in range(5)]


def test_scenes_are_a_source():
    changes = dict(text_views=("caption", "synthetic"))
    batch = joined(batches(open_source("scenes", "train"), 2, **changes))
    assert len(batch["image"]) == 8


def test_sources_that_cannot_be_opened(tmp_path):
    def refused(name, split, words):
        with pytest.raises(ValueError, match=words):
            open_source(str(name), split)

    refused(tmp_path / "nowhere", "train", "nowhere.*declip_jax.prepare")
    refused(tmp_path, "train", "declip_jax.prepare")
    refused("scenes", "nothing", "nothing")

    write_dataset(tmp_path)
    refused(tmp_path, "val", "'val'.*'train': 5")
    refused(tmp_path, "train[:0]", "empty")
    shard = tmp_path / records.shard_name("set", "train", 1, 2)
    shard.rename(tmp_path / "elsewhere")
    refused(tmp_path, "train", shard.name)


def test_a_damaged_shard_is_reported_by_record(tmp_path):
    write_dataset(tmp_path)
    shard = tmp_path / records.shard_name("set", "train", 1, 2)
    shard.write_bytes(shard.read_bytes()[:-100])
    source = open_source(str(tmp_path), "train")
    with pytest.raises(ValueError, match=f"{shard}: record [01] cannot be read"):
        list(eval_images(source, resolution=8, resize=8, batch_size=8))


def test_eval_images_of_a_part_are_spread_over_the_source():
    scenes = Scenes("test")
    reading = dict(resolution=32, resize=32, batch_size=4)
    keys = [key for batch in eval_images(scenes, most=10, **reading) for key in batch["key"]]
    assert keys == [scenes[i * len(scenes) // 10]["key"] for i in range(10)]
    everything = [b["key"] for b in eval_images(scenes, most=10**6, **reading)]
    assert sum(map(len, everything)) == len(scenes)
