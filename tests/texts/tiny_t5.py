"""A T5 with random weights and a vocabulary of a few words, saved as transformers saves one."""

from pathlib import Path

WORDS = ("a", "the", "red", "blue", "circle", "squares", "left", "of", "small", "large", "dog", "cat", "two", "photo")
WIDTH = 24


def save_tiny_t5(folder: Path, *, seed: int = 0, safe: bool = True) -> Path:
    """The folder, with an encoder of two layers and `WIDTH` features; words are tokens, and texts end with </s>."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast, T5Config, T5EncoderModel

    vocabulary = {word: number for number, word in enumerate(["<pad>", "</s>", "<unk>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special).save_pretrained(folder)
    sizes = {"d_model": WIDTH, "d_kv": 6, "d_ff": 32, "num_layers": 2, "num_heads": 4, "vocab_size": len(vocabulary)}
    torch.manual_seed(seed)
    model = T5EncoderModel(T5Config(**sizes))
    model.save_pretrained(folder)
    if not safe:
        torch.save(model.state_dict(), folder / "pytorch_model.bin")
        (folder / "model.safetensors").unlink()
    return folder
