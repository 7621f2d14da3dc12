"""``python -m data_prep.synthetic``: the command is a module of its own, which worker processes can import."""

import sys

from data_prep.synthetic.command import main

if __name__ == "__main__":
    sys.exit(main())
