import io
import tarfile

import pytest

from declip_jax import prepare
from declip_jax.prepare import filters
from tests.test_prepare import contents, csv_flags, encoded, make_photos, run

pytest.importorskip("apache_beam")


@pytest.fixture
def photos(tmp_path):
    return make_photos(tmp_path)


def test_direct_runner_writes_the_same(photos, tmp_path):
    (photos / "07.webp").unlink()
    flags = (*csv_flags(photos), "--name", "birds", "--short-side", "20", "--shards", "5")
    assert run("csv", photos, tmp_path / "one", *flags) == 0
    assert run("csv", photos, tmp_path / "two", *flags, "--beam=--runner=DirectRunner") == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_worker_processes_write_the_same(tmp_path):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for number in range(12):
            for extension, data in (("jpg", encoded(number)), ("txt", b"a %d" % number)):
                member = tarfile.TarInfo(f"{number}.{extension}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    command = ["webdataset", "--source", str(tmp_path / "0.tar"), "--name", "x", "--shards", "4"]
    command += ["--deduplicate", "--output"]
    assert prepare.main([*command, str(tmp_path / "one")]) == 0
    options = "--runner=DirectRunner --direct_num_workers=2 --direct_running_mode=multi_processing"
    assert prepare.main([*command, str(tmp_path / "two"), "--beam", options]) == 0
    assert contents(tmp_path / "one") == contents(tmp_path / "two")


def test_restart_does_the_missing_shards(photos, tmp_path, monkeypatch, capsys):
    flags = (*csv_flags(photos), "--name", "birds", "--shards", "4")
    assert run("csv", photos, tmp_path / "whole", *flags) == 0
    check_image, calls = filters.check_image, []

    def check_or_fail(*arguments):
        calls.append(arguments)
        if len(calls) == 13:
            raise OSError("the disk is away")
        return check_image(*arguments)

    monkeypatch.setattr(filters, "check_image", check_or_fail)
    beam = "--beam=--runner=DirectRunner"
    output = tmp_path / "stopped"
    assert run("csv", photos, output, *flags, beam) == 2
    error = capsys.readouterr().err
    assert "the same command continues" in error and "the disk is away" in error
    monkeypatch.undo()

    shards = sorted((output / "train.incomplete").glob("*-of-00004"))
    assert 1 <= len(shards) <= 3
    written = [shard.stat().st_mtime_ns for shard in shards]
    assert run("csv", photos, output, *flags, beam) == 0
    assert [(output / shard.name).stat().st_mtime_ns for shard in shards] == written
    assert contents(output) == contents(tmp_path / "whole")


def test_options_that_beam_does_not_know(photos, tmp_path, capsys):
    beam = "--beam=--runner=NoSuchRunner"
    assert run("csv", photos, tmp_path / "out", *csv_flags(photos), beam) == 2
    assert "NoSuchRunner" in capsys.readouterr().err
