"""YAML as people write it: `1e-3` is a number, only true and false are booleans, a repeated key is an error.

Numbers are decimal: `0x10`, `1:30` and `1_000`, and `010`, which YAML 1.1 reads as 8, are text. Keys are text as they
stand. Only plain data is read: an anchor, an alias, a tag, deep nesting or a huge document is an error.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from hcnet_cli.console import UserError

MOST_LEVELS, MOST_VALUES, MOST_DIGITS = 20, 10_000, 30


class _Loader(yaml.SafeLoader):
    level = values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        self.level, self.values = self.level + 1, self.values + 1
        problem = ""
        if isinstance(event, yaml.AliasEvent) or event.anchor:
            problem = "anchors (&) and aliases (*) are not read; write the value out"
        elif event.tag:
            problem = "tags (!) are not read; write the value without one"
        elif self.level > MOST_LEVELS:
            problem = f"values are nested in more than {MOST_LEVELS} levels"
        elif self.values > MOST_VALUES:
            problem = f"there are more than {MOST_VALUES:,} keys and values"
        if problem:
            raise yaml.composer.ComposerError(None, None, problem, event.start_mark)
        node = super().compose_node(parent, index)
        self.level -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        found: dict[Any, Any] = {}
        for key, value in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key must be text", key.start_mark)
            if key.value in found:
                raise yaml.constructor.ConstructorError(
                    None, None, f'the key "{key.value}" appears twice', key.start_mark
                )
            found[key.value] = self.construct_object(value, deep=True)
        return found

    def construct_decimal(self, node: yaml.ScalarNode) -> int:
        if len(node.value) > MOST_DIGITS:
            problem = f"a whole number has more than {MOST_DIGITS} digits"
            raise yaml.constructor.ConstructorError(None, None, problem, node.start_mark)
        return int(node.value)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag == "tag:yaml.org,2002:null"]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(?:true|false)$"), list("tf"))
_Loader.add_implicit_resolver("tag:yaml.org,2002:int", re.compile(r"^[-+]?(?:0|[1-9][0-9]*)$"), list("-+0123456789"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+(?=[eE]))(?:[eE][-+]?[0-9]+)?$"),
    list("-+0123456789."),
)
_Loader.add_constructor("tag:yaml.org,2002:int", _Loader.construct_decimal)


class _Dumper(yaml.SafeDumper):
    """Quotes every text that a reader of YAML 1.1, or the one above, would take for something else."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


_Dumper.yaml_implicit_resolvers = {
    first: [*yaml.SafeDumper.yaml_implicit_resolvers.get(first, []), *_Loader.yaml_implicit_resolvers.get(first, [])]
    for first in {**yaml.SafeDumper.yaml_implicit_resolvers, **_Loader.yaml_implicit_resolvers}
}


def dump_yaml(data: Any, *, flow: bool | None = None, width: int = 110) -> str:
    """Plain data as YAML that `parse_yaml` reads back equal. `flow`: all on one line; None: what is innermost is."""
    text: str = yaml.dump(data, Dumper=_Dumper, sort_keys=False, default_flow_style=flow, width=width)
    return text


def parse_yaml(text: str, origin: str) -> Any:
    """Plain data from YAML text; `origin` names the source in the UserError for text that is not such YAML."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" (line {mark.line + 1})" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        if isinstance(error, yaml.reader.ReaderError):
            line = text.count("\n", 0, error.position) + 1
            where, problem = f" (line {line})", f"the character U+{ord(text[error.position]):04X} is not allowed"
        raise UserError(f"{origin}{where} is not valid YAML: {problem}.") from None
