"""A tiny random Llama with a tokenizer of its own: what the evaluation tests run on."""

from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dynmask.evals.text import haystack_lines
from tests.tiny import tiny_llama

VOCABULARY = 400


@cache
def stand_in_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on a little of the haystack."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<pad>", "<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(haystack_lines()[:400], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


@cache
def stand_in_model():
    """A model of that vocabulary, in float32; nobody may change it."""
    with torch.random.fork_rng():
        return tiny_llama(vocab_size=VOCABULARY, eos_token_id=2, max_position_embeddings=4096)


def save_stand_in(folder: Path) -> Path:
    """Write model and tokenizer as a folder that from_pretrained reads."""
    stand_in_model().save_pretrained(folder)
    stand_in_tokenizer().save_pretrained(folder)
    return folder
