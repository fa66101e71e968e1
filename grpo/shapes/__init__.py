"""A small world with exact ground truth: coloured shapes, captions of them, and readers of what a picture shows."""

from grpo.shapes.examples import SPLITS, Example, example, is_unseen, scenes, split_size
from grpo.shapes.fitting import Fitting
from grpo.shapes.grammar import CATEGORIES, caption, category, parse
from grpo.shapes.reading import Reader, ReaderConfig, load_reader, reading_loss
from grpo.shapes.rendering import render
from grpo.shapes.scoring import ATTRIBUTES, reward, score
from grpo.shapes.world import Request, Scenes, Thing

VERSION = 2
"""Of the drawings and captions: another where an example of some number is another."""
