"""Byte-level BPE: text to ids and back, with a vocabulary learned from text, or anyone's.

Text is UTF-8, so 256 bytes suffice for every text of the world; but one token a byte is long.
Byte-pair encoding merges the most frequent pair of neighbouring tokens into a new one, again and
again. A regular expression cuts the text into words first, and no merge crosses a cut.

    train    count pairs, merge the most frequent (of equals the one with the smallest ids), repeat
    encode   in each word, apply the merges in the order in which they were learned
    decode   put the bytes together; what is no UTF-8 becomes the replacement character

cutting    text to words            learning   the merges of a text
bpe        the tokenizer            files      those of GPT-2, and tokenizer.json

Papers: BPE for words, 1508.07909, sec. 3.2; on bytes, with this cut: GPT-2 (Radford et al. 2019),
sec. 2.2.
"""

from reference.transformer.tokenizer.bpe import Tokenizer
from reference.transformer.tokenizer.files import read_gpt2_files, read_tokenizer_json
from reference.transformer.tokenizer.learning import merge
from reference.transformer.tokenizer.vocabulary import END

__all__ = ["END", "Tokenizer", "merge", "read_gpt2_files", "read_tokenizer_json"]
