"""Commands in processes of their own."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def user_environment() -> dict[str, str]:
    """A user's: the tests' own settings make programs that compile fast and run slowly."""
    return {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("JAX_") or name == "JAX_PLATFORMS"
    }


def run_module(name, *arguments) -> str:
    """Runs `python -m declip_jax.NAME` as a user would; returns what it printed."""
    done = subprocess.run(
        [sys.executable, "-m", f"declip_jax.{name}", *map(str, arguments)],
        cwd=ROOT,
        env=user_environment(),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
    return done.stdout
