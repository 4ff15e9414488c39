"""`python -m exporter.cli`."""

import sys

from exporter.cli.commands import main

sys.exit(main())
