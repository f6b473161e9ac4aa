"""charlm's vocabularies as fast tokenizers, which keep the ids."""

import json
from pathlib import Path
from typing import Any, ClassVar

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from charlm.data.vocabulary import ByteVocabulary, SentencePieceVocabulary, Vocabulary, vocabulary_from_dict
from charlm.files import read_json, write_whole
from charlm.runs.exported import VOCABULARY

OPTIONS = {
    "pad_token": "<pad>",  # its id is V
    "padding_side": "left",
    "split_special_tokens": True,  # a text that contains <pad> is spelt like any other
    "clean_up_tokenization_spaces": False,
}


def fast_tokenizer(vocabulary: Vocabulary) -> Tokenizer:
    """The vocabulary for the library tokenizers; one of characters raises an exception for others."""
    if isinstance(vocabulary, ByteVocabulary):
        signs = sorted(pre_tokenizers.ByteLevel.alphabet())
        own = {ord(sign): sign for sign in signs if ord(sign) < 256}
        others = iter(signs[len(own) :])  # stand for the other bytes, in order
        tokenizer = Tokenizer(models.BPE({own.get(byte) or next(others): byte for byte in range(256)}, []))
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.decoder = decoders.ByteLevel()
        return tokenizer
    first = vocabulary.first_character
    table = {symbol.decode(): first + place for place, symbol in enumerate(vocabulary.symbols[first:])}
    if isinstance(vocabulary, SentencePieceVocabulary):
        table |= {"<unk>": 0} | {f"<0x{byte:02X}>": byte + 1 for byte in range(256)}
        tokenizer = Tokenizer(models.BPE(table, [], byte_fallback=True))
        tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
        return tokenizer
    tokenizer = Tokenizer(models.WordLevel(table, unk_token="<unk>"))  # not in the table, or it would hide a fault
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.decoder = decoders.Fuse()
    return tokenizer


class CharlmTokenizer(PreTrainedTokenizerFast):
    """The vocabulary of an exported folder. Raises UserError if its file is damaged."""

    vocab_files_names: ClassVar[dict[str, str]] = {"vocab_file": VOCABULARY}
    model_input_names = ("input_ids", "attention_mask")

    def __init__(self, vocab_file: str | None = None, **options: Any):
        self.vocabulary = vocabulary_from_dict(read_json(Path(vocab_file or VOCABULARY)))
        options |= {"tokenizer_object": fast_tokenizer(self.vocabulary), "vocab_file": str(vocab_file)}
        super().__init__(**OPTIONS | options)

    @classmethod
    def convert_to_native_format(cls, **options: Any) -> dict[str, Any]:
        """The options alone: tokens of other files would have ids beyond the model's."""
        return {name: value for name, value in options.items() if name != "added_tokens_decoder"}

    def _save_pretrained(self, save_directory: str, file_names: tuple[str, ...], **_: Any) -> tuple[str, ...]:
        path = Path(save_directory, VOCABULARY)
        write_whole(path, json.dumps(self.vocabulary.to_dict(), indent=2) + "\n")
        return (*file_names, str(path))
