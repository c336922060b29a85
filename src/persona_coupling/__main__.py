"""`python -m persona_coupling`."""

import sys

from persona_coupling.cli import main, settle_allocator

if __name__ == "__main__":
    settle_allocator()
    sys.exit(main())
