"""Images and texts in: data sets, the centre crop, the resumable stream, codes on disk and in memory."""

from grpo.data.batch import ImageBatch
from grpo.data.build import LARGEST_LABEL, build_dataset, build_text_dataset, open_captions
from grpo.data.captions import Captions, RequestList
from grpo.data.code_cache import CodeCache, build_codes
from grpo.data.code_files import CodeFolder
from grpo.data.code_writer import CodeWriter
from grpo.data.dataset import ImageDataset
from grpo.data.folder import ImageFiles, image_files
from grpo.data.images import read_image, to_image, to_pixels
from grpo.data.index_cache import on_main_rank
from grpo.data.sample import sample_images
from grpo.data.stream import ImageStream, build_stream
from grpo.data.unreadable import UnreadableImage
from grpo.data.views import Views, load_views
from grpo.data.worker import worker_count
from grpo.models import normalize, to_uint8
