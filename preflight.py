"""The guards, tried on planted faults: `python preflight.py --selftest`.

Each fault is planted in a small healthy run and has to be caught by name; they are in
selftest/planted_faults.py.
"""

from __future__ import annotations

import sys

from config import parse_settings
from config.console import refuse
from selftest.settings import SelftestSettings


def main(argv: list[str]) -> None:
    """Run the self-test; exit with 1 if a planted fault is missed or a healthy run refused."""
    settings = parse_settings(SelftestSettings, argv, "Try the guards on planted faults.")
    if not settings.selftest:
        refuse("python preflight.py --selftest is the one command here")
    from selftest.run import selftest  # Imported here, since it imports torch.

    sys.exit(0 if selftest() else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
