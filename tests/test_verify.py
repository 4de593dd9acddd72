import json

import pytest
from array_record.python.array_record_module import ArrayRecordWriter

from declip_jax import prepare
from declip_jax.data import records
from declip_jax.prepare.shards import sha256
from tests.test_prepare import csv_flags, encoded, make_photos, manifest, run


@pytest.fixture
def birds(tmp_path):
    """A data set of two splits; training has three shards."""
    photos = make_photos(tmp_path)
    for split in ("test", "train"):
        flags = (*csv_flags(photos), "--split", split, "--shards", "3")
        assert run("csv", photos, tmp_path / "birds", *flags) == 0
    return tmp_path / "birds"


def verify(directory, *flags) -> int:
    return prepare.main(["verify", str(directory), "--workers", "1", *flags])


def shard(birds, number: int):
    return birds / f"birds-train.array_record-0000{number}-of-00003"


def rewrite(birds, number: int, stored: list[bytes]) -> None:
    """Other records in a shard, with a manifest that says so."""
    writer = ArrayRecordWriter(str(shard(birds, number)), "group_size:1,uncompressed")
    for record in stored:
        writer.write(record)
    writer.close()
    changed = manifest(birds)
    changed["shards"][number] |= {
        "bytes": shard(birds, number).stat().st_size,
        "sha256": sha256(shard(birds, number)),
    }
    (birds / "prepare-train.json").write_text(json.dumps(changed))


def test_as_written(birds, capsys):
    assert verify(birds, "--decode", "--workers", "2") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["split", "test", "train"]
    assert lines[2].split()[1:3] == ["3", "20"] and lines[2].endswith("as written")


def test_each_problem_is_named(birds, capsys):
    def problem(expected, *flags):
        assert verify(birds, *flags) == 1
        printed = capsys.readouterr().out
        assert f"train: {expected}" in printed, printed
        assert verify(birds, "--split", "test") == 0  # has none of these
        capsys.readouterr()

    first, second, third = (shard(birds, number) for number in range(3))
    data = first.read_bytes()
    first.unlink()
    problem(f"{first.name}: missing")
    first.write_bytes(data[:-1])
    problem(f"{first.name}: 131,071 bytes, the manifest 131,072")
    place = data.index(b"caption 3")
    first.write_bytes(data[:place] + b"C" + data[place + 1 :])
    problem(f"{first.name}: its SHA-256 is not the manifest's")
    problem(f"{first.name}: record 3 cannot be read")
    first.write_bytes(data)

    record = {"image": encoded(1)[:-100], "captions": ["x"], "key": "cut.jpg"}
    good = records.serialize(record | {"image": encoded(1)})
    rewrite(birds, 1, [good] * 5 + [b"no record", records.serialize(record)])
    problem(f"{second.name}: record 5 cannot be read")
    problem(f"{second.name}: record 6 cannot be read", "--decode")
    rewrite(birds, 1, [good] * 6)
    problem(f"{second.name}: 6 records, the manifest 7")
    rewrite(birds, 1, [good] * 7)
    assert verify(birds, "--decode") == 0

    extra = third.with_name(third.name.replace("00002-of", "00003-of"))
    extra.write_bytes(b"")
    problem(f"the folder has more shards, ['{extra.name}'], the manifest []")
    extra.unlink()
    (birds / "train.incomplete").mkdir()
    problem("train.incomplete is there")
    (birds / "train.incomplete").rmdir()


def test_what_tfds_reads(birds, capsys):
    sizes = {
        "train": records.SplitSize([6, 7, 6], manifest(birds)["record_bytes"]),
        "test": records.SplitSize([6, 7, 7], manifest(birds, "test")["record_bytes"]),
    }
    records.write_metadata(birds, "birds", sizes, ["fox"])
    assert verify(birds) == 1
    printed = capsys.readouterr().out
    assert "train: dataset_info.json has shards of [6, 7, 6], the manifest [6, 7, 7]" in printed
    assert "test: features.json has classes ['fox'], the manifest []" in printed
    records.write_metadata(birds, "birds", {"test": sizes["test"]})
    assert verify(birds) == 1
    printed = capsys.readouterr().out
    assert "train: dataset_info.json has the splits ['test'] only" in printed
    assert "test: " not in printed
    (birds / "dataset_info.json").unlink()
    assert verify(birds) == 1
    assert "dataset_info.json or features.json is missing" in capsys.readouterr().out


def test_written_before_there_were_checksums(birds, capsys):
    old = manifest(birds)
    old["shard_lengths"] = [known["records"] for known in old.pop("shards")]
    old["bytes"] = old.pop("record_bytes")
    (birds / "prepare-train.json").write_text(json.dumps(old))
    assert verify(birds) == 0
    assert "its records were read instead" in capsys.readouterr().out
    data = shard(birds, 2).read_bytes()
    shard(birds, 2).write_bytes(data[: len(data) // 2])
    assert verify(birds) == 1
    assert f"{shard(birds, 2).name}: 0 records, the manifest 7" in capsys.readouterr().out


def test_what_cannot_be_verified(birds, tmp_path, capsys):
    assert verify(tmp_path / "nowhere") == 2
    assert "no such file" in capsys.readouterr().err
    assert verify(birds, "--split", "val") == 2
    assert "prepare-val.json: no such file" in capsys.readouterr().err
    (birds / "prepare-train.json").write_text("{}")
    assert verify(birds) == 2
    assert "a manifest is damaged" in capsys.readouterr().err
