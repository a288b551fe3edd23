"""Model families written outside ddecode: backbones, tokenizers and loaders of upstream's checkpoints."""

from typing import Literal

from ddecode.arguments import check_choice
from ddecode.student import Student
from ddecode.types import Tokenizer
from third_party_loaders import llamagen, var
from third_party_loaders.llamagen import load_llamagen, load_llamagen_student
from third_party_loaders.lpips import load_lpips
from third_party_loaders.state import Found, StateOrPath, is_hub_id, preview, read_tree, title, unwrap
from third_party_loaders.var import load_var, load_var_student

__all__ = ["identify", "is_hub_id", "load_dd1_student", "load_llamagen", "load_lpips", "load_var"]


def load_dd1_student(
    model: StateOrPath,
    tokenizer: Tokenizer,
    family: Literal["var", "llamagen"],
    *,
    patch_nums: tuple[int, ...] | None = None,
    n_head: int | None = None,
    block_size: int | None = None,
    split: int,
) -> Student:
    """A published DD1 student.

    Args:
        model: its state or file, in the published layout.
        tokenizer: the teacher's.
        family: which model it was distilled from.
        patch_nums: as in `load_var`, without the student's leading scale.
        n_head, block_size: as in `load_llamagen`.
        split: in tokens; positions before it are emitted as argmax tokens.

    Returns:
        A `Student` in evaluation mode, fp32, on the CPU.

    Raises:
        ValueError: an unknown family or sizes that it has not, or keys missing, extra or misshapen.
    """
    check_choice("family", family, ("var", "llamagen"))
    given = {"patch_nums": patch_nums, "n_head": n_head, "block_size": block_size}
    own = var.SIZE_OPTIONS if family == "var" else llamagen.SIZE_OPTIONS
    if alien := [name for name, value in given.items() if value is not None and name not in own]:
        raise ValueError(f"{alien[0]} is no option of family {family}, which takes {', '.join(own)}")
    if family == "var":
        return load_var_student(model, tokenizer, patch_nums, split)
    return load_llamagen_student(model, tokenizer, n_head, block_size, split)


def identify(source: StateOrPath, *, tokenizer: bool = False) -> tuple[str, Found]:
    """What a state is, by its names alone: a key of some family's `ADAPTERS`, and its tensors.

    Args:
        source: as in `read_state`.
        tokenizer: of a file that holds a transformer and its tokenizer, take the latter.

    Raises:
        ValueError: it cannot be read, or is nothing known.
    """
    tree = read_tree(source)
    kinds = [(family, kind, adapter) for family in (var, llamagen) for kind, adapter in family.ADAPTERS.items()]
    for family, kind, adapter in sorted(kinds, key=lambda entry: (entry[2].part == "tokenizer") != tokenizer):
        found = unwrap(tree, adapter.preferred, title(source))
        if family.recognise(found.tensors) == kind:
            return kind, found
    names = preview(unwrap(tree, (), title(source)).tensors)
    raise ValueError(f"{title(source)} is none of {', '.join(kind for _, kind, _ in kinds)}: its names are {names}")
