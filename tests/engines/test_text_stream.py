"""Text as it comes: characters and stop strings that are spread over tokens."""

import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from lpdeploy.engines.text_stream import TextStream

TEXT = "Zoë paid 30 € for a naïve 漢字 book ☃. The end. Then the rest of the story"


@pytest.fixture(scope="module", params=["bytes", "words"])
def tokenizer(request):
    """Of bytes, as in Llama 3, or of pieces that begin with a space, as in Llama 2."""
    if request.param == "bytes":
        made = Tokenizer(models.BPE())
        made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        made.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        made.train_from_iterator(["the end then the"], BpeTrainer(initial_alphabet=alphabet))
    else:
        pieces = [f"<0x{byte:02X}>" for byte in range(256)]
        made = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
        made.pre_tokenizer = pre_tokenizers.Metaspace()
        made.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(),
             decoders.Strip(" ", 1, 0)]
        )  # fmt: skip
        letters = sorted(set("abcdefghijklmnopqrstuvwxyzTZ.03▁"))
        made.train_from_iterator(
            ["the end then the"],
            BpeTrainer(special_tokens=["<unk>", *pieces], initial_alphabet=letters),
        )
        # The bytes are plain tokens, not special ones that decoding leaves out.
        made = Tokenizer.from_str(made.to_str().replace('"special":true', '"special":false'))
    return PreTrainedTokenizerFast(tokenizer_object=made)


def spread(tokenizer, prompt, text, stop=()):
    """The pieces of a text that continues a prompt, and whether a stop string ended it."""
    stream = TextStream(tokenizer, prompt, stop)
    pieces = []
    for token in text:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()], stream.stopped


@pytest.mark.parametrize("cut", [1, 5, 9, 20])
def test_pieces_together_continue_the_prompt(tokenizer, cut):
    ids = tokenizer(TEXT).input_ids
    pieces, _ = spread(tokenizer, ids[:cut], ids[cut:])
    start = tokenizer.decode(ids[:cut])
    whole = tokenizer.decode(ids)
    if "\ufffd" not in start:  # else the prompt itself ends within a character
        assert start + "".join(pieces) == whole
    assert "\ufffd" not in "".join(pieces)


def test_a_stop_string_over_several_tokens(tokenizer):
    ids = tokenizer(TEXT).input_ids
    pieces, stopped = spread(tokenizer, ids[:1], ids[1:], stop=["The end.", "never"])
    assert stopped
    expected = tokenizer.decode(ids).split("The end.")[0]
    assert tokenizer.decode(ids[:1]) + "".join(pieces) == expected


def test_what_looks_like_a_stop_string_is_given_back(tokenizer):
    ids = tokenizer("the then the the end").input_ids
    pieces, stopped = spread(tokenizer, ids[:1], ids[1:], stop=["the enx", "then there", "endless"])
    assert not stopped
    assert tokenizer.decode(ids[:1]) + "".join(pieces) == tokenizer.decode(ids)


def test_nothing_of_a_stop_string_ever_shows(tokenizer):
    rng = random.Random(0)
    for _ in range(50):
        words = rng.choices(["the", "end", "then", "th", "en", "d"], k=12)
        text = " ".join(words)
        stop = " ".join(words[rng.randrange(6) :][:2])[: rng.randrange(2, 8)]
        ids = tokenizer(text).input_ids
        pieces, stopped = spread(tokenizer, ids[:1], ids[1:], stop=[stop])
        continued = tokenizer.decode(ids)[len(tokenizer.decode(ids[:1])) :]
        assert stopped == (stop in continued)
        assert "".join(pieces) == continued.split(stop)[0]


def list_bytes(tokenizer, data):
    """The tokens of single bytes, whatever they are together."""
    if tokenizer.convert_tokens_to_ids("<0x41>") is not None:
        return tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in data])
    letters = list(map_bytes())
    return tokenizer.convert_tokens_to_ids([letters[byte] for byte in data])


def map_bytes():
    """GPT-2's letter for each byte (its released encoder): printable ones stand for themselves."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]


BROKEN = {
    "a byte after an emoji": "😀".encode() + b"\xff" + b"a",
    "half an emoji": "😀".encode()[:2] + b"a",
    "half an emoji at the end": b"a" + "😀".encode()[:3],
    "half, then whole": "😀".encode()[:3] + "😀".encode() + b"b",
    "continuation bytes": b"\x80\x80a\x80",
    "the replacement itself": "a\ufffdb".encode(),
    "nothing but": b"\xff" * 5,
}


@pytest.mark.parametrize("data", BROKEN.values(), ids=BROKEN)
def test_bytes_that_are_no_character_end_nothing(tokenizer, data):
    start = tokenizer("the end").input_ids
    tokens = list_bytes(tokenizer, data)
    pieces, _ = spread(tokenizer, start, [*tokens, *tokenizer("then").input_ids])
    text = "".join(pieces)
    assert text.endswith("then")
    if tokenizer.convert_tokens_to_ids("<0x41>") is None:
        assert text == tokenizer.decode([*start, *tokens, *tokenizer("then").input_ids])[7:]
    elif data.startswith("😀".encode()):  # byte fallback gives up a whole run, but for what is out
        assert "😀" in text


def test_any_tokens_are_streamed_as_they_are_decoded(tokenizer):
    """Of bytes exactly; with byte fallback, wherever no byte is broken."""
    rng, checked = random.Random(1), 0
    exact = tokenizer.convert_tokens_to_ids("<0x41>") is None
    for _ in range(300):
        ids = [rng.randrange(1, tokenizer.vocab_size) for _ in range(rng.randrange(2, 40))]
        cut = rng.randrange(1, len(ids))
        start, whole = tokenizer.decode(ids[:cut]), tokenizer.decode(ids)
        pieces, _ = spread(tokenizer, ids[:cut], ids[cut:])
        if whole.startswith(start) and (exact or "\ufffd" not in whole):
            assert start + "".join(pieces) == whole
            checked += 1
    assert checked > 3


def test_a_prompt_that_ends_in_a_replacement_is_not_repeated(tokenizer):
    prompt = list_bytes(tokenizer, "the \ufffd".encode())
    pieces, _ = spread(tokenizer, prompt, tokenizer("then").input_ids)
    assert "\ufffd" not in "".join(pieces)
    assert "".join(pieces).endswith("then")
