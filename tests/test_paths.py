import os

import fsspec
import pytest

from declip_jax.data.sources import paths


@pytest.fixture(params=["", "memory://"])
def folder(request, tmp_path):
    """A folder on disk and in an object store with a/0.tar, a/1.tar, a/note.txt and b/2.tar."""
    root = f"{request.param}{tmp_path}"
    fs, path = paths.file_system(root)
    for name in ("a/0.tar", "a/1.tar", "a/note.txt", "b/2.tar", "a/sub.tar/3.tar"):
        fs.makedirs(os.path.dirname(f"{path}/{name}"), exist_ok=True)
        fs.pipe_file(f"{path}/{name}", name.encode())
    yield root
    fs.rm(path, recursive=True)


@pytest.mark.parametrize(
    "pattern, expected",
    [
        ("a/0.tar", ["a/0.tar"]),
        ("a/{1,0}.tar", ["a/1.tar", "a/0.tar"]),
        ("a/{0..1}.tar", ["a/0.tar", "a/1.tar"]),
        ("b/*.tar", ["b/2.tar"]),
        ("a/[0-9].*", ["a/0.tar", "a/1.tar"]),
        ("a/*", ["a/0.tar", "a/1.tar", "a/note.txt"]),  # no folders
        ("{b,a}/?.tar", ["b/2.tar", "a/0.tar", "a/1.tar"]),
        ("{a/1.tar,a/?.tar}", ["a/1.tar", "a/0.tar"]),  # each once
        ("b", ["b/2.tar"]),
        ("b/", ["b/2.tar"]),
    ],
)
def test_expand(folder, pattern, expected):
    assert paths.expand(f"{folder}/{pattern}", ".tar") == [f"{folder}/{name}" for name in expected]


@pytest.mark.parametrize("pattern", ["c/*.tar", "a/2.tar", "a/{0..2}.tar", "c", "a/0.tar/x.tar"])
def test_what_matches_nothing(folder, pattern):
    with pytest.raises(ValueError, match="matches nothing"):
        paths.expand(f"{folder}/{pattern}", ".tar")


def test_folder_without_such_files(folder):
    with pytest.raises(ValueError, match="matches nothing"):
        paths.expand(f"{folder}/a", ".parquet")


def test_the_alternative_that_matches_nothing_is_named(tmp_path):
    (tmp_path / "0.tar").touch()
    with pytest.raises(ValueError, match="1.tar' .one of the 2 of .*{0..1}"):
        paths.expand(f"{tmp_path}/{{0..1}}.tar", ".tar")


def test_patterns_that_cannot_be(tmp_path, monkeypatch):
    monkeypatch.setattr(paths, "MAX_SHARDS", 1000)
    with pytest.raises(ValueError, match="braces that do not match"):
        paths.expand(f"{tmp_path}/{{0..1.tar", ".tar")
    with pytest.raises(ValueError, match="more than 1,000 files"):
        paths.expand(f"{tmp_path}/{{0..999999999999}}.tar", ".tar")
    with pytest.raises(ValueError, match="nowhere"):
        paths.expand("nowhere://x.tar", ".tar")


def test_relative_names(tmp_path, monkeypatch):
    (tmp_path / "0.tar").touch()
    monkeypatch.chdir(tmp_path)
    for pattern in ("0.tar", "*.tar", "."):
        assert paths.expand(pattern, ".tar") == [f"{tmp_path}/0.tar"]


def test_versions(folder):
    files = [f"{folder}/a/0.tar", f"{folder}/a/1.tar"]
    before = paths.versions(files)
    assert [version.size for version in before] == [7, 7] and before[0].modified
    assert paths.versions(files) == before
    fs, path = paths.file_system(files[1])
    fs.pipe_file(path, b"a/1.taR")  # of the same size
    if not paths.is_remote(files[1]):
        os.utime(path, (0, 0))
    after = paths.versions(files)
    assert after[0] == before[0] and after[1] != before[1]


def test_versions_of_a_missing_file(folder):
    with pytest.raises(FileNotFoundError):
        paths.versions([f"{folder}/a/0.tar", f"{folder}/a/9.tar"])


@pytest.mark.parametrize(
    "info, modified",
    [
        ({"LastModified": "monday", "ETag": "x", "created": "before"}, "monday"),
        ({"ETag": "x"}, "x"),
        ({}, ""),
    ],
)
def test_versions_by_whatever_the_file_system_tells(monkeypatch, info, modified):
    memory = fsspec.filesystem("memory")
    monkeypatch.setattr(type(memory), "info", lambda self, path: {"size": 3} | info)
    assert paths.versions(["memory://x"]) == [(3, modified)]


def test_read_range(folder):
    name = f"{folder}/a/0.tar"
    assert paths.read_range(name, 2, 3) == b"0.t"
    assert paths.read_range(name, 5, 10) == b"ar"
    assert paths.read_range(name, 7, 1) == b""
    with pytest.raises(FileNotFoundError):
        paths.read_range(f"{folder}/missing", 0, 1)
