import numpy as np
import torch
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pretrain.model.vocabulary import Vocabulary
from tests.builders import CLS, MASK, PAD, SEP, VOCABULARY, word_tokenizer


def tokenizer(words: list[str], **names) -> PreTrainedTokenizerFast:
    model = models.WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0])
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(model), **names)


def test_roles_are_read_from_a_tokenizer_of_berts_kind():
    vocabulary = Vocabulary.of(word_tokenizer())
    assert (vocabulary.size, vocabulary.pad_id, vocabulary.mask_id) == (211, PAD, MASK)
    assert vocabulary.special_ids.tolist() == sorted([PAD, CLS, SEP, MASK])
    assert np.array_equal(vocabulary.special_ids, VOCABULARY.special_ids)


def test_special_and_ordinary_ids_partition_the_vocabulary_and_the_unknown_word_is_text():
    vocabulary = Vocabulary.of(word_tokenizer(37))
    both = np.concatenate([vocabulary.special_ids, vocabulary.ordinary_ids])
    assert sorted(both.tolist()) == list(range(37))
    assert 1 in vocabulary.ordinary_ids


def test_a_decoders_one_special_token_is_no_text_and_pads():
    vocabulary = Vocabulary.of(
        tokenizer(["<|end|>", "a", "b"], bos_token="<|end|>", eos_token="<|end|>", unk_token="<|end|>")
    )
    assert vocabulary.special_ids.tolist() == [0]
    assert (vocabulary.pad_id, vocabulary.mask_id) == (0, None)


def test_tokens_only_marked_as_special_are_no_text():
    marked = word_tokenizer(11)
    marked.add_tokens(["<|tool|>"], special_tokens=True)
    assert 11 in Vocabulary.of(marked).special_ids
    assert Vocabulary.of(marked).size == 12


def test_a_tokenizer_without_special_tokens_has_ordinary_ids_only():
    vocabulary = Vocabulary.of(tokenizer(["a", "b", "c"]))
    assert vocabulary.special_ids.tolist() == []
    assert vocabulary.ordinary_ids.tolist() == [0, 1, 2]
    assert vocabulary.pad_id == 0


def test_sentence_ends_are_found_whatever_marks_the_borders_of_words():
    words = ["<unk>", ".", "Ġ.", "▁?", "##!", "!", "a.", "...", "a", ".b"]
    vocabulary = Vocabulary.of(tokenizer(words, unk_token="<unk>"))
    assert vocabulary.sentence_end_ids.tolist() == [1, 2, 3, 4, 5]
    ends = vocabulary.tables(torch.device("cpu")).ends_sentence
    assert ends.tolist() == [word in words[1:6] for word in words]


def test_a_special_token_ends_no_sentence():
    assert Vocabulary.of(tokenizer([".", "a"], eos_token=".", unk_token="a")).sentence_end_ids.tolist() == []


def test_the_separator_is_the_tokenizers_if_it_has_one():
    assert Vocabulary.of(word_tokenizer()).separator_id == SEP
    assert Vocabulary.of(tokenizer(["a", "b"])).separator_id is None
