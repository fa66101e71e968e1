"""A trained generator with its tokenizer in one folder: written with a model card, loaded, published."""

from grpo.sharing.card import Training, model_card, read_training, without_places
from grpo.sharing.image_generator import CARD_NAME, SAMPLES_NAME, ImageGenerator
