"""Tokenizers of the real classes that need no files: single characters are their vocabularies."""

from __future__ import annotations

from typing import Any

from transformers import BertTokenizer, CLIPTokenizer, GemmaTokenizer, Qwen2Tokenizer, T5Tokenizer
from transformers.convert_slow_tokenizer import bytes_to_unicode

_ASCII = [chr(code) for code in range(33, 127)]
_CHAT = "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"


def clip_tokenizer() -> Any:
    """A CLIP tokenizer of 515 tokens: start, pad, end, then every byte inside a word and at its end."""
    letters = list(bytes_to_unicode().values())
    words = ["<start>", "<pad>", "<end>", *letters, *(letter + "</w>" for letter in letters)]
    return CLIPTokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=[],
        model_max_length=77,
        **{"bos_token": "<start>", "eos_token": "<end>", "unk_token": "<end>", "pad_token": "<pad>"},
    )


def t5_tokenizer(max_length: int = 77) -> Any:
    """A T5 tokenizer of 98 tokens: pad, end, unknown, the mark of a space, then printable ASCII."""
    pieces = ["<pad>", "</s>", "<unk>", "▁", *_ASCII]
    scores = [0.0, 0.0, 0.0, -2.0, *([-3.0] * len(_ASCII))]
    return T5Tokenizer(vocab=list(zip(pieces, scores, strict=True)), extra_ids=0, model_max_length=max_length)


def qwen_tokenizer() -> Any:
    """A Qwen2 tokenizer of 259 tokens: every byte, end of text, and the two marks of a chat turn."""
    letters = list(bytes_to_unicode().values())
    words = [*letters, "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Qwen2Tokenizer(
        vocab={word: index for index, word in enumerate(words)},
        merges=[],
        chat_template=_CHAT,
        model_max_length=2048,
    )
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def gemma_tokenizer() -> Any:
    """A Gemma tokenizer of 100 tokens, which pads on the left: six marks, then printable ASCII."""
    words = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "▁", *_ASCII]
    return GemmaTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])


def bert_tokenizer() -> Any:
    """A BERT tokenizer of 193 tokens: five marks, printable ASCII, and the same inside a word."""
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *_ASCII, *("##" + letter for letter in _ASCII)]
    return BertTokenizer(vocab={word: index for index, word in enumerate(words)}, model_max_length=77)
