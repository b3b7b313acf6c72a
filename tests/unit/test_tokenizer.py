import pytest
from tokenizers import Regex, Tokenizer, models, normalizers

from vlarl_ray.models.tokenizer import PROMPT_PREFIX, PROMPT_SUFFIX, PromptTokenizer, prompt_text, training_text

INSTRUCTIONS = ["close the drawer", "open the window", "press the button from the top"]


def test_prompt_is_the_template_around_the_lower_cased_instruction():
    tokenizer = PromptTokenizer.train(INSTRUCTIONS, vocab_size=511)
    ids = tokenizer.encode("Open the WINDOW")
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.trailing_token_id is None
    text = tokenizer.tokenizer.decode(ids[1:], skip_special_tokens=False)
    assert text == f"{PROMPT_PREFIX}open the window{PROMPT_SUFFIX}"


def test_known_words_are_one_token_each_and_any_other_text_encodes():
    tokenizer = PromptTokenizer.train(INSTRUCTIONS, vocab_size=511)
    assert len(tokenizer.encode("close the window")) == 3 + 3
    strange = "Überquere das µ-Tor ✓ 你好 <|x|>"
    decoded = tokenizer.tokenizer.decode(tokenizer.encode(strange)[1:], skip_special_tokens=True)
    assert decoded == strange.lower()


def test_the_order_of_instructions_does_not_matter_and_the_file_round_trips(tmp_path):
    first = PromptTokenizer.train(INSTRUCTIONS, vocab_size=511)
    second = PromptTokenizer.train(reversed([*INSTRUCTIONS, *INSTRUCTIONS]), vocab_size=511)
    first.save(tmp_path / "a.json")
    second.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()
    loaded = PromptTokenizer.load(tmp_path / "a.json")
    assert loaded.encode("press something unknown") == first.encode("press something unknown")


def test_ids_never_reach_the_action_tokens():
    tokenizer = PromptTokenizer.train([f"{a} {b}" for a in "abcdefgh" for b in INSTRUCTIONS], vocab_size=270)
    assert tokenizer.num_tokens <= 270


def test_prompts_are_padded_on_the_right_and_long_ones_refused():
    tokenizer = PromptTokenizer.train(INSTRUCTIONS, vocab_size=511)
    ids, lengths = tokenizer.encode_batch(INSTRUCTIONS, max_tokens=12)
    assert lengths.tolist() == [6, 6, 9]
    assert ids.shape == (3, 12)
    assert (ids[0, 6:] == 0).all()
    with pytest.raises(ValueError, match="max_prompt_tokens = 8"):
        tokenizer.encode_batch(INSTRUCTIONS, max_tokens=8)


def test_a_vocabulary_without_room_for_all_bytes_is_refused():
    with pytest.raises(ValueError, match="text_vocab_size = 256"):
        PromptTokenizer.train(INSTRUCTIONS, vocab_size=256)


def test_a_lone_space_token_ends_the_prompt_where_the_vocabulary_has_one():
    tokenizer = PromptTokenizer.train([*INSTRUCTIONS], vocab_size=511).tokenizer
    tokenizer.add_tokens(["▁"])
    assert PromptTokenizer(tokenizer).encode("open the window")[-1] == tokenizer.token_to_id("▁")


def test_the_declared_style_shapes_the_prompt_and_its_template_is_two_tokens(tmp_path):
    tokenizer = PromptTokenizer.train(INSTRUCTIONS, vocab_size=511, style="openvla-v01")
    ids = tokenizer.encode("Open the WINDOW")
    assert len(ids) == len(PromptTokenizer.train(INSTRUCTIONS, vocab_size=511).encode("open the window")) == 6
    text = tokenizer.tokenizer.decode(ids[1:], skip_special_tokens=False)
    assert text == prompt_text("open the window", "openvla-v01")
    assert text.startswith("A chat between")
    assert text.endswith(" open the window? ASSISTANT:")
    tokenizer.save(tmp_path / "tokenizer.json")
    assert PromptTokenizer.load(tmp_path / "tokenizer.json", "openvla-v01").encode("Open the WINDOW") == ids


def test_a_prompt_that_ends_in_the_lone_space_gets_no_second_one():
    tokenizer = Tokenizer(models.WordLevel({"<s>": 1, "▁": 7}))
    tokenizer.normalizer = normalizers.Replace(Regex(r"[\s\S]+"), "▁")  # any text is that one token
    assert PromptTokenizer(tokenizer).encode("open the window") == [1, 7]


def test_the_training_text_is_prompt_answer_and_end_mark():
    assert training_text("Close it", "xyz") == prompt_text("Close it") + " xyz</s>"


def test_a_file_that_is_no_tokenizer_is_refused(tmp_path):
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"tokenizer\.json is no tokenizer"):
        PromptTokenizer.load(tmp_path / "tokenizer.json")
