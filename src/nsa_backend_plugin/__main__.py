"""`python -m nsa_backend_plugin` is `nsa-plugin`."""

import sys

from nsa_backend_plugin.cli import main

if __name__ == "__main__":
    sys.exit(main())
