"""The guards, tried on planted faults: `python preflight.py --selftest`; and `--explain NAME` for one fault.

Each fault is planted in a small healthy run and has to be caught by name; they are in
selftest/planted_faults.py.
"""

from __future__ import annotations

import sys

from config import parse_settings
from config.console import refuse, say
from guards.faults import explained
from selftest.settings import SelftestSettings


def main(argv: list[str]) -> None:
    """Explain a fault, or run the self-test, which exits with 1 if it is not passed."""
    settings = parse_settings(SelftestSettings, argv, "Try the guards on planted faults, or explain one.")
    if settings.explain:
        try:
            say(explained(settings.explain))
        except ValueError as error:
            refuse(str(error))
        return
    if not settings.selftest:
        refuse("give --selftest, or --explain and the name of a fault; docs/faults.md lists them")
    from selftest.run import selftest  # Imported here, since it imports torch.

    sys.exit(0 if selftest() else 1)


if __name__ == "__main__":
    main(sys.argv[1:])
