"""What a recipe takes before it runs: memory of a GPU, work of a step, and how fast that makes a device."""

from grpo.estimate.memory import RecipeMemory, models_on_meta, recipe_memory, sharded_bytes
from grpo.estimate.micro_batch import on_a_gpu, with_micro_batch
from grpo.estimate.scaling import step_seconds, step_traffic
from grpo.estimate.speed import Peaks, Work, device_peaks, grpo_work, measured_peaks, throughput
