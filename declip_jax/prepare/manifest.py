"""What is known about the splits of a data set: prepare-<split>.json, its settings and counts."""

import argparse
import functools
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from declip_jax.data import records
from declip_jax.data.input_files import InputError
from declip_jax.prepare.inputs import Input

# What does not decide about the bytes of the result, or does so by the input's digest alone.
INDIFFERENT = ("output", "workers", "captions", "classes", "cache", "beam")


def manifest_path(directory: Path, split: str) -> Path:
    return directory / f"prepare-{split}.json"


def settings_of(args: argparse.Namespace, found: Input) -> dict[str, Any]:
    """Everything that decides about the bytes of the result."""
    settings = vars(args) | {
        "class_names": list(found.class_names),
        "synthetic": args.synthetic or found.has_synthetic or None,
        "input_digest": found.digest,
    }
    for name in ("images", "source"):
        place = settings.get(name, "scenes")
        # Others mean the same in every folder.
        if "://" not in place and not place.startswith("tfds:") and place != "scenes":
            settings[name] = os.path.abspath(place)
    return {key: value for key, value in settings.items() if key not in INDIFFERENT}


def check_settings(path: Path, settings: Mapping[str, Any], advice: str) -> None:
    """Raises InputError unless the settings kept in `path` are these."""
    try:
        before = json.loads(path.read_text())["settings"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(
            f"{path} is damaged ({error}); delete {path.parent} to begin again"
        ) from None
    different = [
        f"{key} was {before.get(key)!r:.80}, now {settings.get(key)!r:.80}"
        for key in sorted(before.keys() | settings.keys())
        if before.get(key) != settings.get(key)
    ]
    if different:
        raise InputError(f"{path.parent} has other settings: {'; '.join(different)}. {advice}")


def check_other_splits(output: Path, settings: Mapping[str, Any]) -> None:
    """Raises InputError unless this split and those already there can be one data set."""
    manifests = read_manifests(output)
    if not manifests and (output / "dataset_info.json").exists():
        raise InputError(f"--output {output}: holds a data set from elsewhere; choose another")
    manifests.pop(settings["split"], None)
    for split, manifest in manifests.items():
        for key, flag in (("name", "--name"), ("class_names", "--classes")):
            there = manifest["settings"][key]
            if there != settings[key]:
                raise InputError(
                    f"--output {output}: all splits of a data set have the same {key}, but split "
                    f"{split!r} has {there!r:.200} and this one {settings[key]!r:.200}; "
                    f"change {flag} or --output"
                )
        # Splits written before there were synthetic captions have no such setting.
        has, other_has = (s.get("synthetic") is not None for s in (settings, manifest["settings"]))
        if has != other_has:
            raise InputError(
                f"--output {output}: either all splits of a data set have synthetic captions or "
                f"none, but split {split!r} has {'some' if other_has else 'none'} and this one "
                f"{'some' if has else 'none'}; add or drop --synthetic-…, or change --output"
            )


def read_manifests(directory: Path) -> dict[str, dict[str, Any]]:
    """Split -> manifest, of the splits that are complete."""
    found = {}
    for path in sorted(directory.glob("prepare-*.json")):
        manifest = json.loads(path.read_text())
        settings = manifest["settings"]
        if "shards" not in manifest:  # written before there were checksums
            lengths = manifest.pop("shard_lengths")
            manifest["record_bytes"] = manifest.pop("bytes")
            name = functools.partial(records.shard_name, settings["name"], settings["split"])
            manifest["shards"] = [
                {"name": name(shard, len(lengths)), "records": length}
                for shard, length in enumerate(lengths)
            ]
        found[settings["split"]] = manifest
    return found


def split_size(manifest: Mapping[str, Any]) -> records.SplitSize:
    lengths = [shard["records"] for shard in manifest["shards"]]
    return records.SplitSize(lengths, manifest["record_bytes"])


def report(manifest: Mapping[str, Any]) -> str:
    settings, refused = manifest["settings"], manifest["refused"]
    size = split_size(manifest)
    lines = [
        f"{settings['split']}: kept {sum(size.shard_lengths):,} images with "
        f"{manifest['captions']:,} captions, {size.num_bytes / 1e6:,.1f} MB in "
        f"{len(size.shard_lengths)} shards"
    ]
    lines += [f"  refused  {reason:<20}{count:>10,}" for reason, count in refused.items()]
    if not refused:
        lines.append("  refused  nothing")
    if "unused_keys" in manifest:
        lines.append(f"  keys of --from that no record has: {manifest['unused_keys']:,}")
    return "\n".join(lines)
