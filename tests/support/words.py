"""A tokenizer for the tiny models: one word, w0 to w95, per id, and a chat template that adds nothing."""

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from support import zoo


def build_tokenizer(num_words: int = zoo.VOCAB_SIZE) -> PreTrainedTokenizerFast:
    """Id i is the word ``w{i}``; the special ids are those of the zoo's models."""
    vocabulary = {f"w{i}": i for i in range(num_words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="w0",
        bos_token="w1",
        eos_token="w2",
        chat_template="{% for message in messages %}{{ message['content'] }} {% endfor %}",
    )
