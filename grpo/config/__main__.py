"""`python -m grpo.config docs/configuration.md` writes the tables of that page anew, below its introduction."""

import sys
from pathlib import Path

from grpo.config.help import markdown

page = Path(sys.argv[1])
text = markdown()
introduction, heading, _ = page.read_text(encoding="utf-8").partition(text.partition("\n")[0] + "\n")
page.write_text(introduction + text, encoding="utf-8")
