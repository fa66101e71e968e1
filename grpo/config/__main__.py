"""`python -m grpo.config` prints the page docs/configuration.md."""

import sys

from grpo.config.reference import markdown

sys.stdout.write(markdown())
