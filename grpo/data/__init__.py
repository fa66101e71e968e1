"""Images in: data sets, the centre crop, the resumable stream and the cache of codes."""

from grpo.data.build import LARGEST_LABEL, build_dataset
from grpo.data.code_cache import CodeCache
from grpo.data.dataset import ImageDataset, UnreadableImage
from grpo.data.folder import ImageFiles, image_files
from grpo.data.images import read_image, to_image, to_pixels
from grpo.data.sample import sample_images
from grpo.data.stream import ImageBatch, ImageStream, build_stream
from grpo.models import normalize, to_uint8
