import subprocess
import sys
from pathlib import Path

import pytest

from configs import quickstart
from declip_jax.bench import bench


def test_it_says_what_the_input_delivers():
    config, lines = quickstart.get_config("tiny").unlock(), []
    bench(config, seconds=0.2, batch_size=8, say=lines.append)
    text = "\n".join(lines)
    assert "scenes 'train'" in lines[0] and "2 image views of 32 pixels" in lines[1]
    for name in ("first batch", "pairs", "encoded images", "bad records", "a pair, one thread"):
        assert name in text


def test_wrong_data_are_named():
    config = quickstart.get_config("tiny").unlock()
    config.data.source = "nowhere"
    with pytest.raises(ValueError, match="nowhere"):
        bench(config, seconds=0.2, batch_size=8)


def test_command_line():
    command = [sys.executable, "-m", "declip_jax.bench", "--help"]
    done = subprocess.run(command, cwd=Path(__file__).parent.parent, capture_output=True, text=True)
    assert "Measure the input of a run alone" in done.stdout
