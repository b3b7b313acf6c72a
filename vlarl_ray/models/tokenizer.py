"""Prompts as token ids: a declared template around an instruction, with OpenVLA's tokenizer or one made offline."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Literal

import torch
from jaxtyping import Int64
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

PromptStyle = Literal["openvla", "openvla-v01"]
PROMPT_PREFIX = "In: What action should the robot take to "
PROMPT_SUFFIX = "?\nOut:"
_VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
PROMPT_TEMPLATES: Mapping[PromptStyle, tuple[str, str]] = {
    "openvla": (PROMPT_PREFIX, PROMPT_SUFFIX),
    "openvla-v01": (f"{_VICUNA_SYSTEM} USER: What action should the robot take to ", "? ASSISTANT:"),
}
"""What stands before and after the instruction, as the policies of each release were trained."""
_BOS, _EOS = "<s>", "</s>"
_LONE_SPACE = "▁"
"""Follows the prompt in Llama's vocabulary (id 29871); in ours the suffix is one token and ends the prompt itself."""


def prompt_text(instruction: str, style: PromptStyle = "openvla") -> str:
    r"""Put the lower-cased instruction into the template; a full stop at its end stays, before the question mark.

    Example:
        >>> prompt_text("Open the drawer")
        'In: What action should the robot take to open the drawer?\nOut:'
    """
    prefix, suffix = PROMPT_TEMPLATES[style]
    return prefix + instruction.lower() + suffix


def training_text(instruction: str, answer: str, style: PromptStyle = "openvla") -> str:
    """Put prompt, answer and end mark together, as the published policies were fine-tuned on them.

    Llama's tokenizer makes the lone-space token of the space before the answer, where action tokens follow.
    """
    return f"{prompt_text(instruction, style)} {answer}{_EOS}"


class PromptTokenizer:
    """Turn instructions into prompts: BOS, the template around the lower-cased instruction, and Llama's lone space.

    The lone space is appended where the vocabulary has one, unless the prompt ends in it already.
    Every text encodes, byte by byte if need be.
    """

    def __init__(self, tokenizer: Tokenizer, style: PromptStyle = "openvla") -> None:
        """Wrap a tokenizer.

        Args:
            tokenizer: Llama's, or one that `train` made.
            style: Of the text around an instruction.

        Raises:
            ValueError: If the tokenizer lacks the token that starts a prompt.
        """
        self.tokenizer = tokenizer
        self.style: PromptStyle = style
        bos = tokenizer.token_to_id(_BOS)
        if bos is None:
            raise ValueError(
                f"the tokenizer lacks {_BOS!r}, with which prompts start; it is none of OpenVLA's or ours."
            )
        self.bos_token_id: int = bos
        self.trailing_token_id: int | None = tokenizer.token_to_id(_LONE_SPACE)
        self._ids: dict[str, list[int]] = {}

    @classmethod
    def train(cls, instructions: Iterable[str], *, vocab_size: int, style: PromptStyle = "openvla") -> PromptTokenizer:
        """Make a byte-pair tokenizer whose merges shorten `instructions`; their order does not matter.

        The two halves of the template are one token each: sequence length is what a small policy pays for.

        Args:
            instructions: Sentences of the suite.
            vocab_size: Upper bound on the number of ids.
            style: Of the text around an instruction.

        Raises:
            ValueError: If `vocab_size` does not hold all bytes and the special tokens.
        """
        specials = [AddedToken(text, special=True) for text in ("<unk>", _BOS, _EOS, *PROMPT_TEMPLATES[style])]
        if vocab_size < 256 + len(specials):
            raise ValueError(
                f"model.text_vocab_size = {vocab_size} does not hold 256 bytes and {len(specials)} special tokens; "
                f"set at least {256 + len(specials)}."
            )
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=specials,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
        tokenizer.train_from_iterator(sorted({text.lower() for text in instructions}), trainer)
        return cls(tokenizer, style)

    @classmethod
    def load(cls, path: Path, style: PromptStyle = "openvla") -> PromptTokenizer:
        """Read a `tokenizer.json`; it does not hold the style, which is in the policy's `config.json`.

        Raises:
            ValueError: If the file is none.
        """
        try:
            tokenizer = Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing narrower
            raise ValueError(f"{path} is no tokenizer ({error}); take the file that came with the policy.") from error
        return cls(tokenizer, style)

    def save(self, path: Path) -> None:
        """Write a `tokenizer.json`."""
        self.tokenizer.save(str(path))

    @property
    def num_tokens(self) -> int:
        """Ids in use, added tokens included."""
        return self.tokenizer.get_vocab_size()

    @property
    def num_base_tokens(self) -> int:
        """Ids without added tokens such as padding."""
        return self.tokenizer.get_vocab_size(with_added_tokens=False)

    def encode(self, instruction: str) -> list[int]:
        """Return the ids of one prompt, without padding."""
        if instruction not in self._ids:
            text = prompt_text(instruction, self.style)
            ids = [self.bos_token_id, *self.tokenizer.encode(text, add_special_tokens=False).ids]
            if self.trailing_token_id not in (None, ids[-1]):
                ids.append(self.trailing_token_id)
            self._ids[instruction] = ids
        return self._ids[instruction]

    def encode_batch(
        self, instructions: Sequence[str], *, max_tokens: int
    ) -> tuple[Int64[Tensor, "B N"], Int64[Tensor, " B"]]:
        """Return prompts padded on the right with id 0 to `max_tokens`, and their lengths.

        Raises:
            ValueError: If a prompt is longer.
        """
        prompts = torch.zeros(len(instructions), max_tokens, dtype=torch.int64)
        lengths = torch.zeros(len(instructions), dtype=torch.int64)
        for row, instruction in enumerate(instructions):
            ids = self.encode(instruction)
            if len(ids) > max_tokens:
                raise ValueError(
                    f"instruction {instruction!r} makes a prompt of {len(ids)} tokens, but model.max_prompt_tokens = "
                    f"{max_tokens}; shorten it, or raise max_prompt_tokens (padding changes no result)."
                )
            prompts[row, : len(ids)] = torch.tensor(ids)
            lengths[row] = len(ids)
        return prompts, lengths
