"""The table of all values in the chart's README, made from values.schema.json and values.yaml: `python -m deploy.helm.values_table`."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

CHART = Path(__file__).parent / "ossia"
BEGIN, END = "<!-- values: begin -->\n", "<!-- values: end -->\n"
Schema = dict[str, Any]


def resolve(schema: Schema, defs: Schema) -> Schema:
    """The schema with its reference followed; its own description wins."""
    name = schema.get("$ref", "").removeprefix("#/$defs/")
    return {**defs[name], **schema} if name else schema


def rows(schema: Schema, defs: Schema, default: object, path: str = "") -> Iterator[tuple[str, str, str, str]]:
    """(key, type and range, default, meaning) of every value; `<name>` stands for a key of the user's own."""
    children = schema.get("properties", {})
    if isinstance(named := schema.get("additionalProperties"), dict):
        children = {"<name>": named} if "properties" in resolve(named, defs) else {}
    for key, child in children.items():
        child, here = resolve(child, defs), f"{path}.{key}".lstrip(".")
        value = default.get(key) if isinstance(default, dict) else None
        is_group = "properties" in child or "properties" in resolve(child.get("additionalProperties") or {}, defs)
        yield here, "" if "properties" in child else kind(child), "" if is_group else shown(value), child["description"]
        yield from rows(child, defs, value, here)


def kind(schema: Schema) -> str:
    if "enum" in schema:
        return " or ".join(f"`{json.dumps(one)}`" for one in schema["enum"])
    if schema["type"] == "object":
        return "map"
    low = f"{schema['minimum']} to" if "minimum" in schema else f"above {schema.get('exclusiveMinimum')} to"
    return f"{schema['type']}, {low} {schema['maximum']}" if "maximum" in schema else str(schema["type"])


def shown(value: object) -> str:
    return "" if value in (None, "", {}) else f"`{json.dumps(value)}`"


def make_table() -> str:
    schema = json.loads((CHART / "values.schema.json").read_text())
    defaults = yaml.safe_load((CHART / "values.yaml").read_text())
    lines = [f"| `{key}` | {kind} | {default} | {meaning} |" for key, kind, default, meaning in rows(schema, schema["$defs"], defaults)]
    return "\n".join(["| key | type | default | meaning |", "| --- | --- | --- | --- |", *lines]) + "\n"


def fill(readme: str) -> str:
    """The README with its table made anew."""
    before, _, rest = readme.partition(BEGIN)
    return f"{before}{BEGIN}{make_table()}{END}{rest.partition(END)[2]}"


def main() -> None:
    readme = CHART / "README.md"
    readme.write_text(fill(readme.read_text()))


if __name__ == "__main__":
    main()
