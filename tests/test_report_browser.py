"""The report in a real browser, without a network."""

import os
import shutil
from pathlib import Path

import pytest
from playwright import sync_api

from declip_jax.report.page import write_page
from declip_jax.report.runs import load_runs
from tests.test_report import HOSTILE, workdirs  # noqa: F401

NAMES = ("chromium", "chromium-browser", "google-chrome")
OPTIONS = (
    "--no-sandbox",
    "--headless",
    "--disable-gpu",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser():
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if not found:
        said = f"needs one of {', '.join(NAMES)} in the PATH"
        # Where everything is tested, a missing browser must not pass for a page that works.
        pytest.fail(said) if os.environ.get("CI") else pytest.skip(said)
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=found, args=OPTIONS)
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def file(workdirs, tmp_path_factory) -> Path:  # noqa: F811
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
    assert "--suite" in page.locator("#scores .note").inner_text()  # CLIP has no scores
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
    colours = {one.first.evaluate("one => getComputedStyle(one).color") for one in (right, wrong)}
    assert colours == {"rgb(26, 127, 55)", "rgb(207, 34, 46)"}


def test_support_set(page):
    section = page.locator("#support-set")
    assert "clip has no support set." in section.inner_text()
    rows = section.locator("tbody tr")
    assert rows.count() == 5 * section.locator("blockquote").count() > 0
    similarity, caption, age = rows.first.locator("td").all_inner_texts()
    assert 0 < float(similarity) <= 1 and age.endswith(("step", "before"))
    assert caption.removesuffix(" augmented")
