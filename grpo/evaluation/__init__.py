"""How good images are: distances to a reference, and what judging networks see in them."""

from grpo.evaluation.distances import FeatureStatistics, frechet_distance
from grpo.evaluation.judges import ClassifierJudge, InceptionJudge, Judge, judge_files, load_judges
from grpo.evaluation.layouts import SaveImages, build_layout
from grpo.evaluation.measure import Measured, classifier_gap, compare, measure_images
from grpo.evaluation.results import Result, read_result, require_comparable, shown, unequal_settings
from grpo.evaluation.scores import read_scores
from grpo.evaluation.shapes import measure_shapes
from grpo.evaluation.sources import (
    DatasetImages,
    DrawnImages,
    ImageSource,
    KeptImages,
    classes_in_turn,
    drawn_classes,
    open_images,
)
from grpo.evaluation.writing import NpzWriter, batches_in_order, make_writable, save_image, save_pngs
