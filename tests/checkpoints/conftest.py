"""Let these tests import the training tools, which belong to no package."""

import sys
from pathlib import Path

sys.path.append(str(Path(__file__).parents[2] / "tools"))
