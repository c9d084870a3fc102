"""Write the option pages and the frozen list of options from the settings of the tools.

    python docs/make_options.py

Run it after changing an option, and read the diff: an option that disappears from the list breaks someone's script.
"""

import importlib.util
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from wan_train.cli import Tool, bounds, groups, options, shown, spellings, title

ROOT = Path(__file__).resolve().parents[1]
PAGES = ROOT / "docs" / "options"
FROZEN = ROOT / "tests" / "golden" / "options.json"


def find_tools() -> dict[str, Tool]:
    """Return the tool of each entry point, that is of every script in the root that has one."""
    tools = {}
    for path in sorted(ROOT.glob("*.py")):
        if "cli import run" not in path.read_text(encoding="utf-8"):
            continue
        spec = importlib.util.spec_from_file_location(f"entry_{path.stem}", path)
        assert spec is not None and spec.loader is not None
        script = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(script)
        tools[path.stem] = next(value for value in vars(script).values() if isinstance(value, Tool))
    return tools


def describe(tool: Tool) -> str:
    """Return a Markdown page of all options of a tool."""
    lines = [f"# {tool.program}", "", tool.description, ""]
    for group in groups(tool.settings).values():
        lines += [f"## {title(group)}", "", "| option | default | meaning |", "|---|---|---|"]
        for field, described, _ in options(group):
            names = ", ".join(f"`{flag}`" for flag in (*spellings(field, described), *described.shortcuts))
            default = "required" if described.required else shown(field.default)
            allowed = f" One of: {', '.join(described.choices)}." if described.choices else ""
            allowed += f" Range: {bounds(described)}." if bounds(described) else ""
            lines.append(f"| {names} | {default} | {described.help}{allowed} |")
        lines.append("")
    return "\n".join(lines)


def list_options(tool: Tool) -> dict[str, str]:
    """Return every spelling of every option of a tool, with the repr of its default."""
    listed: dict[str, str] = {}
    for group in groups(tool.settings).values():
        for field, described, _ in options(group):
            default = "required" if described.required else repr(field.default)
            listed |= {flag: default for flag in spellings(field, described)}
            listed |= {flag: f"--{field.name} {value}" for flag, value in described.shortcuts.items()}
    return dict(sorted(listed.items()))


def freeze() -> str:
    """Return the list of all tools' options as JSON text."""
    return json.dumps({name: list_options(tool) for name, tool in find_tools().items()}, indent=1) + "\n"


def main() -> None:
    PAGES.mkdir(parents=True, exist_ok=True)
    tools = find_tools()
    for page in PAGES.glob("*.md"):
        if page.stem not in tools:
            page.unlink()
    for name, tool in tools.items():
        (PAGES / f"{name}.md").write_text(describe(tool), encoding="utf-8")
    FROZEN.parent.mkdir(parents=True, exist_ok=True)
    FROZEN.write_text(freeze(), encoding="utf-8")
    print(f"wrote {len(tools)} pages to {PAGES} and {FROZEN}")


if __name__ == "__main__":
    main()
