"""Results of named protocols as JSON, and their comparison."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from ddecode import __version__
from ddecode.arguments import as_path, check_kind
from ddecode.config import build
from ddecode.files import read_json

MUST_EQUAL = ("protocol", "num", "feature_hash", "reference_hash")
"""What two results have to share for their figures to mean the same."""


@dataclass(frozen=True, kw_only=True)
class Result:
    """What every protocol records; its own class adds the rows."""

    protocol: str
    model: str
    num: int
    """Images of each set."""
    seed: int | None
    """None for images whose seed is not known."""
    labels: str
    """How labels are spread over the images, see `label_balance`."""
    rounding: str
    """From network output to 8 bits."""
    feature_hash: str
    """Of the network that judges."""
    reference_hash: str
    """Of the real images or their statistics."""
    versions: dict[str, str]
    model_hash: str | None = None
    """Of the model's own weights, see `ddecode.checkpoint.ModelFolder.model_hash`; None where that is not known."""


def versions_of(*packages: str) -> dict[str, str]:
    """This package's version, and those of others."""
    return {"ddecode": __version__} | {package: version(package) for package in packages}


def label_balance(labelling: str | None, labels_N: np.ndarray | None) -> str:
    """How labels are spread, for people; `labelling` is None for those that are as they were found."""
    if labels_N is None:
        return "unknown"
    counts = np.unique(labels_N, return_counts=True)[1]
    few, many = int(counts.min()), int(counts.max())
    each = str(few) if few == many else f"{few} to {many}"
    return f"{labelling or 'as given'}, {each} of each of {len(counts)} classes"


def as_json(result: Result) -> str:
    return json.dumps(dataclasses.asdict(result))


def read_result(path: str | Path) -> dict[str, Any]:
    """A result as `as_json` wrote it.

    Raises:
        ValueError: the file is missing or no result.
    """
    result: dict[str, Any] = read_json(as_path("a result", path))
    check_result(path, result)
    return result


def check_result(name: str | Path, result: Any) -> None:
    """
    Raises:
        ValueError: it is no result as `as_json` wrote it.
    """
    needed = {field.name for field in dataclasses.fields(Result) if field.default is dataclasses.MISSING} | {"rows"}
    if not isinstance(result, dict) or not needed <= result.keys() or not are_rows(result["rows"]):
        raise ValueError(f"{name} is no result of ddecode eval")
    for field, kind in get_type_hints(Result).items():
        build(kind, result.get(field), f"{name}: {field}")


def are_rows(rows: Any) -> bool:
    """At least one, each naming its plan, all of the same columns."""
    if not isinstance(rows, list) or not rows or not all(isinstance(row, dict) for row in rows):
        return False
    return "plan" in rows[0] and all(row.keys() == rows[0].keys() for row in rows)


def compare(results: Mapping[str, Mapping[str, Any]]) -> str:
    """Results side by side, for people.

    Args:
        results: as read by `read_result`, by a name for each.

    Raises:
        ValueError: there is none, one is no result, or they differ in what their figures rest on, see `MUST_EQUAL`.
    """
    check_kind("results", results, Mapping)
    if not results:
        raise ValueError("there are no results to compare")
    for name, result in results.items():
        check_result(name, result)
    (first, ours), *others = results.items()
    for name, theirs in others:
        differing = [key for key in MUST_EQUAL if theirs[key] != ours[key]]
        if "protocol" in differing:
            differing = ["protocol"]
        if differing:
            facts = ", ".join(f"{key} is {ours[key]} in {first}, {theirs[key]} in {name}" for key in differing)
            raise ValueError(f"{first} and {name} cannot be compared: {facts}")
    lines = ["protocol {protocol}, n {num}, features {feature_hash}, reference {reference_hash}".format_map(ours)]
    for name, result in results.items():
        lines.append("{}: {model}, seed {seed}, labels {labels}; {rounding}".format(name, **result))
    return "\n".join([*lines, *row_lines([(name, row) for name, result in results.items() for row in result["rows"]])])


def row_lines(rows: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
    """Rows of one protocol as aligned lines under a head, each after a text of its own.

    Another version of this package may have other columns; what a row has not is left open.
    """
    columns = dict.fromkeys(column for _, row in rows for column in row)
    cells = [["", *columns]] + [[text, *(figure(row.get(column)) for column in columns)] for text, row in rows]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(map(str.ljust, line, widths)).rstrip() for line in cells]


def figure(value: Any) -> str:
    """A cell of a table."""
    return "-" if value is None else format(value, ".4g") if isinstance(value, float) else str(value)
