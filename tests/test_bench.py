import pytest

from configs import quickstart
from declip_jax.step import Setup
from declip_jax.throughput import measure


def test_it_says_what_the_input_delivers():
    config, lines = quickstart.get_config("tiny").unlock(), []
    measure(Setup(config), seconds=0.2, batch_size=8, say=lines.append)
    text = "\n".join(lines)
    assert "scenes 'train'" in lines[0] and "2 image views of 32 pixels" in lines[1]
    for name in ("first batch", "pairs", "encoded images", "bad records", "a pair, one thread"):
        assert name in text


def test_wrong_data_are_named():
    config = quickstart.get_config("tiny").unlock()
    config.data.source = "nowhere"
    with pytest.raises(ValueError, match="nowhere"):
        measure(Setup(config), seconds=0.2, batch_size=8)
