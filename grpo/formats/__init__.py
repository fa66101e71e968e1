"""State dicts in files and folders, read beside written: nothing in a file is ever executed."""

from grpo.formats.distributed_folders import METADATA_NAME, SafeFileSystemReader, read_tensors, safe_load
from grpo.formats.weight_files import (
    RUN_STATE_NAME,
    Layout,
    read_config,
    read_weights,
    save_weights,
    saved_config,
    saved_fields,
)
