"""Model families written outside ddecode: backbones, tokenizers and loaders of upstream's checkpoints."""

from typing import Literal

from ddecode.student import Student
from ddecode.types import Tokenizer
from third_party_loaders.llamagen import load_llamagen, load_llamagen_student
from third_party_loaders.state import StateOrPath

__all__ = ["load_dd1_student", "load_llamagen"]


def load_dd1_student(
    model: StateOrPath,
    tokenizer: Tokenizer,
    family: Literal["llamagen"],
    *,
    n_head: int | None = None,
    block_size: int | None = None,
    split: int,
) -> Student:
    """A published DD1 student.

    Args:
        model: its state or file, in the published layout.
        tokenizer: the teacher's.
        family: which model it was distilled from.
        n_head, block_size: as in `load_llamagen`.
        split: in tokens; positions before it are emitted as argmax tokens.

    Returns:
        A `Student` in evaluation mode, fp32, on the CPU.

    Raises:
        ValueError: an unknown family, or keys missing, extra or misshapen.
    """
    if family != "llamagen":
        raise ValueError(f"unknown family {family!r}; DD1 students are known for llamagen")
    return load_llamagen_student(model, tokenizer, n_head, block_size, split)
