"""A little byte-level tokenizer, trained in the test, that adds a bos by itself as LLaMA's do."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

TEXT = "the cat sat on the mat. the dog sat on the cat and the mat. what did the cat say to that?"


def build_tokenizer(**specials):
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        [TEXT],
        trainers.BpeTrainer(
            vocab_size=300,
            special_tokens=["<s>", "</s>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, model_max_length=16, **specials)


@pytest.fixture(scope="session")
def tokenizer():
    return build_tokenizer(bos_token="<s>", eos_token="</s>")


@pytest.fixture(scope="session")
def bare_tokenizer():
    """One without bos and eos, as Qwen's has no bos."""
    return build_tokenizer()
