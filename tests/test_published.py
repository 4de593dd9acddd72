import pytest

from declip_jax.evals import sets
from declip_jax.evals.sets import NAMES, RETRIEVAL
from declip_jax.methods import METHODS as OURS
from declip_jax.report import published as module
from declip_jax.report.published import published

METHODS = ("clip", "slip", "filip", "declip", "defilip", "uniclip", "hiclip", "hideclip", "alip")
TASKS = ("zeroshot", "linear_probe", "retrieval")


def values(method: str, table: str) -> dict[str, float]:
    return {number.set: number.value for number in published(method) if number.table == table}


def test_every_number_is_of_a_known_set_metric_and_task():
    numbers = module._numbers()
    assert {number.method for number in numbers} == set(METHODS)
    assert sum(len(published(method)) for method in METHODS) == len(numbers) == 221
    for number in numbers:
        assert 0 < number.value < 100 and round(number.value, 1) == number.value
        assert number.task in TASKS and number.model in ("ViT-B/32", "RN50")
        assert number.data in ("YFCC15M", "DeCLIP-88M")
        assert number.url.startswith("https://arxiv.org/abs/") and number.title and number.table
        if number.task == "retrieval":
            assert number.set in RETRIEVAL
            way, _, rank = number.metric.rpartition("_r")
            assert way in ("image_to_text", "text_to_image") and rank in ("1", "5", "10")
        else:
            assert number.set in NAMES and number.metric == sets.get(number.set).metric
    places = [number[:8] for number in numbers]
    assert len(set(places)) == len(places)


def test_methods_are_called_as_ours():
    assert set(METHODS) - {"uniclip", "hiclip", "hideclip"} <= set(OURS)


# The last column of each row, which the file leaves out. It is the mean of numbers before they were
# rounded to a tenth, and is itself rounded, hence the tolerance.
AVERAGES = {
    "Table 2": dict(clip=63.0, declip=68.7, hiclip=67.2, hideclip=70.8, alip=72.2),
    "Table 3": dict(
        clip=31.8,
        slip=30.0,
        filip=37.2,
        declip=41.3,
        defilip=44.2,
        hiclip=41.8,
        hideclip=44.6,
        alip=41.7,
    ),
}


@pytest.mark.parametrize("table, sets_of_row", [("Table 2", NAMES[:10]), ("Table 3", NAMES[:11])])
def test_averages_of_rows(table, sets_of_row):
    for method in METHODS:
        row = values(method, table)
        assert bool(row) == (method in AVERAGES[table])
        if row:
            assert tuple(row) == sets_of_row
            assert sum(row.values()) / len(row) == pytest.approx(AVERAGES[table][method], abs=0.1)


def test_recall_grows_with_the_rank():
    for method in METHODS:
        numbers = published(method, task="retrieval")
        for at1, at5, at10 in zip(numbers[::3], numbers[1::3], numbers[2::3], strict=True):
            assert at1.metric.removesuffix("1") == at10.metric.removesuffix("10")
            assert at1.set == at5.set == at10.set and at1.value < at5.value < at10.value


def test_tables_agree_on_imagenet():
    for method in METHODS:
        numbers = published(method, "ViT-B/32", "zeroshot")
        found = {n.value for n in numbers if n.set == "imagenet" and n.data == "YFCC15M"}
        assert len(found) == (method != "uniclip")


def test_choice():
    assert published("nothing") == [] and published("uniclip", "RN50") == []
    assert [n.value for n in published("clip", "RN50")] == [37.2]
    assert [n.value for n in published("declip", "RN50", "zeroshot")] == [62.5, 44.4]
    assert {n.task for n in published("alip")} == {*TASKS}


def test_papers_that_print_the_same_agree():
    """The report shows the first of them."""
    found = {}
    for number in module._numbers():
        same = (number.method, number.model, number.data, number.task, number.set, number.metric)
        assert found.setdefault(same, number.value) == number.value
