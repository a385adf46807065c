"""Write docs/options.md from the fields and the docstring of sparse24.Recipe.

python docs/make_options.py [--out FILE]
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import re
from pathlib import Path

import sparse24

HEAD = """# Options

What `torch.compile(model, backend="sparse24", options={...})` takes: the fields of `sparse24.Recipe`. A wrong
value raises `sparse24.OptionError`, as an unknown name does, with the valid ones.

Made by `python docs/make_options.py` from the docstring of `Recipe`; a test compares.

"""

TAIL = """
`decay` depends on the optimizer, the batch size and the reduction of the loss. Watch the flip rate
(`session.flip_rate()`): it should rise early and then fall towards zero as the learning rate falls. If it stays high or
grows, raise `decay`. `sparse24.find_decay` searches it in short runs; `examples/find_decay.py` is a complete program.

`session.load_state_dict` refuses a state that was saved under other options, but for `when`, `inner`, `inductor`,
`strict` and `virtual_flips`, which do not belong to the method; `strict=False` there goes on under the new ones.
"""


def meanings() -> dict[str, str]:
    """{field: what the docstring says of it}."""
    found: dict[str, str] = {}
    name = ""
    for line in inspect.getdoc(sparse24.Recipe).splitlines():  # type: ignore[union-attr]
        entry = re.fullmatch(r"(\w+) {2,}(.+)", line)
        if entry:
            name = entry[1]
            found[name] = entry[2]
        elif name and line.startswith(" "):
            found[name] += " " + line.strip()
        else:
            name = ""
    return found


def page() -> str:
    said = meanings()
    lines = ["| option | default | meaning |", "|---|---|---|"]
    for field in dataclasses.fields(sparse24.Recipe):
        default = getattr(sparse24.Recipe(), field.name)
        text = said[field.name].replace("|", "\\|").replace("*", "\\*")
        lines.append(f"| `{field.name}` | `{list(default) if isinstance(default, tuple) else default!r}` | {text} |")
    return HEAD + "\n".join(lines) + "\n" + TAIL


def main() -> None:
    p = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--out", type=Path, default=Path(__file__).parent / "options.md")
    args = p.parse_args()
    args.out.write_text(page())
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
