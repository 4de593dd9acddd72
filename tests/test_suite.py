"""Tasks, suites, results files and the cache: what joins the evaluations to data and models."""

import csv
import json

import cv2
import numpy as np
import pytest

from configs import common
from declip_jax.config import Config
from declip_jax.data.tokenizer import CLIP_TOKENIZER
from declip_jax.evals import sets, suite, suites
from declip_jax.evals.cache import Cache
from declip_jax.evals.preprocess import CLIP, IMAGENET, preprocess
from declip_jax.results import Results, keep, read_results

COLORS = {"red": (0, 0, 220), "green": (0, 200, 0), "blue": (220, 0, 0)}  # BGR, as OpenCV has it


class ByColor:
    """An encoder that knows colors: mean pixel of images, and of texts the color they name."""

    context = 16
    mesh = None
    tokenizer = CLIP_TOKENIZER

    def __init__(self):
        self.images = self.texts = 0

    def encode_image(self, images):
        self.images += len(images)
        features = images.mean(axis=(1, 2)) + 1e-3
        return (features / np.linalg.norm(features, axis=1, keepdims=True)).astype(np.float32)

    def encode_texts(self, texts):
        tokens = self.tokenizer.encode(texts, self.context)
        self.texts += len(tokens)
        features = np.full((len(tokens), 3), 1e-3, np.float32)
        for name, color in COLORS.items():
            word = self.tokenizer.encode([name], self.context)[0, 1]
            features[(tokens == word).any(axis=1)] += np.array(color[::-1], np.float32)
        return features / np.linalg.norm(features, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Class folders of one-colored pictures: 10 a class to train, 4 to test."""
    folder = tmp_path_factory.mktemp("colors")
    rng = np.random.default_rng(0)
    for split, count in (("train", 10), ("test", 4)):
        for name, color in COLORS.items():
            (folder / split / name).mkdir(parents=True)
            for number in range(count):
                noise = rng.integers(-20, 20, (40, 48, 3))
                image = np.clip(np.array(color) + noise, 0, 255).astype(np.uint8)
                cv2.imwrite(str(folder / split / name / f"{number}.png"), image)
    return str(folder)


def shared(**settings):
    config = common.get_config("tiny").unlock()
    config.eval.update(settings)
    config = Config.read(config)
    return suite.shared(config.eval, config.preprocess)


def score(entry, cache=None, encoder=None):
    task = suite.task_of(entry, shared())
    return task(encoder or ByColor(), cache or Cache())


@pytest.mark.parametrize("task", ["zeroshot", "linear_probe", "knn", "few_shot"])
def test_each_task_finds_what_an_encoder_knows(folder, task):
    entry = dict(task=task, source=folder)
    if task == "few_shot":
        entry |= dict(shots=(1, 2), seeds=2)
    if task == "knn":
        entry |= dict(neighbors=5)
    made = suite.task_of(entry, shared())
    result = made(ByColor(), Cache())
    assert set(made.metrics) <= set(result.metrics) and made.metric in made.metrics
    assert all(result.metrics[name] == 1.0 for name in made.metrics if "top5" not in name)
    assert [row["name"] for row in result.classes] == (
        ["blue", "green", "red"] if task == "zeroshot" else []
    )


def test_retrieval_takes_so_many_captions_and_a_prefix(tmp_path):
    rows = ["filepath,caption"]
    for name, color in COLORS.items():
        cv2.imwrite(str(tmp_path / f"{name}.png"), np.full((40, 40, 3), color, np.uint8))
        rows += [f"{name}.png,all {name}", f"{name}.png,nothing to see"]
    (tmp_path / "set.csv").write_text("\n".join(rows) + "\n")
    entry = dict(task="retrieval", source=str(tmp_path / "set.csv"))
    assert score(entry).metrics["texts"] == 6
    karpathy = [
        dict(filename=f"{name}.png", split="test", sentences=[dict(raw=f"a {name}")] * 6)
        for name in COLORS
    ]
    (tmp_path / "dataset_flickr30k.json").write_text(json.dumps({"images": karpathy}))
    known = dict(task="retrieval", set="flickr30k", source=str(tmp_path / "dataset_flickr30k.json"))
    assert score(known).metrics["texts"] == 15  # five of six
    metrics = score(entry | dict(captions_per_image=1, prefix="a photo of ")).metrics
    assert metrics["texts"] == 3 and metrics["text_to_image_r1"] == 1.0


def test_features_are_made_once_for_all_that_learn_from_them(folder):
    encoder, cache = ByColor(), Cache()
    for task in ("linear_probe", "knn"):
        score(dict(task=task, source=folder), cache, encoder)
    assert encoder.images == 30 + 12


def test_other_pictures_under_the_same_names_are_other_data(folder, tmp_path):
    """Nor are splits of one size with the same names the same images."""
    cache, scores = Cache(tmp_path / "cache", "model"), []
    for number, colors in enumerate((list(COLORS), list(COLORS)[::-1])):
        place = tmp_path / str(number)
        for split in ("train", "test"):
            for name, color in zip(COLORS, colors, strict=True):
                (place / split / name).mkdir(parents=True)
                image = np.full((40, 40, 3), COLORS[color], np.uint8)
                cv2.imwrite(str(place / split / name / "0.png"), image)
                cv2.imwrite(str(place / split / name / "1.png"), image // 2)
        entry = dict(task="zeroshot", source=str(place))
        probe = suite.task_of(dict(task="knn", source=str(place)), shared())
        scores.append(score(entry, cache).metrics["top1"])
        splits = probe.splits(ByColor(), cache)
        assert len(splits["train"]) + len(splits["validation"]) == len(splits["test"]) == 6
        identity = probe.identity()
        cv2.imwrite(str(place / "test" / "red" / "1.png"), np.zeros((40, 40, 3), np.uint8))
        changed = suite.task_of(dict(task="knn", source=str(place)), shared())
        assert changed.identity() != identity
        assert not np.array_equal(changed.splits(ByColor(), cache)["test"], splits["test"])
    assert scores == [1.0, 1 / 3]


def test_splits_must_differ_and_have_the_same_classes(folder, tmp_path):
    for name in list(COLORS)[1:]:
        (tmp_path / "val" / name).mkdir(parents=True)
        image = np.zeros((40, 40, 3), np.uint8)
        cv2.imwrite(str(tmp_path / "val" / name / "0.png"), image)
    for split in ("train", "test"):
        (tmp_path / split).symlink_to(f"{folder}/{split}")
    entry = dict(task="linear_probe", source=str(tmp_path))
    with pytest.raises(ValueError, match="'train' and 'val' of .* have different classes: 3 and 2"):
        suite.task_of(entry | dict(validation="val"), shared())
    with pytest.raises(ValueError, match="'test' and 'test' of .* are the same images"):
        suite.task_of(entry | dict(validation="test"), shared())


def test_a_task_that_fails_or_is_not_waited_for_leaves_the_others(folder):
    tasks = [
        suite.task_of(dict(task=name, source=folder), shared()) for name in ("knn", "zeroshot")
    ]
    tasks[0].splits = lambda *_: (_ for _ in ()).throw(ValueError("no luck"))
    found, failed = suite.run(tasks, ByColor())
    assert failed == [f"{folder}/knn: no luck"]
    assert suite.logged(found)[f"val/{folder}/zeroshot/top1"] == 1.0
    assert suite.run(tasks, ByColor(), stop=lambda: True) == ([], [])


def test_of_an_interrupted_evaluation_what_was_finished_is_kept(folder, tmp_path):
    tasks = [
        suite.task_of(dict(task=name, source=folder), shared()) for name in ("knn", "zeroshot")
    ]
    asked = iter((False, True))
    found, _ = suite.run(tasks, ByColor(), stop=lambda: next(asked))
    absent = [dict(set="dtd", task="knn", why="not there")]
    for checkpoint in ("digest", "digest", "another"):  # of a run that came here again, or anew
        keep(tmp_path, 3, checkpoint, found, absent)
        results = Results(tmp_path, 3, checkpoint)
        known, unknown = (results.find(results.identity(task.identity())) for task in tasks)
        assert known["metrics"]["top1"] == 1.0 and unknown is None
        read = read_results(results.path)
        assert len(read["results"]) == 1 and read["absent"] == absent


def test_in_training_a_set_and_task_come_once(folder, tmp_path):
    path = tmp_path / "mine.py"
    entry = f"dict(task='retrieval', source={folder!r}"
    path.write_text(f"def get_suite():\n    return [{entry}), {entry}, prefix='a ')]\n")
    config = common.get_config("tiny").unlock()
    config.eval.suite = str(path)
    with pytest.raises(ValueError, match="has more than one of"):
        suite.build(Config.read(config).eval, shared())


def test_prompts_are_encoded_once(folder, tmp_path):
    encoder = ByColor()
    for _ in range(2):
        score(dict(task="zeroshot", source=folder), Cache(tmp_path, "model"), encoder)
    assert encoder.texts == 3
    score(dict(task="zeroshot", source=folder), Cache(tmp_path, "another model"), encoder)
    score(
        dict(task="zeroshot", source=folder, templates=("{}!",)), Cache(tmp_path, "model"), encoder
    )
    assert encoder.texts == 9


def test_a_damaged_cache_is_made_anew(tmp_path):
    def make():
        return {"x": np.arange(5)}

    Cache(tmp_path, "m").get("content", make)
    (path,) = tmp_path.iterdir()
    for damage in (b"", b"PK\x03\x04", path.read_bytes()[:-9], b"\x80\x04."):
        path.write_bytes(damage)
        assert (Cache(tmp_path, "m").get("content", make)["x"] == np.arange(5)).all()
    assert len(list(tmp_path.iterdir())) == 1  # no parts left behind


def test_without_a_validation_split_a_tenth_of_the_images_is_held_out(folder):
    task = suite.task_of(dict(task="linear_probe", source=folder), shared())
    splits = task.splits(ByColor(), Cache())
    assert len(splits["train"]) == 27 and len(splits["validation"]) == 3
    assert sorted(splits["validation_labels"]) == [0, 1, 2]


@pytest.mark.parametrize(
    "entry, said",
    [
        (dict(task="zero_shot", set="cifar10"), "Did you mean 'zeroshot'"),
        (dict(set="cifar10"), "task=None is unknown"),
        (dict(task="zeroshot", set="cifar01"), "cifar10"),
        (dict(task="zeroshot", source="scenes", spilt="test"), "Did you mean 'split'"),
        (dict(task="few_shot", source="scenes", neighbors=3), "no setting 'neighbors'"),
        (dict(task="zeroshot"), "needs a set"),
        (dict(task="few_shot", source="scenes", shots=()), "shots="),
        (dict(task="zeroshot", source="scenes", split="zeroshot", templates="a photo"), "no {}"),
        (dict(task="knn", source="scenes", train="train[:8]", test="test"), "has no classes"),
        (dict(task="knn", source="scenes", train="zeroshot", test="zeroshot"), "the same images"),
    ],
    ids=str,
)
def test_wrong_entries(entry, said):
    with pytest.raises(ValueError, match=said.replace("(", r"\(")):
        suite.task_of(entry, shared())


def test_every_suite_names_tasks_and_sets_that_exist():
    for name in suites.SUITES:
        for entry in suites.load(name):
            assert entry["task"] in suite.TASKS
            assert entry["set"] in (*sets.NAMES, *sets.RETRIEVAL)
            with pytest.raises(sets.Absent, match=entry["set"]):
                suite.task_of(entry, shared(data_dir="nowhere"))


def test_own_suites(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("def get_suite():\n    return [dict(task='knn', set='dtd')]\n")
    assert suites.load(str(path)) == [dict(task="knn", set="dtd")]
    for text, said in (
        ("def get_suite():\n    return []\n", "at least one"),
        ("def get_suite():\n    return ['cifar10']\n", "must return dicts"),
        ("x = 1\n", "get_suite"),
        ("import nothing_like_it\n", "nothing_like_it"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=said):
            suites.load(str(path))
    with pytest.raises(ValueError, match="Did you mean 'declip'"):
        suites.load("deklip")
    with pytest.raises(ValueError, match="no such file"):
        suites.load(str(tmp_path / "other.py"))


def result(**changes):
    base = dict(set="cifar10", title="CIFAR-10", task="zeroshot", metric="top1", seconds=1.0)
    base |= dict(settings={"preprocess": "train", "split": "test"}, classes=[], id="a")
    return base | dict(metrics={"top1": 0.5, "images": 10}) | changes


def test_results_are_kept_between_programs(tmp_path):
    results = Results(tmp_path, 3, "digest")
    results.set_absent([dict(set="dtd", task="zeroshot", why="not there")])
    results.add(result())
    again = Results(tmp_path, 3, "digest")
    assert again.find("a") == result() and again.find("b") is None
    again.add(result(id="b", metrics={"top1": 0.75}))  # in place of the first
    again.add(result(id="c", set="dtd"))
    again.set_absent([])
    read = read_results(again.path)
    assert [r["id"] for r in read["results"]] == ["b", "c"] and read["absent"] == []
    with open(tmp_path / "evaluations" / "step_3.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert all(json.loads(r["settings"]) == result()["settings"] for r in rows)
    assert [(r["set"], r["metric"], float(r["value"])) for r in rows] == [
        ("cifar10", "top1", 0.75),
        ("dtd", "top1", 0.5),
        ("dtd", "images", 10),
    ]


def test_results_of_another_checkpoint_are_moved_aside(tmp_path):
    Results(tmp_path, 3, "one").add(result())
    assert Results(tmp_path, 3, "other").find("a") is None
    assert [p.name for p in (tmp_path / "evaluations").glob("*.json")] == ["other_step_3_one.json"]


def test_a_setting_has_its_old_name_in_suites_and_in_scores_on_disk(folder, tmp_path, caplog):
    entry = dict(task="knn", source=folder)
    task = suite.task_of(entry | {"neighbours": 5}, shared())
    assert task.settings == suite.task_of(entry | {"neighbors": 5}, shared()).settings
    assert "'neighbours' is now called 'neighbors'" in caplog.text
    assert len(caplog.records) == 1
    Results(tmp_path, 3, "digest").add(result(task="knn", settings={"neighbours": 5}))
    results = Results(tmp_path, 3, "digest")
    results.add(result(task="knn", settings={"neighbors": 5}, id="b"))  # in place of it
    assert [r["id"] for r in read_results(results.path)["results"]] == ["b"]


def test_another_kind_of_results_file_is_left_alone(tmp_path):
    (tmp_path / "evaluations").mkdir()
    (tmp_path / "evaluations" / "step_3.json").write_text("{}")
    with pytest.raises(ValueError, match=r"step_3.json is not what .* move it away"):
        Results(tmp_path, 3, "digest")
    assert (tmp_path / "evaluations" / "step_3.json").read_text() == "{}"


def test_preprocess():
    own = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    assert preprocess("declip", 224, *own) == (256, 224, *IMAGENET)
    assert preprocess("openai", 224, *own) == (224, 224, *CLIP)
    assert preprocess("train", 224, *own) == (224, 224, *own)
    assert preprocess("declip", 288, *own).short_side == 329
    with pytest.raises(ValueError, match="config.eval.preprocess='imagenet' is not one of"):
        shared(preprocess="imagenet")


def test_settings_are_plain_values(folder):
    for name in suite.TASKS:
        task = suite.task_of(dict(task=name, source=folder), shared())
        json.dumps(task.identity())
