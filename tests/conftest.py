"""Settings of all tests."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "recipes" / "nano"))  # scripts outside of the package
