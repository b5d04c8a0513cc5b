"""Where the repository lies: the folder with params/, notebooks/, weights/ and figures/."""

import os
from pathlib import Path

ROOT = Path(os.environ.get("FAITHKD_HOME") or Path(__file__).resolve().parents[1]).expanduser().absolute()
