"""Prompts as token ids: OpenVLA's template around an instruction, with a byte-level tokenizer made offline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from jaxtyping import Int64
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor

PROMPT_PREFIX = "In: What action should the robot take to "
PROMPT_SUFFIX = "?\nOut:"
_BOS = "<s>"
_LONE_SPACE = "▁"
"""Follows `Out:` in Llama's vocabulary (id 29871); in ours the suffix is one token and ends the prompt itself."""


class PromptTokenizer:
    """Turn instructions into prompts: BOS, OpenVLA's template around the instruction, and Llama's lone space.

    Instructions are lower-cased, as OpenVLA does. Every text encodes, byte by byte if need be.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        """Wrap a tokenizer.

        Raises:
            ValueError: If it lacks the token that starts a prompt.
        """
        self.tokenizer = tokenizer
        bos = tokenizer.token_to_id(_BOS)
        if bos is None:
            raise ValueError(
                f"the tokenizer lacks {_BOS!r}, with which prompts start; it is none of OpenVLA's or ours."
            )
        self.bos_token_id: int = bos
        self.trailing_token_id: int | None = tokenizer.token_to_id(_LONE_SPACE)
        self._ids: dict[str, list[int]] = {}

    @classmethod
    def train(cls, instructions: Iterable[str], *, vocab_size: int) -> PromptTokenizer:
        """Make a byte-pair tokenizer whose merges shorten `instructions`; their order does not matter.

        The two halves of the template are one token each: sequence length is what a small policy pays for.

        Args:
            instructions: Sentences of the suite.
            vocab_size: Upper bound on the number of ids.

        Raises:
            ValueError: If `vocab_size` does not hold all bytes and the special tokens.
        """
        specials = [AddedToken(text, special=True) for text in ("<unk>", _BOS, "</s>", PROMPT_PREFIX, PROMPT_SUFFIX)]
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
        return cls(tokenizer)

    @classmethod
    def load(cls, path: Path) -> PromptTokenizer:
        """Read a `tokenizer.json`."""
        return cls(Tokenizer.from_file(str(path)))

    def save(self, path: Path) -> None:
        """Write a `tokenizer.json`."""
        self.tokenizer.save(str(path))

    @property
    def num_tokens(self) -> int:
        """Ids in use, added tokens included."""
        return self.tokenizer.get_vocab_size()

    def encode(self, instruction: str) -> list[int]:
        """Return the ids of one prompt, without padding."""
        if instruction not in self._ids:
            text = PROMPT_PREFIX + instruction.lower() + PROMPT_SUFFIX
            ids = self.tokenizer.encode(text, add_special_tokens=False).ids
            trailing = [] if self.trailing_token_id is None else [self.trailing_token_id]
            self._ids[instruction] = [self.bos_token_id, *ids, *trailing]
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
