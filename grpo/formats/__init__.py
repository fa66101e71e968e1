"""State dicts in files and folders, read beside written: nothing in a file is ever executed."""

from grpo.formats.adapter_files import (
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    Adapter,
    add_product,
    merged,
    read_adapter,
    save_adapter,
)
from grpo.formats.manifest import (
    MANIFEST_NAME,
    FileSum,
    check_files,
    file_sums,
    manifest_text,
    parse_manifest,
    read_file,
    read_manifest,
)
from grpo.formats.shards import ShardReader, load_shards, rank_shards, read_tensors, shard_files, write_shards
from grpo.formats.weight_files import (
    CHECKPOINT_FORMAT,
    CONSOLIDATED,
    RUN_STATE_NAME,
    Layout,
    check_format,
    read_config,
    read_weights,
    require_finite,
    save_weights,
    saved_config,
    saved_fields,
)
