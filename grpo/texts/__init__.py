"""From texts to the conditions of a text-conditional model: features of words, of a T5 encoder, on disk."""

from grpo.texts.build import build_encoder
from grpo.texts.features import TextEncoder, TextList, as_rows, clean_text
from grpo.texts.llamagen_features import LlamaGenFeatures
from grpo.texts.prompts import CAPTION_KEYS, Prompt, read_objects, read_prompts, text_of
from grpo.texts.store import FeatureStore
from grpo.texts.store_writer import FeatureWriter
from grpo.texts.t5 import T5Encoder
from grpo.texts.words import WordEncoder
