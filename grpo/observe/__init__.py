"""What a run shows and writes down: metrics, console, Weights & Biases, image grids, the report."""

from grpo.observe.catalogue import metric
from grpo.observe.comparison import (
    Run,
    end_table,
    judge_table,
    numbers_table,
    read_run,
    recipe_table,
    write_comparison,
)
from grpo.observe.console import duration, progress
from grpo.observe.files import MetricsFile, finite, read_metrics, write_atomically
from grpo.observe.grids import SampleRow, captioned_grid, image_grid, labelled_strips, sample_grid
from grpo.observe.history import History
from grpo.observe.observer import RunObserver
from grpo.observe.pictures import gallery
from grpo.observe.report import write_report
from grpo.observe.tables import Cell, Results, Table
from grpo.observe.terminal import table_lines
from grpo.observe.timer import PhaseTimer
