"""`resume_on_two_ranks.py` without compiling anything, which takes a CPU minutes."""

import sys
from pathlib import Path

import torch

from tests.training.resume_on_two_ranks import main

if __name__ == "__main__":
    torch.compiler.set_stance("force_eager")
    main(Path(sys.argv[1]), sys.argv[2:])
