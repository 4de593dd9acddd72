"""What the report says of runs, and how it looks in a real browser, without a network."""

import dataclasses
import io
import json
import os
import shlex
import shutil
import sys
import tarfile
from pathlib import Path

import cv2
import jax
import numpy as np
import pytest
from playwright import sync_api

from configs import common
from declip_jax import report
from declip_jax.data.options import Data
from declip_jax.data.pipeline import digest
from declip_jax.data.sources import open_data
from declip_jax.data.tokenizer import CLIP_TOKENIZER
from declip_jax.encode import Encoder
from declip_jax.report import examples, figures
from declip_jax.report.page import write_page
from declip_jax.report.runs import differences, load_runs
from declip_jax.report.scores import scores, worst_classes
from declip_jax.results import Results
from declip_jax.step import Setup
from declip_jax.train import train
from declip_jax.trained import load
from tests import make_runs as runs_for_tests

HOSTILE = '<script>document.title = "taken"</script> & a "$5" cat'
METHODS = {
    "declip": {"clip": 0.4, "simsiam": 0.2, "mlm": 0.2, "nn_text": 0.2},
    "clip": {"clip": 1.0},
}
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
BROWSER_OPTIONS = (
    "--no-sandbox",
    "--headless",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


def write_shard(path: Path) -> Path:
    """24 images of one color each, with captions; the last one's is hostile."""
    with tarfile.open(path, "w") as tar:
        for number in range(24):
            image = np.full((40, 50, 3), 10 * number, np.uint8)
            caption = f"a picture number {number} of a plain surface" if number < 23 else HOSTILE
            for suffix, data in (
                ("png", cv2.imencode(".png", image)[1].tobytes()),
                ("txt", caption.encode()),
            ):
                info = tarfile.TarInfo(f"{number:03}.{suffix}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return path


def train_tiny(method: str, workdir: Path, shard: Path) -> Path:
    """Three steps whose learning rate is 0: what the support set holds can be encoded again."""
    config = common.get_config("tiny").unlock()
    config.method = method
    config.loss.weights = METHODS[method]
    config.loss.contrast_masked = False
    config.loss.support_set.size = 128  # of which 96 are replaced
    config.total_steps = config.checkpoint.every = 3
    config.optim.update(peak_lr=0.0, warmup_lr=0.0)
    config.data.source = str(shard)
    config.eval.zeroshot.source = ""
    config.eval.retrieval.source = str(shard)
    train(config.lock(), workdir)
    return workdir


def add_scores(workdir: Path) -> None:
    """As python -m declip_jax.evaluate writes them: two sets, of which one is absent."""
    results = Results(workdir, load(workdir).step, "digest")
    settings = {"preprocess": "declip", "source": "", "split": "test"}
    classes = [
        {"name": "cat", "images": 50, "accuracy": 0.5, "taken_for": [["<b>dog</b>", 20]]},
        {"name": "<b>dog</b>", "images": 50, "accuracy": 0.75, "taken_for": []},
    ]
    common = {"id": "1", "set": "cifar10", "title": "CIFAR-10", "settings": settings, "seconds": 1}
    zeroshot = {"task": "zeroshot", "metric": "top1", "metrics": {"top1": 0.625, "images": 100}}
    results.add(common | zeroshot | {"classes": classes})
    results.set_absent([{"set": "food101", "task": "zeroshot", "why": "not in data"}])


@pytest.fixture(scope="module")
def workdirs(tmp_path_factory) -> list[Path]:
    """A DeCLIP run with scores and a CLIP run with those in metrics.jsonl alone, as runs once were;
    both on a shard with a hostile caption."""
    folder = tmp_path_factory.mktemp("report")
    shard = write_shard(folder / "shard.tar")
    made = [train_tiny(name, folder / f"{name} <i>$x$ & y", shard) for name in METHODS]
    add_scores(made[0])
    shutil.rmtree(made[1] / "evaluations")
    return made


@pytest.fixture(scope="module")
def runs(workdirs):
    return load_runs(workdirs)


def test_head(runs):
    declip, clip = runs
    assert declip.color != clip.color
    said = declip.summary()
    assert said["method"] == "declip" and said["step"] == "3 of 3" and said["pairs seen"] == "48"
    assert int(said["parameters"].replace(",", "")) > 1_000_000
    differing = dict(differences(runs))
    assert differing["method"] == ['"declip"', '"clip"']
    assert differing["loss.weights.mlm"] == ["0.2", "–"]
    assert not any(name.startswith("optim") for name in differing)


def test_curves_have_a_trace_for_each_run_and_name(runs):
    html = figures.curves(runs)
    assert "Loss: simsiam" in html and "Norm of the gradient" in html
    assert "declip <i>" not in html and "seconds left" not in html


def test_many_points_have_a_running_mean():
    curve = {step: float(step % 2) for step in range(1, 201)}
    raw, mean = figures._traces(curve)
    assert len(raw.x) == 200 and raw.opacity < 1
    assert list(mean.x) == list(range(4, 201)) and set(mean.y) == {0.5}  # a window of four
    (alone,) = figures._traces({7: 1.0})
    assert alone.mode == "lines+markers"


def test_a_step_logged_again_replaces_the_first(runs, workdirs):
    path = workdirs[1] / "metrics.jsonl"
    before = path.read_text()
    path.write_text(before + '{"step": 2, "train/loss": 9.0}\n')
    try:
        curve = load_runs(workdirs[1:])[0].curves["train/loss"]
    finally:
        path.write_text(before)
    assert list(curve) == [1, 2, 3] and curve[2] == 9.0


def test_scores_stand_beside_published_ones(runs):
    (task,) = scores(runs)
    assert task.title == "Zero-shot classification"
    cifar, food = task.rows
    assert list(task.rows.values()) == ["CIFAR-10", "Food-101"]
    declip, clip, *papers = task.series
    assert declip.values == {cifar: 62.5} and declip.absent == {"food101": "not in data"}
    assert clip.values == {}
    # ALIP's Table 3, ViT-B/32, YFCC15M
    [found] = [p for p in papers if p.label == "declip" and cifar in p.values]
    assert found.values[cifar] == 66.7 and food in found.values
    assert any("Table 3" in text for text in found.sources)
    assert all(url.startswith("https://arxiv.org") for url in found.sources.values())


def test_scores_that_are_missing_come_by_what_the_page_says_to_type(runs):
    clip = runs[1]
    typed = ["python", "-m", "declip_jax.evaluate", "--workdir", str(clip.workdir)]
    assert clip.evaluation is None and shlex.split(clip.command()) == typed
    named = clip.trained.eval
    unnamed = dataclasses.replace(named.retrieval, source="")
    named = dataclasses.replace(named, retrieval=unnamed)  # then only known sets are left
    other = clip._replace(trained=clip.trained._replace(eval=named))
    assert shlex.split(other.command()) == [*typed, "--suite", "all", "--data-dir", "FOLDER"]
    step, logged = clip.last_evaluation()
    assert step == 3 and 0 <= logged["val/retrieval/image_to_text_r1"] <= 1


def test_worst_classes_come_first():
    classes = [
        {"name": str(n), "images": 10, "accuracy": n / 10, "taken_for": [["9", 3]]}
        for n in (5, 1, 4)
    ]
    worst = worst_classes({"classes": classes}, most=2)
    assert [one["name"] for one in worst] == ["1", "4"]


def test_gallery_marks_what_is_right(runs):
    found = examples.gallery(runs[0].trained, images=24, captions=24)
    assert len(found) == 24 and all(len(matches) == 5 for _, matches in found)
    assert {HOSTILE} & {caption for caption, _ in found}
    for caption, matches in found:
        assert all(match.is_right == (match.caption == caption) for match in matches)
        assert all(match.uri.startswith("data:image/jpeg;base64,") for match in matches)


def test_neighbors_have_the_captions_that_were_enqueued(runs):
    """The learning rate is 0: the captions, encoded again, have the cosines of the rows."""
    run = runs[0]
    found = examples.neighbors(run.trained, captions=2, k=128)
    assert len(found) == max(2, jax.device_count())
    encode = run.trained.encoder.encode_text

    def encoded(captions):
        return encode(CLIP_TOKENIZER.encode(captions, run.trained.model.text.context))

    for query, rows in found:
        known = [row for row in rows if row.caption is not None]
        assert len(rows) == 128 and len(known) == 96
        assert sum(row.augmented for row in known) == 48
        assert sorted(row.steps for row in known) == [0] * 32 + [1] * 32 + [2] * 32
        cosines = encoded([row.caption for row in known]) @ encoded([query])[0]
        np.testing.assert_allclose(cosines, [row.similarity for row in known], atol=1e-5)
    assert any(HOSTILE == row.caption for row in found[0][1])


@pytest.mark.mesh
def test_as_many_captions_have_neighbors_as_the_devices_share_evenly(tmp_path):
    config = runs_for_tests.declip_config(tmp_path)
    runs_for_tests.make_run(
        tmp_path / "run", config, data=digest(open_data(Data.read(config.data, "config.data")))
    )
    found = examples.neighbors(load(tmp_path / "run"), captions=2, k=3)
    assert len(found) == 8
    assert all(row.caption is None for _, rows in found for row in rows)  # random rows


def test_queries_are_what_training_would_look_up_next(runs, monkeypatch):
    run = runs[0]
    config = run.trained.config
    loss = dataclasses.replace(config.loss, contrast_masked=True)
    config = dataclasses.replace(config, loss=loss)
    trained = run.trained._replace(setup=Setup(config))
    seen = []
    original = Encoder.encode_text
    monkeypatch.setattr(
        Encoder, "encode_text", lambda self, tokens: seen.append(tokens) or original(self, tokens)
    )
    examples.neighbors(trained, captions=8, k=1)
    with_masks = trained.setup.batches(open_data(config.data), trained.record["samples"])
    tokens = next(with_masks)["tokens"]
    with_masks.close()
    length = tokens.shape[-1]
    np.testing.assert_array_equal(seen[0][:, :length], tokens[:8, 0])


def test_neighbors_of_a_run_that_cannot_tell(runs):
    declip, clip = runs
    assert examples.neighbors(clip.trained, 2, 5) == []
    record = declip.trained.record
    with pytest.raises(ValueError, match="has changed since"):
        examples.neighbors(declip.trained._replace(record=record | {"data": "other"}), 2, 5)
    grown = declip.trained._replace(record=record | {"samples": record["samples"] + 16})
    with pytest.raises(ValueError, match="config.batch_size has changed"):
        examples.neighbors(grown, 2, 5)


def write(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["report", *map(str, arguments)])
    report.main()


def test_data_that_are_elsewhere_by_now(workdirs, tmp_path, monkeypatch, capsys):
    shard = workdirs[0].parent / "shard.tar"
    shard.rename(tmp_path / "away.tar")
    try:
        write(monkeypatch, workdirs[0], "--out", tmp_path / "page.html")
    finally:
        (tmp_path / "away.tar").rename(shard)
    page = (tmp_path / "page.html").read_text()
    assert page.count("Not shown: ") == 2 and "data:image/jpeg" not in page
    assert str(tmp_path / "page.html") in capsys.readouterr().out


def test_what_cannot_be_shown_is_named(workdirs, tmp_path, monkeypatch):
    def said(*arguments):
        with pytest.raises(SystemExit) as stop:
            write(monkeypatch, *arguments, "--out", tmp_path / "page.html")
        assert not (tmp_path / "page.html").exists()
        return str(stop.value)

    assert "nowhere holds no checkpoints" in said("nowhere")
    assert "is named twice" in said(workdirs[0], workdirs[0])
    metrics = workdirs[1] / "metrics.jsonl"
    text = metrics.read_text()
    try:
        metrics.write_text('{"step": 1}\n{"step": 2,\n{"step": 3}\n')
        assert "metrics.jsonl:2: not JSON" in said(workdirs[1])
        metrics.unlink()
        assert "has nothing in metrics.jsonl" in said(workdirs[1])
    finally:
        metrics.write_text(text)
    results = workdirs[0] / "evaluations" / "step_3.json"
    text = results.read_text()
    try:
        results.write_text(json.dumps({"step": 3}))
        assert "step_3.json is not what python -m declip_jax.evaluate writes" in said(workdirs[0])
    finally:
        results.write_text(text)


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        said = f"needs one of {', '.join(BROWSERS)} in the PATH"
        # Where everything is tested, a missing browser must not pass for a page that works.
        pytest.fail(said) if os.environ.get("CI") else pytest.skip(said)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=BROWSER_OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(workdirs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("page") / "report.html"
    write_page(load_runs(workdirs), out, images=24, captions=24)
    return out


@pytest.fixture(scope="module")
def page(browser, file):
    """The page, with what it complained about and asked for as `said` and `asked`."""
    context = browser.new_context(viewport={"width": 1400, "height": 1000})
    context.set_offline(True)
    page = context.new_page()
    page.said, page.asked = [], []
    page.on("console", lambda message: page.said.append(message.text))
    page.on("pageerror", lambda error: page.said.append(str(error)))
    page.on("request", lambda request: page.asked.append(request.url))
    page.goto(file.as_uri())
    page.wait_for_selector("#plot-zeroshot .bars .point")
    yield page
    context.close()


def test_nothing_is_asked_for_or_complained_about(page, file):
    page.mouse.move(300, 700)
    page.mouse.wheel(0, 20_000)  # to the end and back
    page.mouse.wheel(0, -20_000)
    page.wait_for_timeout(200)
    assert page.said == []
    assert [url for url in page.asked if not url.startswith(("data:", "blob:"))] == [file.as_uri()]


def test_sections_and_their_contents_line(page):
    headings = page.locator("h2").all_inner_texts()
    assert headings == ["Runs", "Curves", "Scores", "Worst classes", "Gallery", "Support set"]
    assert page.locator("nav a").all_inner_texts() == headings
    for link in page.locator("nav a").all():
        assert page.locator(link.get_attribute("href")).is_visible()
    assert page.evaluate("document.documentElement.scrollWidth") <= 1400
    page.set_viewport_size({"width": 1000, "height": 1000})
    page.wait_for_timeout(300)
    assert page.evaluate("document.documentElement.scrollWidth") <= 1000
    page.set_viewport_size({"width": 1400, "height": 1000})


def test_names_from_data_are_text(page):
    assert page.title().endswith("report") and "declip <i>$x$ & y" in page.title()
    assert "declip <i>$x$ & y" in page.locator("h1").inner_text()
    assert "declip <i>$x$ & y" in page.locator("#plot-curves .legendtext").all_text_contents()
    assert f"“{HOSTILE}”" in page.locator("#gallery blockquote").all_inner_texts()
    assert page.locator("section i, section td b").count() == 0


def test_a_click_in_the_legend_hides_a_run_in_all_panels(page):
    panels = page.locator("#plot-curves .subplot").count()
    assert panels > 10
    titles = page.locator("#plot-curves .annotation-text").all_text_contents()
    assert {"Loss", "Loss: simsiam", "Learning rate", "Training, pairs/s"} <= set(titles)

    lines = page.locator("#plot-curves .scatterlayer .js-line")
    of_clip = page.locator("#plot-curves .scatterlayer .js-line[style*='rgb(255, 127, 14)']")
    both = lines.count()
    assert both - of_clip.count() == panels  # DeCLIP's are in all
    assert of_clip.count() > 10
    entry = page.locator("#plot-curves .legendtoggle").nth(1)
    entry.click()
    sync_api.expect(of_clip).to_have_count(0)
    assert lines.count() == panels
    entry.click()
    sync_api.expect(lines).to_have_count(both)


def test_scores_and_published_numbers(page):
    table = page.locator("#scores table")
    rows = {
        row.locator("th").inner_text(): row.locator("td").all_inner_texts()
        for row in table.locator("tbody tr").all()
    }
    assert rows["CIFAR-10"][:3] == ["top-1", "62.5", "–"] and "66.7" in rows["CIFAR-10"]
    assert rows["Food-101"][:2] == ["top-1", "data absent"]
    assert "62.5" in page.locator("#plot-zeroshot .bartext").all_text_contents()
    # CLIP has the numbers of its training alone.
    assert "image_to_text_r1" in page.locator("#scores pre").inner_text()
    assert "declip_jax.evaluate --workdir" in page.locator("#scores .note").inner_text()
    sources = page.locator("#scores .sources li").all_inner_texts()
    assert any("ALIP" in source for source in sources)


def test_worst_classes(page):
    (cat, dog) = page.locator("#confusion tbody tr").all_inner_texts()
    assert cat.split("\t") == ["cat", "50.0 % of 50", "<b>dog</b> 40 %"]
    assert dog.startswith("<b>dog</b>")


def test_gallery(page):
    images = page.locator("#gallery img")
    assert images.count() == 2 * 24 * 5
    assert images.evaluate_all("all => all.every(one => one.naturalWidth > 0 && one.alt)")
    right, wrong = page.locator("#gallery li.right"), page.locator("#gallery li.wrong")
    assert right.count() + wrong.count() == images.count() and right.count() > 0
    assert set(right.all_inner_texts()) == {"✓"} and set(wrong.all_inner_texts()) == {"✗"}
    colors = {one.first.evaluate("one => getComputedStyle(one).color") for one in (right, wrong)}
    assert colors == {"rgb(26, 127, 55)", "rgb(207, 34, 46)"}


def test_support_set(page):
    section = page.locator("#support-set")
    assert "clip has no support set." in section.inner_text()
    rows = section.locator("tbody tr")
    assert rows.count() == 5 * section.locator("blockquote").count() > 0
    similarity, caption, age = rows.first.locator("td").all_inner_texts()
    assert 0 < float(similarity) <= 1 and age.endswith(("step", "before"))
    assert caption.removesuffix(" augmented")
