"""Reading of YAML files, with limits: a short text with nested aliases can expand without bound."""

from pathlib import Path
from typing import Any

import yaml

from tdlrt.files import read_text

__all__ = ["read_yaml"]

MAX_BYTES = 2**18
"""Largest size of a file, and of its content with all aliases expanded."""

MAX_DEPTH = 20
MAX_INTEGER = 2**63


def read_yaml(path: Path) -> Any:
    """Read a YAML file that holds plain types only.

    Raises:
        ValueError: The file cannot be read, is not valid YAML, has a duplicate key, exceeds a limit
            of size or depth, or has an alias that contains itself.
    """
    try:
        return yaml.load(read_text(path, max_bytes=MAX_BYTES), _Loader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise ValueError(f"cannot be read as YAML ({' '.join(str(error).split())})") from error


class _Loader(yaml.SafeLoader):
    """A safe loader with the limits of this module, which refuses duplicate keys."""

    _depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        """The next node, if it is not nested too deeply: such a text takes long to read."""
        if self._depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"more than {MAX_DEPTH} levels", None)
        self._depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def get_single_node(self) -> yaml.Node | None:
        """The root node, if the document is not too large with its aliases expanded."""
        root: yaml.Node | None = super().get_single_node()
        if root is not None:
            _check_size(root, {})
        return root

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Build a dict, if no key occurs twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key.value}", key.start_mark
                )
            seen.add(str(key.value))
        found: dict[Any, Any] = super().construct_mapping(node, deep)
        return found

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """An integer of at most 64 bits: Python refuses to print very large ones."""
        number: int = super().construct_yaml_int(node)
        if abs(number) >= MAX_INTEGER:
            raise yaml.constructor.ConstructorError(
                None, None, "an integer beyond 64 bits", node.start_mark
            )
        return number


_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_yaml_int)


def _check_size(node: yaml.Node, sizes: dict[yaml.Node, int]) -> int:
    """Number of characters of a node, roughly, with all aliases expanded.

    Args:
        node: The node.
        sizes: Sizes of the nodes seen before; 0 while a node is being measured.
    """
    if node in sizes:
        if not sizes[node]:
            raise yaml.constructor.ConstructorError(
                None, None, "an alias that contains itself", node.start_mark
            )
        return sizes[node]
    sizes[node] = 0
    if isinstance(node, yaml.ScalarNode):
        sizes[node] = 1 + len(node.value)
    else:
        pairs = isinstance(node, yaml.MappingNode)
        parts = [part for pair in node.value for part in pair] if pairs else node.value
        sizes[node] = 1 + sum(_check_size(part, sizes) for part in parts)
    if sizes[node] > MAX_BYTES:
        raise yaml.constructor.ConstructorError(
            None, None, f"more than {MAX_BYTES:,} bytes with its aliases", node.start_mark
        )
    return sizes[node]
