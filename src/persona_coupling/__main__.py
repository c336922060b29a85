"""`python -m persona_coupling`."""

import sys

from persona_coupling.cli import main, settle_process

if __name__ == "__main__":
    settle_process()
    sys.exit(main())
