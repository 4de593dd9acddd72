import sys

from declip_jax.prepare.cli import main

if __name__ == "__main__":
    sys.exit(main())
