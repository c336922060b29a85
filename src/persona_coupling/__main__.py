"""`python -m persona_coupling`."""

import sys

from persona_coupling.cli import main

if __name__ == "__main__":
    sys.exit(main())
