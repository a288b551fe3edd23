"""YAML as recipes need it: plain values, each key once, nothing that grows when it is read."""

from pathlib import Path
from typing import Any

import yaml

from ddecode.arguments import as_path

LARGEST_FILE = 1 << 18
"""Bytes; recipes have about two thousand."""
DEEPEST = 16
"""Groups and lists inside each other."""


class Loader(yaml.SafeLoader):
    """No anchors, of which a few lines can stand for gigabytes; no key given twice, of which one would be lost."""

    depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError(f"write out what *{self.peek_event().anchor} stands for: aliases are not read")
        self.depth += 1
        if self.depth > DEEPEST:
            raise yaml.YAMLError(f"more than {DEEPEST} groups or lists are inside each other")
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        mapping = super().construct_mapping(node, deep)
        if len(mapping) < len(node.value):
            names = [key.value for key, _ in node.value]
            raise yaml.YAMLError(f"the key {next(n for n in names if names.count(n) > 1)} is given twice")
        return mapping


def parse_yaml(text: str, what: str) -> Any:
    """
    Args:
        text: YAML.
        what: what errors call it.

    Raises:
        ValueError: it is no such YAML.
    """
    try:
        return yaml.load(text, Loader)  # a SafeLoader: no code is run
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
    except (ValueError, LookupError, AttributeError) as error:  # PyYAML's own, for what is tagged !!int, !!bool, ...
        reason = f"a value is not what it looks like ({error})"
    raise ValueError(f"{what} is no YAML: {reason}")


def read_text(path: Path) -> str:
    """
    Raises:
        ValueError: there is no such file, or it is too large for a recipe or no text.
    """
    path = as_path("a config file", path)
    if not path.is_file():
        raise ValueError(f"no config file {path}")
    if path.stat().st_size > LARGEST_FILE:
        raise ValueError(f"{path} is no config: it has {path.stat().st_size} bytes")
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is no config: it is not UTF-8 text") from None


def read_yaml(path: Path) -> Any:
    """Raises ValueError: see `read_text` and `parse_yaml`."""
    return parse_yaml(read_text(path), str(path))


class Dumper(yaml.SafeDumper):
    """Lists on one line."""


Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_sequence("tag:yaml.org,2002:seq", value, True))


def as_text(tree: Any) -> str:
    """Plain values as YAML."""
    return yaml.dump(tree, Dumper=Dumper, sort_keys=False, allow_unicode=True, width=120)
